"use strict";
// Errors are kept where a reader of the DOM finds them: a report that fails silently lies.
(() => {
  const root = document.documentElement;
  const keep = (what) => {
    root.dataset.errors = [root.dataset.errors, what].filter(Boolean).join(" | ");
  };
  addEventListener("error", (event) => keep(event.message));
  addEventListener("unhandledrejection", (event) => keep(String(event.reason)));
  addEventListener("securitypolicyviolation", (event) => keep(`blocked: ${event.violatedDirective} ${event.blockedURI}`));

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

  const openTo = (hash) => {
    const target = hash.length > 1 && document.getElementById(hash.slice(1));
    for (let at = target; at; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  };

  addEventListener("DOMContentLoaded", () => {
    for (const button of document.querySelectorAll("button.copy")) {
      button.hidden = false;
      button.addEventListener("click", () => copy(button));
    }
    openTo(location.hash);
  });
  addEventListener("hashchange", () => openTo(location.hash));
  // Paper cannot be unfolded.
  addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });
})();
