// -- the table ---------------------------------------------------------------------------------------------------------
// `from`: the width of the table, in pixels, from which on a column is shown.
const COLUMNS = [
  { key: "id", name: capital(ONE), first: 1, width: "64px" },
  { key: "name", name: "Name", first: 1, width: "minmax(120px, 1fr)" },
  { key: "count", name: "Density", number: true, first: -1, width: "128px" },
  { key: "max", name: "Max", number: true, first: -1, width: "56px", from: 480 },
  { key: "mean", name: "Mean", number: true, first: -1, width: "56px", from: 1000 },
  { key: "tokens", name: "Top tokens", first: 1, width: "minmax(150px, 1.3fr)" },
  { key: "label", name: "Label", first: 1, width: "minmax(150px, 1.1fr)", from: table.concept ? 1000 : 620 },
  { key: "concept", name: "Best concept", first: 1, width: "minmax(120px, .7fr)", from: 620 },
  { key: "auroc", name: "AUROC", number: true, first: -1, width: "58px", from: 620 },
  { key: "match", name: "Match", number: true, first: -1, width: "96px", from: 640 },
].filter((column) => table[column.key]);
const ROW = 31;
const SAME = 0.7;

const OTHER = second ? visible(second.name, true) : "";
const matched = (index) => Boolean(table.match[index]) && table.match[index][1] >= SAME;
const FILTERS = [
  ["all", "All " + MANY, () => true],
  table.warn && ["warned", "With a warning", (index) => Boolean(table.warn[index])],
  table.warn && ["sound", "Without a warning", (index) => !table.warn[index]],
  table.concept && ["concept", "With a concept", (index) => Boolean(table.concept[index])],
  table.match && ["matched", "Also in " + OTHER, matched],
  table.match && ["unmatched", "Not in " + OTHER, (index) => !matched(index)],
].filter(Boolean);

// What the table shows: kept in the address, so that a link shows the same.
const wanted = { search: "", filter: "all", sort: "count", up: false };
let listed = [];
let cursor = 0;

const firstToken = (index) => (table.tokens[index].length ? textOf(table.tokens[index][0]).trim().toLowerCase() : "");
const SORT_VALUE = { tokens: firstToken, match: (index) => (table.match[index] ? table.match[index][1] : null) };
const sortValue = (key, index) => (SORT_VALUE[key] ? SORT_VALUE[key](index) : table[key][index]);
const haystack = table.id.map((id, index) => [
  " " + id + " ", ...table.tokens[index].map(textOf),
  ...["name", "label", "concept"].map((key) => (table[key] && table[key][index]) || ""),
].join("\n").toLowerCase());

function overviewHash() {
  const parts = new URLSearchParams();
  if (wanted.search) parts.set("search", wanted.search);
  if (wanted.filter !== "all") parts.set("filter", wanted.filter);
  if (wanted.sort !== "count" || wanted.up) parts.set("sort", wanted.sort + (wanted.up ? ".up" : ""));
  return "#" + parts;
}

function readWanted(parts) {
  const [sort, up] = (parts.get("sort") ?? "count").split(".");
  wanted.search = parts.get("search") ?? "";
  wanted.filter = FILTERS.some(([name]) => name === parts.get("filter")) ? parts.get("filter") : "all";
  wanted.sort = COLUMNS.some((column) => column.key === sort) ? sort : "count";
  wanted.up = up === "up";
  $("search").value = wanted.search;
  $("filter").value = wanted.filter;
}

function change(values) {
  Object.assign(wanted, values);
  try { history.replaceState(null, "", overviewHash()); } catch (error) { /* some browsers limit how often */ }
  arrange();
}

function arrange() {
  const words = wanted.search.toLowerCase().split(/\s+/).filter(Boolean);
  const keep = FILTERS.find(([name]) => name === wanted.filter)[2];
  const matches = (index) => keep(index) && words.every((word) => (/^#\d+$/.test(word)
    ? "#" + table.id[index] === word : haystack[index].includes(word)));
  const direction = wanted.up ? 1 : -1;
  listed = table.id.map((_, index) => index).filter(matches);
  const values = table.id.map((_, index) => sortValue(wanted.sort, index));
  listed.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x === y) return table.id[a] - table.id[b];
    if (x === null || x === "") return 1;
    if (y === null || y === "") return -1;
    return (x < y ? -1 : 1) * direction;
  });
  cursor = 0;
  const count = whole(listed.length) + " " + (listed.length === 1 ? ONE : MANY);
  $("found").textContent = listed.length < table.id.length ? count + " of " + whole(table.id.length) : count;
  $("scroll").scrollTop = 0;
  for (const element of $("columns").querySelectorAll("button")) {
    const mine = element.dataset.key === wanted.sort;
    element.textContent = element.dataset.name + (mine ? (wanted.up ? " ↑" : " ↓") : "");
    element.parentElement.setAttribute("aria-sort", mine ? (wanted.up ? "ascending" : "descending") : "none");
  }
  paint();
  map?.mark(listed.length < table.id.length ? new Set(listed) : null);
}

