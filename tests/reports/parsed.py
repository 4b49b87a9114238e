"""A report page taken apart by the standard library's parser, as a browser would see it."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

_BREAKS = {"td", "th", "dt", "dd", "li", "p", "pre", "small", "code", "button", "span", "h3", "h4"}
_VOID = {"meta", "br", "wbr", "img", "link", "input", "hr"}


@dataclass
class Element:
    """A start tag, with all text inside it."""

    tag: str
    attributes: dict[str, str]
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def classes(self) -> set[str]:
        return set(self.attributes.get("class", "").split())

    @property
    def words(self) -> str:
        """The text with white space folded; cells, items and blocks stand apart."""
        return " ".join(self.text.split())


@dataclass
class Page(HTMLParser):
    """``elements`` in document order. Text in script and style belongs to those elements alone."""

    source: str
    elements: list[Element] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"never closed: {[e.tag for e in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.elements.append(element)
        if tag not in _VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}>"
        self._open.pop()
        if tag in _BREAKS:
            for element in self._open:
                element.parts.append(" ")

    def handle_data(self, data: str) -> None:
        raw = self._open and self._open[-1].tag in ("script", "style")
        for element in self._open[-1:] if raw else self._open:
            element.parts.append(data)

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Elements by tag and by attributes (``class_`` asks for one class among others)."""
        wanted = attributes.pop("class_", None)
        return [
            element
            for element in self.elements
            if (not tag or element.tag == tag)
            and (wanted is None or wanted in element.classes)
            and all(element.attributes.get(name) == value for name, value in attributes.items())
        ]

    def one(self, tag: str = "", **attributes: str) -> Element:
        found = self.all(tag, **attributes)
        assert len(found) == 1, f"sought one <{tag}> with {attributes}, found {len(found)}"
        return found[0]
