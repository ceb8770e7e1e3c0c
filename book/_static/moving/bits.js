// Bits by noise level: the curve of a pixel model, and at each level what it sees and what it believes.
Moving.figure("bits", async (live, data, root) => {
  const { html, fixed, alpha, sigma } = Moving;
  const [image] = await Moving.grays(data.image);
  const [field] = await Moving.grays(data.noise);
  const guesses = await Moving.grays(data.guesses); // of the clean image, at the levels of `at`
  const { width, height } = data.image;
  const { gammas, bits, at } = data;
  const x = Float32Array.from(image, (v) => (2 * v) / 255 - 1);
  const eps = Float32Array.from(field, (v) => (v - 128) / data.levels);
  const spent = [0]; // bits per pixel at less noise, by trapezia
  for (let k = 1; k < gammas.length; k++)
    spent.push(spent[k - 1] + ((bits[k] + bits[k - 1]) / 2) * (gammas[k] - gammas[k - 1]));
  const all = spent[spent.length - 1];
  let level = data.start;

  Moving.title(live, "Where the bits are spent", "Come from the right, where sampling starts. When do you see a chest, and what is still to be paid then?");
  const pair = html("div", { class: "moving-pair moving-wide" });
  live.append(pair);
  const [left, right] = [html("div", {}), html("div", { class: "moving-two" })];
  pair.append(left, right);
  const chart = Moving.chart(left, {
    label: "Bits per pixel and unit of gamma over the noise level", height: 270,
    x: { range: [gammas[0], gammas[gammas.length - 1]], ticks: data.ticks, name: "noise level \u03b3" },
    y: { range: [0, 0.8], ticks: [0, 0.2, 0.4, 0.6, 0.8], name: "bits per pixel and unit of \u03b3", text: (v) => fixed(v, 1) },
    draw(c) {
      const most = 0.5 / Math.LN2;
      c.line([[gammas[0], most], [gammas[gammas.length - 1], most]], "moving-dash");
      const upto = gammas.map((g, k) => [g, bits[k]]).slice(0, level + 1);
      c.area([[gammas[0], 0], ...upto, [gammas[level], 0]], "moving-b");
      c.line(gammas.map((g, k) => [g, bits[k]]), "moving-a");
      c.line([[gammas[level], 0], [gammas[level], 0.8]], "moving-thin");
      c.dot(gammas[level], bits[level], "moving-b", 6);
    },
  });
  chart.node.classList.add("moving-surface");
  Moving.follow(chart, chart.node, (g) => {
    const k = Math.round(((g - gammas[0]) / (gammas[gammas.length - 1] - gammas[0])) * (gammas.length - 1));
    slider.set(Math.min(gammas.length - 1, Math.max(0, k)));
    draw();
  });
  const noisy = Moving.picture(right, { width, height, alt: "The noisy image, divided by alpha", name: "what it sees" });
  const guess = Moving.picture(right, { width, height, alt: "The network's guess of the clean image", name: "what it believes" });
  const slider = Moving.slider(live, {
    label: "noise \u03b3", min: 0, max: gammas.length - 1, step: 1, value: level, text: (k) => fixed(gammas[k], 2), input: draw,
  });
  const show = Moving.numbers(live, {
    gray: "noise (gray levels)", paid: "bits per pixel paid at more noise",
    bits: "still to be paid at less noise", share: "of all bits",
  });
  const buffer = new Float32Array(x.length);
  function draw() {
    level = slider.value;
    const g = gammas[level];
    // Beside the image the noise is sigma / alpha; where it is louder than the image, both are shown smaller.
    const [a, s] = [alpha(g), sigma(g)];
    for (let i = 0; i < x.length; i++) buffer[i] = (a * x[i] + s * eps[i] + 1) / 2;
    noisy.paint(buffer);
    let near = 0;
    at.forEach((k, n) => {
      if (Math.abs(k - level) < Math.abs(at[near] - level)) near = n;
    });
    guess.paint(Float32Array.from(guesses[near], (v) => v / 255));
    chart.draw();
    const gray = (s / a) * 127.5;
    show({
      gray: gray < 10 ? gray.toFixed(2) : gray.toFixed(0), paid: fixed(all - spent[level], 2),
      bits: fixed(spent[level], 2), share: `${fixed((100 * spent[level]) / all, 0)} %`,
    });
    root.state = { gamma: g, spent: spent[level], all };
  }
  draw();
});
