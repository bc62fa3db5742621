"use strict";
(() => {
  // -- data ---------------------------------------------------------------------------------------------------------
  const shards = window.__shards;
  const waiting = new Map();
  window.__shard = (name, data) => { shards[name] = data; };

  function load(name) {
    if (name in shards) return Promise.resolve(shards[name]);
    if (!waiting.has(name)) {
      waiting.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        script.src = "data/" + name + ".js";
        script.onload = () => resolve(shards[name]);
        script.onerror = () => { waiting.delete(name); reject(new Error(script.src)); };
        document.head.append(script);
      }));
    }
    return waiting.get(name);
  }

  const head = shards.head;
  const table = head.table;
  const place = new Map(table.id.map((id, index) => [id, index]));
  const dead = new Set(head.dead);
  const special = new Set(head.special);
  const texts = new Map();
  head.top_text[0].forEach((id, index) => texts.set(id, head.top_text[1][index]));

  async function loadTexts() {
    const data = await load("tokens");
    if (texts.complete) return;
    data.ids.forEach((id, index) => texts.set(id, data.text[index]));
    texts.complete = true;
  }

  async function row(number) {
    let shard = 0;
    while (shard + 1 < head.row_shards.length && head.row_shards[shard + 1] <= number) shard += 1;
    return (await load("rows-" + shard))[number - head.row_shards[shard]];
  }

  // -- small things --------------------------------------------------------------------------------------------------
  const $ = (id) => document.getElementById(id);

  function make(tag, className, ...children) {
    const element = document.createElement(tag);
    if (className) element.className = className;
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const whole = (value) => value.toLocaleString("en-US");
  const percent = (share) => (share >= 1e-4 || share === 0 ? (100 * share).toFixed(2)
    : share >= 1e-6 ? (100 * share).toFixed(4) : (100 * share).toExponential(0)) + " %";
  const powerOfTen = (exponent) => (exponent >= -7 ? Number((10 ** (exponent + 2)).toPrecision(1)) : "1e" + (exponent + 2)) + " %";
  const decimal = (value) => {
    const size = Math.abs(value);
    if (!size) return "0";
    return (size < 1e-3 || size >= 1e5 ? value.toExponential(1)
      : value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : size >= 0.1 ? 2 : 3)).replace("-", "−");
  };

  // Whitespace that would not be seen, made visible; `inText` leaves the spaces between words as they are.
  const INCOMPLETE = "\udc00";
  function visible(text, inText) {
    if (text.startsWith(INCOMPLETE)) return "‹" + text.slice(1).replace(/..(?=.)/g, "$& ") + "›";
    let shown = text.replace(/\r/g, "␍").replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/\u00a0/g, "⍽")
      .replace(/[\x00-\x1f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\x7f/g, "␡")
      .replace(/[\u200b-\u200f\u2028-\u202f\u2060-\u206f\ufeff]/g, "◌");
    if (inText) return /^ +$/.test(shown) && shown.length > 1 ? shown.replace(/ /g, "·") : shown;
    if (head.style === "wordpiece") return shown.startsWith(" ") ? shown.slice(1) : "##" + shown;
    return shown.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
  }

  const textOf = (id) => texts.get(id) ?? "[" + id + "]";

  function token(id, className = "token") {
    const shown = special.has(id) ? textOf(id) : visible(textOf(id), false);
    const marks = shown.match(/^(·+|##)(?=.)/);
    if (!marks) return make("span", className, shown);
    return make("span", className, make("span", "mark", marks[0]), shown.slice(marks[0].length));
  }

  // A character may be spread over several tokens: the first shows it, the others a dot.
  function contextTexts(ids) {
    const raw = ids.map(textOf);
    const shown = raw.map((text) => visible(text, true));
    for (let start = 0; start < raw.length; start += 1) {
      if (!raw[start].startsWith(INCOMPLETE)) continue;
      let hex = "";
      for (let end = start; end < raw.length && raw[end].startsWith(INCOMPLETE); end += 1) {
        hex += raw[end].slice(1);
        const bytes = Uint8Array.from(hex.match(/../g), (pair) => parseInt(pair, 16));
        let text;
        try { text = new TextDecoder("utf-8", { fatal: true }).decode(bytes); } catch (error) { continue; }
        shown[start] = text;
        shown.fill("‧", start + 1, end + 1);
        start = end;
        break;
      }
    }
    return shown;
  }

  // -- the overview --------------------------------------------------------------------------------------------------
  const COLUMNS = [
    { key: "id", name: "Latent", first: 1 },
    { key: "count", name: "Density", number: true, first: -1 },
    { key: "max", name: "Max", number: true, first: -1 },
    { key: "mean", name: "Mean", number: true, first: -1 },
    { key: "tokens", name: "Top tokens", first: 1 },
    { key: "concept", name: "Best concept", first: 1 },
    { key: "auroc", name: "AUROC", number: true, first: -1 },
  ].filter((column) => table[column.key]);
  const ROW = 31;
  const order = { key: "count", direction: -1 };
  let listed = [];

  const firstToken = (index) => (table.tokens[index].length ? textOf(table.tokens[index][0]).trim().toLowerCase() : "");
  const sortValue = (key, index) => (key === "tokens" ? firstToken(index) : table[key][index]);
  const haystack = table.id.map((id, index) => [
    " " + id + " ", ...table.tokens[index].map((t) => textOf(t).toLowerCase()),
    table.concept && table.concept[index] ? table.concept[index].toLowerCase() : "",
  ].join("\n"));

  function arrange() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const matches = (index) => words.every((word) => (/^#\d+$/.test(word)
      ? "#" + table.id[index] === word : haystack[index].includes(word)));
    listed = table.id.map((_, index) => index).filter(matches);
    listed.sort((a, b) => {
      const [x, y] = [sortValue(order.key, a), sortValue(order.key, b)];
      if (x === y) return table.id[a] - table.id[b];
      if (x === null || x === "") return 1;
      if (y === null || y === "") return -1;
      return (x < y ? -1 : 1) * order.direction;
    });
    const count = whole(listed.length) + (listed.length === 1 ? " latent" : " latents");
    $("found").textContent = words.length ? count + " of " + whole(table.id.length) : count;
    $("scroll").scrollTop = 0;
    for (const button of $("columns").querySelectorAll("button")) {
      const mine = button.dataset.key === order.key;
      const arrow = order.direction > 0 ? " ↑" : " ↓";
      button.textContent = button.dataset.name + (mine ? arrow : "");
      button.parentElement.setAttribute("aria-sort", mine ? (order.direction > 0 ? "ascending" : "descending") : "none");
    }
    paint();
  }

  // A bar on a logarithmic scale, from one token to all of them.
  function meter(count) {
    const bar = make("i");
    bar.style.width = (count ? Math.max(2, 56 * Math.log(count) / Math.log(head.tokens)) : 0) + "px";
    return make("span", "number meter", bar, percent(count / head.tokens));
  }

  function line(index, rank) {
    const link = make("a", "", String(table.id[index]));
    link.href = "#latent=" + table.id[index];
    const cells = {
      id: () => make("span", "id", link),
      count: () => meter(table.count[index]),
      max: () => make("span", "number", decimal(table.max[index])),
      mean: () => make("span", "number c-mean", decimal(table.mean[index])),
      tokens: () => make("span", "cell c-tokens", ...table.tokens[index].map((id) => token(id, "token chip"))),
      concept: () => make("span", "cell c-concept", table.concept[index] ?? ""),
      auroc: () => make("span", "number c-auroc", table.auroc[index] === null ? "" : table.auroc[index].toFixed(3)),
    };
    const element = make("div", "row", ...COLUMNS.map((column) => cells[column.key]()));
    for (const cell of element.children) cell.setAttribute("role", "cell");
    element.setAttribute("aria-rowindex", rank + 2);
    element.style.top = rank * ROW + "px";
    element.setAttribute("role", "row");
    return element;
  }

  // Only the rows in sight are in the document.
  function paint() {
    const scroll = $("scroll");
    const first = Math.max(0, Math.floor(scroll.scrollTop / ROW) - 10);
    const end = Math.min(listed.length, Math.ceil((scroll.scrollTop + scroll.clientHeight) / ROW) + 10);
    $("columns").style.paddingRight = 14 + scroll.offsetWidth - scroll.clientWidth + "px";
    $("rows").style.height = listed.length * ROW + "px";
    $("table").setAttribute("aria-rowcount", listed.length + 1);
    const lines = [];
    for (let i = first; i < end; i += 1) lines.push(line(listed[i], i));
    if (!listed.length) lines.push(make("div", "nothing", "No latent matches."));
    $("rows").replaceChildren(...lines);
  }

  const TILES = [
    ["arch", "architecture", () => head.arch],
    ["d_sae", "latents", whole], ["l0", "L0", decimal], ["fvu", "FVU", (v) => v.toFixed(3)],
    ["ce_recovered", "CE recovered", (v) => (100 * v).toFixed(1) + " %"], ["delta_ce", "ΔCE, nats", (v) => v.toFixed(3).replace("-", "−")],
    ["kl", "KL, nats", (v) => v.toFixed(3)], ["dead_fraction", "dead", percent], ["cosine", "cosine", (v) => v.toFixed(3)],
  ];

  function overview() {
    $("title").textContent = head.title;
    $("subtitle").textContent = head.subtitle;
    for (const [key, name, format] of TILES) {
      const value = head.summary[key];
      if (value === undefined || value === null) continue;
      $("tiles").append(make("div", "", make("dt", "", name), make("dd", "", String(format(value)))));
    }
    if (table.concept) $("table").classList.add("with-concepts");
    for (const column of COLUMNS) {
      const button = make("button", "");
      button.type = "button";
      button.dataset.key = column.key;
      button.dataset.name = column.name;
      button.addEventListener("click", () => {
        order.direction = order.key === column.key ? -order.direction : column.first;
        order.key = column.key;
        arrange();
      });
      const header = make("span", (column.number ? "number " : "") + "c-" + column.key, button);
      header.setAttribute("role", "columnheader");
      $("columns").append(header);
    }
    const about = make("table", "");
    for (const [key, value] of Object.entries(head.provenance)) {
      const text = typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
      about.append(make("tr", "", make("td", "", key), make("td", "", text)));
    }
    $("provenance").append(make("details", "", make("summary", "", "How this was made"), about));
    arrange();
    drawDensity();
  }

  function drawDensity() {
    const logs = table.count.filter(Boolean).map((count) => Math.log10(count / head.tokens));
    if (!logs.length) return;
    const low = Math.floor(logs.reduce((a, b) => Math.min(a, b)));
    const high = Math.max(low + 1, Math.min(0, Math.floor(logs.reduce((a, b) => Math.max(a, b))) + 1));
    const width = 0.125;
    const counts = new Array(Math.round((high - low) / width)).fill(0);
    for (const value of logs) counts[Math.min(counts.length - 1, Math.floor((value - low) / width))] += 1;
    const names = counts.map((_, i) => percent(10 ** (low + i * width)) + " – " + percent(10 ** (low + (i + 1) * width)));
    const ticks = Array.from({ length: high - low + 1 }, (_, i) => low + i);
    steerkit.draw($("density-plot"),
      [{ type: "bar", x: counts.map((_, i) => low + (i + 0.5) * width), y: counts, width: width * 0.92, customdata: names,
        hovertemplate: "%{customdata} of tokens: %{y} latents<extra></extra>" }],
      { xaxis: { tickvals: ticks, ticktext: ticks.map(powerOfTen), range: [low, high], showgrid: false,
        title: { text: "share of tokens on which a latent is active" } },
      yaxis: { title: { text: "latents" }, nticks: 4 }, margin: { l: 48, r: 8, t: 6, b: 38 } });
  }

  // -- one latent ----------------------------------------------------------------------------------------------------
  function neighbour(id, step) {
    const here = listed.indexOf(place.get(id));
    const next = here < 0 ? undefined : listed[here + step];
    return next === undefined ? null : table.id[next];
  }

  function top(id, facts) {
    const link = (text, target, label) => {
      const element = make("a", "button", text);
      if (target === null) { element.setAttribute("aria-disabled", "true"); element.style.opacity = 0.4; }
      else element.href = target === "" ? "#" : "#latent=" + target;
      element.setAttribute("aria-label", label);
      return element;
    };
    return make("div", "top", make("h2", "", "Latent " + id), make("div", "facts", ...facts), make("span", "space"),
      make("nav", "", link("All latents", "", "Back to the table"), link("←", neighbour(id, -1), "Previous latent"),
        link("→", neighbour(id, 1), "Next latent")));
  }

  const fact = (name, value) => make("span", "", name + " ", make("b", "", value));
  const panel = (title, note, ...children) => make("div", "panel",
    make("h2", "", title, note ? make("small", "", note) : null), ...children);

  function logitTable(ids, values, kind) {
    const lines = ids.map((id, i) => make("tr", "", make("td", "", token(id)),
      make("td", "number " + kind, (values[i] > 0 ? "+" : "") + decimal(values[i]))));
    return make("table", "", ...lines);
  }

  function logits(data) {
    const [ids, values] = data;
    const n = ids.length / 2;
    return panel("Logits", "decoder direction to vocabulary", make("div", "pair",
      logitTable(ids.slice(0, n), values.slice(0, n), "for"),
      logitTable(ids.slice(n).reverse(), values.slice(n).reverse(), "against")));
  }

  function tokenTable(lines) {
    const names = make("tr", "", make("th", "", "token"), ...["share", "mean", "times"].map((t) => make("th", "number", t)));
    return panel("Tokens", "by summed activation", make("table", "", names, ...lines.map(([id, share, mean, count]) =>
      make("tr", "", make("td", "", token(id)), make("td", "number", percent(share)),
        make("td", "number", decimal(mean)), make("td", "number", whole(count))))));
  }

  function nearest(pairs) {
    const lines = pairs.map(([id, cosine]) => {
      const link = make("a", "", String(id));
      link.href = "#latent=" + id;
      const index = place.get(id);
      const about = index === undefined ? [make("span", "", dead.has(id) ? "dead" : "")]
        : table.tokens[index].slice(0, 3).map((t) => token(t, "token chip"));
      return make("tr", "", make("td", "near", link, ...about), make("td", "number", decimal(cosine)));
    });
    return panel("Nearest directions", "decoder cosine", make("table", "", ...lines));
  }

  const WINDOW = 15;
  function context(example, maximum) {
    const [, , position, activation, first, hex] = example;
    const value = make("span", "value", decimal(activation));
    const text = make("span", "text", "…");
    const element = make("div", "context", value, text);
    const values = new Map((hex.match(/../g) ?? []).map((pair, i) => [position + first + i, parseInt(pair, 16) / 255 * activation]));
    let open = false;
    const fill = (ids) => {
      const shown = contextTexts(ids);
      const start = open ? 0 : Math.max(0, position - WINDOW);
      const end = open ? ids.length : Math.min(ids.length, position + WINDOW + 1);
      const spans = [];
      if (start > 0) spans.push(make("span", "cut", "… "));
      for (let i = start; i < end; i += 1) {
        const act = values.get(i) ?? 0;
        let word = shown[i];
        if (word.length > 1 && word.startsWith(" ")) {
          if (i > start) spans.push(" ");
          word = word.slice(1);
        }
        const span = make("span", special.has(ids[i]) ? "special" : "", word);
        if (act > 0) span.style.background = "rgba(var(--heat), " + (0.1 + 0.72 * Math.min(1, act / maximum)).toFixed(3) + ")";
        if (act > 0.7 * maximum) span.classList.add("hot");
        if (i === position) span.classList.add("peak");
        span.dataset.token = ids[i];
        span.dataset.value = Math.abs(i - position) > WINDOW ? "" : decimal(act);
        spans.push(span);
      }
      if (end < ids.length) spans.push(make("span", "cut", " …"));
      text.replaceChildren(...spans);
    };
    row(example[1]).then((ids) => {
      fill(ids);
      element.addEventListener("click", () => {
        if (String(getSelection())) return;
        open = !open;
        fill(ids);
      });
    });
    return element;
  }

  const FIFTHS = ["Weakest fifth", "Second fifth", "Middle fifth", "Fourth fifth", "Strongest fifth"];
  function contexts(examples, maximum) {
    const groups = [0, 5, 4, 3, 2, 1];
    const parts = [];
    for (const group of groups) {
      const mine = examples.filter((example) => example[0] === group);
      if (!mine.length) continue;
      const name = group ? FIFTHS[group - 1] : "Strongest contexts";
      const note = group ? "of a random sample of the other rows" : "one a row of text; click for the whole row";
      parts.push(make("div", "group", make("h2", "", name, make("small", "", note)),
        ...mine.map((example) => context(example, maximum))));
    }
    return make("div", "", ...parts);
  }

  function drawHistogram(element, [first, ...counts]) {
    const edges = head.edges;
    const end = first + counts.length;
    const x = counts.map((_, i) => first + i + 0.5);
    const step = Math.max(1, Math.ceil(counts.length / 6));
    const ticks = [];
    for (let i = end; i >= first; i -= step) ticks.push(i);
    steerkit.draw(element, [{ type: "bar", x, y: counts.map((v) => v || null),
      customdata: x.map((v) => decimal(edges[Math.floor(v)]) + " to " + decimal(edges[Math.floor(v) + 1])),
      hovertemplate: "%{customdata}: %{y:,} tokens<extra></extra>" }],
    { xaxis: { tickvals: ticks, ticktext: ticks.map((t) => decimal(edges[t])), showgrid: false,
      range: [first - 0.3, Math.max(end, first + 5) + 0.3], title: { text: "activation" } },
      yaxis: { type: "log", dtick: 1, exponentformat: "none", tickformat: ",d", title: { text: "tokens" },
        range: [-0.2, Math.log10(Math.max(...counts)) + 0.15] }, margin: { l: 44, r: 18, t: 6, b: 38 } });
  }

  function friendly(title, ...text) {
    const back = make("a", "button", "All latents");
    back.href = "#";
    return make("div", "friendly", make("h2", "", title), make("p", "", ...text), back);
  }

  async function latent(id) {
    const view = $("latent");
    const index = place.get(id);
    if (!(Number.isInteger(id) && id >= 0 && id < head.d_sae)) {
      view.replaceChildren(friendly("There is no such latent", "This autoencoder has latents 0 to " + (head.d_sae - 1) + "."));
      return;
    }
    if (index === undefined) {
      view.replaceChildren(dead.has(id)
        ? friendly("Latent " + id + " is dead", "It was not active on any of the " + whole(head.tokens) + " tokens looked at.")
        : friendly("Latent " + id + " is not in this dashboard", "It is alive, but only " + whole(table.id.length) + " of "
          + whole(head.n_alive) + " living latents were included."));
      return;
    }
    let data;
    try {
      [data] = await Promise.all([load("latents-" + Math.floor(index / head.per_shard)), loadTexts()]);
    } catch (error) {
      view.replaceChildren(friendly("A file of this dashboard is missing", error.message));
      return;
    }
    if (location.hash !== "#latent=" + id) return;
    const mine = data[index % head.per_shard];
    const facts = [
      fact("density", percent(table.count[index] / head.tokens)),
      fact("active", whole(table.count[index]) + " of " + whole(head.tokens)),
      fact("max", decimal(table.max[index])), fact("mean", decimal(table.mean[index])),
      fact("encoder · decoder", decimal(mine.enc)),
    ];
    if (table.concept && table.concept[index]) facts.push(fact("best concept", table.concept[index] + " (AUROC " + table.auroc[index].toFixed(3) + ")"));
    const histogram = make("div", "plot");
    histogram.id = "histogram";
    const silent = table.count[index] === 0;
    const left = make("div", "",
      silent ? null : panel("Activations", "", histogram),
      mine.logits ? logits(mine.logits) : null,
      silent ? null : tokenTable(mine.tokens),
      nearest(mine.near));
    const right = silent
      ? make("div", "friendly", make("h2", "", "Dead"), make("p", "", "It was not active on any of the " + whole(head.tokens) + " tokens looked at."))
      : contexts(mine.examples, table.max[index]);
    view.replaceChildren(top(id, facts), make("div", "columns", left, right));
    if (!silent) drawHistogram(histogram, mine.hist);
  }

  // -- moving about --------------------------------------------------------------------------------------------------
  function route() {
    const match = location.hash.match(/^#latent=(.*)$/);
    $("overview").hidden = Boolean(match);
    $("latent").hidden = !match;
    $("tip").hidden = true;
    if (!match) {
      document.title = head.title;
      paint();
      return;
    }
    const id = /^\d+$/.test(match[1]) ? Number(match[1]) : NaN;
    document.title = "Latent " + match[1] + " · " + head.title;
    scrollTo(0, 0);
    latent(id);
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input");
    if (event.key === "Escape" && typing) typing.blur();
    if (typing) return;
    if (event.key === "/") {
      event.preventDefault();
      if (!$("latent").hidden) location.hash = "";
      $("search").focus();
    }
    const match = location.hash.match(/^#latent=(\d+)$/);
    if (!match) return;
    if (event.key === "Escape") location.hash = "";
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
      const next = neighbour(Number(match[1]), event.key === "ArrowLeft" ? -1 : 1);
      if (next !== null) location.hash = "latent=" + next;
    }
  });

  document.addEventListener("mouseover", (event) => {
    const span = event.target.closest("[data-token]");
    const tip = $("tip");
    tip.hidden = !span;
    if (!span) return;
    const beyond = span.dataset.value === "";
    tip.replaceChildren(token(Number(span.dataset.token)), beyond ? "  not kept this far out" : "  " + span.dataset.value);
    const box = span.getBoundingClientRect();
    tip.style.left = Math.min(box.left, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = box.top - tip.offsetHeight - 5 + "px";
  });

  $("jump").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = $("jump-to").value.trim().replace(/^#/, "");
    if (text) location.hash = "latent=" + text;
    $("jump-to").value = "";
    $("jump-to").blur();
  });
  $("search").addEventListener("input", arrange);
  $("scroll").addEventListener("scroll", paint, { passive: true });
  addEventListener("resize", paint);
  addEventListener("hashchange", route);
  overview();
  route();
})();
