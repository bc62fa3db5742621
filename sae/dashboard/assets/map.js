// -- the map -----------------------------------------------------------------------------------------------------------
// Points on a canvas: thousands of them follow the pointer, where elements or Plotly would lag. Drag to move, wheel or
// pinch to zoom, hover for what a point is, click to open it.
const SCALE = [[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]];                                                             // viridis
const STEPS = 24;

function viridis(share) {
  const at = Math.min(0.999, Math.max(0, share)) * (SCALE.length - 1);
  const [low, high] = [SCALE[Math.floor(at)], SCALE[Math.floor(at) + 1]];
  return "rgb(" + low.map((value, i) => Math.round(value + (at % 1) * (high[i] - value))).join(",") + ")";
}

// Each point's class (-1: none), the colour of each class, and what the legend says.
function byDensity() {
  const logs = table.count.map((count) => Math.log(Math.max(1, count) / head.tokens));
  const [low, high] = logs.reduce(([a, b], value) => [Math.min(a, value), Math.max(b, value)], [Infinity, -Infinity]);
  // The brightest end of the scale is lost on white, the darkest on black.
  const dark = steerkit.theme() === "dark";
  const colours = Array.from({ length: STEPS }, (_, i) => viridis((dark ? 0.14 : 0) + 0.86 * i / (STEPS - 1)));
  const ramp = make("span", "ramp");
  ramp.style.background = "linear-gradient(90deg, " + colours.filter((_, i) => i % 4 === 0 || i === STEPS - 1).join(", ") + ")";
  return { classes: logs.map((value) => Math.min(STEPS - 1, Math.floor(STEPS * (value - low) / (high - low || 1)))), colours,
    legend: [percent(Math.exp(low)), ramp, percent(Math.exp(high)) + " of tokens"] };
}

