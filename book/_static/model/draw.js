// On the start page: the model that comes with the package draws an X-ray, in the browser.
(() => {
  "use strict";
  const STEPS = 20;
  const here = document.currentScript.src.replace(/draw\.js.*$/, "");

  const html = (tag, properties, ...children) => {
    const node = Object.assign(document.createElement(tag), properties);
    node.append(...children);
    return node;
  };

  document.addEventListener("DOMContentLoaded", () => {
    const section = document.querySelector("section#try-it-in-a-minute");
    if (!section || !location.protocol.startsWith("http")) return; // a page on disk may fetch no weights
    const canvas = (label) => {
      const node = html("canvas", { width: 64, height: 64 });
      node.setAttribute("role", "img");
      node.setAttribute("aria-label", label);
      return node;
    };
    const noisy = canvas("The noisy image"), clean = canvas("The image that the model expects");
    const button = html("button", { type: "button", className: "draw-button" }, "Draw an X-ray here");
    const said = html("p", { className: "draw-said" }, "The model that comes with the package runs in your browser: 1.6 MB, 20 steps, a few seconds.");
    said.setAttribute("aria-live", "polite");
    const pictures = html(
      "div",
      { className: "draw-pictures", hidden: true },
      html("figure", {}, noisy, html("figcaption", {}, "what the chain holds")),
      html("figure", {}, clean, html("figcaption", {}, "what the model expects")),
    );
    section.querySelector("h2").after(html("div", { className: "draw" }, button, said, pictures));
    let model = null;

    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        if (!model) {
          said.textContent = "Fetching the model";
          if (!globalThis.medvdmModel) await script(`${here}unet.js`);
          model = await medvdmModel.load(here);
        }
        pictures.hidden = false;
        const z = medvdmModel.noise(model.size ** 2);
        for (const state of medvdmModel.chain(model, z, STEPS)) {
          show(noisy, state.z);
          show(clean, state.x);
          said.textContent = state.step < STEPS ? `Step ${state.step + 1} of ${STEPS}` : "Synthetic: no X-ray of a patient. At the end both pictures agree.";
          await new Promise((next) => setTimeout(next)); // so that the page is painted, and may be scrolled
        }
        button.textContent = "Draw another";
      } catch (problem) {
        said.textContent = "The model could not be fetched.";
        console.error(problem);
      }
      button.disabled = false;
    });
  });

  function script(address) {
    return new Promise((resolve, reject) => {
      const node = html("script", { src: address, onload: resolve, onerror: reject });
      document.head.append(node);
    });
  }

  /** An image in [-1, 1]; what lies outside is black or white. */
  function show(canvas, x) {
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    x.forEach((value, i) => image.data.set([0, 1, 2].map(() => 127.5 * (value + 1)).concat(255), 4 * i));
    context.putImageData(image, 0, 0);
  }
})();
