"""How everything that steerkit draws looks, and pages that work offline.

    page("Steering", ["<p>…</p>", figure], "runs/s/report.html")

A page is one HTML file with `plotly.min.js` beside it, copied once from the installed plotly: it opens from
disk and asks the network for nothing. Light and dark follow the reader's system, and a button changes it.
Colours are those of Okabe and Ito, chosen to be told apart with any colour vision; on dark they are lighter.
"""

from __future__ import annotations

import html
import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from steerkit.errors import InputError
from steerkit.runs import atomic_path, atomic_write
from steerkit.stats import Interval

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5a5a5a")
"""Series colours on light."""
PALETTE_DARK = ("#5ab4e5", "#f08a4b", "#3cc29b", "#e3a0c4", "#e8b93e", "#9ad1f5", "#a8a8a8")
"""The same series on dark."""

_LIGHT = {
    "paper": "#ffffff",
    "raised": "#f7f7f5",
    "sunken": "#efefec",
    "ink": "#1d1f21",
    "quiet": "#63676d",
    "faint": "#8d9197",
    "line": "#e3e3df",
    "accent": PALETTE[0],
    "against": PALETTE[1],
    "heat": "242, 153, 0",
}
_DARK = {
    "paper": "#16181b",
    "raised": "#1d2023",
    "sunken": "#26292e",
    "ink": "#e4e5e7",
    "quiet": "#a0a5ac",
    "faint": "#767b83",
    "line": "#303439",
    "accent": PALETTE_DARK[0],
    "against": PALETTE_DARK[1],
    "heat": "238, 146, 20",
}


def theme_css(*, by_system: bool = False) -> str:
    """Colours and type as CSS variables, light and dark: by the root's `data-theme`, or by the reader's system alone."""

    def variables(colours: dict[str, str]) -> str:
        return " ".join(f"--{name}: {value};" for name, value in colours.items())

    dark = f"{{ color-scheme: dark; {variables(_DARK)} }}"
    return (
        f":root {{ color-scheme: light; {variables(_LIGHT)}\n"
        '  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif;\n'
        '  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }\n'
        + (
            f"@media (prefers-color-scheme: dark) {{ :root {dark} }}\n"
            if by_system
            else f":root[data-theme=dark] {dark}\n"
        )
    )


def theme_js() -> str:
    """`steerkit.draw(element, data, layout)` for Plotly figures, as soon as Plotly has loaded; and the
    switch between light and dark.

    Belongs before the page's other scripts. A button with `data-switch-theme` becomes the switch.
    """
    return _THEME_JS.replace("PALETTES", json.dumps({"light": PALETTE, "dark": PALETTE_DARK}))


def copy_plotly(folder: str | Path) -> Path:
    """Put plotly.min.js of the installed plotly into `folder`, unless it is there. InputError without plotly."""
    target = Path(folder) / "plotly.min.js"
    source = _plotly_file()
    if not target.exists() or target.stat().st_size != source.stat().st_size:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)
    return target


def plotly_source() -> str:
    """The text of plotly.min.js."""
    return _plotly_file().read_text(encoding="utf-8")


def script_json(value: Any) -> str:
    """JSON that is safe inside a <script>: nothing in it can close the element or end a line early."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    for character, escape in escapes.items():
        text = text.replace(character, escape)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def page(title: str, body_parts: Iterable[Any], out: str | Path) -> Path:
    """Write an HTML page of `body_parts` to `out`: strings are HTML as they stand, the rest Plotly figures.

    Text that comes from data must be escaped by the caller (`html.escape`). Returns the path of the page.
    """
    out = Path(out)
    parts = []
    for number, part in enumerate(body_parts):
        if isinstance(part, str):
            parts.append(part)
            continue
        figure = json.loads(part.to_json())
        figure["layout"].pop("template", None)
        arguments = f"{script_json(figure['data'])}, {script_json(figure['layout'])}"
        parts.append(
            f'<div class="figure" id="figure-{number}"></div>\n'
            f'<script>steerkit.draw(document.getElementById("figure-{number}"), {arguments});</script>'
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    copy_plotly(out.parent)
    atomic_write(
        out,
        _PAGE.format(
            title=html.escape(title), css=theme_css() + _PAGE_CSS, js=theme_js(), body="\n".join(parts)
        ),
    )
    return out


def notebook_frame(body: str, css: str, *, height: int, script: str = "") -> str:
    """HTML for the output of a notebook's cell: `alone(…)` in a frame of `height` pixels, where its style touches nothing else.

    The frame is sandboxed: it belongs to no site and has no scripts, but `script` if there is one. Text that comes from data must
    be escaped in `body`.
    """
    sandbox = "allow-scripts" if script else ""
    document = html.escape(alone("", body, css, script=script), quote=True)
    return (
        f'<iframe srcdoc="{document}" sandbox="{sandbox}" width="100%" height="{height}" '
        'style="border:0;min-width:300px"></iframe>'
    )


def alone(title: str, body: str, css: str, *, script: str = "") -> str:
    """A whole HTML document without Plotly, in the colours of the reader's system."""
    scripts = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{theme_css(by_system=True)}{_ALONE_CSS}{css}</style></head><body>{body}{scripts}</body></html>"
    )