function byClass(of) {
  const counts = new Map();
  for (let index = 0; index < table.id.length; index += 1) {
    const name = of(index);
    if (name) counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const palette = steerkit.palette();
  const names = [...counts.keys()].sort((a, b) => counts.get(b) - counts.get(a)).slice(0, palette.length - 1);
  const classes = table.id.map((_, index) => names.indexOf(of(index)));
  return { classes, colours: palette, legend: names.map((name, i) => {
    const dot = make("i", "dot");
    dot.style.background = palette[i];
    return make("span", "", dot, visible(name, true));
  }) };
}

const COLOURINGS = [
  ["density", "density", byDensity],
  table.concept && ["concept", "concept", () => byClass((index) => table.concept[index] && table.concept[index].split("=")[0])],
  table.match && ["match", "match", () => byClass((index) => (matched(index) ? "also in " + OTHER : "only here"))],
  table.warn && ["warning", "warning", () => byClass((index) => (table.warn[index] ? "warning" : null))],
].filter(Boolean);

function createMap() {
  const { x, y, method } = head.map;
  const n = x.length;
  const canvas = make("canvas");
  const legend = make("div", "legend");
  const pen = canvas.getContext("2d");
  const camera = { x: 500, y: 500, zoom: 1 };
  const pointers = new Map();
  let colouring = COLOURINGS[0][2];
  let shown, only = null, under = -1, moved = 0, waitingForFrame = false;

  // Reading an element's size is slow where it is done for each point: once a frame is enough.
  let width = 0, height = 0;
  const scale = () => camera.zoom * Math.min(width, height) / 1060;
  const screenX = (i) => width / 2 + (x[i] - camera.x) * scale();
  const screenY = (i) => height / 2 - (y[i] - camera.y) * scale();
  const radius = () => Math.min(7, (n < 600 ? 3.2 : n < 4000 ? 2.2 : 1.4) * camera.zoom ** 0.4);

  function dots(indices, colour) {
    const [size, factor] = [radius(), scale()];
    const [left, top] = [width / 2 - camera.x * factor, height / 2 + camera.y * factor];
    pen.fillStyle = colour;
    for (const i of indices) {
      const [across, down] = [left + x[i] * factor, top - y[i] * factor];
      if (across < -9 || down < -9 || across > width + 9 || down > height + 9) continue;
      if (size < 2) pen.fillRect(across - size, down - size, 2 * size, 2 * size);
      else { pen.beginPath(); pen.arc(across, down, size, 0, 7); pen.fill(); }
    }
  }

  function draw() {
    waitingForFrame = false;
    const ratio = devicePixelRatio || 1;
    [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return;
    const [columns, lines] = [Math.round(width * ratio), Math.round(height * ratio)];
    if (canvas.width !== columns || canvas.height !== lines) Object.assign(canvas, { width: columns, height: lines });
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    dots(shown.groups.out, steerkit.colour("line"));
    dots(shown.groups.rest, steerkit.colour("faint"));
    shown.groups.forEach((indices, i) => dots(indices, shown.colours[i]));
    if (under >= 0) {
      pen.strokeStyle = steerkit.colour("ink");
      pen.lineWidth = 1.5;
      pen.beginPath();
      pen.arc(screenX(under), screenY(under), radius() + 3, 0, 7);
      pen.stroke();
    }
  }

  function redraw() {
    if (!waitingForFrame) requestAnimationFrame(draw);
    waitingForFrame = true;
  }

  function regroup() {
    shown = colouring();
    shown.groups = shown.colours.map(() => []);
    shown.groups.rest = [];
    shown.groups.out = [];
    for (let i = 0; i < n; i += 1) {
      const group = only && !only.has(i) ? "out" : shown.classes[i] < 0 ? "rest" : shown.classes[i];
      shown.groups[group].push(i);
    }
    legend.replaceChildren(...shown.legend);
    redraw();
  }

  function nearest(left, top) {
    const factor = scale();
    const [across, up] = [camera.x + (left - width / 2) / factor, camera.y - (top - height / 2) / factor];
    let best = -1, distance = (10 / factor) ** 2;
    for (let i = 0; i < n; i += 1) {
      if (only && !only.has(i)) continue;
      const away = (x[i] - across) ** 2 + (y[i] - up) ** 2;
      if (away < distance) { best = i; distance = away; }
    }
    return best;
  }

  function point(event) {
    const box = canvas.getBoundingClientRect();
    const found = nearest(event.clientX - box.left, event.clientY - box.top);
    canvas.style.cursor = found < 0 ? "grab" : "pointer";
    if (found !== under) { under = found; redraw(); }
    if (found < 0) { hideTip(); return; }
    const top = box.top + screenY(found) - radius();
    showTip({ left: box.left + screenX(found) - 12, top, bottom: top + 2 * radius() },
      make("b", "", titleOf(table.id[found])), "  " + percent(table.count[found] / head.tokens),
      table.label && table.label[found] ? make("div", "", visible(table.label[found], true)) : "",
      make("div", "", ...chips(table.tokens[found])));
  }

  function zoom(factor, left = width / 2, top = height / 2) {
    const before = scale();
    camera.zoom = Math.min(60, Math.max(0.8, camera.zoom * factor));
    const change = 1 / before - 1 / scale();
    camera.x += (left - width / 2) * change;
    camera.y -= (top - height / 2) * change;
    redraw();
  }

  const spread = () => {
    const [a, b] = [...pointers.values()];
    return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
  };

  canvas.addEventListener("pointerdown", (event) => {
    pointers.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) { point(event); return; }
    const old = pointers.size === 2 ? spread() : 0;
    pointers.set(event.pointerId, event);
    if (old) { zoom(spread() / old); return; }
    const [across, down] = [event.clientX - before.clientX, event.clientY - before.clientY];
    moved += Math.abs(across) + Math.abs(down);
    camera.x -= across / scale();
    camera.y += down / scale();
    hideTip();
    redraw();
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { under = -1; hideTip(); redraw(); });
  canvas.addEventListener("click", (event) => {
    if (moved > 5) return;
    point(event);
    if (under >= 0) location.hash = "latent=" + table.id[under];
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const box = canvas.getBoundingClientRect();
    zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
  }, { passive: false });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Map of " + MANY + "; the table lists the same");

  const colours = make("select");
  colours.setAttribute("aria-label", "Colour of the map");
  for (const [value, text] of COLOURINGS) {
    const option = make("option", "", "colour: " + text);
    option.value = value;
    colours.append(option);
  }
  colours.addEventListener("change", () => {
    colouring = COLOURINGS.find(([value]) => value === colours.value)[2];
    regroup();
  });
  const tools = make("span", "tools", colours, button("+", "small", () => zoom(1.6)), button("−", "small", () => zoom(1 / 1.6)),
    button("Reset", "small", () => { Object.assign(camera, { x: 500, y: 500, zoom: 1 }); redraw(); }));
  ["Zoom in", "Zoom out", "The whole map"].forEach((label, i) => tools.children[i + 1].setAttribute("aria-label", label));
  $("charts").append(Object.assign(make("div", "panel", make("h2", "", "Map", make("small", "", visible(method, true))), tools,
    canvas, legend), { id: "map" }));
  $("board").classList.add("with-map");

  regroup();
  new ResizeObserver(redraw).observe(canvas);
  new MutationObserver(regroup).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  return { mark(indices) { only = indices; regroup(); } };
}

const map = head.map ? createMap() : null;
