// The plane of rate and distortion: every point is a model, and shows the picture that its decoder makes.
Moving.figure("plane", async (live, data, root) => {
  const { html, fixed } = Moving;
  const pictures = await Moving.grays(data.pictures);
  const [image] = await Moving.grays(data.image);
  const { width, height } = data.image;
  const { points, components, noises, curve } = data; // a point: {component, noise, rate, distortion}, by index
  const at = (i, j) => points[i * noises.length + j];
  let [i, j] = data.start; // which number of components, which noise
  const paint = (one, bytes) => one.paint(Float32Array.from(bytes, (v) => v / 255));

  Moving.title(live, "What a bit buys", "Move over the plane, or use the sliders. Which point has the least excess, rate and distortion together?");
  const pair = html("div", { class: "moving-pair moving-wide" });
  live.append(pair);
  const [left, right] = [html("div", {}), html("div", { class: "moving-two" })];
  pair.append(left, right);
  const span = (f) => [Math.min(...points.map(f)), Math.max(...points.map(f))];
  const [rates, distortions] = [span((p) => p[0]), span((p) => p[1])];
  const round = (v) => String(v);
  const best = Math.min(...points.map((p) => p[0] + p[1]));
  const chart = Moving.chart(left, {
    label: "Rate and distortion of models with a few components and some noise", height: 330,
    x: { range: [rates[0] / 1.25, rates[1] * 1.25], log: true, ticks: data.ticks[0].filter((v) => v > rates[0] && v < rates[1] * 1.2), text: round, name: "rate (bits per image)" },
    y: { range: [distortions[0] / 1.12, distortions[1] * 1.12], log: true, ticks: data.ticks[1].filter((v) => v > distortions[0] / 1.1 && v < distortions[1] * 1.1), text: round, name: "distortion (bits per image)" },
    draw(c) {
      for (const factor of [1, 2, 4]) {
        const total = best * factor;
        c.line(Array.from({ length: 120 }, (_, k) => 0.002 + 0.9975 * (k / 119)).map((u) => [u * total, (1 - u) * total]), "moving-total");
      }
      c.line(curve, "moving-a");
      points.forEach(([rate, distortion]) => c.dot(rate, distortion, "moving-quietdot", 3));
      c.line(noises.map((_, k) => at(i, k).slice(0, 2)), "moving-thin");
      const [rate, distortion] = at(i, j);
      c.dot(rate, distortion, "moving-b", 8);
    },
  });
  const surface = chart.node;
  surface.classList.add("moving-surface");
  const nearest = (event) => {
    const box = surface.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let [found, least] = [0, Infinity];
    points.forEach((p, k) => {
      const far = (chart.x(p[0]) - px) ** 2 + (chart.y(p[1]) - py) ** 2;
      if (far < least) [found, least] = [k, far];
    });
    set(Math.floor(found / noises.length), found % noises.length);
  };
  surface.addEventListener("pointerdown", nearest);
  surface.addEventListener("pointermove", nearest);
  paint(Moving.picture(right, { width, height, alt: "The image", name: "the image" }), image);
  const decoded = Moving.picture(right, { width, height, alt: "The decoded picture", name: "decoded" });
  const sliders = [
    Moving.slider(live, {
      label: "components k", min: 0, max: components.length - 1, step: 1, value: i, text: (v) => String(components[v]), input: (v) => set(v, j),
    }),
    Moving.slider(live, {
      label: "noise \u03c3\u2080/\u03b1\u2080", min: 0, max: noises.length - 1, step: 1, value: j, text: (v) => fixed(noises[v], 2), input: (v) => set(i, v),
    }),
  ];
  const show = Moving.numbers(live, {
    rate: "rate (bits per image)", distortion: "distortion (bits per image)", excess: "excess (bits per image)",
  });
  function set(a, b) {
    [i, j] = [a, b];
    sliders[0].set(i);
    sliders[1].set(j);
    draw();
  }
  function draw() {
    const [rate, distortion] = at(i, j);
    paint(decoded, pictures[i * noises.length + j]);
    decoded.name.textContent = `decoded, k = ${components[i]}`;
    chart.draw();
    show({ rate: fixed(rate, 0), distortion: fixed(distortion, 0), excess: fixed(rate + distortion, 0) });
    root.state = { components: components[i], noise: noises[j], rate, distortion };
  }
  draw();
});