def error_bars(values: Sequence[Interval]) -> dict[str, Any]:
    """Plotly's error bars of intervals, none where one has no ends."""

    def length(end: float, value: Interval) -> float:
        return abs(end - value.estimate) if math.isfinite(end) else 0.0

    return {
        "type": "data",
        "symmetric": False,
        "array": [length(v.high, v) for v in values],
        "arrayminus": [length(v.low, v) for v in values],
        "thickness": 1,
        "width": 3,
    }


def _plotly_file() -> Path:
    try:
        import plotly
    except ImportError:
        raise InputError("plotly is not installed: pip install plotly.") from None
    return Path(plotly.__file__).parent / "package_data" / "plotly.min.js"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{css}</style>
<script src="plotly.min.js"></script>
<script>
{js}</script>
</head>
<body>
<header><h1>{title}</h1><button data-switch-theme></button></header>
<main>
{body}
</main>
</body>
</html>
"""

_PAGE_CSS = """
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 var(--sans); }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { display: flex; align-items: baseline; justify-content: space-between; padding-top: 24px; }
h1 { font-size: 22px; font-weight: 600; margin: 0; }
h2 { font-size: 16px; font-weight: 600; margin: 32px 0 8px; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
code, pre { font: 13px/1.5 var(--mono); }
pre { background: var(--raised); padding: 12px 16px; overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 4px 16px 4px 0; border-bottom: 1px solid var(--line); }
th { color: var(--quiet); font-weight: 500; font-size: 13px; }
td.number, th.number { text-align: right; }
button { font: 13px var(--sans); color: var(--quiet); background: none; border: 1px solid var(--line);
  border-radius: 6px; padding: 4px 10px; cursor: pointer; }
button:hover { color: var(--ink); border-color: var(--faint); }
.figure { min-height: 320px; margin: 12px 0 24px; }
"""

_ALONE_CSS = """
body { margin: 0; padding: 4px 10px; background: var(--paper); color: var(--ink); font: 14px/1.5 var(--sans); }
h1 { font-size: 16px; font-weight: 600; margin: 4px 0 8px; }
h2 { font-size: 12px; font-weight: 400; color: var(--faint); margin: 10px 0 2px; }
small { font-size: 12px; font-weight: 400; color: var(--faint); margin-left: 6px; }
"""

_THEME_JS = """"use strict";
window.steerkit = (() => {
  const palettes = PALETTES;
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();
  let chosen = null;
  try { chosen = localStorage.getItem("steerkit-theme"); } catch (error) { /* storage may be forbidden */ }

  const theme = () => (chosen || (system.matches ? "dark" : "light"));
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();

  function template() {
    const axis = { gridcolor: colour("line"), linecolor: colour("line"), zerolinecolor: colour("line"),
      tickcolor: colour("line"), title: { font: { color: colour("quiet"), size: 12 }, standoff: 8 },
      automargin: true };
    return { layout: { colorway: palettes[theme()], paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: colour("sans"), size: 12, color: colour("quiet") }, xaxis: axis, yaxis: axis,
      margin: { l: 48, r: 8, t: 16, b: 40 }, bargap: 0.06, hovermode: "closest",
      hoverlabel: { bgcolor: colour("sunken"), bordercolor: colour("line"),
        font: { family: colour("sans"), color: colour("ink"), size: 12 } },
      legend: { font: { color: colour("quiet") } } } };
  }

  function draw(element, data, layout) {
    for (const old of drawn.keys()) if (!old.isConnected) { window.Plotly?.purge(old); drawn.delete(old); }
    drawn.set(element, [data, layout]);
    if (!window.Plotly) return;
    Plotly.react(element, data, { ...layout, template: template() },
      { displayModeBar: false, responsive: true });
  }

  function apply() {
    root.dataset.theme = theme();
    for (const button of document.querySelectorAll("[data-switch-theme]")) {
      button.textContent = theme() === "dark" ? "Light" : "Dark";
      button.setAttribute("aria-label", "Switch to " + button.textContent.toLowerCase() + " colours");
    }
    for (const [element, [data, layout]] of drawn) if (element.isConnected) draw(element, data, layout);
  }

  root.dataset.theme = theme();
  system.addEventListener("change", apply);
  document.addEventListener("DOMContentLoaded", apply);
  addEventListener("load", apply);
  document.addEventListener("click", (event) => {
    if (!event.target.closest("[data-switch-theme]")) return;
    chosen = theme() === "dark" ? "light" : "dark";
    try { localStorage.setItem("steerkit-theme", chosen); } catch (error) { /* kept for this page only */ }
    apply();
  });
  return { draw, theme, colour, palette: () => palettes[theme()] };
})();
"""
