"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const root = document.documentElement, stage = get("stage"), canvas = get("canvas"), ink = canvas.getContext("2d");
const calm = matchMedia("(prefers-reduced-motion: reduce)");

// What is seen: which run and token, how far on the way (in stops, with a fraction while moving), turned and zoomed how.
const seen = { run: 0, token: 0, hover: null, time: 0, turn: null, zoom: 1, playing: false };
let shape = null; // of the run: arcs, labels
let colours = {};
let wanted = false; // a frame is asked for

const run = () => data.runs[seen.run];
const last = () => run().points.length - 1;
const here = () => Math.floor(seen.time + 1e-6);
// Two colours: for what looks at other positions, and for what does not.
const kind = step => (["MLP", "experts"].includes(run().steps[step][1]) ? "mlp" : "attention");
const percent = p => (100 * p).toFixed(p < 0.1 ? 1 : 0) + " %";

const parts = look => [...new Set(data.runs.flatMap(r => r.steps.map(step => step[1])))].filter(part => ["MLP", "experts"].includes(part) === (look === "mlp"));
for (const look of ["attention", "mlp"]) {
  document.querySelector("#legend ." + look).textContent = "step by " + parts(look).join(" or ");
  document.querySelector("#legend ." + look).hidden = !parts(look).length;
}

function stopName(stop) {
  if (stop === 0) return "embedding";
  const [layer, part] = run().steps[stop - 1];
  return part + " of layer " + layer;
}

const shortName = stop => (stop === 0 ? "embedding" : run().steps[stop - 1][1] + " " + run().steps[stop - 1][0]);

// Geometry -----------------------------------------------------------------------------------------------------------

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];
const scaled = (a, s) => [a[0] * s, a[1] * s, a[2] * s];
const unit = a => scaled(a, 1 / (Math.hypot(a[0], a[1], a[2]) || 1));
const turned = (m, p) => [dot(m[0], p), dot(m[1], p), dot(m[2], p)];
const product = (a, b) => a.map(row => [0, 1, 2].map(j => row[0] * b[0][j] + row[1] * b[1][j] + row[2] * b[2][j]));
const degrees = (a, b) => Math.acos(Math.max(-1, Math.min(1, dot(a, b)))) * 180 / Math.PI;

function between(a, b, t) {
  const angle = degrees(a, b) * Math.PI / 180;
  if (angle < 1e-4) return b;
  const s = Math.sin(angle), u = Math.sin((1 - t) * angle) / s, v = Math.sin(t * angle) / s;
  return [u * a[0] + v * b[0], u * a[1] + v * b[1], u * a[2] + v * b[2]];
}

function arc(a, b) {
  const pieces = Math.max(1, Math.ceil(degrees(a, b) / 4));
  return Array.from({ length: pieces + 1 }, (_, i) => between(a, b, i / pieces));
}

function about(axis, angle) {
  const c = Math.cos(angle), s = Math.sin(angle);
  return axis === "x" ? [[1, 0, 0], [0, c, -s], [0, s, c]] : [[c, 0, s], [0, 1, 0], [-s, 0, c]];
}

// Turned so that the middle of all stops is in front, the chosen token's counting for half; a little to the upper left of
// where one looks.
function firstView() {
  let middle = [0, 0, 0];
  for (const stop of run().points)
    stop.forEach((p, t) => { middle = middle.map((m, i) => m + p[i] * (t === seen.token ? stop.length : 1)); });
  const z = unit(middle), help = Math.abs(z[1]) < 0.9 ? [0, 1, 0] : [1, 0, 0];
  const x = unit([help[1] * z[2] - help[2] * z[1], help[2] * z[0] - help[0] * z[2], help[0] * z[1] - help[1] * z[0]]);
  const y = [z[1] * x[2] - z[2] * x[1], z[2] * x[0] - z[0] * x[2], z[0] * x[1] - z[1] * x[0]];
  return product(about("x", 0.25), product(about("y", -0.25), [x, y, z]));
}

