// The synthetic study in plain JavaScript: the same numbers as the Python loop, computed on the spot.
// Points are [x, y]; theta holds one point a task. No page is needed: Node loads this file as it is.
"use strict";

const plus = (a, b, scale = 1) => [a[0] + scale * b[0], a[1] + scale * b[1]];
const minus = (a, b) => [a[0] - b[0], a[1] - b[1]];
const finite = (point) => Number.isFinite(point[0]) && Number.isFinite(point[1]);
const mean = (numbers) => numbers.reduce((sum, number) => sum + number, 0) / numbers.length;

/** The tasks: first (u^2 + v - 11)^2 + second (u + v^2 - 7)^2 with (u, v) = R(angle) (p - centre) / scale. */
class Landscape {
  /** `data` as playground.py writes it: {first, second, scale, centres, angles, momentum, directions}. */
  constructor(data) {
    Object.assign(this, data);
    this.rotations = data.angles.map((angle) => [Math.cos(angle), Math.sin(angle)]);
    this.directions = numbers(data.directions);
  }

  /** {loss, gradient} of one task at a point. */
  at(task, point) {
    const { first, second, scale, centres, rotations } = this;
    const [x, y] = minus(point, centres[task]);
    const [cos, sin] = rotations[task];
    const u = (cos * x - sin * y) / scale, v = (sin * x + cos * y) / scale;
    const a = u * u + v - 11, b = u + v * v - 7;
    const du = (4 * first * a * u + 2 * second * b) / scale, dv = (2 * first * a + 4 * second * b * v) / scale;
    return { loss: first * a * a + second * b * b, gradient: [cos * du + sin * dv, cos * dv - sin * du] };
  }

  /** Quality of an initialization: mean over tasks of the loss after `steps` steps of Adam from it. */
  quality(start, steps = 100, lr = 0.1) {
    return mean(this.centres.map((_, task) => this.at(task, this.adam(task, start, steps, lr)).loss));
  }

  /** The point that Adam (Kingma and Ba, 2015; PyTorch's constants) reaches. */
  adam(task, start, steps, lr) {
    const point = [...start], first = [0, 0], second = [0, 0];
    for (let step = 1; step <= steps; step++) {
      const { gradient } = this.at(task, point);
      const rate = lr / (1 - 0.9 ** step), correction = Math.sqrt(1 - 0.999 ** step);
      for (let i = 0; i < 2; i++) {
        first[i] += 0.1 * (gradient[i] - first[i]);
        second[i] = 0.999 * second[i] + 0.001 * gradient[i] * gradient[i];
        point[i] -= (rate * first[i]) / (Math.sqrt(second[i]) / correction + 1e-8);
      }
    }
    return point;
  }

  /** The unit vector of random shifting at an inner step (from 1): Python's own draw, repeated once all are used. */
  direction(task, step) {
    const angle = this.directions[((step - 1) * this.centres.length + task) % this.directions.length];
    return [Math.cos(angle), Math.sin(angle)];
  }
}

/** float64 numbers from base64 (little-endian). */
function numbers(base64) {
  return new Float64Array(Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer);
}

/** The meta-gradients: `begin` a trajectory, `observe` each inner step of a task, `read` one point a task. */
const METAGRADS = {
  displacement: () => ({
    begin() {},
    observe() {},
    read: ({ phi, theta }) => theta.map((point) => minus(phi, point)),
  }),
  last_gradient: () => {
    const last = [];
    return {
      begin() {},
      observe(task, { gradient }) { last[task] = gradient; },
      read: () => last,
    };
  },
  path_length: () => {
    let sum, open; // the sum over closed segments, and the last one, whose end loss is not known yet
    const close = (task, endLoss) => {
      const { loss, gradient, move } = open[task];
      const rise = -Math.abs(endLoss - loss);
      const length = Math.hypot(move[0], move[1], rise);
      if (length > 0) sum[task] = plus(sum[task], plus(move, gradient, rise), -1 / length);
    };
    return {
      begin(tasks) {
        sum = Array.from({ length: tasks }, () => [0, 0]);
        open = Array(tasks).fill(null);
      },
      observe(task, segment) {
        if (open[task]) close(task, segment.loss);
        open[task] = segment;
      },
      read({ landscape, theta }) {
        theta.forEach((point, task) => close(task, landscape.at(task, point).loss));
        open.fill(null);
        return sum;
      },
    };
  },
};

