// -- one latent --------------------------------------------------------------------------------------------------------
function neighbour(id, step) {
  const here = listed.indexOf(place.get(id));
  const next = here < 0 ? undefined : listed[here + step];
  return next === undefined ? null : table.id[next];
}

function navigation(id) {
  const link = (text, target, label) => {
    const element = make("a", "button", text);
    if (target === null) element.setAttribute("aria-disabled", "true");
    else element.href = target;
    element.setAttribute("aria-label", label);
    return element;
  };
  const to = (step) => { const next = neighbour(id, step); return next === null ? null : "#latent=" + next; };
  const here = listed.indexOf(place.get(id));
  return make("nav", "", here < 0 ? null : make("span", "rank", whole(here + 1) + " of " + whole(listed.length)),
    link("Table", overviewHash(), "Back to the table"), link("←", to(-1), "Previous " + ONE), link("→", to(1), "Next " + ONE));
}

const fact = (name, ...value) => make("span", "", name + " ", make("b", "", ...value));

function facts(index, data) {
  const list = [
    fact("density", percent(table.count[index] / head.tokens)),
    fact("active", whole(table.count[index]) + " of " + whole(head.tokens)),
    fact("max", decimal(table.max[index])), fact("mean", decimal(table.mean[index])),
  ];
  if (data.enc !== undefined) list.push(fact("encoder · decoder", decimal(data.enc)));
  if (table.concept && table.concept[index]) {
    list.push(fact("best concept", visible(table.concept[index], true) + " (AUROC " + table.auroc[index].toFixed(3) + ")"));
  }
  if (data.ablation && data.ablation.n) list.push(fact("Δ loss without it", nats(data.ablation.mean) + " nats a token"));
  if (table.match && table.match[index]) {
    const [other, cosine] = table.match[index];
    list.push(fact("in " + visible(second.name, true), other + " (cosine " + cosine.toFixed(2) + ")"));
  }
  return list;
}

function top(id, index, data) {
  const name = make("h2", "", titleOf(id));
  name.id = "name";
  name.tabIndex = -1;
  const warnings = (data.warn ?? []).map((text) => make("li", "", visible(text, true)));
  const list = make("ul", "warnings", ...warnings);
  list.setAttribute("aria-label", "Warnings");
  const { explanation } = data;
  return make("div", "top", make("div", "heading", name, make("span", "space"), navigation(id)),
    make("div", "facts", ...facts(index, data)),
    data.about ? make("p", "about", capital(visible(data.about, true))) : null,
    explanation ? explained(explanation) : null,
    warnings.length ? list : null);
}

function explained({ text, by, score, n, detection, failed }) {
  const parts = [visible(by, true)];
  const known = (value) => value !== null && value !== undefined;
  if (known(score)) {
    parts.push("correlation " + decimal(score) + " with the activations on " + whole(n) + " contexts that it was not shown");
  }
  if (known(detection)) parts.push("tells " + Math.round(100 * detection) + " % of active and silent ones apart");
  if (parts.length === 1 && !failed) parts.push("not scored");
  return make("p", "explanation" + (failed ? " failed" : ""), visible(text, true), make("small", "", parts.join(" · ")));
}

const panel = (title, note, ...children) => make("div", "panel",
  make("h2", "", title, note ? make("small", "", note) : null), ...children);

function plot(id, label) {
  const element = make("div", "plot");
  element.id = id;
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", label);
  return element;
}

const numberCell = (text, className = "number") => make("td", className, text);
const headings = (names) => make("tr", "", ...names.map((name, i) => make("th", i ? "number" : "", name)));

function logits(data) {
  const [ids, values] = data.logits;
  const n = ids.length / 2;
  const half = (from, to, kind) => make("table", "", ...ids.slice(from, to).map((id, i) =>
    make("tr", "", make("td", "", token(id)), numberCell(signed(values[from + i]), "number " + kind))));
  const against = half(n, 2 * n, "against");
  against.append(...[...against.children].reverse());
  return panel("Logits", ONE === "latent" ? "decoder direction to vocabulary" : "direction to vocabulary",
    data.logit_hist ? plot("logit-histogram", "Histogram of the effects on all tokens' logits") : null,
    make("div", "pair", half(0, n, "for"), against));
}

function tokenTable(lines) {
  return panel("Tokens", "by summed activation", make("table", "", headings(["token", "share", "mean", "times"]),
    ...lines.map(([id, share, mean, count]) => make("tr", "", make("td", "", token(id)), numberCell(percent(share)),
      numberCell(decimal(mean)), numberCell(whole(count))))));
}

function relative(id) {
  const index = place.get(id);
  const about = index === undefined ? [make("span", "", dead.has(id) ? "dead" : "")]
    : table.name ? [make("span", "", visible(table.name[index], true))] : chips(table.tokens[index].slice(0, 3));
  return make("td", "near", linkTo(id), ...about);
}

function nearest(pairs) {
  return panel("Nearest directions", ONE === "latent" ? "decoder cosine" : "cosine", make("table", "",
    ...pairs.map(([id, cosine]) => make("tr", "", relative(id), numberCell(decimal(cosine))))));
}

function together(lines) {
  const note = head.cooccurrence_tokens ? "on the same token, of " + whole(head.cooccurrence_tokens) : "on the same token";
  return panel("Active together", note, make("table", "together", headings([ONE, "Jaccard", "PMI", "times"]),
    ...lines.map(([id, jaccard, pmi, both]) => make("tr", "", relative(id), numberCell(decimal(jaccard)),
      numberCell(decimal(pmi)), numberCell(whole(both))))));
}