const graticule = [];
for (let i = 0; i < 12; i++) {
  const a = i * Math.PI / 6;
  graticule.push(Array.from({ length: 31 }, (_, j) => {
    const b = (-75 + 5 * j) * Math.PI / 180;
    return [Math.cos(b) * Math.cos(a), Math.sin(b), Math.cos(b) * Math.sin(a)];
  }));
}
for (const latitude of [-60, -30, 0, 30, 60]) {
  const b = latitude * Math.PI / 180;
  graticule.push(Array.from({ length: 73 }, (_, j) => {
    const a = j * Math.PI / 36;
    return [Math.cos(b) * Math.cos(a), Math.sin(b), Math.cos(b) * Math.sin(a)];
  }));
}

function place(token, time = seen.time) {
  const points = run().points, i = Math.min(Math.floor(time + 1e-6), last());
  return i === last() ? points[i][token] : between(points[i][token], points[i + 1][token], Math.max(0, time - i));
}

// Drawing ------------------------------------------------------------------------------------------------------------

function readColours() {
  const style = getComputedStyle(root);
  for (const [name, variable] of Object.entries({ fg: "--fg", muted: "--muted", grid: "--grid", bg: "--bg", attention: "--c-ngpt", mlp: "--c-third" }))
    colours[name] = style.getPropertyValue(variable).trim();
}

function frame() {
  wanted = false;
  const width = stage.clientWidth, height = stage.clientHeight, dense = window.devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * dense) || canvas.height !== Math.round(height * dense)) {
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
  }
  ink.setTransform(dense, 0, 0, dense, 0, 0);
  ink.clearRect(0, 0, width, height);
  const radius = 0.43 * Math.min(width, height) * seen.zoom;
  const screen = p => {
    const q = turned(seen.turn, p);
    return [width / 2 + radius * q[0], height / 2 - radius * q[1], q[2]];
  };
  shape.radius = radius;
  shape.screen = screen;
  ink.lineCap = ink.lineJoin = "round";
  drawSide(screen, false);
  veil(width / 2, height / 2, radius);
  drawSide(screen, true);
  drawDots(screen);
  placeLabels(screen, width, height);
}

function draw() {
  if (!wanted) requestAnimationFrame(frame);
  wanted = true;
}

// The near half of a glass sphere: what lies behind it is seen through it.
function veil(x, y, radius) {
  const light = ink.createRadialGradient(x - 0.35 * radius, y - 0.4 * radius, 0.1 * radius, x, y, radius);
  light.addColorStop(0, colours.bg);
  light.addColorStop(1, colours.grid);
  ink.globalAlpha = 0.62;
  ink.fillStyle = light;
  ink.beginPath();
  ink.arc(x, y, radius, 0, 2 * Math.PI);
  ink.fill();
  ink.globalAlpha = 1;
  ink.strokeStyle = colours.muted;
  ink.lineWidth = 1;
  ink.stroke();
}

function drawSide(screen, front) {
  ink.setLineDash([]);
  ink.strokeStyle = colours.muted;
  ink.globalAlpha = front ? 0.22 : 0.3;
  ink.lineWidth = 0.7;
  for (const line of graticule) strokeSide(line.map(screen), front);
  const followed = seen.hover ? seen.hover.token : seen.token;
  for (let t = 0; t < run().tokens.length; t++) if (t !== followed) drawPath(t, screen, front, false);
  drawPath(followed, screen, front, true);
  ink.globalAlpha = 1;
  ink.setLineDash([]);
}

function drawPath(token, screen, front, followed) {
  for (let step = 0; step < last(); step++) {
    const line = shape.arcs[step][token].map(screen), done = Math.max(0, Math.min(1, seen.time - step));
    const cut = done * (line.length - 1), at = Math.floor(cut);
    const edge = at < line.length - 1 ? line[at].map((v, i) => v + (cut - at) * (line[at + 1][i] - v)) : line[at];
    if (done > 0) {
      ink.strokeStyle = colours[kind(step)];
      ink.globalAlpha = followed ? 1 : 0.62;
      ink.lineWidth = followed ? 4 : 2.1;
      ink.setLineDash([]);
      strokeSide([...line.slice(0, at + 1), edge], front);
    }
    if (done < 1) {
      ink.strokeStyle = colours.muted;
      ink.globalAlpha = followed ? 0.8 : 0.3;
      ink.lineWidth = followed ? 1.6 : 1;
      ink.setLineDash([1.5, 4]);
      strokeSide([edge, ...line.slice(at + 1)], front);
    }
  }
}

