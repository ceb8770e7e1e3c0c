// A slider of gamma: alpha times an image plus sigma times noise is the noisy image. One image, one field of noise.
Moving.figure("noise", async (live, data, root) => {
  const { html, fixed, alpha, sigma, snr } = Moving;
  const [image] = await Moving.grays(data.image);
  const [field] = await Moving.grays(data.noise);
  const x = Float32Array.from(image, (v) => v / 127.5 - 1); // as the models see it
  const eps = Float32Array.from(field, (v) => (v - 128) / data.levels); // levels per standard deviation

  Moving.title(live, "One image, one field of noise, one number", "Move \u03b3. Where do the ribs go, and where the outline?");
  const row = html("div", { class: "moving-sum" });
  live.append(row);
  const size = { width: data.image.width, height: data.image.height };
  const signal = Moving.picture(row, { ...size, alt: "The image times alpha" });
  row.append(html("span", { class: "moving-sign", "aria-hidden": "true" }, "+"));
  const noise = Moving.picture(row, { ...size, alt: "The noise times sigma" });
  row.append(html("span", { class: "moving-sign", "aria-hidden": "true" }, "="));
  const noisy = Moving.picture(row, { ...size, alt: "Their sum, the noisy image" });

  const [low, high] = data.gamma;
  const gamma = Moving.slider(live, {
    label: "noise \u03b3", min: low, max: high, step: 0.05, value: data.start,
    text: (g) => fixed(g, 2), says: (g) => `gamma ${g.toFixed(2)}`, input: draw,
  });
  const bar = html("div", { class: "moving-bar", role: "img" });
  const [kept, drowned] = [html("span", { class: "moving-fill-a" }), html("span", { class: "moving-fill-b" })];
  bar.append(kept, drowned);
  live.append(bar);
  const show = Moving.numbers(live, {
    snr: "SNR = \u03b1\u00b2 / \u03c3\u00b2", alpha: "\u03b1, of the image", sigma: "\u03c3, of the noise",
  });

  const buffer = new Float32Array(x.length);
  function draw() {
    const g = gamma.value;
    const [a, s, r] = [alpha(g), sigma(g), snr(g)];
    const paint = (one, f) => {
      for (let i = 0; i < x.length; i++) buffer[i] = (f(i) + 1) / 2;
      one.paint(buffer);
    };
    paint(signal, (i) => a * x[i]);
    paint(noise, (i) => s * eps[i]);
    paint(noisy, (i) => a * x[i] + s * eps[i]);
    signal.name.textContent = `${fixed(a, 3)} \u00d7 image`;
    noise.name.textContent = `${fixed(s, 3)} \u00d7 noise`;
    noisy.name.textContent = "noisy image z";
    const percent = Math.round(100 * a * a);
    kept.style.width = `${100 * a * a}%`;
    kept.textContent = percent > 16 ? `signal \u03b1\u00b2 ${percent} %` : "";
    drowned.textContent = percent < 84 ? `noise \u03c3\u00b2 ${100 - percent} %` : "";
    bar.setAttribute("aria-label", `signal ${percent} percent of the variance, noise ${100 - percent} percent`);
    show({ snr: r >= 100 ? r.toFixed(0) : r.toPrecision(3), alpha: fixed(a, 4), sigma: fixed(s, 4) });
    root.state = { gamma: g, alpha: a, sigma: s, snr: r };
  }
  draw();
});
