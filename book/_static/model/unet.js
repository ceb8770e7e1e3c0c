// The model that comes with the package, in plain JavaScript: the U-Net of medvdm.models.unet and DPM-Solver++(2M) of
// medvdm.theory.solvers, one image at a time. Arrays are flat, in the order row, column, channel. A browser test holds
// the answers of this file against those of JAX.
(() => {
  "use strict";

  const LEVELS = 256, SPACING = 2 / (LEVELS - 1), PIXEL_VARIANCE = 0.25, CONTRAST = 0.03;
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));

  /** Fetch the model's description and its weights, float16 in one file. */
  async function load(folder) {
    const about = await (await fetch(`${folder}/phantom.json`)).json();
    const half = new Uint16Array(await (await fetch(`${folder}/phantom.bin`)).arrayBuffer());
    const weights = {};
    for (const [name, { start, shape }] of Object.entries(about.weights)) {
      const size = shape.reduce((a, b) => a * b, 1);
      const numbers = Float32Array.from(half.subarray(start, start + size), single);
      weights[name] = shape.length === 4 ? turned(numbers, shape) : numbers;
    }
    return { ...about, weights };
  }

  /** A kernel (k, k, from, to) as (to, k, k, from). */
  function turned(kernel, [high, wide, from, to]) {
    const seen = high * wide * from;
    return kernel.map((_, i) => kernel[(i % seen) * to + Math.floor(i / seen)]);
  }

  /** The number that 16 bits stand for. */
  function single(bits) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 0) return sign * fraction * 2 ** -24;
    return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
  }

  // --- Layers: (side, side, channels) to (side, side, channels) -----------------------------------------------------

  /**
   * A convolution with kernel (to, k, k, from), zeros around; `stride` is 1 or k. What a place sees is laid out in a row,
   * so that each answer is one sum of products, in four parts for the sake of speed.
   */
  function conv(x, side, kernel, bias, k, stride) {
    const to = bias.length, seen = kernel.length / to, from = seen / (k * k);
    const out = side / stride, pad = stride === 1 ? (k - 1) / 2 : 0;
    const y = new Float32Array(out * out * to), row = new Float32Array(seen);
    for (let place = 0; place < out * out; place++) {
      const top = Math.floor(place / out) * stride - pad, left = (place % out) * stride - pad;
      for (let i = 0, at = 0; i < k; i++)
        for (let j = 0; j < k; j++, at += from) {
          const r = top + i, c = left + j;
          if (r < 0 || r >= side || c < 0 || c >= side) row.fill(0, at, at + from);
          else for (let f = 0, source = (r * side + c) * from; f < from; f++) row[at + f] = x[source + f];
        }
      for (let o = 0, weight = 0; o < to; o++, weight += seen) {
        let a = bias[o], b = 0, c = 0, d = 0;
        for (let f = 0; f < seen; f += 4) {
          a += row[f] * kernel[weight + f];
          b += row[f + 1] * kernel[weight + f + 1];
          c += row[f + 2] * kernel[weight + f + 2];
          d += row[f + 3] * kernel[weight + f + 3];
        }
        y[place * to + o] = a + b + c + d;
      }
    }
    return y;
  }

  /** The same for one place at a time: a dense layer over the channels. */
  function linear(x, kernel, bias, to) {
    const from = kernel.length / to, places = x.length / from, y = new Float32Array(places * to);
    for (let place = 0; place < places; place++) {
      if (bias) y.set(bias, place * to);
      for (let f = 0, weight = 0; f < from; f++) {
        const value = x[place * from + f];
        for (let o = 0; o < to; o++) y[place * to + o] += value * kernel[weight++];
      }
    }
    return y;
  }

  const swish = (x) => x.map((value) => value * sigmoid(value));

  /** Each place's channels divided by their root mean square. */
  function normed(x, width) {
    const y = new Float32Array(x.length);
    for (let at = 0; at < x.length; at += width) {
      let sum = 0;
      for (let o = 0; o < width; o++) sum += x[at + o] ** 2;
      const scale = 1 / Math.sqrt(sum / width + 1e-6);
      for (let o = 0; o < width; o++) y[at + o] = x[at + o] * scale;
    }
    return y;
  }

  /** (side, side, p p c) to (side p, side p, c): each place's channels become a square of p by p places. */
  function spread(x, side, p) {
    const channels = x.length / (side * side * p * p), y = new Float32Array(x.length);
    for (let row = 0, from = 0; row < side; row++)
      for (let column = 0; column < side; column++)
        for (let i = 0; i < p; i++)
          for (let j = 0; j < p; j++)
            for (let o = 0; o < channels; o++) y[((row * p + i) * side * p + column * p + j) * channels + o] = x[from++];
    return y;
  }

  /** The inverse of `spread`; `side` is that of x. */
  function gather(x, side, p) {
    const channels = x.length / (side * side), y = new Float32Array(x.length);
    let to = 0;
    for (let row = 0; row < side; row += p)
      for (let column = 0; column < side; column += p)
        for (let i = 0; i < p; i++)
          for (let j = 0; j < p; j++)
            for (let o = 0; o < channels; o++) y[to++] = x[((row + i) * side + column + j) * channels + o];
    return y;
  }

  /** Channels of a and of b side by side. */
  function joined(...parts) {
    const places = parts[0].data.length / parts[0].width, width = parts.reduce((sum, part) => sum + part.width, 0);
    const y = new Float32Array(places * width);
    let first = 0;
    for (const { data, width: own } of parts) {
      for (let place = 0; place < places; place++)
        for (let o = 0; o < own; o++) y[place * width + first + o] = data[place * own + o];
      first += own;
    }
    return y;
  }

  /** The mean of 3 by 3 pixels, the border repeated. */
  function blur(x, side) {
    const y = new Float32Array(x.length), inside = (i) => Math.min(Math.max(i, 0), side - 1);
    for (let row = 0; row < side; row++)
      for (let column = 0; column < side; column++) {
        let sum = 0;
        for (let i = -1; i <= 1; i++) for (let j = -1; j <= 1; j++) sum += x[inside(row + i) * side + inside(column + j)];
        y[row * side + column] = sum / 9;
      }
    return y;
  }

  // --- The network ----------------------------------------------------------------------------------------------------

  /** What the network says of each pixel: two numbers, as UNet.answers. */
  function answers(model, z, gamma) {
    const { weights: w, size, width, scales, blocks, patch, embedding } = model;
    const dense = (name, x) => linear(x, w[`${name}/kernel`], w[`${name}/bias`], w[`${name}/bias`].length);
    const convolved = (name, x, side, k, stride) => conv(x, side, w[`${name}/kernel`], w[`${name}/bias`], k, stride);

    // Time and label to the modulation of each block.
    const time = (gamma - model.gamma_min) / (model.gamma_max - model.gamma_min), half = embedding / 2;
    const condition = new Float32Array(2 * embedding);
    for (let i = 0; i < half; i++) {
      const angle = 1000 * time * Math.exp((-Math.log(10000) * i) / (half - 1));
      condition[i] = Math.sin(angle);
      condition[half + i] = Math.cos(angle);
    }
    condition.set(w["labels/null"], embedding);
    const mixed = swish(dense("score/mix2", swish(dense("score/mix1", condition))));
    let film = 0;

    function block(name, x, side, from, to) {
      const inner = normed(convolved(`${name}/first`, swish(normed(x, from)), side, 3, 1), to);
      const modulation = dense(`score/films/${film++}/linear`, mixed);
      for (let at = 0; at < inner.length; at += to)
        for (let o = 0; o < to; o++) inner[at + o] = (1 + modulation[o]) * inner[at + o] + modulation[to + o];
      const y = convolved(`${name}/second`, swish(inner), side, 3, 1);
      const skip = from === to ? x : linear(x, w[`${name}/skip/kernel`], null, to);
      return y.map((value, i) => value + skip[i]);
    }

    // The image beside its finest differences, in cells.
    const scale = 1 / Math.sqrt(sigmoid(gamma) + CONTRAST ** 2), once = blur(z, size), twice = blur(once, size);
    const given = [z, z.map((value, i) => (value - once[i]) * scale), once.map((value, i) => (value - twice[i]) * scale)];
    const pixels = joined(...given.map((data) => ({ data, width: 1 })));
    let side = size / patch, h = convolved("score/enter", gather(pixels, size, patch), side, 3, 1);

    const kept = [];
    for (let level = 0; level < scales; level++) {
      const own = width * 2 ** level;
      for (let i = 0; i < blocks; i++) h = block(`score/down/${level}/${i}`, h, side, own, own);
      if (level === scales - 1) break;
      kept.push(h);
      h = convolved(`score/shrink/${level}`, h, side, 2, 2);
      side /= 2;
    }
    for (let level = scales - 2; level >= 0; level--) {
      const own = width * 2 ** level;
      const finer = spread(dense(`score/grow/${level}`, h), side, 2);
      side *= 2;
      h = joined({ data: kept.pop(), width: own }, { data: finer, width: own });
      for (let i = 0; i < blocks; i++) h = block(`score/up/${level}/${i}`, h, side, i ? own : 2 * own, own);
    }
    return spread(convolved("score/leave", swish(normed(h, width)), side, 3, 1), side, patch);
  }

  /** The clean image that the model expects, x_hat, from z at gamma: the centre, softly rounded to whole gray values. */
  function expected(model, z, gamma) {
    const said = answers(model, z, gamma), alpha2 = sigmoid(-gamma), sigma2 = sigmoid(gamma);
    const alpha = Math.sqrt(alpha2), sigma = Math.sqrt(sigma2), total = alpha2 * PIXEL_VARIANCE + sigma2;
    return z.map((value, i) => {
      const noise = (sigma * value + Math.sqrt(alpha2 * PIXEL_VARIANCE * total) * said[2 * i]) / total;
      const variance = Math.exp(Math.min(Math.max(2 * said[2 * i + 1] - 5, -14), 3));
      return levelMean((value - sigma * noise) / alpha, (sigma2 * variance) / (alpha2 * variance + sigma2));
    });
  }

  /** The mean of a bell over the 256 gray values. */
  function levelMean(centre, variance) {
    const d2 = variance / SPACING ** 2, c = (centre + 1) / SPACING;
    if (d2 >= 1) return centre;
    const near = Math.min(Math.max(Math.round(c), 0), LEVELS - 1), inside = Math.min(Math.max(c, -3), LEVELS + 2);
    let most = -Infinity, sum = 0, mean = 0;
    const exponents = [];
    for (let k = Math.max(near - 5, 0); k <= Math.min(near + 5, LEVELS - 1); k++) {
      const exponent = -((k - inside) ** 2) / (2 * d2);
      exponents.push([k, exponent]);
      most = Math.max(most, exponent);
    }
    for (const [k, exponent] of exponents) {
      const weight = Math.exp(exponent - most);
      sum += weight;
      mean += weight * k;
    }
    return (SPACING * mean) / sum - 1;
  }

  // --- The chain ------------------------------------------------------------------------------------------------------

  /** z_1, z_s, ..., z_0 with the images expected on the way: one { step, gamma, z, x } per evaluation of the network. */
  function* chain(model, z, steps) {
    const at = (step) => model.gamma_max + ((model.gamma_min - model.gamma_max) * step) / steps;
    let past = null;
    for (let step = 0; step < steps; step++) {
      const here = at(step), there = at(step + 1), x = expected(model, z, here);
      yield { step, gamma: here, z, x };
      const ratio = past ? (here - there) / (past.gamma - here) : 0;
      const shrink = Math.sqrt(sigmoid(there) / sigmoid(here));
      const pull = -Math.sqrt(sigmoid(-there)) * Math.expm1((there - here) / 2);
      const before = past;
      z = z.map((value, i) => shrink * value + pull * (x[i] + (before ? 0.5 * ratio * (x[i] - before.x[i]) : 0)));
      past = { x, gamma: here };
    }
    const alpha = Math.sqrt(sigmoid(-model.gamma_min));
    yield { step: steps, gamma: model.gamma_min, z, x: z.map((value) => value / alpha) };
  }

  /** Standard normal numbers. */
  function noise(count) {
    const pair = () => Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
    return Float32Array.from({ length: count }, pair);
  }

  globalThis.medvdmModel = { load, expected, chain, noise };
})();
