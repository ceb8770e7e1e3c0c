// A schedule that the reader drags. The area under the integrand is the loss in continuous time, and stays; the spread
// of its estimate from one random time does not. Errors M and Q of the denoiser are tables over gamma, from the cell.
Moving.figure("schedule", (live, data, root) => {
  const { html, fixed } = Moving;
  const { gammas, m, q, shapes, draws } = data; // m: E|e|^2, q: E|e|^4; draws: [time, |e|^2 / m] of single estimates
  const [low, high] = [gammas[0], gammas[gammas.length - 1]];
  const GAP = 0.02; // the least rise between two knots
  const STEPS = 4000; // of the integrals over time

  /** A monotone cubic through the points (Fritsch and Carlson), as a function that gives [value, slope]. */
  function curve(xs, ys) {
    const n = xs.length;
    const h = Array.from({ length: n - 1 }, (_, i) => xs[i + 1] - xs[i]);
    const rise = h.map((width, i) => (ys[i + 1] - ys[i]) / width);
    const end = (a, b, u, v) => {
      const slope = ((2 * a + b) * u - a * v) / (a + b);
      if (slope * u <= 0) return 0;
      return u * v <= 0 && Math.abs(slope) > 3 * Math.abs(u) ? 3 * u : slope;
    };
    const slopes = [end(h[0], h[1], rise[0], rise[1])];
    for (let i = 1; i < n - 1; i++) {
      const [a, b] = [2 * h[i] + h[i - 1], h[i] + 2 * h[i - 1]];
      slopes.push(rise[i - 1] * rise[i] <= 0 ? 0 : (a + b) / (a / rise[i - 1] + b / rise[i]));
    }
    slopes.push(end(h[n - 2], h[n - 3], rise[n - 2], rise[n - 3]));
    let i = 0; // the interval of the last call
    return (x) => {
      while (i > 0 && x < xs[i]) i -= 1;
      while (i < n - 2 && x > xs[i + 1]) i += 1;
      const u = (x - xs[i]) / h[i];
      const [y0, y1, d0, d1] = [ys[i], ys[i + 1], slopes[i] * h[i], slopes[i + 1] * h[i]];
      const [a, b] = [3 * (y1 - y0) - 2 * d0 - d1, d0 + d1 - 2 * (y1 - y0)];
      return [y0 + u * (d0 + u * (a + u * b)), (d0 + u * (2 * a + 3 * u * b)) / h[i]];
    };
  }
  const errorM = curve(gammas, m);
  const errorQ = curve(gammas, q);

  const times = data.times; // of the knots, with both ends
  let knots = [...shapes[data.start]];

  /** The integrand over time, its area, and the deviation of an estimate from one time: (5.4) and (5.8). */
  function measure() {
    const gamma = curve(times, knots);
    const points = [];
    let [area, second] = [0, 0];
    for (let i = 0; i < STEPS; i++) {
      const t = (i + 0.5) / STEPS;
      const [g, slope] = gamma(t);
      const at = 0.5 * slope * errorM(g)[0];
      area += at / STEPS;
      second += (0.25 * slope * slope * errorQ(g)[0]) / STEPS;
      if (i % 20 === 0) points.push([t, at]);
    }
    points.push([1, 0.5 * gamma(1)[1] * errorM(high)[0]]);
    return { gamma, points, area, deviation: Math.sqrt(Math.max(0, second - area * area)) };
  }

  Moving.title(live, "Bend the schedule", "Drag the points. The blue area cannot change. Can you bring the spread down to its least value?");
  const pair = html("div", { class: "moving-pair" });
  live.append(pair);
  const [left, right] = [html("div", {}), html("div", {})];
  pair.append(left, right);
  let now = measure();
  const shape = Moving.chart(left, {
    label: "The schedule gamma of t, with points to drag", height: 290,
    x: { range: [0, 1], ticks: [0, 0.25, 0.5, 0.75, 1], name: "time t" },
    y: { range: [low - 0.6, high + 0.6], ticks: data.ticks, name: "schedule \u03b3(t)" },
    draw(c) {
      const gamma = curve(times, knots);
      c.line(Array.from({ length: 161 }, (_, i) => [i / 160, gamma(i / 160)[0]]), "moving-a");
      c.dot(0, low, "moving-ink");
      c.dot(1, high, "moving-ink");
      handles.forEach((one, i) => one.at(times[i + 1], knots[i + 1], `gamma ${knots[i + 1].toFixed(1)}`, knots[i + 1].toFixed(2)));
    },
  });
  const cloud = Moving.chart(right, {
    label: "Single estimates of the loss over time, and their mean", height: 290,
    x: { range: [0, 1], ticks: [0, 0.25, 0.5, 0.75, 1], name: "time t" },
    y: { range: [0, data.top], ticks: data.losses, name: "one estimate \u2113, and its mean (nats)" },
    draw(c) {
      c.area([[0, 0], ...now.points, [1, 0]], "moving-a");
      for (const [t, factor] of draws) {
        const [g, slope] = now.gamma(t);
        c.dot(t, Math.min(0.5 * slope * errorM(g)[0] * factor, data.top * 1.01), "moving-speck", 1.7);
      }
      c.line(now.points, "moving-a");
      c.line([[0, now.area], [1, now.area]], "moving-dash");
    },
  });
  const handles = times.slice(1, -1).map((t, i) =>
    Moving.handle(shape, {
      label: `gamma at time ${t}`, look: "moving-a",
      move: (_, y) => set(i + 1, y), key: (dx, dy) => set(i + 1, knots[i + 1] + 0.2 * (dx + dy)),
    }),
  );
  const track = html("div", { class: "moving-gauge" });
  const [inner, least] = [html("span", { class: "moving-fill-b" }), html("i", {})];
  track.append(inner, least);
  live.append(html("div", { class: "moving-weights" }, html("span", {}, "spread"), track, html("output", {})));
  const said = live.querySelector(".moving-weights output");
  const full = 1.15 * data.widest;
  least.style.left = `${(100 * data.least) / full}%`;
  least.title = "the least that any schedule can have";
  const show = Moving.numbers(live, {
    area: "area: the loss (nats)", deviation: "spread of one estimate (nats)", least: "least spread (nats)",
    batch: "images per batch, for the precision of the best",
  });
  Moving.buttons(live, Object.keys(shapes), (name) => {
    knots = [...shapes[name]];
    draw();
  });

  /** Put knot i at a value; its neighbours give way, and the curve stays increasing. */
  function set(i, value) {
    const last = knots.length - 1;
    knots[i] = Math.min(high - GAP * (last - i), Math.max(low + GAP * i, value));
    for (let j = i + 1; j < last; j++) knots[j] = Math.max(knots[j], knots[j - 1] + GAP);
    for (let j = i - 1; j > 0; j--) knots[j] = Math.min(knots[j], knots[j + 1] - GAP);
    draw();
  }
  function draw() {
    now = measure();
    shape.draw();
    cloud.draw();
    inner.style.width = `${Math.min(100, (100 * now.deviation) / full)}%`;
    said.textContent = fixed(now.deviation, 1);
    show({
      area: fixed(now.area, 2), deviation: fixed(now.deviation, 1), least: fixed(data.least, 1),
      batch: `\u00d7 ${fixed((now.deviation / data.least) ** 2, 1)}`,
    });
    root.state = { knots: [...knots], area: now.area, deviation: now.deviation };
  }
  root.set = set;
  draw();
});