// A bar on a logarithmic scale, from one token to all of them.
function meter(count) {
  const bar = make("i");
  bar.style.width = (count ? Math.max(2, 52 * Math.log(count) / Math.log(head.tokens)) : 0) + "px";
  return make("span", "number meter", bar, percent(count / head.tokens));
}

const CELLS = {
  id: (index) => make("span", "id", linkTo(table.id[index]), table.warn && table.warn[index] ? warningMark() : null),
  name: (index) => make("span", "cell", visible(table.name[index], true)),
  count: (index) => meter(table.count[index]),
  max: (index) => make("span", "number", decimal(table.max[index])),
  mean: (index) => make("span", "number", decimal(table.mean[index])),
  tokens: (index) => make("span", "cell c-tokens", ...chips(table.tokens[index])),
  label: (index) => make("span", "cell", visible(table.label[index] ?? "", true)),
  concept: (index) => make("span", "cell", visible(table.concept[index] ?? "", true)),
  auroc: (index) => make("span", "number", table.auroc[index] === null ? "" : table.auroc[index].toFixed(3)),
  match: (index) => make("span", "number",
    table.match[index] ? table.match[index][0] + " · " + table.match[index][1].toFixed(2) : ""),
};

function warningMark() {
  const mark = make("span", "warned", "!");
  mark.title = "thin or doubtful evidence";
  return mark;
}

function line(index, rank, columns) {
  const element = make("div", "row", ...columns.map((column) => CELLS[column.key](index)));
  for (const cell of element.children) cell.setAttribute("role", "cell");
  element.setAttribute("role", "row");
  element.setAttribute("aria-rowindex", rank + 2);
  element.style.top = rank * ROW + "px";
  if (rank === cursor) element.classList.add("here");
  return element;
}

// Only the rows in sight, and the columns that fit, are in the document.
function paint() {
  const scroll = $("scroll");
  if (!scroll.clientHeight) return;
  const columns = COLUMNS.filter((column) => !column.from || scroll.clientWidth >= column.from);
  $("table").style.setProperty("--columns", columns.map((column) => column.width).join(" "));
  for (const header of $("columns").children) header.hidden = !columns.includes(header.column);
  const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 10);
  const end = Math.min(listed.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + 10);
  $("columns").style.paddingRight = 14 + scroll.offsetWidth - scroll.clientWidth + "px";
  $("rows").style.height = listed.length * ROW + "px";
  $("table").setAttribute("aria-rowcount", listed.length + 1);
  const lines = [];
  for (let i = first; i < end; i += 1) lines.push(line(listed[i], i, columns));
  if (!listed.length) lines.push(make("div", "nothing", "No " + ONE + " matches."));
  $("rows").replaceChildren(...lines);
}

function moveCursor(to) {
  cursor = Math.max(0, Math.min(listed.length - 1, to));
  const scroll = $("scroll");
  const top = cursor * ROW;
  if (top < scroll.scrollTop) scroll.scrollTop = top;
  if (top + ROW > scroll.scrollTop + scroll.clientHeight) scroll.scrollTop = top + ROW - scroll.clientHeight;
  paint();
}

// -- around the table ----------------------------------------------------------------------------------------------------
const TILES = [
  ["arch", "architecture", (value) => ARCHITECTURES[value] ?? value],
  ["d_sae", "latents", whole], ["l0", "L0", decimal], ["fvu", "FVU", thousandths],
  ["ce_recovered", "CE recovered", (value) => (100 * value).toFixed(1) + " %"], ["delta_ce", "ΔCE, nats", thousandths],
  ["kl", "KL, nats", thousandths], ["dead_fraction", "dead", percent], ["cosine", "cosine", thousandths],
];
const ARCHITECTURES = { topk: "TopK", l1: "L1", sqrt_l1: "√L1", gated: "Gated", jumprelu: "JumpReLU" };

function tiles() {
  const present = (summary, key) => summary && summary[key] !== undefined && summary[key] !== null;
  const tile = (name, ...values) => $("tiles").append(make("div", "", make("dt", "", name), ...values));
  if (second) tile("", make("dd", "whose", "this"), make("dd", "whose", visible(second.name, true)));
  for (const [key, name, format] of TILES) {
    if (!present(head.summary, key) && !present(second?.summary, key)) continue;
    const value = (summary) => make("dd", "", present(summary, key) ? String(format(summary[key])) : "–");
    tile(name, value(head.summary), ...(second ? [value(second.summary)] : []));
  }
  if (second) tile("without a match", make("dd", "", whole(second.unmatched)), make("dd", "", "–"));
}