// Stroke those pieces of a line that lie on one side; each piece by the depth of its middle.
function strokeSide(line, front) {
  ink.beginPath();
  let drawing = false;
  for (let i = 1; i < line.length; i++) {
    const side = line[i - 1][2] + line[i][2] >= 0;
    if (side === front) {
      if (!drawing) ink.moveTo(line[i - 1][0], line[i - 1][1]);
      ink.lineTo(line[i][0], line[i][1]);
    }
    drawing = side === front;
  }
  ink.stroke();
}

function drawDots(screen) {
  const stop = here(), followed = seen.hover ? seen.hover.token : seen.token;
  run().tokens.forEach((_, t) => {
    circle(screen(run().points[0][t]), 3, colours.bg, colours.muted, 1.2);
    if (t === followed)
      for (let s = 1; s <= stop; s++) circle(screen(run().points[s][t]), 3, colours[kind(s - 1)], colours.bg, 1);
    const now = screen(place(t)), moving = Math.ceil(seen.time - 1e-6);
    circle(now, t === followed ? 7 : 4.5, moving ? colours[kind(moving - 1)] : colours.muted, t === followed ? colours.fg : colours.bg, t === followed ? 2 : 1.2);
  });
  if (seen.hover) circle(screen(run().points[seen.hover.stop][seen.hover.token]), 9, "transparent", colours.fg, 1.5);
}

function circle(at, size, fill, line, width) {
  ink.globalAlpha = at[2] < 0 ? 0.35 : 1;
  ink.beginPath();
  ink.arc(at[0], at[1], size, 0, 2 * Math.PI);
  ink.fillStyle = fill;
  ink.fill();
  ink.strokeStyle = line;
  ink.lineWidth = width;
  ink.stroke();
  ink.globalAlpha = 1;
}

// Labels stand beside their points where there is room; those in front are asked first, and one without room is left out.
function placeLabels(screen, width, height) {
  const taken = [{ x: width - 130, y: height - 46, w: 130, h: 46 }], followed = seen.hover ? seen.hover.token : seen.token;
  const order = shape.labels.map((label, t) => ({ label, t, at: screen(place(t)) }));
  order.sort((a, b) => (b.t === followed) - (a.t === followed) || b.at[2] - a.at[2]);
  for (const { label, t, at } of order) {
    writeLabel(label, t, t === followed);
    const w = label.offsetWidth, h = label.offsetHeight, gap = t === followed ? 10 : 7;
    const tries = [[gap, -h / 2], [-gap - w, -h / 2], [-w / 2, -gap - h], [-w / 2, gap], [gap, -h - 2], [gap, 2], [-gap - w, -h - 2], [-gap - w, 2]];
    const spot = tries.map(([x, y]) => ({ x: at[0] + x, y: at[1] + y, w, h })).find(box => fits(box, taken, width, height));
    label.hidden = !spot;
    if (!spot) continue;
    taken.push(spot);
    label.classList.toggle("back", at[2] < 0 && t !== followed);
    label.style.transform = "translate(" + spot.x.toFixed(1) + "px," + spot.y.toFixed(1) + "px)";
  }
}

function fits(box, taken, width, height) {
  if (box.x < 0 || box.y < 0 || box.x + box.w > width || box.y + box.h > height) return false;
  return taken.every(o => box.x > o.x + o.w || box.x + box.w < o.x || box.y > o.y + o.h || box.y + box.h < o.y);
}

