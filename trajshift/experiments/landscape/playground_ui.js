// The page's side of the playground: controls, drawing, animation. Numbers come from playground.js.

const DEFAULTS = {
  method: "trajectory-shifting", rival: "reptile", horizon: 100, rounds: 3, innerLr: 0.05, metaLr: 0.1,
  budget: "updates", variant: "published", start: [-4, 3],
};
const STORIES = [
  ["Where Reptile gets stuck", {},
    "Both methods make 300 meta-updates. Shifting ends at a loss of 0.06 after 300 inner steps; Reptile, after " +
    "30,000, is still in a poor optimum nearby, at 29.5."],
  ["What the shift does", { rival: "no-shifting" },
    "The same steps without the shift: φ moves, the learners do not follow, and it ends in Reptile's optimum at 29.5."],
  ["Where Reptile wins", { start: [-2, 3] },
    "No method wins everywhere. From here shifting ends at 1.22, Reptile at 0.03 for 100 times the inner steps."],
  ["How good is the approximation?", { rival: "accurate", start: [14, 12] },
    "“Accurate” runs every trajectory again after each move of φ: 15,150 inner steps instead of 300. After 20 moves " +
    "φ has come 7.3 far and the two are 1.1 apart; then they part, and end at 0.26 (shifting) and 0.22."],
  ["Too large a step", { innerLr: 0.2, start: [5, 5] },
    "With α = 0.2 shifting diverges in its first round, and Reptile in its second: the learners overflow."],
];
const HURRY = 50; // how much faster the slower method is played once the other is done

class Playground {
  constructor(root, data) {
    this.root = root;
    this.data = data;
    this.settings = { ...DEFAULTS };
    this.maps = {}; // by variant of the tasks, made when first shown
    this.playing = this.rushing = this.dragging = false;
    this.find = (selector) => root.querySelector(selector);
    this.out = (name, text) => { this.find(`[data-out="${name}"]`).textContent = text; };
    this.buildControls();
    this.buildStories();
    this.listen();
    this.set({}, STORIES[0]);
    this.rushing = false;
    requestAnimationFrame((now) => this.frame(now));
  }

  // -- settings --------------------------------------------------------------------------------------------

  buildControls() {
    const names = Object.keys(this.data.methods);
    for (const [select, options] of [["method", names], ["rival", ["", ...names]]]) {
      for (const name of options) this.find(`[name=${select}]`).add(new Option(name ? pretty(name) : "nothing", name));
    }
    for (const label of this.root.querySelectorAll(".tsp-slider")) this.buildSlider(label);
    for (const select of this.root.querySelectorAll("select")) {
      select.addEventListener("change", () => this.set({ [select.name]: select.value }));
    }
    this.find("[name=speed]").addEventListener("input", () => this.describeSpeed());
    this.describeSpeed();
  }

  /** A logarithmic slider beside a field for the number itself. */
  buildSlider(label) {
    const { name, min, max } = label.dataset;
    const whole = Number.isInteger(Number(min));
    const field = element("input", { type: "number", name, min, max, step: whole ? 1 : "any" });
    const range = element("input", { type: "range", min: 0, max: 1, step: 0.002 });
    range.setAttribute("aria-label", label.textContent.trim());
    label.append(range, field);
    const clamp = (value) => Math.min(Number(max), Math.max(Number(min), whole ? Math.round(value) : value));
    label.reflect = (value) => {
      field.value = value;
      range.value = Math.log(value / min) / Math.log(max / min);
    };
    range.addEventListener("input", () =>
      this.set({ [name]: clamp(Number((min * (max / min) ** range.value).toPrecision(2))) }));
    field.addEventListener("change", () => this.set({ [name]: clamp(Number(field.value) || this.settings[name]) }));
  }

  buildStories() {
    for (const story of STORIES) {
      const button = element("button", { type: "button", textContent: story[0] });
      button.addEventListener("click", () => this.show(story));
      this.find(".tsp-stories").append(button);
    }
  }

  /** Sets a story up and plays it, unless the reader asked for less motion. */
  show(story) {
    this.playing = !this.still;
    this.set({ ...DEFAULTS, ...story[1] }, story);
  }

  /** Changes settings, shows them in the controls and starts anew; while nothing plays, the end is shown at once. */
  set(changes, story = null) {
    Object.assign(this.settings, changes);
    for (const select of this.root.querySelectorAll("select")) select.value = this.settings[select.name];
    for (const label of this.root.querySelectorAll(".tsp-slider")) label.reflect(this.settings[label.dataset.name]);
    for (const button of this.find(".tsp-stories").children) {
      button.setAttribute("aria-pressed", story !== null && button.textContent === story[0]);
    }
    this.out("caption", story ? story[2] : "");
    const { variant } = this.settings;
    if (!this.maps[variant]) {
      this.maps[variant] = new QualityMap(new Landscape(this.data.landscapes[variant]), this.data.domain);
    }
    this.map = this.maps[variant];
    this.landscape = this.map.landscape;
    this.restart();
    this.rushing = !this.playing || this.dragging;
  }