function columnHeads() {
  for (const column of COLUMNS) {
    const press = button("", "", () => change({ sort: column.key,
      up: wanted.sort === column.key ? !wanted.up : column.first > 0 }));
    press.dataset.key = column.key;
    press.dataset.name = column.name;
    const header = make("span", (column.number ? "number " : "") + "c-" + column.key, press);
    header.setAttribute("role", "columnheader");
    header.column = column;
    $("columns").append(header);
  }
}

function deadList() {
  if (!head.dead.length) return;
  const many = 2000;
  const list = make("details", "", make("summary", "", whole(head.dead.length) + " dead " + (head.dead.length === 1 ? ONE : MANY)));
  list.addEventListener("toggle", () => {
    if (list.children.length > 1) return;
    const links = head.dead.slice(0, many).flatMap((id) => [linkTo(id), " "]);
    list.append(make("p", "", ...links, head.dead.length > many ? "and " + whole(head.dead.length - many) + " more" : ""));
  });
  $("dead").append(list);
}

// A link to each file, and one to each folder of files.
function exportLinks() {
  const folders = new Set();
  for (const file of head.exports ?? []) {
    const [, folder] = file.match(/^export\/([^/]+)\/[^/]+$/) ?? [];
    if (folders.has(folder)) continue;
    const link = make("a", "", folder ? capital(folder) : file.split(".").pop().toUpperCase());
    link.href = folder ? "export/" + folder + "/" : file;
    if (folder) folders.add(folder);
    else link.download = "";
    $("exports").append(link, " ");
  }
}

function provenance() {
  const about = make("table", "");
  for (const [key, value] of Object.entries(head.provenance)) {
    const text = typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
    about.append(make("tr", "", make("td", "", key), make("td", "", visible(text, true))));
  }
  $("provenance").append(make("details", "", make("summary", "", "How this was made"), about));
}

function drawDensity() {
  if ($("overview").hidden) return;
  const logs = table.count.filter(Boolean).map((count) => Math.log10(count / head.tokens));
  if (!logs.length) { $("density").hidden = true; return; }
  const low = Math.floor(logs.reduce((a, b) => Math.min(a, b)));
  const high = Math.max(low + 1, Math.min(0, Math.floor(logs.reduce((a, b) => Math.max(a, b))) + 1));
  const width = 0.125;
  const counts = new Array(Math.round((high - low) / width)).fill(0);
  for (const value of logs) counts[Math.min(counts.length - 1, Math.floor((value - low) / width))] += 1;
  const names = counts.map((_, i) => percent(10 ** (low + i * width)) + " – " + percent(10 ** (low + (i + 1) * width)));
  const ticks = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  steerkit.draw($("density-plot"),
    [{ type: "bar", x: counts.map((_, i) => low + (i + 0.5) * width), y: counts, width: width * 0.92, customdata: names,
      hovertemplate: "%{customdata} of tokens: %{y} " + MANY + "<extra></extra>" }],
    { xaxis: { tickvals: ticks, ticktext: ticks.map(powerOfTen), range: [low, high], showgrid: false,
      title: { text: "share of tokens on which a " + ONE + " is active" } },
    yaxis: { title: { text: MANY }, nticks: 4 }, margin: { l: 48, r: 8, t: 6, b: 38 } });
}

function overview() {
  $("title").textContent = visible(head.title, true);
  $("subtitle").textContent = visible(head.subtitle, true);
  $("table").setAttribute("aria-label", capital(MANY));
  $("search").placeholder = "Search tokens, labels, numbers  ( / )";
  $("search").setAttribute("aria-label", "Search " + MANY);
  $("jump-to").placeholder = capital(ONE) + " …";
  $("jump-to").setAttribute("aria-label", "Go to " + ONE);
  for (const [name, text] of FILTERS) {
    const option = make("option", "", text);
    option.value = name;
    $("filter").append(option);
  }
  $("filter").hidden = FILTERS.length < 2;
  exportLinks();
  tiles();
  columnHeads();
  deadList();
  provenance();
  $("search").addEventListener("input", () => change({ search: $("search").value.trim() }));
  $("filter").addEventListener("change", () => change({ filter: $("filter").value }));
  $("scroll").addEventListener("scroll", paint, { passive: true });
  addEventListener("resize", paint);
}
