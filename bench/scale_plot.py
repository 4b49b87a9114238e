"""The picture of bench.scale: what grows with the number of devices, and what does not."""

from __future__ import annotations

from typing import Any

import altair as alt
import vl_convert

COLOURS = {"longest-first": "#0b6e4f", "in-order": "#b5531c"}
MB = 1e6


def draw(points: list[dict[str, Any]]) -> str:
    """SVG of four charts side by side, on white, which a page in the dark shows as well."""
    rows = [_row(point) for point in points]
    memory = [
        {"s": s, "MB": size / MB, "of": of}
        for point in points
        if point["settings"]["devices"] == max(row["devices"] for row in rows)
        and point["settings"]["scheduler"] == "longest-first"
        for s, client, agents in point["memory"]
        for of, size in (("client", client), ("all lab agents", agents))
    ]
    picture = alt.hconcat(
        _over_devices(rows, "cpu_s", "client CPU, s", "CPU grows linearly", log=True),
        _over_devices(rows, "cpu_ms", "client CPU of a job, ms", "CPU of a job (bound: 5 ms)", rule=5.0),
        _over_devices(rows, "use", "of the perfect schedule, %", "Utilisation (bound: 95 %)", rule=95.0),
        _memory(memory),
    )
    return str(vl_convert.vegalite_to_svg(picture.configure(background="white").to_dict()))


def _row(point: dict[str, Any]) -> dict[str, Any]:
    return {
        "devices": point["settings"]["devices"],
        "scheduler": point["settings"]["scheduler"],
        "cpu_s": point["client_cpu_s"],
        "cpu_ms": point["summary"]["cpu_ms_per_job"],
        "use": 100 * point["summary"]["utilisation"],
    }


def _over_devices(
    rows: list[dict[str, Any]],
    field: str,
    title: str,
    heading: str,
    rule: float | None = None,
    log: bool = False,
) -> Any:
    scale = alt.Scale(type="log") if log else alt.Scale(zero=True)
    base = alt.Chart(alt.InlineData(values=rows))
    drawn = base.mark_line(point=True).encode(
        x=alt.X("devices:Q", title="devices", scale=alt.Scale(type="log")),
        y=alt.Y(f"{field}:Q", title=title, scale=scale),
        color=alt.Color(
            "scheduler:N",
            title=None,
            scale=alt.Scale(domain=[*COLOURS], range=[*COLOURS.values()]),
            legend=alt.Legend(orient="bottom"),
        ),
        shape=alt.Shape("scheduler:N", title=None),
    )
    if rule is not None:
        bound = alt.Chart(alt.InlineData(values=[{"bound": rule}])).mark_rule(strokeDash=[4, 3], color="#888")
        drawn = drawn + bound.encode(y="bound:Q")
    return drawn.properties(width=190, height=200, title=heading)


def _memory(rows: list[dict[str, Any]]) -> Any:
    return (
        alt.Chart(alt.InlineData(values=rows))
        .mark_line()
        .encode(
            x=alt.X("s:Q", title="s since the first job"),
            y=alt.Y("MB:Q", title="resident, MB"),
            strokeDash=alt.StrokeDash("of:N", title=None, legend=alt.Legend(orient="bottom")),
        )
        .properties(width=190, height=200, title="Memory of the largest run")
    )