  /** Whether the reader asked for less motion. */
  get still() { return matchMedia("(prefers-reduced-motion: reduce)").matches; }

  /** Inner steps per task and second. */
  get speed() { return Math.round(10 ** this.find("[name=speed]").value); }

  describeSpeed() { this.out("speed", `${count(this.speed)}/s`); }

  // -- running ---------------------------------------------------------------------------------------------

  restart() {
    const { method, rival, horizon, rounds, budget } = this.settings;
    this.runs = [method, rival].filter(Boolean).map((name) => {
      const choices = this.data.methods[name];
      const every = budget === "updates" ? cadence(choices.every, horizon) : 1;
      const run = new Run(this.landscape, { ...this.settings, ...choices, rounds: rounds * every });
      return Object.assign(run, { name, label: pretty(name) });
    });
    this.qualities = this.runs.map(() => []); // of the points of each path, as far as computed
    this.trail = [this.runs[0].theta]; // theta since the last reset
    this.startQuality = this.landscape.quality(this.settings.start);
    this.rushing = false;
    this.owed = 0;
    this.dirty = true;
  }

  get done() { return this.runs.every((run) => run.done); }

  /** One inner step of every run that is not finished. */
  step() {
    this.runs.forEach((run, place) => {
      if (run.done) return;
      run.advance();
      if (place) return;
      if (run.k === 1) this.trail = [this.landscape.centres.map(() => run.path[run.path.length - 1])];
      this.trail.push(run.theta);
    });
    this.dirty = true;
  }

  /** Starts or pauses; a finished run starts again. */
  toggle() {
    this.playing = !this.playing;
    if (this.playing && this.done) this.restart();
    this.dirty = true;
  }

  toEnd() {
    this.rushing = true;
    this.dirty = true;
  }

  moveStart(point) {
    const [low, high] = this.data.domain;
    this.set({ start: point.map((x) => Math.min(high, Math.max(low, Number(x.toFixed(2))))) });
  }

  frame(now) {
    const elapsed = Math.min(0.1, (now - (this.before || now)) / 1000);
    this.before = now;
    if (this.rushing) {
      for (const end = performance.now() + 20; !this.done && performance.now() < end; ) this.step();
    } else if (this.playing && !this.dragging) {
      const hurry = this.runs.some((run) => run.done) ? HURRY : 1;
      for (this.owed += this.speed * hurry * elapsed; this.owed >= 1 && !this.done; this.owed--) this.step();
    }
    if (this.done) {
      this.rushing = false;
      if (!this.dragging) this.playing = false;
    }
    const better = [this.map.improve(8), this.improveChart(6)];
    if (this.dirty || better.includes(true)) this.draw();
    requestAnimationFrame((next) => this.frame(next));
  }

  /** Computes missing qualities of the paths for some milliseconds; whether there were any. */
  improveChart(milliseconds) {
    const end = performance.now() + milliseconds;
    let changed = false;
    this.runs.forEach((run, place) => {
      const known = this.qualities[place];
      for (; known.length < run.path.length && performance.now() < end; changed = true) {
        known.push(this.landscape.quality(run.path[known.length]));
      }
    });
    return changed;
  }

  // -- input -----------------------------------------------------------------------------------------------

