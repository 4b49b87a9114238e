"use strict";
(() => {
  const copy = async (button) => {
    const code = button.parentElement.querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // no clipboard here: leave it selected for the keyboard
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };

  const openTo = (hash, scroll) => {
    let target = null;
    try {
      target = hash.length > 1 && document.getElementById(decodeURIComponent(hash.slice(1)));
    } catch { /* no valid escape: no such element */ }
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
    if (target && scroll) target.scrollIntoView();
  };

  const inflate = (base64) => {
    const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(plain).text();
  };

  // What a template holds is parsed and never run.
  const unpack = async () => {
    for (const script of document.querySelectorAll("script.packed")) {
      const template = document.createElement("template");
      template.innerHTML = await inflate(script.textContent);
      script.replaceWith(template.content);
    }
  };

  const SIZES = { ms: 1, s: 1e3, min: 6e4, h: 36e5, B: 1, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30 };
  // [kind, value]: numbers with their unit first, then words, then what is missing.
  const rank = (cell) => {
    const shown = (cell.querySelector(".value") ?? cell).textContent.trim();
    const text = cell.dataset.sort ?? shown.replaceAll(",", "").replaceAll("−", "-");
    if (cell.dataset.sort) return [1, text];
    const found = /^[^\w+-]*([+-]?\d+(?:\.\d+)?)\s*([A-Za-z]*)/.exec(text);
    if (found) return [0, Number(found[1]) * (SIZES[found[2]] ?? 1)];
    return /^[–\s]*$/.test(text) ? [2, ""] : [1, text];
  };
  const byRank = (a, b) => a[0] - b[0] || (a[0] ? String(a[1]).localeCompare(String(b[1])) : a[1] - b[1]);

  const sort = (table, column, heading) => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row) => [rank(row.cells[column]), row]);
    rows.sort((a, b) => (down ? -1 : 1) * byRank(a[0], b[0]));
    body.append(...rows.map((row) => row[1]));
  };

  const sortable = (table) => {
    const width = table.tHead?.rows.length === 1 && table.tHead.rows[0].cells.length;
    const rows = [...(table.tBodies[0]?.rows ?? [])];
    if (!width || rows.length < 2 || rows.some((row) => row.cells.length !== width)) return;
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      if (!heading.textContent.trim() || heading.querySelector("svg")) return;
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, column, heading));
      heading.append(button);
    });
  };

  const ready = new Promise((done) => {
    addEventListener("DOMContentLoaded", async () => {
      await unpack();
      for (const button of document.querySelectorAll("button.copy")) {
        button.hidden = false;
        button.addEventListener("click", () => copy(button));
      }
      for (const table of document.querySelectorAll("table.numbers")) sortable(table);
      openTo(location.hash, true);
      done();
    });
  });
  window.kvfarm = { inflate, ready };
  addEventListener("hashchange", () => openTo(location.hash, false));
  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
