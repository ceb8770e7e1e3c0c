// The reverse chain as a loop: states of a few chains from pure noise to pictures, and the noise level of each.
Moving.figure("reverse", async (live, data, root) => {
  const { html, fixed } = Moving;
  const states = await Moving.grays(data.states); // all chains of the first time, then of the next
  const { width, height } = data.states;
  const { chains, times } = data;
  const frames = times.length;

  Moving.title(live, data.title, data.hint);
  const row = html("div", { class: "moving-row", style: `max-width: ${14 * chains}rem` });
  live.append(row);
  const pictures = Array.from({ length: chains }, (_, k) =>
    Moving.picture(row, {
      width, height, name: data.names ? data.names[k] : "",
      alt: data.names ? data.names[k] : `Chain ${k + 1} on its way from noise to a synthetic picture`,
    }),
  );
  const controls = html("div", { class: "moving-player" });
  live.append(controls);
  const button = html("button", { type: "button", onclick: () => play(!playing) });
  controls.append(button);
  let [frame, playing, last, visible] = [frames - 1, false, 0, true];
  const slider = Moving.slider(controls, {
    label: "time t", min: 0, max: frames - 1, step: 1, value: frame, text: (k) => fixed(times[k], 2),
    input: (k) => {
      play(false);
      show(k);
    },
  });
  slider.range.classList.add("moving-long");

  function show(k) {
    frame = k;
    slider.set(k);
    pictures.forEach((one, i) => one.paint(Float32Array.from(states[k * chains + i], (v) => v / 255)));
    root.state = { frame: k, t: times[k], playing };
  }
  function play(on) {
    playing = on;
    button.textContent = on ? "Pause" : "Play";
    button.setAttribute("aria-pressed", String(on));
    root.state = { ...root.state, playing };
    if (on) requestAnimationFrame(tick);
  }
  function tick(now) {
    if (!playing) return;
    requestAnimationFrame(tick);
    if (!visible) return;
    const rest = frame === frames - 1 ? 2200 : 140; // the finished pictures stay for a while
    if (now - last < rest) return;
    last = now;
    show((frame + 1) % frames);
  }
  new IntersectionObserver((seen) => (visible = seen[seen.length - 1].isIntersecting)).observe(row);
  show(frame);
  play(!window.matchMedia("(prefers-reduced-motion: reduce)").matches); // who wants no motion presses the button
});