function writeLabel(label, token, followed) {
  const text = run().tokens[token], next = followed ? " → " + nearest(here(), token)[0].word : "";
  label.hidden = false;
  label.classList.toggle("chosen", followed);
  if (label.textContent === text + next) return;
  label.textContent = text;
  if (!next) return;
  const span = label.appendChild(document.createElement("span"));
  span.className = "next";
  span.textContent = next;
}

// Words and numbers --------------------------------------------------------------------------------------------------

function nearest(stop, token) {
  const r = run();
  return r.nearest[stop][token].map((entry, i) => ({ word: r.words[entry], p: r.probabilities[stop][token][i], angle: r.angles[stop][token][i] }));
}

function cells(row, texts) {
  for (const text of texts) row.appendChild(document.createElement("td")).textContent = text;
  return row;
}

function tell() {
  const r = run(), stop = here(), t = seen.token;
  get("where").textContent = "after " + stopName(stop) + ", " + stop + " of " + last();
  get("stop").setAttribute("aria-valuetext", "after " + stopName(stop));
  get("chosen").textContent = r.tokens[t];
  const way = r.moved.slice(0, stop).reduce((sum, step) => sum + step[t], 0);
  const parts = [stop ? "After " + stopName(stop) + ": moved " + r.moved[stop - 1][t].toFixed(1) + "° in this step, " + way.toFixed(1) + "° on its way so far." : "At its embedding, where it starts."];
  if (r.arm === "gpt") parts.push("Its state has length " + r.lengths[stop][t].toPrecision(3) + ", drawn as 1.");
  get("numbers").textContent = parts.join(" ");
  get("entries").replaceChildren(...nearest(stop, t).map(entry => {
    const row = cells(document.createElement("tr"), [entry.word, percent(entry.p), entry.angle.toFixed(0) + "°"]);
    const bar = document.createElement("span"), part = bar.appendChild(document.createElement("i"));
    bar.className = "bar";
    part.style.width = 100 * entry.p + "%";
    row.children[1].prepend(bar);
    return row;
  }));
  get("path").querySelectorAll("tr").forEach((row, s) => row.classList.toggle("now", s === stop));
}

function tellPath() {
  const r = run(), t = seen.token;
  get("path").replaceChildren(...r.points.map((_, s) => {
    const top = nearest(s, t)[0], row = document.createElement("tr");
    row.className = s ? kind(s - 1) : "";
    row.onclick = () => walkTo(s);
    return cells(row, [shortName(s), s ? r.moved[s - 1][t].toFixed(1) + "°" : "", top.word + " " + percent(top.p)]);
  }));
  get("tokens").querySelectorAll("button").forEach((button, i) => button.setAttribute("aria-pressed", i === t));
}

function announce() {
  const top = nearest(here(), seen.token)[0];
  get("live").textContent = "After " + stopName(here()) + ": " + run().tokens[seen.token] + ", most probable next token " + top.word + ", " + percent(top.p);
}

function showTip() {
  const tip = get("tip"), at = seen.hover;
  tip.hidden = !at;
  if (!at) return;
  const { token, stop } = at, points = run().points, lines = [run().tokens[token] + ", after " + stopName(stop)];
  if (stop) lines.push("moved " + run().moved[stop - 1][token].toFixed(1) + "° (drawn " + degrees(points[stop - 1][token], points[stop][token]).toFixed(1) + "°)");
  for (const entry of nearest(stop, token).slice(0, 3)) lines.push("→ " + entry.word + "  " + percent(entry.p) + ", at " + entry.angle.toFixed(0) + "°");
  tip.textContent = lines.join("\n");
  const [x, y] = shape.screen(points[stop][token]);
  const left = x + 16 + tip.offsetWidth > stage.clientWidth ? x - 16 - tip.offsetWidth : x + 16;
  const top = Math.max(4, Math.min(y - tip.offsetHeight / 2, stage.clientHeight - tip.offsetHeight - 4));
  tip.style.transform = "translate(" + Math.max(4, left).toFixed(0) + "px," + top.toFixed(0) + "px)";
}

// What one does ------------------------------------------------------------------------------------------------------

