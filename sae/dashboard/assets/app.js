// -- moving about ------------------------------------------------------------------------------------------------------
function currentLatent() {
  const name = new URLSearchParams(location.hash.slice(1)).get("latent");
  return name === null ? null : /^\d+$/.test(name) ? Number(name) : NaN;
}

function route() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const id = currentLatent();
  $("overview").hidden = id !== null;
  $("latent").hidden = id === null;
  hideTip();
  if (id === null) {
    const before = overviewHash();
    readWanted(parts);
    document.title = visible(head.title, true);
    if (before !== overviewHash()) arrange();
    else paint();
    // Text first: drawing takes longer than all the rest. And not while hidden: then nothing has a width.
    requestAnimationFrame(() => setTimeout(drawDensity));
    setTimeout(() => loadTexts().catch(() => {}), 200);
    return;
  }
  const name = Number.isInteger(id) ? titleOf(id) : capital(ONE) + " " + parts.get("latent");
  document.title = visible(name, true) + " · " + visible(head.title, true);
  const rank = listed.indexOf(place.get(id));
  if (rank >= 0) cursor = rank;
  scrollTo(0, 0);
  latent(id);
}

function step(by) {
  const id = currentLatent();
  if (id === null) { moveCursor(cursor + by); return; }
  const next = neighbour(id, by);
  if (next !== null) location.hash = "latent=" + next;
}

const contextBar = (name) => document.querySelector("#latent .context-tools")?.dispatchEvent(new Event(name));
const KEYS = {
  "/": () => { if (currentLatent() !== null) location.hash = overviewHash(); $("overview").hidden = false; $("search").focus(); },
  j: () => step(1), k: () => step(-1),
  ArrowRight: () => step(1), ArrowLeft: () => step(-1),
  Escape: () => { if (currentLatent() !== null) location.hash = overviewHash(); },
  u: () => KEYS.Escape(),
  Enter: () => { if (currentLatent() === null && listed.length) location.hash = "latent=" + table.id[listed[cursor]]; },
  w: () => contextBar("toggle-width"), c: () => contextBar("toggle-colour"),
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open) return;
  const field = event.target.closest("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    if (event.key === "Enter" && field === $("search")) { field.blur(); KEYS.Enter(); }
    return;
  }
  if (event.key === "Enter" && event.target.closest("a, button, summary")) return;
  if (!KEYS[event.key]) return;
  event.preventDefault();
  KEYS[event.key]();
});

document.addEventListener("mouseover", (event) => {
  const span = event.target.closest("[data-token]");
  if (!span) {
    if (!event.target.closest("canvas")) hideTip();
    return;
  }
  const { value, loss } = span.dataset;
  showTip(span.getBoundingClientRect(), token(Number(span.dataset.token)), value === "" ? "  not kept this far out" : "  " + value,
    loss === undefined ? "" : make("div", "", "loss of the next token without it " + loss + " nats"));
});

$("jump").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("jump-to").value.trim().replace(/^#/, "");
  if (text) location.hash = "latent=" + text;
  $("jump-to").value = "";
  $("jump-to").blur();
});
$("ask").addEventListener("click", () => $("help").showModal());
$("help").addEventListener("click", (event) => { if (event.target === $("help")) $("help").close(); });
addEventListener("hashchange", route);
overview();
readWanted(new URLSearchParams(currentLatent() === null ? location.hash.slice(1) : ""));
arrange();
route();
