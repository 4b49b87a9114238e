"use strict";
// Renews the page's sections every few seconds. What the server sends is HTML that it has escaped itself.
(() => {
  const root = document.documentElement;
  const shown = new Map();
  let paused = false;
  let renewals = 0;

  // Focus, opened details and scrolled tables stay as they are.
  const renew = (id, html) => {
    const section = document.getElementById(id);
    if (!section || shown.get(id) === html) return;
    const focused = section.contains(document.activeElement) ? document.activeElement : null;
    const scrolled = [...section.querySelectorAll(".scroll")].map((each) => each.scrollLeft);
    const index = focused?.classList.contains("scroll") ? [...section.querySelectorAll(".scroll")].indexOf(focused) : -1;
    const template = document.createElement("template");
    template.innerHTML = html;
    section.replaceChildren(template.content);
    shown.set(id, html);
    const regions = [...section.querySelectorAll(".scroll")];
    regions.forEach((each, number) => { each.scrollLeft = scrolled[number] ?? 0; });
    const again = index >= 0 ? regions[index] : focused?.id ? document.getElementById(focused.id) : null;
    again?.focus({ preventScroll: true });
  };

  const say = (pulse, word, live) => {
    if (pulse.textContent !== word) pulse.textContent = word;
    pulse.className = `pulse ${live === null ? "" : live ? "on" : "off"}`;
  };

  const reading = () => {
    const selection = getSelection();
    return selection && !selection.isCollapsed; // somebody is about to copy something
  };

  const look = async (pulse, every) => {
    let wait = every;
    if (!paused && !document.hidden && !reading()) {
      try {
        const answer = await fetch("api/sections", { cache: "no-store", signal: AbortSignal.timeout(10000) });
        if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
        for (const [id, html] of Object.entries(await answer.json())) renew(id, html);
        renewals += 1;
        root.dataset.renewals = String(renewals);
        say(pulse, "live", true);
      } catch (error) {
        say(pulse, `kvfarm dash does not answer (${error.message}); what follows is old`, false);
        wait = 5 * every;
      }
    }
    setTimeout(look, wait, pulse, every);
  };

  addEventListener("DOMContentLoaded", () => {
    const pulse = document.getElementById("pulse");
    const button = document.getElementById("pause");
    button.hidden = false;
    button.addEventListener("click", () => {
      paused = !paused;
      button.setAttribute("aria-pressed", String(paused));
      button.textContent = paused ? "Go on" : "Pause";
      say(pulse, paused ? "paused" : "live", paused ? null : true);
    });
    look(pulse, Number(document.body.dataset.poll));
  });
})();