/** The carries: what the running theta do once phi has moved by delta. (`replay` takes steps: see `Run`.) */
const CARRIES = {
  shift: (run, delta) => { run.theta = run.theta.map((point) => plus(point, delta)); },
  hold: () => {},
  random: (run, delta) => {
    const norm = Math.hypot(...delta);
    run.theta = run.theta.map((point, task) => plus(point, run.landscape.direction(task, run.step), norm));
  },
  replay: () => {},
};

/** Inner steps between meta-updates at horizon K: a number, "horizon" for K, "tenth" for a tenth of it (or 1). */
function cadence(every, horizon) {
  if (every === "tenth") return horizon % 10 ? 1 : horizon / 10;
  return every === "horizon" ? horizon : every;
}

/** One meta-training run. `advance` takes one inner step of all tasks; the fields say where it stands. */
class Run {
  /** The choices of a preset (metagrad, every, carry), start, horizon (K), rounds (M), innerLr and metaLr. */
  constructor(landscape, { metagrad, every, carry, start, horizon, rounds, innerLr, metaLr }) {
    Object.assign(this, { landscape, carry, start, horizon, rounds, innerLr, metaLr });
    this.every = cadence(every, horizon);
    this.metagrad = METAGRADS[metagrad]();
    this.phi = [...start];
    this.path = [this.phi]; // phi after every meta-update
    this.costs = [0]; // and the inner steps per task spent until then
    this.step = 0; // scheduled inner steps
    this.innerSteps = 0; // inner steps per task, replays included
    this.round = 0;
    this.k = 0;
    this.diverged = null; // or {step, task}: the first theta that was not finite, or phi where task is null
    this.done = false;
    this.reset();
    this.steps = this.algorithm();
  }

  /** Meta-updates done. */
  get metaUpdates() { return this.path.length - 1; }

  /** One inner step of all tasks, replayed ones included; false once there is nothing left to do. */
  advance() {
    if (!this.done) this.done = this.steps.next().done || this.diverged !== null;
    return !this.done;
  }

  /** To the end, or to where it diverges. */
  finish() {
    while (this.advance());
    return this;
  }

  /** Algorithm 2 of Shin et al. (2021); a meta-update only every K steps makes it Algorithm 1. */
  *algorithm() {
    for (this.round = 1; ; this.round++) {
      this.reset();
      for (let k = 1; k <= this.horizon; k++) {
        this.step++;
        this.innerStep(k);
        const due = k % this.every === 0 && !this.diverged;
        const carry = due && k < this.horizon ? this.carry : "hold";
        if (due) CARRIES[carry](this, this.metaUpdate());
        if (this.round === this.rounds && k === this.horizon) return;
        yield;
        if (carry === "replay") yield* this.replay(k);
      }
    }
  }

  /** theta_0 <- phi for all tasks, with a new momentum buffer. */
  reset() {
    this.k = 0;
    this.theta = this.landscape.centres.map(() => this.phi);
    this.velocity = this.landscape.centres.map(() => [0, 0]);
    this.metagrad.begin(this.theta.length);
  }

  /** theta_k <- theta_{k-1} - alpha velocity, velocity <- momentum velocity + gradient, for every task. */
  innerStep(k) {
    this.k = k;
    this.innerSteps++;
    this.theta = this.theta.map((before, task) => {
      const { loss, gradient } = this.landscape.at(task, before);
      const velocity = plus(gradient, this.velocity[task], this.landscape.momentum);
      const after = plus(before, velocity, -this.innerLr);
      this.velocity[task] = velocity;
      this.metagrad.observe(task, { loss, gradient, move: minus(after, before) });
      if (!this.diverged && !(Number.isFinite(loss) && finite(after))) {
        this.diverged = { step: (this.round - 1) * this.horizon + k, task };
      }
      return after;
    });
  }

  /** phi <- phi + delta with delta = -beta * mean MetaGrad; returns delta. */
  metaUpdate() {
    const gradients = this.metagrad.read(this);
    const delta = [0, 1].map((i) => -this.metaLr * mean(gradients.map((gradient) => gradient[i])));
    this.phi = plus(this.phi, delta);
    this.path.push(this.phi);
    if (!finite(this.phi)) this.diverged = { step: this.step, task: null };
    this.costs.push(this.innerSteps);
    return delta;
  }

  /** theta <- U_k(phi): k steps again from the new phi. */
  *replay(k) {
    this.reset();
    for (let again = 1; again <= k && !this.diverged; again++) {
      this.innerStep(again);
      yield;
    }
  }

  /** Mean over tasks of the loss at the running theta. */
  meanLoss() {
    return mean(this.theta.map((point, task) => this.landscape.at(task, point).loss));
  }
}

if (typeof module !== "undefined") module.exports = { Landscape, Run, cadence };
