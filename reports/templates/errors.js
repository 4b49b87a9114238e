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
})();
