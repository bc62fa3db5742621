// -- contexts ----------------------------------------------------------------------------------------------------------
const WINDOW = 15;
const FIFTHS = ["Weakest fifth", "Second fifth", "Middle fifth", "Fourth fifth", "Strongest fifth"];
// How contexts are shown; stays as it is from one page to the next.
const showing = { whole: false, loss: false };

// One row of text. `values`: activations by position; `losses`: changes of loss by position, null if not measured.
function context({ row: number, position, label, values, losses = null }, scale) {
  const value = make("span", "value");
  const text = make("span", "text", "…");
  const element = make("div", "context", value, text);
  let ids = null;
  let open = null;

  function word(i, shown, first) {
    const space = shown.length > 1 && shown.startsWith(" ");
    const span = make("span", special.has(ids[i]) ? "special" : "", space ? shown.slice(1) : shown);
    const act = values.get(i) ?? 0;
    const loss = losses?.get(i);
    if (showing.loss && loss) {
      span.style.background = "rgba(var(--" + (loss > 0 ? "rise" : "fall") + "), "
        + (0.08 + 0.55 * Math.min(1, Math.abs(loss) / scale.loss)).toFixed(3) + ")";
    } else if (!showing.loss && act > 0) {
      span.style.background = "rgba(var(--heat), " + (0.1 + 0.72 * Math.min(1, act / scale.activation)).toFixed(3) + ")";
      if (act > 0.8 * scale.activation) span.classList.add("hot");
    }
    if (i === position) span.classList.add("peak");
    span.dataset.token = ids[i];
    span.dataset.value = Math.abs(i - position) > WINDOW ? "" : decimal(act);
    if (loss !== undefined) span.dataset.loss = nats(loss);
    return space && !first ? [" ", span] : [span];
  }

  function fill() {
    if (!ids) return;
    const shown = contextTexts(ids);
    const all = open ?? showing.whole;
    const start = all ? 0 : Math.max(0, position - WINDOW);
    const end = all ? ids.length : Math.min(ids.length, position + WINDOW + 1);
    const spans = [];
    if (start > 0) spans.push(make("span", "cut", "… "));
    for (let i = start; i < end; i += 1) spans.push(...word(i, shown[i], i === start));
    if (end < ids.length) spans.push(make("span", "cut", " …"));
    text.replaceChildren(...spans);
    value.textContent = !showing.loss ? label : losses ? nats([...losses.values()].reduce((a, b) => a + b, 0)) : "";
    element.classList.toggle("unmeasured", showing.loss && !losses);
  }

  row(number).then((found) => { ids = found; fill(); }, () => { text.textContent = "data/rows is missing"; });
  element.addEventListener("click", () => {
    if (String(getSelection())) return;
    open = !(open ?? showing.whole);
    fill();
  });
  element.fill = () => { open = null; fill(); };
  return element;
}

function example([, number, position, activation, first, hex], losses) {
  const values = new Map((hex.match(/../g) ?? []).map((pair, i) => [position + first + i, parseInt(pair, 16) / 255 * activation]));
  return { row: number, position, label: decimal(activation), values, losses };
}

// The change of loss in each example that was measured: its index -> position -> nats.
function measuredLosses(data) {
  return new Map((data.ablation?.examples ?? []).map(([k, first, changes]) => {
    const position = data.examples[k][2];
    return [k, new Map(changes.map((change, i) => [position + first + i, change]))];
  }));
}

function group(id, title, note, contexts) {
  const section = make("section", "group", make("h2", "", title, note ? make("small", "", note) : null), ...contexts);
  section.id = id;
  return section;
}

function groupsOf(data, scale) {
  const losses = measuredLosses(data);
  for (const changes of losses.values()) for (const change of changes.values()) scale.loss = Math.max(scale.loss, Math.abs(change));
  const parts = [];
  for (const number of [0, 5, 4, 3, 2, 1]) {
    const mine = data.examples.flatMap((entry, k) => (entry[0] === number ? [context(example(entry, losses.get(k)), scale)] : []));
    if (mine.length) {
      parts.push(number ? group("fifth-" + number, FIFTHS[number - 1], "of a random sample of the other rows", mine)
        : group("strongest", "Strongest contexts", "one a row of text; click for the whole row", mine));
    }
    if (number === 0 && data.misses?.length) {
      const near = data.misses.map(([miss, position, closeness]) => context({ row: miss, position, values: new Map(),
        label: closeness === null ? "0" : decimal(closeness) }, scale));
      parts.push(group("misses", "Silent although near", data.misses.some((miss) => miss[2] !== null)
        ? "how far below its threshold at the marked token" : "a token that it often answers, but not here", near));
    }
  }
  return parts;
}

// The bar above the contexts: where to go, how much to show, what the colours mean.
function contextTools(groups, scale, measured) {
  const fills = () => { for (const element of document.querySelectorAll("#latent .context")) element.fill(); };
  const legend = make("span", "legend");
  const explain = () => {
    const ramp = make("span", "ramp " + (showing.loss ? "loss" : "heat"));
    const ends = showing.loss ? ["−" + decimal(scale.loss), "+" + decimal(scale.loss) + " nats"]
      : ["0", decimal(scale.activation)];
    legend.replaceChildren(ends[0], ramp, ends[1]);
    legend.title = showing.loss ? "Change of the loss of the token after each, when the " + ONE + " is taken away" : "Activation";
  };
  const width = choice("Width of contexts", [["window", "Window"], ["row", "Whole row"]], showing.whole ? "row" : "window",
    (value) => {
      showing.whole = value === "row";
      fills();
    });
  if (!measured) showing.loss = false;
  const colours = measured && choice("Colour of contexts", [["activation", "Activation"], ["loss", "Δ loss"]],
    showing.loss ? "loss" : "activation", (value) => {
      showing.loss = value === "loss";
      explain();
      fills();
    });
  explain();
  const names = { strongest: "Strongest", misses: "Near misses", "fifth-5": "Fifths" };
  const jumps = groups.filter((part) => names[part.id]).map((part) => button(names[part.id], "jump", () => {
    part.scrollIntoView({ block: "start" });
  }));
  const bar = make("div", "context-tools", make("span", "jumps", ...(jumps.length > 1 ? jumps : [])), make("span", "space"), legend,
    colours || null, width);
  bar.addEventListener("toggle-width", () => width.querySelector("[aria-pressed=false]").click());
  bar.addEventListener("toggle-colour", () => colours && colours.querySelector("[aria-pressed=false]").click());
  return bar;
}
