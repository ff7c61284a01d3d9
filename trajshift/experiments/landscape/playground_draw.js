// The playground's colours, map, pens and words. Sizes are CSS pixels.

// Tol's "muted" scheme: eight colours that stay apart with any colour vision; each theta also carries its number.
const TASKS = ["#882255", "#ddcc77", "#117733", "#88ccee", "#cc6677", "#44aa99", "#332288", "#999933"];
const LOOKS = [{ colour: "#d55e00", casing: "#fff", dash: [] }, { colour: "#111", casing: "#fff", dash: [7, 5] }];
const RAMP = ["#10263d", "#24486b", "#4a7393", "#86a5b8", "#c3d0d6", "#f3f1ea"].map((hex) =>
  [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16))); // good to bad

/** The background: quality over the domain, refined bit by bit so that nothing waits for it. */
class QualityMap {
  constructor(landscape, domain) {
    Object.assign(this, { landscape, domain });
    this.work = this.compute();
    this.work.next();
  }

  /** Works for some milliseconds; whether the image changed. */
  improve(milliseconds) {
    const end = performance.now() + milliseconds;
    let changed = false;
    while (performance.now() < end && !this.work.next().done) changed = true;
    return changed;
  }

  /** A coarse image at once, which also fixes the colours, then a fine one row by row. */
  *compute() {
    const coarse = this.values(21).sort((a, b) => a - b).filter(Number.isFinite);
    [this.low, this.high] = [0.02, 0.95].map((share) => coarse[Math.floor(share * (coarse.length - 1))]);
    for (const side of [21, 97]) {
      const image = new ImageData(side, side);
      for (let row = 0; row < side; row++) {
        this.paint(image, row);
        if (side > 21) yield;
      }
      this.image = image;
      yield;
    }
  }

  point(side, column, row) {
    const [low, high] = this.domain, width = (high - low) / side; // centres of the pixels
    return [low + (column + 0.5) * width, high - (row + 0.5) * width];
  }

  values(side) {
    const at = (i) => this.point(side, i % side, Math.floor(i / side));
    return Array.from({ length: side * side }, (_, i) => this.landscape.quality(at(i)));
  }

  paint(image, row) {
    const span = Math.log(this.high / this.low);
    for (let column = 0; column < image.width; column++) {
      const quality = this.landscape.quality(this.point(image.width, column, row));
      const share = Number.isFinite(quality) ? Math.min(1, Math.max(0, Math.log(quality / this.low) / span)) : 1;
      image.data.set([...colour(share), 255], 4 * (row * image.width + column));
    }
  }
}

/** A colour of the ramp, 0 good to 1 bad. */
function colour(share) {
  const place = Math.min(RAMP.length - 2, Math.floor(share * (RAMP.length - 1)));
  const part = share * (RAMP.length - 1) - place;
  return RAMP[place].map((value, i) => Math.round(value + part * (RAMP[place + 1][i] - value)));
}

/** A cleared canvas at the screen's resolution: its pen, and its size in CSS pixels. */
function sheet(canvas) {
  const size = [canvas.clientWidth, canvas.clientHeight], ratio = window.devicePixelRatio || 1;
  Object.assign(canvas, { width: Math.round(size[0] * ratio), height: Math.round(size[1] * ratio) });
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.lineJoin = pen.lineCap = "round";
  return { pen, size };
}

function line(pen, points, width, { colour, casing, dash }) {
  if (points.length < 2) return;
  pen.beginPath();
  points.forEach((point) => pen.lineTo(...point));
  if (casing) stroke(pen, casing, width + 2.5, []);
  stroke(pen, colour, width, dash);
}

function stroke(pen, colour, width, dash) {
  pen.setLineDash(dash);
  pen.strokeStyle = colour;
  pen.lineWidth = width;
  pen.stroke();
  pen.setLineDash([]);
}

function circle(pen, spot, radius, fill, edge) {
  pen.beginPath();
  pen.arc(...spot, radius, 0, 2 * Math.PI);
  if (fill) {
    pen.fillStyle = fill;
    pen.fill();
  } else stroke(pen, "#fff", 4.5, []);
  stroke(pen, edge, fill ? 1.5 : 2.5, []);
}

/** phi; crossed out where it diverged. */
function diamond(pen, [x, y], { colour, casing }, crossed) {
  const r = 9;
  pen.beginPath();
  for (const [dx, dy] of [[0, -r], [r, 0], [0, r], [-r, 0]]) pen.lineTo(x + dx, y + dy);
  pen.closePath();
  pen.fillStyle = colour;
  stroke(pen, casing, 5, []);
  pen.fill();
  if (!crossed) return;
  for (const way of [1, -1]) {
    pen.beginPath();
    pen.moveTo(x - 14, y - 14 * way);
    pen.lineTo(x + 14, y + 14 * way);
    stroke(pen, "#fff", 6, []);
    stroke(pen, "#c00000", 3.5, []);
  }
}

function write(pen, text, [x, y], colour, font, halo = true, align = "center") {
  Object.assign(pen, { font, textAlign: align, textBaseline: "middle" });
  if (halo) {
    Object.assign(pen, { strokeStyle: "#fff", lineWidth: 3 });
    pen.strokeText(text, x, y);
  }
  pen.fillStyle = colour;
  pen.fillText(text, x, y);
}

function drawAxes(pen, size, at, low, high) {
  for (let tick = low + 5; tick < high; tick += 5) {
    write(pen, tick, [at([tick, 0])[0], size[1] - 9], "#333", "11px system-ui, sans-serif");
    write(pen, tick, [12, at([0, tick])[1]], "#333", "11px system-ui, sans-serif");
  }
}

/** A grid line of the chart. */
function rule(pen, ...ends) {
  line(pen, ends, 1, { colour: "#e3e6e8", casing: null, dash: [] });
}

/** Small print of the chart. */
function label(pen, text, spot, align) {
  write(pen, text, spot, "#555", "11.5px system-ui, sans-serif", false, align);
}

/** A power of ten. */
function tick(power) {
  return power < 4 ? String(10 ** power) : `${10 ** (power - 3)}k`;
}

/** A spot on the canvas, or where the way to it from the middle meets the edge. */
function pinned(spot, size, margin) {
  const middle = [size[0] / 2, size[1] / 2], way = minus(spot, middle);
  const share = Math.min(1, ...way.map((part, i) => (middle[i] - margin) / Math.abs(part)));
  return plus(middle, way, share);
}

/** The part of a path before it runs out of all bounds. */
function untilLost(path) {
  const lost = path.findIndex((point) => !(Math.hypot(...point) < 1e4));
  return lost < 0 ? path : path.slice(0, lost);
}

function lastFinite(path) {
  for (let i = path.length - 1; i > 0; i--) if (finite(path[i])) return path[i];
  return path[0];
}

const pretty = (name) => (name[0].toUpperCase() + name.slice(1)).replace("-", " ").replace("Fomaml", "FOMAML");
const count = (number) => number.toLocaleString("en-US");
const short = (number, digits = 3) => {
  if (!Number.isFinite(number)) return "not finite";
  if (Math.abs(number) >= 1e4) return number.toExponential(1).replace("e+", "e");
  return Math.abs(number) < 1 ? number.toFixed(digits) : number.toPrecision(digits);
};
const coordinates = (point) => (finite(point) ? point.map((x) => short(x, 4)).join(", ") : "not finite");
const element = (tag, fields) => Object.assign(document.createElement(tag), fields);
const list = (words) => words.join(", ").replace(/, (\S+)$/, " and $1");
