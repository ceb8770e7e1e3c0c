// On the start page: the model that comes with the package draws an X-ray, in the browser.
(() => {
  "use strict";
  const STEPS = 20;
  const here = document.currentScript.src.replace(/draw\.js.*$/, "");

  document.addEventListener("DOMContentLoaded", () => {
    const section = document.querySelector("section#try-it-in-a-minute");
    if (!section || !location.protocol.startsWith("http")) return; // a page on disk may fetch no weights
    const { html, picture } = Moving;
    const button = html("button", { type: "button", class: "draw-button" }, "Draw an X-ray here");
    const said = html("p", { class: "draw-said", "aria-live": "polite" });
    said.textContent = `The model that comes with the package runs in your browser: 1.6 MB, ${STEPS} steps, a few seconds.`;
    const pictures = html("div", { class: "draw-pictures", hidden: "" });
    const square = { width: 64, height: 64 };
    const noisy = picture(pictures, { ...square, alt: "The noisy image", name: "what the chain holds" });
    const clean = picture(pictures, { ...square, alt: "The image that the model expects", name: "what the model expects" });
    section.querySelector("h2").after(html("div", { class: "draw" }, button, said, pictures));
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
          noisy.paint(state.z.map(shade));
          clean.paint(state.x.map(shade));
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

  const shade = (value) => (value + 1) / 2; // from [-1, 1]

  function script(address) {
    return new Promise((resolve, reject) => {
      document.head.append(Moving.html("script", { src: address, onload: resolve, onerror: reject }));
    });
  }
})();
