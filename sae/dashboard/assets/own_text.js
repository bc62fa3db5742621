// Your own text: only in a dashboard that `steerkit dashboard --serve` serves, with the model behind it.
"use strict";
(() => {
  const head = window.__shards.head;
  const table = head.table;
  const place = new Map(table.id.map((id, index) => [id, index]));
  const topText = new Map(head.top_text[0].map((id, index) => [id, head.top_text[1][index]]));
  const kind = head.directions ? "direction" : "latent";

  const style = document.createElement("style");
  style.textContent = `
    #own-text { margin: 14px 0 22px; border-bottom: 1px solid var(--line); padding-bottom: 16px; }
    #own-text form { display: flex; gap: 10px; align-items: flex-start; }
    #own-text textarea { flex: 1; min-height: 52px; resize: vertical; font: 14px/1.5 var(--sans); color: var(--ink);
      background: var(--paper); border: 1px solid var(--line); border-radius: 6px; padding: 7px 11px; }
    #own-tokens { margin: 12px 0 0; line-height: 2; }
    #own-tokens button { all: unset; cursor: pointer; white-space: pre-wrap; border-radius: 3px; padding: 2px 0; }
    #own-tokens button.silent { color: var(--faint); }
    #own-tokens button:focus-visible { outline: 2px solid var(--accent); }
    #own-tokens button[aria-pressed=true] { box-shadow: inset 0 -2px 0 rgba(var(--heat), 1); }
    #own-found { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 8px 36px; margin-top: 10px; }
    #own-found table { table-layout: auto; }
    #own-found td { padding-right: 12px; height: 26px; }
    #own-found td.about { width: 99%; max-width: 0; overflow: hidden; text-overflow: ellipsis; color: var(--quiet); }
    #own-found td button { padding: 3px 8px; font-size: 12px; }
    #own-text .note { color: var(--quiet); font-size: 13px; margin: 8px 0 0; }
    #own-text .wrong { color: var(--against); }
    #own-steer { min-width: 0; }
    #own-steer p { margin: 4px 0 10px; line-height: 1.7; white-space: pre-wrap; overflow-wrap: anywhere; }
    #own-steer span[data-kl] { border-radius: 3px; }
    #own-steer input[type=range] { width: 180px; vertical-align: middle; padding: 0; accent-color: var(--accent); }`;
  document.head.append(style);

  function make(tag, properties, ...children) {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  }

  async function ask(question, body) {
    const answer = await fetch("api/" + question, body && {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  }

  const number = (value) => (Math.abs(value) >= 100 ? value.toFixed(0) : value.toPrecision(3)).replace("-", "−");
  const heat = (share) => "rgba(var(--heat), " + (0.08 + 0.72 * Math.min(1, share)).toFixed(3) + ")";

  function about(id) {
    const index = place.get(id);
    if (index === undefined) return "not in this dashboard";
    if (table.name) return table.name[index];
    if (table.label && table.label[index]) return table.label[index];
    return table.tokens[index].map((token) => (topText.get(token) ?? "").trim()).join("  ");
  }

  function nameOf(id) {
    return place.has(id) ? make("a", { href: "#latent=" + id, textContent: String(id) }) : make("span", { textContent: String(id) });
  }

  const text = make("textarea", { id: "own-input", maxLength: 10000, placeholder: "A sentence of your own …", spellcheck: false });
  text.setAttribute("aria-label", "Your own text");
  const form = make("form", {}, text, make("button", { textContent: "Read" }));
  const note = make("p", { className: "note" });
  note.setAttribute("role", "status");
  const tokens = make("div", { id: "own-tokens" });
  const latents = make("div", {});
  const steered = make("div", { id: "own-steer" });
  const panel = make("section", { id: "own-text", className: "panel" },
    make("h2", {}, "Your own text", make("small", { textContent: "read by the model that is running here" })),
    form, note, tokens, make("div", { id: "own-found" }, latents, steered));
  const overview = document.getElementById("overview");
  const tiles = document.getElementById("tiles");
  if (tiles) tiles.after(panel);
  else overview.prepend(panel);

  let read = null;
  let canSteer = false;
  ask("about").then((found) => { canSteer = found.steer; text.maxLength = found.characters; });

  function say(message, wrong = false) {
    note.textContent = message;
    note.classList.toggle("wrong", wrong);
  }

  async function busy(work) {
    say("The model is at work …");
    for (const button of panel.querySelectorAll("button, input")) button.disabled = true;
    try {
      await work();
    } catch (error) {
      say(error.message || "The server does not answer: is it still running?", true);
    }
    for (const button of panel.querySelectorAll("button, input")) button.disabled = false;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    busy(async () => {
      read = { ...(await ask("activations", { text: text.value })), asked: text.value };
      say(read.cut ? "Only the first row of so long a text is read." : "Click a token to see its " + kind + "s.");
      steered.replaceChildren();
      showTokens();
      const most = read.tokens.map((token) => (token.latents.length ? token.latents[0][1] : 0));
      showLatents(most.indexOf(Math.max(...most)));
    });
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });

  function showTokens() {
    tokens.replaceChildren(...read.tokens.map((token, at) => {
      const button = make("button", { type: "button", textContent: token.text, title: token.active + " active" });
      button.classList.toggle("silent", token.active === 0);
      button.addEventListener("click", () => showLatents(at));
      return button;
    }));
  }

  // Tokens shaded by one latent, as far as it is among their strongest.
  function shade(id) {
    const values = read.tokens.map((token) => (token.latents.find(([other]) => other === id) ?? [id, 0])[1]);
    const most = Math.max(...values);
    [...tokens.children].forEach((button, at) => {
      button.style.background = id !== null && values[at] > 0 ? heat(values[at] / most) : "";
    });
  }

  function showLatents(at) {
    shade(null);
    [...tokens.children].forEach((button, other) => button.setAttribute("aria-pressed", String(other === at)));
    const token = read.tokens[at];
    const title = make("h2", {}, "“" + token.text.trim() + "”",
      make("small", { textContent: token.active > token.latents.length ? "the strongest " + token.latents.length + " of " + token.active : "" }));
    if (!token.latents.length) {
      latents.replaceChildren(title, make("p", { className: "note", textContent: "No " + kind + " is active here, or the token does not count." }));
      return;
    }
    const lines = token.latents.map(([id, value]) => {
      const bar = make("td", { className: "number", textContent: number(value) });
      const line = make("tr", {}, make("td", {}, nameOf(id)), bar, make("td", { className: "about", textContent: about(id) }));
      if (canSteer) {
        const button = make("button", { type: "button", textContent: "steer" });
        button.addEventListener("click", () => showSteering(id, value));
        line.append(make("td", {}, button));
      }
      line.addEventListener("mouseenter", () => shade(id));
      line.addEventListener("mouseleave", () => shade(null));
      return line;
    });
    latents.replaceChildren(title, make("table", {}, ...lines));
  }

  // Strengths in units of the latent's maximum in the dashboard, else of its activation here; of directions, in the directions themselves.
  function showSteering(id, value) {
    const unit = head.directions ? 1 : place.has(id) ? table.max[place.get(id)] : value;
    const slider = make("input", { type: "range", min: -4, max: 4, step: 0.5, value: 1 });
    slider.setAttribute("aria-label", "Strength of steering");
    const shown = make("b", {});
    const tell = () => { shown.textContent = " " + number(slider.valueAsNumber).replace(/\.?0+$/, "") + (head.directions ? " × the direction " : " × its maximum "); };
    const go = make("button", { type: "button", textContent: "Go on" });
    const result = make("div", {});
    go.addEventListener("click", () => busy(async () => {
      const found = await ask("steer", { text: read.asked, latent: id, strength: slider.valueAsNumber * unit });
      const total = found.steered.reduce((sum, [, nats]) => sum + nats, 0);
      const words = found.steered.map(([word, nats]) => {
        const span = make("span", { textContent: word, title: "KL " + number(nats) + " nats" });
        span.dataset.kl = nats;
        span.style.background = nats > 0.01 ? heat(nats / 5) : "";
        return span;
      });
      result.replaceChildren(
        make("h2", {}, "Steered", make("small", { textContent: "KL " + number(total / Math.max(1, words.length)) + " nats a token" })), make("p", {}, ...words),
        make("h2", { textContent: "Unsteered" }), make("p", { textContent: found.unsteered.join("") }));
      say("Shaded by each token's KL from the unsteered model; both go on with the likeliest token.");
    }));
    slider.addEventListener("input", tell);
    tell();
    steered.replaceChildren(make("h2", {}, "Steer by ", nameOf(id)), make("div", {}, slider, shown, go), result);
    go.click();
  }
})();
