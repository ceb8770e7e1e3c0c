// Figures that a reader can move. The output of a cell holds such a figure as a picture, which is what a notebook and
// print show, and its data as JSON. This file finds them on a page, fetches the code of each kind, moving/KIND.js, and
// holds what the kinds share: sliders, numbers, charts, pictures. Nothing comes from another host.
(() => {
  "use strict";

  const here = document.currentScript.src;
  const waiting = {}; // kind -> the figures that its code will build

  function start() {
    for (const root of document.querySelectorAll("div.moving[data-moving]")) {
      const kind = root.dataset.moving;
      if (!/^[a-z]+$/.test(kind)) continue;
      if (!waiting[kind]) {
        waiting[kind] = [];
        const script = document.createElement("script");
        script.src = here.replace(/moving\.js/, `moving/${kind}.js`);
        document.head.append(script);
      }
      waiting[kind].push(root);
    }
  }

  /** Called by moving/KIND.js: `build(live, data, root)` fills the element `live`, and may be asynchronous. */
  async function figure(kind, build) {
    for (const root of waiting[kind] || []) {
      const data = JSON.parse(root.querySelector("script").textContent);
      const live = html("div", { class: "moving-live" });
      root.append(live);
      try {
        await build(live, data, root);
        root.classList.add("moving-on"); // hides the still picture
        root.dispatchEvent(new Event("moving-on"));
      } catch (problem) {
        live.remove(); // the still picture stays
        console.error(problem);
      }
    }
  }

  // --- Elements ---------------------------------------------------------------------------------------------------

  function fill(node, properties, children) {
    for (const [key, value] of Object.entries(properties || {})) {
      if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  }
  const html = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const svg = (tag, properties, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);

  /** A title line, and below it what to try. */
  function title(parent, text, hint) {
    parent.append(html("p", { class: "moving-title" }, text));
    if (hint) parent.append(html("p", { class: "moving-hint" }, hint));
  }

  let count = 0; // of ids that this file gives
  /** A labelled <input type=range>, whose value stands to its right as `text` says it. */
  function slider(parent, { label, min, max, step, value, text = String, input, says }) {
    const id = `moving-${(count += 1)}`;
    const range = html("input", { type: "range", id, min, max, step, value });
    const shown = html("output", { for: id });
    parent.append(html("div", { class: "moving-slider" }, html("label", { for: id }, label), range, shown));
    const say = () => {
      shown.textContent = text(Number(range.value));
      range.setAttribute("aria-valuetext", (says || text)(Number(range.value)));
    };
    range.addEventListener("input", () => {
      say();
      input(Number(range.value));
    });
    say();
    return {
      range,
      get value() {
        return Number(range.value);
      },
      set(value) {
        range.value = value;
        say();
      },
    };
  }

  /** Labelled values side by side; returns what changes them: `show({name: text})`. */
  function numbers(parent, labels) {
    const list = html("dl", { class: "moving-numbers" });
    const values = {};
    for (const [name, label] of Object.entries(labels)) {
      values[name] = html("dd", {});
      list.append(html("div", { class: `moving-number-${name}` }, html("dt", {}, label), values[name]));
    }
    parent.append(list);
    return (texts) => {
      for (const [name, text] of Object.entries(texts)) values[name].textContent = text;
    };
  }

  function buttons(parent, names, press) {
    const row = html("div", { class: "moving-buttons" });
    for (const name of names) row.append(html("button", { type: "button", onclick: () => press(name) }, name));
    parent.append(row);
    return row;
  }

  /** A number with a true minus sign and a fixed number of digits. */
  const fixed = (value, digits) => {
    const text = value.toFixed(digits);
    return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
  };

  // --- Pictures ---------------------------------------------------------------------------------------------------

  /** The gray images of a sheet made by `medvdm.notebook.interactive`: arrays of height * width bytes. */
  async function grays(sheet) {
    const image = new Image();
    image.src = sheet.png;
    await image.decode();
    const canvas = html("canvas", { width: sheet.width, height: sheet.height * sheet.count });
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(image, 0, 0);
    const size = sheet.width * sheet.height;
    const colours = context.getImageData(0, 0, canvas.width, canvas.height).data;
    return Array.from({ length: sheet.count }, (_, number) => {
      const bytes = new Uint8Array(size);
      for (let i = 0; i < size; i++) bytes[i] = colours[4 * (number * size + i)];
      return bytes;
    });
  }

  /** A canvas with a name below; returns {paint(values), name}, with values in [0, 1] or beyond, which is clipped. */
  function picture(parent, { width, height, alt, name = "" }) {
    const canvas = html("canvas", { width, height, role: "img", "aria-label": alt });
    const below = html("span", { class: "moving-name" }, name);
    parent.append(html("div", { class: "moving-picture" }, canvas, below));
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(width, height);
    pixels.data.fill(255);
    return {
      canvas,
      name: below,
      paint(values) {
        for (let i = 0; i < values.length; i++) {
          const gray = 255 * values[i]; // a clamped array rounds and clips
          pixels.data[4 * i] = pixels.data[4 * i + 1] = pixels.data[4 * i + 2] = gray;
        }
        context.putImageData(pixels, 0, 0);
      },
    };
  }

  // --- Charts -----------------------------------------------------------------------------------------------------

  const SIDES = { left: 44, right: 12, top: 26, bottom: 40 };

  /**
   * A chart as wide as its parent, drawn anew at each new width, so that its text keeps its size.
   * spec: label (spoken), height, x and y ({range, ticks, name, log, text}), draw(chart).
   */
  function chart(parent, spec) {
    const node = svg("svg", { class: "moving-chart", role: "group", "aria-label": spec.label });
    const [frame, clip, inside, front] = [svg("g"), svg("clipPath", { id: `moving-${(count += 1)}` }), svg("g"), svg("g")];
    const hole = svg("rect");
    clip.append(hole);
    inside.setAttribute("clip-path", `url(#${clip.id})`);
    node.append(svg("defs", {}, clip), frame, inside, front);
    parent.append(node);
    let width = 300;
    const sides = { ...SIDES, ...spec.sides };
    const scale = (axis, low, high) => {
      const f = axis.log ? Math.log : (v) => v;
      const [a, b] = axis.range.map(f);
      const to = (v) => low + ((f(v) - a) / (b - a)) * (high - low);
      to.back = (pixel) => {
        const v = a + ((pixel - low) / (high - low)) * (b - a);
        return axis.log ? Math.exp(v) : v;
      };
      return to;
    };
    const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${c.x(x).toFixed(2)} ${c.y(y).toFixed(2)}`).join("");
    const put = (tag, properties, to = inside) => {
      const one = svg(tag, properties);
      to.append(one);
      return one;
    };
    const c = {
      node,
      front, // handles, which stay when the chart is drawn anew
      line: (points, look) => put("path", { d: path(points), class: `moving-line ${look}` }),
      area: (points, look) => put("path", { d: `${path(points)}Z`, class: `moving-area ${look}` }),
      dot: (x, y, look, r = 4) => put("circle", { cx: c.x(x), cy: c.y(y), r, class: `moving-dot ${look}` }),
      text(x, y, words, { look = "", dx = 0, dy = 0, anchor = "start" } = {}) {
        put("text", { x: c.x(x) + dx, y: c.y(y) + dy, "text-anchor": anchor, class: look }, front.parentNode).append(words);
      },
      draw() {
        const height = width < 340 ? Math.round(0.76 * spec.height) : spec.height; // two charts fit a telephone
        node.setAttribute("viewBox", `0 0 ${width} ${height}`);
        node.style.height = `${height}px`;
        c.x = scale(spec.x, sides.left, width - sides.right);
        c.y = scale(spec.y, height - sides.bottom, sides.top);
        for (const text of node.querySelectorAll(":scope > text")) text.remove();
        inside.replaceChildren();
        frame.replaceChildren();
        const [right, bottom] = [width - sides.right, height - sides.bottom];
        fill(hole, { x: sides.left - 6, y: sides.top - 6, width: right - sides.left + 12, height: bottom - sides.top + 12 }, []);
        const say = (axis, tick) => (axis.text ? axis.text(tick) : String(tick).replace("-", "\u2212"));
        const ticks = (axis) => (typeof axis.ticks === "function" ? axis.ticks(width) : axis.ticks);
        for (const tick of ticks(spec.y)) {
          const y = c.y(tick);
          put("line", { x1: sides.left, x2: right, y1: y, y2: y, class: "moving-grid" }, frame);
          put("text", { x: sides.left - 7, y: y + 4, "text-anchor": "end" }, frame).append(say(spec.y, tick));
        }
        for (const tick of ticks(spec.x)) {
          put("line", { x1: c.x(tick), x2: c.x(tick), y1: bottom, y2: bottom + 4, class: "moving-axis" }, frame);
          put("text", { x: c.x(tick), y: bottom + 17, "text-anchor": "middle" }, frame).append(say(spec.x, tick));
        }
        put("line", { x1: sides.left, x2: right, y1: bottom, y2: bottom, class: "moving-axis" }, frame);
        put("text", { x: right, y: height - 5, "text-anchor": "end", class: "moving-quiet" }, frame).append(spec.x.name);
        put("text", { x: 2, y: 13, class: "moving-quiet" }, frame).append(spec.y.name);
        spec.draw(c);
      },
    };
    const watch = new ResizeObserver(() => {
      const now = Math.max(220, Math.round(node.getBoundingClientRect().width));
      if (now !== width) {
        width = now;
        c.draw();
      }
    });
    watch.observe(node);
    width = Math.max(220, Math.round(parent.getBoundingClientRect().width) || 300);
    return c;
  }

  /** A point of a chart that a pointer drags and arrow keys move: `move(x, y)` in the chart's units, `key(dx, dy)`. */
  function handle(c, { label, look, move, key }) {
    const near = svg("circle", { r: 15, class: "moving-reach" }); // a finger is wide
    const dot = svg("circle", { r: 7, class: `moving-knob ${look}` });
    const node = svg("g", { class: "moving-handle", tabindex: 0, role: "slider", "aria-label": label }, near, dot);
    c.front.append(node);
    follow(c, node, move);
    node.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!by) return;
      event.preventDefault();
      key(...by);
    });
    return {
      node,
      at(x, y, says, now) {
        node.setAttribute("transform", `translate(${c.x(x).toFixed(2)} ${c.y(y).toFixed(2)})`);
        node.setAttribute("aria-valuetext", says);
        node.setAttribute("aria-valuenow", now);
      },
    };
  }

  /** While a pointer is down on a node of a chart: `move(x, y)` in the chart's units. */
  function follow(c, node, move) {
    const where = (event) => {
      const box = c.node.getBoundingClientRect();
      move(c.x.back(event.clientX - box.left), c.y.back(event.clientY - box.top), event);
    };
    let down = false;
    node.addEventListener("pointerdown", (event) => {
      down = true;
      node.setPointerCapture(event.pointerId);
      where(event);
    });
    node.addEventListener("pointermove", (event) => down && where(event));
    for (const end of ["pointerup", "pointercancel"]) node.addEventListener(end, () => (down = false));
  }

  // --- Mathematics ------------------------------------------------------------------------------------------------

  const sigmoid = (v) => 1 / (1 + Math.exp(-v));
  const alpha = (gamma) => Math.sqrt(sigmoid(-gamma));
  const sigma = (gamma) => Math.sqrt(sigmoid(gamma));
  const snr = (gamma) => Math.exp(-gamma);

  window.Moving = {
    figure, html, svg, title, slider, numbers, buttons, fixed, grays, picture, chart, handle, follow,
    sigmoid, alpha, sigma, snr,
  };
  start();
})();
