"use strict";
// Draws each figure.plot from the spec inside it, once its <details> is open: a farm has hundreds.
(() => {
  const options = {
    config: JSON.parse(document.getElementById("chart-config").textContent),
    mode: "vega-lite",
    renderer: "svg",
    ast: true, // interpret expressions: the page's policy forbids eval
    actions: false,
    defaultStyle: false,
    tooltip: { disableDefaultStyle: true },
  };

  const draw = async (figure) => {
    figure.dataset.state = "drawing";
    try {
      const spec = JSON.parse(figure.querySelector("script").textContent);
      await window.vegaEmbed(figure.querySelector(".canvas"), spec, options);
      figure.dataset.state = "drawn";
    } catch (error) {
      figure.dataset.state = "failed";
      figure.querySelector(".canvas").textContent = `This chart could not be drawn (${error}). The table above has its numbers.`;
      throw error;
    }
  };

  const drawVisible = () => {
    for (const figure of document.querySelectorAll('figure.plot[data-state="waiting"]')) {
      if (!figure.closest("details:not([open])")) draw(figure);
    }
  };

  const begin = async () => {
    await window.kvfarm.ready;
    const script = document.createElement("script");
    script.textContent = await window.kvfarm.inflate(document.getElementById("chart-library").textContent);
    document.head.append(script); // the page's policy knows it by its hash
    drawVisible();
    for (const details of document.querySelectorAll("details")) details.addEventListener("toggle", drawVisible);
  };
  begin();
})();