function walkTo(time, quiet) {
  const before = here();
  seen.time = Math.max(0, Math.min(last(), time));
  get("stop").value = here();
  if (before !== here() || !quiet) tell();
  if (!quiet) announce();
  draw();
}

function follow(token) {
  seen.token = token;
  tellPath();
  tell();
  announce();
  draw();
}

function turn(right, down) {
  seen.turn = product(about("x", down), product(about("y", right), seen.turn));
  draw();
}

function zoom(factor) {
  seen.zoom = Math.max(0.6, Math.min(6, seen.zoom * factor));
  draw();
}

function reset() {
  seen.turn = firstView();
  seen.zoom = 1;
  draw();
}

function play(on) {
  seen.playing = on;
  get("play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  if (seen.time >= last()) walkTo(0, true);
  const speed = Math.max(0.8, last() / 20), start = performance.now(), from = seen.time;
  const advance = now => {
    if (!seen.playing) return;
    const time = from + speed * (now - start) / 1000;
    walkTo(calm.matches ? Math.floor(time) : time, true);
    if (seen.time >= last()) play(false);
    else requestAnimationFrame(advance);
  };
  requestAnimationFrame(advance);
}

function open(index) {
  seen.run = index;
  const r = run(), stops = r.points;
  seen.hover = null;
  seen.token = Math.min(seen.token, r.tokens.length - 1);
  seen.time = Math.min(here(), last());
  seen.turn = firstView();
  shape = { arcs: stops.slice(1).map((stop, s) => stop.map((p, t) => arc(stops[s][t], p))) };
  shape.labels = r.tokens.map((_, t) => {
    const label = document.createElement("button");
    label.className = "label";
    label.type = "button";
    label.tabIndex = -1;
    label.onclick = () => follow(t);
    return label;
  });
  get("labels").replaceChildren(...shape.labels);
  get("tokens").replaceChildren(...r.tokens.map((token, t) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = token;
    button.onclick = () => follow(t);
    return button;
  }));
  get("stop").max = last();
  get("stop").value = here();
  get("runs").querySelectorAll("button").forEach((button, i) => {
    button.setAttribute("aria-checked", i === index);
    button.tabIndex = i === index ? 0 : -1;
  });
  explain();
  tellPath();
  tell();
  draw();
}

function explain() {
  const r = run(), gpt = r.arm === "gpt";
  get("how").textContent =
    (gpt
      ? "This is a GPT: its states have any length, and for this picture each was divided by its length, so that only directions are shown. "
      : "This is an nGPT: its states are unit vectors, and live on a sphere by themselves. ") +
    "That sphere lies in " + r.dimensions + " dimensions, this one in three. The places keep the angles between all stops as near to the true ones as possible; the angles of the steps count as much as all others together. (Spherical multidimensional scaling by gradient descent, started from the first three principal directions, made unit.) Between stops the way is a great circle.";
  get("lost").textContent =
    "The drawn angle is off by " + r.lost.step.toFixed(1) + "° on average over the steps, by " + r.lost.error.toFixed(1) + "° over all pairs of stops (correlation of drawn and true angles: " + r.lost.correlation.toFixed(2) +
    "). The length of a step can be trusted; how near two paths come to each other is only roughly right. All numbers come from the true space, and so do the nearest entries: the most probable next tokens if the output matrix read the state there.";
}

// Events -------------------------------------------------------------------------------------------------------------

const pointers = new Map();
let pinch = 0;

stage.addEventListener("pointerdown", event => {
  if (event.target.closest("button")) return;
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  stage.setPointerCapture(event.pointerId);
  stage.classList.add("turning");
  seen.hover = hit(event);
  if (seen.hover) follow(seen.hover.token);
  showTip();
});

stage.addEventListener("pointermove", event => {
  const before = pointers.get(event.pointerId);
  if (!before) {
    const found = event.target.closest("#zoom") ? null : hit(event), old = seen.hover;
    if (found?.token === old?.token && found?.stop === old?.stop) return;
    seen.hover = found;
    showTip();
    draw();
    return;
  }
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  seen.hover = null;
  showTip();
  if (pointers.size === 1) {
    turn((event.clientX - before[0]) / shape.radius, (event.clientY - before[1]) / shape.radius);
  } else {
    const [a, b] = [...pointers.values()], apart = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (pinch) zoom(apart / pinch);
    pinch = apart;
  }
});

