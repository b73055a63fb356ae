// Saves a figure as PNG: its SVG with the page's style and the colours of the theme that is shown, drawn on a canvas.
(() => {
  "use strict";
  const SCALE = 3;
  const css = document.querySelector("style").textContent;
  const names = [...new Set(css.match(/--[a-z0-9-]+(?=:)/g))];

  function save(figure, name) {
    const root = getComputedStyle(document.documentElement);
    const colours = names.map((key) => `${key}: ${root.getPropertyValue(key)};`).join("");
    const rules = css.split("\n").filter((line) => line.startsWith(".figure")).join("");
    const copy = figure.cloneNode(true);
    const { width, height } = figure.viewBox.baseVal;
    const style = document.createElementNS(copy.namespaceURI, "style");
    style.textContent = `:root {${colours}} ${rules}`;
    copy.prepend(style);
    const image = new Image();
    image.onload = () => {
      const canvas = Object.assign(document.createElement("canvas"), { width: (width + 40) * SCALE, height: (height + 40) * SCALE });
      const context = canvas.getContext("2d");
      context.fillStyle = root.getPropertyValue("--surface");
      context.fillRect(0, 0, canvas.width, canvas.height);
      context.drawImage(image, 20 * SCALE, 20 * SCALE, width * SCALE, height * SCALE);
      Object.assign(document.createElement("a"), { href: canvas.toDataURL("image/png"), download: name + ".png" }).click();
    };
    image.src = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  }

  for (const button of document.querySelectorAll(".save")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const figures = [...button.closest("section").querySelectorAll(".figure")];
      save(figures.find((figure) => figure.getBoundingClientRect().width > 0), button.dataset.name);
    });
  }
})();