  listen() {
    const actions = {
      play: () => this.toggle(), restart: () => this.restart(), end: () => this.toEnd(),
      step: () => { this.playing = false; this.step(); },
    };
    for (const button of this.root.querySelectorAll("[data-do]")) {
      button.addEventListener("click", actions[button.dataset.do]);
    }
    const stage = this.find(".tsp-stage"), handle = this.find(".tsp-start");
    const move = (event) => {
      const box = stage.getBoundingClientRect(), [low, high] = this.data.domain;
      const share = [(event.clientX - box.left) / box.width, 1 - (event.clientY - box.top) / box.height];
      this.moveStart(share.map((part) => low + part * (high - low)));
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.pointerType === "touch" && event.target !== handle) return; // a finger on the map scrolls the page
      event.preventDefault();
      handle.focus({ preventScroll: true });
      stage.setPointerCapture(event.pointerId);
      this.dragging = true;
      move(event);
    });
    stage.addEventListener("pointermove", (event) => { if (this.dragging) move(event); });
    const drop = (event) => {
      if (!this.dragging) return;
      this.dragging = false;
      move(event);
    };
    stage.addEventListener("pointerup", drop);
    stage.addEventListener("pointercancel", () => { this.dragging = false; });
    stage.addEventListener("click", (event) => {
      if (event.pointerType === "touch" && event.target !== handle) move(event);
    });
    handle.addEventListener("keydown", (event) => {
      const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
      if (!way) return;
      event.preventDefault();
      this.moveStart(plus(this.settings.start, way, event.shiftKey ? 1 : 0.25));
    });
    new ResizeObserver(() => { this.dirty = true; }).observe(this.root);
    new IntersectionObserver((entries, observer) => { // plays by itself once it is seen
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      this.playing = !this.still;
    }, { threshold: 0.4 }).observe(stage);
  }

  // -- drawing ---------------------------------------------------------------------------------------------

  draw() {
    this.dirty = false;
    this.drawMap();
    this.drawView();
    this.drawChart();
    this.drawNumbers();
    this.find("[data-do=play]").textContent = this.playing ? "Pause" : "Play";
    const status = this.find(".tsp-status"), text = this.status();
    if (status.textContent !== text) status.textContent = text;
    status.setAttribute("aria-live", this.playing ? "off" : "polite");
    status.classList.toggle("tsp-alarm", this.runs.some((run) => run.diverged));
  }

  drawMap() {
    const canvas = this.find(".tsp-map"), { image, low, high } = this.map;
    Object.assign(canvas, { width: image.width, height: image.height });
    canvas.getContext("2d").putImageData(image, 0, 0);
    this.out("best", `better ${short(low)}`);
    this.out("worst", `${short(high)} worse`);
  }

  drawView() {
    const { pen, size } = sheet(this.find(".tsp-view"));
    const [low, high] = this.data.domain;
    const at = ([x, y]) => [((x - low) / (high - low)) * size[0], ((high - y) / (high - low)) * size[1]];
    const [left, top] = at(this.settings.start);
    const handle = this.find(".tsp-start");
    Object.assign(handle.style, { left: `${left}px`, top: `${top}px` });
    const where = coordinates(this.settings.start);
    handle.setAttribute("aria-label", `Start of phi at ${where}; arrow keys move it, with Shift further`);
    drawAxes(pen, size, at, low, high);
    this.landscape.centres.forEach((centre, task) => write(pen, "+", at(centre), TASKS[task], "bold 17px sans-serif"));
    const [first] = this.runs;
    this.drawTrails(pen, at);
    [...this.runs].reverse().forEach((run) => {
      const look = LOOKS[this.runs.indexOf(run)];
      line(pen, untilLost(run.path).map(at), 2.5, look);
      diamond(pen, pinned(at(lastFinite(run.path)), size, 16), look, run.diverged);
    });
    if (this.pullsToMean && first.theta.every(finite)) {
      circle(pen, at([0, 1].map((i) => mean(first.theta.map((point) => point[i])))), 6, null, LOOKS[0].colour);
    }
    first.theta.forEach((point, task) => {
      if (!finite(point)) return;
      const spot = pinned(at(point), size, 9);
      circle(pen, spot, 8, TASKS[task], "#fff");
      write(pen, task + 1, spot, "13".includes(task) ? "#111" : "#fff", "bold 10px sans-serif", false);
    });
  }

  drawTrails(pen, at) {
    TASKS.forEach((colour, task) => {
      const points = untilLost(this.trail.map((theta) => theta[task]));
      line(pen, points.map(at), 1.5, { colour, casing: "rgba(255,255,255,.55)", dash: [] });
    });
  }

  /** Quality of phi against inner steps per task, both logarithmic. */
  drawChart() {
    const { pen, size } = sheet(this.find(".tsp-chart"));
    const curves = this.qualities.map((values, place) =>
      values.map((value, i) => [this.runs[place].costs[i] + 1, value]).filter(finite));
    const heights = curves.flat().map(([, value]) => Math.min(value, 1e4)).concat(0.1, 10); // what is higher leaves
    const low = Math.floor(Math.log10(Math.min(...heights))), high = Math.ceil(Math.log10(Math.max(...heights)));
    const wide = Math.ceil(Math.log10(Math.max(100, ...this.runs.map((run) => run.innerSteps))));
    const [left, right, top, bottom] = [44, size[0] - 16, 22, size[1] - 30];
    const across = (steps) => left + (Math.log10(steps) / wide) * (right - left);
    const down = (value) => bottom - ((Math.log10(value) - low) / (high - low)) * (bottom - top);
    for (let power = low; power <= high; power++) {
      const y = down(10 ** power);
      rule(pen, [left, y], [right, y]);
      label(pen, tick(power), [left - 6, y], "right");
    }
    for (let power = 0; power <= wide; power++) {
      const x = across(10 ** power);
      rule(pen, [x, top], [x, bottom]);
      label(pen, tick(power), [x, bottom + 9], "center");
    }
    label(pen, "quality of φ (lower is better)", [0, 8], "left");
    label(pen, "inner steps per task, replays included", [right, size[1] - 6], "right");
    pen.beginPath();
    pen.rect(left - 5, top - 5, size[0], bottom - top + 10);
    pen.clip();
    curves.forEach((curve, place) => {
      const points = curve.map(([steps, value]) => [across(steps), down(value)]);
      line(pen, points, 2, { ...LOOKS[place], casing: null });
      if (points.length) circle(pen, points[points.length - 1], 3.5, LOOKS[place].colour, "#fff");
    });
  }

  drawNumbers() {
    const rows = [
      ["round", (run) => `${count(run.round)} of ${count(run.rounds)}`],
      ["k", (run) => `${run.k} of ${run.horizon}`],
      ["inner steps per task", (run) => count(run.innerSteps)],
      ["meta-updates", (run) => count(run.metaUpdates)],
      ["φ", (run) => coordinates(run.phi)],
      ["mean loss of the θ", (run) => short(run.meanLoss())],
      [`quality of φ (start: ${short(this.startQuality)})`, (run) => short(this.landscape.quality(run.phi))],
    ];
    const table = [["", ...this.runs.map((run) => run.label)]];
    for (const [title, read] of rows) table.push([title, ...this.runs.map(read)]);
    this.find(".tsp-numbers").replaceChildren(...table.map((texts, place) => {
      const row = element("tr", {});
      row.append(...texts.map((textContent) => element(place ? "td" : "th", { textContent })));
      return row;
    }));
    this.out("python", this.python());
    this.find("[data-out=mean]").hidden = !this.pullsToMean;
  }

  /** Whether phi of the first method moves towards the mean of theta. */
  get pullsToMean() { return this.data.methods[this.settings.method].metagrad === "displacement"; }

  /** The same runs in Python. */
  python() {
    const { start, horizon, innerLr, metaLr, variant } = this.settings;
    const calls = this.runs.map(({ name, rounds }) =>
      `run("${name}", [[${start.join(", ")}]], tasks=tasks("${variant}"), horizon=${horizon}, rounds=${rounds}, ` +
      `inner_lr=${innerLr}, meta_lr=${metaLr}).phi[-1]`);
    return ["from trajshift.experiments.landscape import run, tasks", ...calls].join("\n");
  }

  /** What is going on, in words; divergence first. */
  status() {
    const [low, high] = this.data.domain;
    const outside = (point) => point.some((x) => x < low || x > high);
    const said = [];
    for (const { label, diverged, phi } of this.runs) {
      const what = diverged && (diverged.task === null ? "φ" : `θ ${diverged.task + 1}`);
      if (diverged) said.push(`${label} diverged: ${what} is not finite at inner step ${count(diverged.step)}.`);
      else if (outside(phi)) said.push(`φ of ${label} has left the picture.`);
    }
    if (this.runs.some((run) => run.diverged)) said.push("Try a smaller α or β.");
    const away = this.runs[0].theta.flatMap((point, task) => (outside(point) ? [task + 1] : []));
    if (away.length && !this.runs[0].diverged) said.push(`Outside the picture, drawn at its edge: θ ${list(away)}.`);
    const late = this.runs.find((run) => !run.done);
    if (!this.playing && this.runs.every((run) => run.innerSteps === 0)) said.push("Press Play, or drag the ring.");
    if (!late) said.push(...this.runs.filter((run) => !run.diverged).map((run) => this.verdict(run)));
    else if (this.playing && this.runs.some((run) => run.done)) {
      said.push(`${late.label} is not done yet: played ${HURRY} times faster.`);
    }
    return said.join(" ");
  }

  verdict({ label, phi, innerSteps }) {
    return `${label} ends at ${short(this.landscape.quality(phi))} after ${count(innerSteps)} inner steps.`;
  }
}

for (const root of document.querySelectorAll(".tsp")) {
  const data = JSON.parse(document.getElementById("trajshift-playground-data").textContent);
  root.querySelector(".tsp-ramp").style.background = `linear-gradient(90deg, ${RAMP.map((rgb) => `rgb(${rgb})`)})`;
  window.trajshiftPlayground = new Playground(root, data);
}
