// -- elements, numbers, tokens ------------------------------------------------------------------------------------------
// Whatever comes from data becomes a text node or an attribute, never HTML.
const $ = (id) => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null));
  return element;
}

function button(text, className, action) {
  const element = make("button", className, text);
  element.type = "button";
  element.addEventListener("click", action);
  return element;
}

function linkTo(id, text = String(id)) {
  const link = make("a", "", text);
  link.href = "#latent=" + id;
  return link;
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
const thousandths = (value) => value.toFixed(3).replace("-", "−");
const nats = (value) => (value >= 0.0005 ? "+" : "") + thousandths(Math.abs(value) < 0.0005 ? 0 : value);
const signed = (value) => (value > 0 ? "+" : "") + decimal(value);

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

const chips = (ids) => ids.map((id) => token(id, "token chip"));

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

// -- the tip at the pointer ----------------------------------------------------------------------------------------------
function showTip(box, ...children) {
  const tip = $("tip");
  tip.replaceChildren(...children);
  tip.hidden = false;
  tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 8)) + "px";
  const above = box.top - tip.offsetHeight - 5;
  tip.style.top = (above < 4 ? box.bottom + 6 : above) + "px";
}

const hideTip = () => { $("tip").hidden = true; };

// -- a choice of a few, as buttons of which one is pressed -----------------------------------------------------------------
function choice(label, options, chosen, choose) {
  const group = make("span", "choice");
  group.setAttribute("role", "group");
  group.setAttribute("aria-label", label);
  const press = (value) => {
    for (const element of group.children) element.setAttribute("aria-pressed", String(element.dataset.value === value));
  };
  for (const [value, text] of options) {
    const element = button(text, "", () => { press(value); choose(value); });
    element.dataset.value = value;
    group.append(element);
  }
  press(chosen);
  group.press = press;
  return group;
}
