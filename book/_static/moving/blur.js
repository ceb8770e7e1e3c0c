// Blur against distortion: a picture blurred here, and what the blurred picture costs as a prediction, in bits.
Moving.figure("blur", async (live, data, root) => {
  const { html, fixed } = Moving;
  const [image] = await Moving.grays(data.image);
  const { width, height } = data.image;
  const x = Float64Array.from(image, (v) => v / 255);
  const clip = data.clip; // predictions are kept this far from 0 and 1

  /** A Gaussian blur with the border repeated, cut at four deviations: scipy.ndimage.gaussian_filter. */
  function blurred(deviation) {
    if (deviation === 0) return Float64Array.from(x);
    const reach = Math.floor(4 * deviation + 0.5);
    const kernel = Array.from({ length: 2 * reach + 1 }, (_, i) => Math.exp(-0.5 * ((i - reach) / deviation) ** 2));
    const sum = kernel.reduce((a, b) => a + b);
    const pass = (from, along, across, lines, length) => {
      const to = new Float64Array(from.length);
      for (let line = 0; line < lines; line++)
        for (let i = 0; i < length; i++) {
          let total = 0;
          for (let k = -reach; k <= reach; k++) {
            const j = Math.min(length - 1, Math.max(0, i + k));
            total += kernel[k + reach] * from[line * across + j * along];
          }
          to[line * across + i * along] = total / sum;
        }
      return to;
    };
    return pass(pass(x, width, 1, width, height), 1, width, height, width);
  }
  const xlogy = (a, b) => (a === 0 ? 0 : a * Math.log2(b));
  let floor = 0; // mean binary entropy of the pixels, bits per pixel
  for (const v of x) floor -= (xlogy(v, v) + xlogy(1 - v, 1 - v)) / x.length;
  /** Bits per pixel of a prediction: the mean cross-entropy less the floor. */
  function distortion(prediction) {
    let total = 0;
    for (let i = 0; i < x.length; i++) {
      const p = Math.min(1 - clip, Math.max(clip, prediction[i]));
      total -= xlogy(x[i], p) + xlogy(1 - x[i], 1 - p);
    }
    return Math.max(0, total / x.length - floor);
  }

  Moving.title(live, "How little the loss notices", "Blur until the ribs are gone. Look at the two bars meanwhile.");
  const pair = html("div", { class: "moving-pair" });
  live.append(pair);
  const [left, right] = [html("div", { class: "moving-two" }), html("div", {})];
  pair.append(left, right);
  Moving.picture(left, { width, height, alt: "The image", name: "image x" }).paint(x);
  const shown = Moving.picture(left, { width, height, alt: "The blurred image", name: "prediction" });
  let [deviation, bits] = [data.start, 0];
  const chart = Moving.chart(right, {
    label: "Distortion in bits per pixel over the width of the blur", height: 220,
    x: { range: [0, data.widths[data.widths.length - 1]], ticks: data.ticks, name: `blur: deviation in pixels of ${width}` },
    y: { range: [0, data.top], ticks: data.levels, name: "distortion (bits per pixel)", text: (v) => fixed(v, 2) },
    draw(c) {
      c.line(data.widths.map((w, i) => [w, data.distortion[i]]), "moving-b");
      c.line([[deviation, 0], [deviation, bits]], "moving-thin");
      c.dot(deviation, bits, "moving-b", 6);
    },
  });
  const slider = Moving.slider(live, {
    label: "blur", min: 0, max: data.widths[data.widths.length - 1], step: 0.25, value: data.start,
    text: (v) => `${fixed(v, 2)} pixels`, input: draw,
  });
  const bars = html("div", { class: "moving-weights" });
  live.append(bars);
  const bar = (label) => {
    const [first, second, value] = [html("span", { class: "moving-fill-c" }), html("span", { class: "moving-fill-b" }), html("output", {})];
    bars.append(html("span", {}, label), html("div", { class: "moving-track" }, first, second), value);
    return [first, second, value];
  };
  const whole = bar("loss");
  const only = bar("distortion");
  const show = Moving.numbers(live, {
    floor: "floor (bits per pixel)", distortion: "distortion (bits per pixel)", share: "share of the loss",
  });
  function draw() {
    deviation = slider.value;
    const prediction = blurred(deviation);
    bits = distortion(prediction);
    shown.paint(prediction);
    chart.draw();
    whole[0].style.width = `${100 * floor}%`; // the tracks are one bit, and a tenth of a bit, long
    whole[1].style.width = `${100 * bits}%`;
    whole[2].textContent = fixed(floor + bits, 3);
    only[1].style.width = `${Math.min(100, 1000 * bits)}%`;
    only[2].textContent = fixed(bits, 3);
    show({ floor: fixed(floor, 3), distortion: fixed(bits, 4), share: `${fixed((100 * bits) / (floor + bits), 1)} %` });
    root.state = { deviation, floor, distortion: bits };
  }
  draw();
});