function histogramPlot(element, [first, ...counts]) {
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

function logitPlot(element, [low, high, counts]) {
  const width = (high - low) / counts.length || 1;
  const from = (i) => low + i * width;
  const part = (mine) => ({ type: "bar", x: counts.map((_, i) => from(i + 0.5)), y: counts.map((v, i) => (v && mine(i) ? v : null)),
    width: 0.94 * width, customdata: counts.map((_, i) => decimal(from(i)) + " to " + decimal(from(i + 1))),
    hovertemplate: "%{customdata}: %{y:,} tokens<extra></extra>" });
  const speaksFor = (i) => from(i + 0.5) >= 0;
  steerkit.draw(element, [part(speaksFor), part((i) => !speaksFor(i))],
    { showlegend: false, barmode: "overlay", xaxis: { showgrid: false, zeroline: true, nticks: 6 },
      yaxis: { type: "log", dtick: Math.max(...counts) > 1000 ? 2 : 1, exponentformat: "none", tickformat: ",d",
        title: { text: "vocabulary" },
        range: [-0.2, Math.log10(Math.max(...counts, 1)) + 0.15] }, margin: { l: 44, r: 18, t: 4, b: 22 } });
}

// -- steering: texts that were generated beforehand, at a few strengths ----------------------------------------------------
function steering({ prompt, unit, rows }) {
  const plain = rows.find(([strength]) => strength === 0);
  const sorted = [...rows].sort((a, b) => a[0] - b[0]);
  const firstShown = sorted.findIndex(([strength]) => strength > 0);
  const named = (strength) => (strength > 0 ? "+" : "") + String(strength).replace("-", "−");
  const slider = make("input");
  Object.assign(slider, { type: "range", min: 0, max: sorted.length - 1, step: 1, id: "strength" });
  slider.value = firstShown < 0 ? sorted.length - 1 : Math.min(sorted.length - 1, firstShown + 1);
  slider.setAttribute("aria-label", "Strength of steering");
  const said = make("div", "said");
  const facts = make("span", "facts");
  const ticks = make("div", "ticks", ...sorted.map(([strength], i) =>
    button(named(strength), "tick", () => { slider.value = i; show(); })));

  function show() {
    const [strength, text, kl] = sorted[Number(slider.value)];
    const shown = visible(text, true);
    const before = plain ? visible(plain[1], true) : "";
    let same = 0;
    while (same < shown.length && shown[same] === before[same]) same += 1;
    if (same < shown.length) same = shown.lastIndexOf(" ", same) + 1;
    said.replaceChildren(shown.slice(0, same), make("em", "", shown.slice(same)));
    facts.replaceChildren(fact("strength", named(strength)), " " + visible(unit, true) + "  ",
      fact("KL", decimal(kl) + " nats a token"));
    slider.setAttribute("aria-valuetext", named(strength));
    [...ticks.children].forEach((tick, i) => tick.setAttribute("aria-pressed", String(sorted[i][0] === strength)));
  }

  slider.addEventListener("input", show);
  show();
  return make("section", "group steering",
    make("h2", "", "Steering", make("small", "", "greedy continuation of “" + visible(prompt, true) + "”")),
    make("div", "dial", make("div", "", slider, ticks), facts),
    make("div", "texts", make("div", "", make("h3", "", "unsteered"), make("div", "said", plain ? visible(plain[1], true) : "–")),
      make("div", "", make("h3", "", "steered"), said)));
}

// -- the page ------------------------------------------------------------------------------------------------------------
function friendly(title, ...text) {
  const back = make("a", "button", "Table");
  back.href = overviewHash();
  return make("div", "friendly", make("h2", "", title), make("p", "", ...text), back);
}

const silentText = () => "It was not active on any of the " + whole(head.tokens) + " tokens looked at.";

function absent(id) {
  if (!(Number.isInteger(id) && id >= 0 && id < head.d_sae)) {
    return friendly("There is no such " + ONE,
      (ONE === "latent" ? "This autoencoder has latents 0 to " : "There are directions 0 to ") + (head.d_sae - 1) + ".");
  }
  if (dead.has(id)) return friendly(capital(ONE) + " " + id + " is dead", silentText());
  return friendly(capital(ONE) + " " + id + " is not in this dashboard", "It is alive, but only " + whole(table.id.length) + " of "
    + whole(head.n_alive) + " living " + MANY + " were included.");
}

async function latent(id) {
  const view = $("latent");
  const index = place.get(id);
  if (index === undefined) { view.replaceChildren(absent(id)); return; }
  let data;
  try {
    data = await record(index);
  } catch (error) {
    view.replaceChildren(friendly("A file of this dashboard is missing", error.message));
    return;
  }
  if (location.hash !== "#latent=" + id) return;
  const silent = table.count[index] === 0;
  const scale = { activation: table.max[index], loss: 0.01 };
  const groups = groupsOf(data, scale);
  const left = make("div", "",
    silent ? null : panel("Activations", "", plot("histogram", "Histogram of the activations")),
    data.logits ? logits(data) : null,
    silent ? null : tokenTable(data.tokens),
    data.co?.length ? together(data.co) : null,
    nearest(data.near));
  const right = make("div", "",
    data.steer ? steering(data.steer) : null,
    silent ? make("div", "friendly", make("h2", "", "Dead"), make("p", "", silentText()))
      : contextTools(groups, scale, Boolean(data.ablation)),
    ...(silent ? [] : groups));
  view.replaceChildren(top(id, index, data), make("div", "columns", left, right));
  $("name").focus({ preventScroll: true });
  // The text first: drawing takes longer than all the rest.
  requestAnimationFrame(() => setTimeout(() => {
    if ($("histogram")?.isConnected) histogramPlot($("histogram"), data.hist);
    if ($("logit-histogram")) logitPlot($("logit-histogram"), data.logit_hist);
  }));
}
