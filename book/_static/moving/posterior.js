// q(z_s | z_t, x) in one dimension: where the process was at s, for one who knows where it is at t and where it began.
Moving.figure("posterior", (live, data, root) => {
  const { html, fixed, alpha, sigma } = Moving;
  const [first, last] = data.gamma;
  const at = (t) => (1 - t) * first + t * last; // gamma(t), a straight line
  const { x } = data;
  let { s, t, z } = data;
  const GAP = 0.01;

  /** Equation (3.5): c, the weights of z_t and of x, the mean and the standard deviation. */
  function posterior(s, t, z) {
    const [gs, gt] = [at(s), at(t)];
    const c = -Math.expm1(gs - gt);
    const ofZ = (1 - c) * (alpha(gs) / alpha(gt));
    const ofX = c * alpha(gs);
    return { c, ofZ, ofX, mean: ofZ * z + ofX * x, deviation: sigma(gs) * Math.sqrt(c) };
  }

  Moving.title(live, "Where was it at time s?", "Drag the two points, or use the sliders. Bring s close to t, then close to 0.");
  const chart = Moving.chart(live, {
    label: "A path in time, pinned at the clean value and at z_t", height: 300,
    x: { range: [0, 1], ticks: [0, 0.25, 0.5, 0.75, 1], name: "time" },
    y: { range: [-2.6, 2.6], ticks: [-2, -1, 0, 1, 2], name: "value of one pixel" },
    draw(c) {
      const grid = Array.from({ length: 81 }, (_, i) => i / 80);
      const both = (points, f, sign) => points.map((u) => [u, f(u, sign)]);
      const around = (u, sign) => alpha(at(u)) * x + sign * sigma(at(u));
      c.area([...both(grid, around, 1), ...both([...grid].reverse(), around, -1)], "moving-soft");
      const past = grid.map((u) => u * t);
      const bridge = (u, sign) => {
        const p = posterior(u, t, z);
        return p.mean + sign * p.deviation;
      };
      c.area([...both(past, bridge, 1), ...both([...past].reverse(), bridge, -1)], "moving-a");
      c.line(both(past, bridge, 0), "moving-a");
      const p = posterior(s, t, z);
      // The bell at s lies on its side; its width is as large as fits to the left, or else to the right.
      const bell = Array.from({ length: 81 }, (_, i) => -3.2 + 0.08 * i);
      const wide = s > 0.2 ? -0.16 : 0.16;
      c.area(bell.map((u) => [s + wide * Math.exp(-0.5 * u * u), p.mean + u * p.deviation]), "moving-b");
      c.line([[s, -2.6], [s, 2.6]], "moving-thin");
      c.dot(0, x, "moving-ink", 5);
      c.text(0, x, "x", { dx: 9, dy: x > 0 ? -8 : 18 });
      c.text(t, z, "z at t", { dx: t > 0.85 ? -14 : 14, dy: 4, anchor: t > 0.85 ? "end" : "start" });
      c.text(s, 2.6, "s", { dx: 5, dy: 8 });
      knobT.at(t, z, `t ${t.toFixed(2)}, z ${z.toFixed(2)}`, t.toFixed(3));
      knobS.at(s, p.mean, `s ${s.toFixed(2)}, mean ${p.mean.toFixed(2)}`, s.toFixed(3));
    },
  });
  const knobT = Moving.handle(chart, {
    label: "time t and value z", look: "moving-a",
    move: (u, v) => set({ t: u, z: v }), key: (dx, dy) => set({ t: t + 0.01 * dx, z: z + 0.05 * dy }),
  });
  const knobS = Moving.handle(chart, {
    label: "time s", look: "moving-b", move: (u) => set({ s: u }), key: (dx, dy) => set({ s: s + 0.01 * (dx + dy) }),
  });
  const sliders = {};
  for (const [name, low, high] of [["t", 0.02, 1], ["s", 0, 0.99], ["z", -2.4, 2.4]]) {
    sliders[name] = Moving.slider(live, {
      label: { t: "time t", s: "time s", z: "value z at t" }[name], min: low, max: high, step: 0.01,
      value: data[name], text: (v) => fixed(v, 2), input: (v) => set({ [name]: v }),
    });
  }
  const weights = html("div", { class: "moving-weights" });
  live.append(weights);
  const bar = (label, look) => {
    const [inner, value] = [html("span", { class: look }), html("output", {})];
    weights.append(html("span", {}, label), html("div", { class: "moving-track" }, inner), value);
    return (v) => {
      inner.style.width = `${100 * v}%`;
      value.textContent = fixed(v, 3);
    };
  };
  const barZ = bar("factor of z\u209c", "moving-fill-a");
  const barX = bar("factor of x", "moving-fill-b");
  const show = Moving.numbers(live, { c: "c", mean: "mean \u03bc", deviation: "deviation \u03c3\u0303" });

  function set(change) {
    const clip = (v, low, high) => Math.min(high, Math.max(low, v));
    if ("z" in change) z = clip(change.z, -2.4, 2.4);
    if ("t" in change) {
      t = clip(change.t, 0.02, 1);
      s = Math.min(s, t - GAP); // t pushes s
    }
    if ("s" in change) s = clip(change.s, 0, t - GAP);
    sliders.t.set(t);
    sliders.s.set(s);
    sliders.z.set(z);
    draw();
  }
  function draw() {
    const p = posterior(s, t, z);
    chart.draw();
    barZ(p.ofZ);
    barX(p.ofX);
    show({ c: fixed(p.c, 4), mean: fixed(p.mean, 3), deviation: fixed(p.deviation, 3) });
    root.state = { s, t, z, x, ...p };
  }
  root.set = set;
  draw();
});