for (const name of ["pointerup", "pointercancel", "lostpointercapture"])
  stage.addEventListener(name, event => {
    pointers.delete(event.pointerId);
    pinch = 0;
    if (!pointers.size) stage.classList.remove("turning");
  });

stage.addEventListener("pointerleave", () => {
  if (pointers.size || !seen.hover) return;
  seen.hover = null;
  showTip();
  draw();
});

stage.addEventListener("wheel", event => {
  if (!event.ctrlKey) return;
  event.preventDefault();
  zoom(Math.exp(-event.deltaY / 300));
}, { passive: false });

// The stop under the pointer: of the walked ways, in front, the nearest within 14 pixels; where a token is now counts first.
function hit(event) {
  if (!shape?.screen) return null;
  const box = stage.getBoundingClientRect(), x = event.clientX - box.left, y = event.clientY - box.top;
  let best = null, nearest = 14;
  run().tokens.forEach((_, token) => {
    for (let stop = 0; stop <= here(); stop++) {
      const at = shape.screen(run().points[stop][token]);
      if (at[2] < -0.1) continue;
      const far = Math.hypot(at[0] - x, at[1] - y) - (stop === here() ? 4 : 0) - (token === seen.token ? 3 : 0);
      if (far < nearest) [best, nearest] = [{ token, stop }, far];
    }
  });
  return best;
}

const keys = {
  ArrowLeft: () => turn(-0.1, 0), ArrowRight: () => turn(0.1, 0), ArrowUp: () => turn(0, -0.1), ArrowDown: () => turn(0, 0.1),
  "+": () => zoom(1.2), "=": () => zoom(1.2), "-": () => zoom(1 / 1.2), 0: reset, " ": () => play(!seen.playing),
  PageDown: () => { play(false); walkTo(here() + 1); }, PageUp: () => { play(false); walkTo(Math.ceil(seen.time) - 1); },
};
stage.addEventListener("keydown", event => {
  const action = event.target === stage && !event.ctrlKey && !event.metaKey && !event.altKey && keys[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

get("play").onclick = () => play(!seen.playing);
get("stop").oninput = () => { play(false); walkTo(Number(get("stop").value)); };
get("in").onclick = () => zoom(1.25);
get("out").onclick = () => zoom(0.8);
get("reset").onclick = reset;

get("runs").hidden = data.runs.length < 2;
get("runs").replaceChildren(...data.runs.map((r, i) => {
  const button = document.createElement("button");
  button.type = "button";
  button.setAttribute("role", "radio");
  button.textContent = (r.arm === "gpt" ? "GPT" : "nGPT") + ", " + r.name;
  button.onclick = () => { play(false); open(i); };
  return button;
}));
get("runs").addEventListener("keydown", event => {
  const way = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!way) return;
  event.preventDefault();
  const next = (seen.run + way + data.runs.length) % data.runs.length;
  play(false);
  open(next);
  get("runs").children[next].focus();
});

function dress() {
  readColours();
  draw();
}
if (location.hash === "#dark" || location.hash === "#light") root.dataset.theme = location.hash.slice(1);
get("theme").onclick = () => {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  dress();
};
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", dress);

// Paper is light, and its sphere of another size: drawn now, for no frame comes between this and the page.
addEventListener("beforeprint", () => {
  const theme = root.dataset.theme;
  root.classList.add("printing");
  root.dataset.theme = "light";
  readColours();
  frame();
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
});
addEventListener("afterprint", () => {
  root.classList.remove("printing");
  dress();
});
new ResizeObserver(draw).observe(stage);

readColours();
seen.token = Math.min(data.runs[0].tokens.length - 1, Math.floor(data.runs[0].tokens.length / 2));
const nGPT = data.runs.findIndex(r => r.arm === "ngpt");
open(Math.max(0, nGPT));
walkTo(last());
