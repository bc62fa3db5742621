"""Writes the files of a dashboard.

    index.html          the page, and what it shows first: summary, table of latents
    assets/             plotly.min.js, script and style
    data/tokens.js      texts of token ids
    data/latents-N.js   64 latents each
    data/rows-N.js      rows of text as token ids, each stored once, whichever latents show it

Pages opened from disk may not fetch files, but may load scripts: each data file is a call of
`window.__shard(name, data)`, loaded when a latent needs it. All text that comes from data is set as text, never as
HTML, and in scripts `<`, `>` and `&` are escaped, so no token can break out.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from sae.architectures.base import SAE
from sae.dashboard.ablation import ablations
from sae.dashboard.content import Content
from sae.dashboard.explain import Explainer, Explanations
from sae.dashboard.export import FORMATS, export
from sae.dashboard.preview import Preview
from sae.dashboard.second import SAME, Second
from sae.latents import LatentStats, collect_latents
from steerkit.activations import Tokenization
from steerkit.data import Documents
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.plots import copy_plotly, plotly_source, script_json, theme_css, theme_js
from steerkit.runs import atomic_path, atomic_write, jsonable, write_json

SINGLE_FILE_BYTES = 50_000_000
MARKER = "steerkit-dashboard.json"
_ARCH_NAMES = {"topk": "TopK", "l1": "L1", "sqrt_l1": "√L1", "gated": "Gated", "jumprelu": "JumpReLU"}
_SCRIPTS = ("data", "text", "overview", "map", "contexts", "latent", "app")
"""The page's script is these files of `assets`, in this order, inside one function."""
_GENERATOR = '<meta name="generator" content="steerkit dashboard">'


def build(
    model: HookedModel,
    sae: SAE,
    documents: Documents | Sequence[str] | str,
    site: str,
    out: str | Path,
    *,
    tokenization: Tokenization | None = None,
    tokens: int = 200_000,
    sink_threshold: float | None = None,
    seed: int = 0,
    latents: str | Sequence[int] = "all",
    single_file: bool = False,
    summary: Mapping[str, Any] | None = None,
    concepts: Mapping[int, tuple[str, float]] | None = None,
    stats: LatentStats | None = None,
    title: str | None = None,
    provenance: Mapping[str, Any] | None = None,
    names: Sequence[str] | None = None,
    ablate: bool = False,
    steer: bool | str = False,
    explainer: Explainer | None = None,
    second: Second | None = None,
    exports: Sequence[str] = (),
    quiet: bool = False,
) -> Path:
    """Write a dashboard into the directory `out` and return the path of its page.

    `latents` is "all" (all that are alive), "top:N" (the N active most often) or a list. `summary` holds figures
    for the head of the page (`summary.json` of a run), `concepts` what a latent is about: (name, AUROC).
    `stats` are statistics collected before, else they are collected here. With `single_file` everything is in
    one file, `out` itself if it ends in .html. `names` are of the ends of directions, pair by
    pair, which are then spoken of instead of latents (`sae.dashboard.directions`).

    What costs more is asked for: `ablate` measures the loss without each latent (`sae.dashboard.ablation`), `steer` generates
    text with it (`sae.dashboard.preview`; a text: the prompt), `explainer` is asked what it is for and scored
    (`sae.dashboard.explain`), `second` is an SAE to compare with, and `exports` are "csv", "json" or "neuronpedia".

    An earlier dashboard at `out` is replaced. Raises InputError when `out` holds anything else, when a latent
    does not exist, or when a single file would exceed 50 MB.
    """
    out = Path(out)
    _check_target(out, single_file)
    if model.tokenizer is None:
        raise InputError(f"{model.name} has no tokenizer: load the model with tokenizer=….")
    chosen = _parse_latents(latents, sae.d_sae)
    check_exports(exports, single_file)
    if stats is None:
        stats = collect_latents(
            model,
            sae,
            documents,
            site,
            tokenization=tokenization,
            tokens=tokens,
            sink_threshold=sink_threshold,
            seed=seed,
            quiet=quiet,
        )
    if stats.d_sae != sae.d_sae:
        raise InputError(f"The statistics are of {stats.d_sae} latents, the SAE has {sae.d_sae}.")
    ids = _select(chosen, stats)
    content = Content(model, sae, stats, ids, dict(concepts or {}), directions=names is not None)
    name = "/".join(Path(stats.info["model"]).parts[-2:])
    content.head |= {
        "title": title or f"{_ARCH_NAMES.get(sae.arch, sae.arch)} SAE of {name}",
        "subtitle": f"{name} · {stats.info['site']}",
        "arch": _ARCH_NAMES.get(sae.arch, sae.arch),
        "summary": {} if names is not None else jsonable(_summary(sae, stats, summary or {})),
        "provenance": jsonable({**stats.info, **(provenance or {})}),
    }
    if names is not None:
        content.head["directions"] = True
        content.table["name"] = [names[i] for i in ids]
    if second is not None:
        content.table["match"] = [[i, round(cosine, 4)] for i, cosine in second.matches(sae, ids.tolist())]
        content.head["second"] = {
            "name": second.name,
            "site": second.site,
            "d_sae": second.sae.d_sae,
            "unmatched": sum(cosine < SAME for _, cosine in content.table["match"]),
            "summary": jsonable({"arch": second.sae.arch, "d_sae": second.sae.d_sae, **second.summary}),
        }
    if steer:
        content.add("steer", Preview(model, sae, stats, steer if isinstance(steer, str) else None))
    if explainer is not None:
        content.add("explanation", Explanations(explainer, stats, content.words.texts))
    if ablate:
        without = ablations(model, sae, stats, ids.tolist(), quiet=quiet)
        content.add("ablation", lambda part: [without[i].to_dict() if i in without else None for i in part])
    if single_file:
        return _write_single(out, content)
    return _write_directory(out, content, exports)


def _write_directory(out: Path, content: Content, exports: Sequence[str]) -> Path:
    with atomic_path(out) as folder:
        (folder / "data").mkdir(parents=True)
        (folder / "assets").mkdir()
        copy_plotly(folder / "assets")
        (folder / "assets" / "style.css").write_text(_style(), encoding="utf-8")
        (folder / "assets" / "app.js").write_text(_script(), encoding="utf-8")
        for name, data in content.shards():
            (folder / "data" / f"{name}.js").write_text(_shard(name, data), encoding="utf-8")
        if exports:
            content.head["exports"] = export(folder, content, exports)
        page = _page(
            content.head["title"],
            '<link rel="stylesheet" href="assets/style.css">',
            f"<script>{_shard('head', content.head)}</script>\n"
            '<script src="assets/app.js"></script>\n<script async src="assets/plotly.min.js"></script>',
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
        write_json(folder / MARKER, {"format": 1, "latents": len(content.ids)})
    return out / "index.html"


def _write_single(out: Path, content: Content) -> Path:
    scripts = [f"<script>{_shard(name, part)}</script>" for name, part in content.shards()]
    data = "\n".join([f"<script>{_shard('head', content.head)}</script>", *scripts])
    plotly = plotly_source().replace("</script", "<\\/script")
    page = _page(
        content.head["title"],
        f"<style>{_style()}</style>",
        f"{data}\n<script>{_script()}</script>\n<script>{plotly}</script>",
    )
    size = len(page.encode())
    if size > SINGLE_FILE_BYTES:
        fitting = max(1, int(len(content.ids) * (SINGLE_FILE_BYTES - 6e6) / size))
        raise InputError(
            f"A single file of {len(content.ids):,} latents would have {size / 1e6:.0f} MB, more than "
            f"{SINGLE_FILE_BYTES / 1e6:.0f}: choose fewer (--latents top:{fitting}) or leave out --single-file."
        )
    if out.suffix == ".html":
        atomic_write(out, page)
        return out
    with atomic_path(out) as folder:
        folder.mkdir()
        (folder / "index.html").write_text(page, encoding="utf-8")
        write_json(folder / MARKER, {"format": 1, "latents": len(content.ids)})
    return out / "index.html"


def _page(title: str, style: str, scripts: str) -> str:
    template = _asset("index.html")
    parts = {"<!-- title -->": html.escape(title), "<!-- style -->": _GENERATOR + "\n" + style}
    for mark, text in parts.items():
        template = template.replace(mark, text)
    before, after = template.split("<!-- scripts -->")
    return before + scripts + after


def _shard(name: str, data: Any) -> str:
    return (
        "window.__shards=window.__shards||{};window.__shard=window.__shard||"
        "function(n,d){window.__shards[n]=d};"
        f"window.__shard({json.dumps(name)},{script_json(data)});"
    )


def _style() -> str:
    return theme_css() + _asset("style.css")


def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    return f'{theme_js()}"use strict";\n(() => {{\n{parts}}})();\n'


def _asset(name: str) -> str:
    return (files("sae.dashboard") / "assets" / name).read_text(encoding="utf-8")


def _check_target(out: Path, single_file: bool) -> None:
    """InputError unless `out` is new, empty or an earlier dashboard."""
    if out.suffix == ".html" and single_file:
        if out.is_dir() or (out.exists() and _GENERATOR.encode() not in out.read_bytes()[:4096]):
            raise InputError(f"{out} exists and is no dashboard of steerkit: give another name.")
        return
    if out.is_file():
        raise InputError(f"{out} is a file: give a directory for the dashboard.")
    if out.is_dir() and any(out.iterdir()) and not (out / MARKER).exists():
        raise InputError(f"{out} is not empty and holds no dashboard: give another directory.")


def check_exports(exports: Sequence[str], single_file: bool) -> None:
    """InputError unless there are such exports, and a place for them."""
    unknown = [name for name in exports if name not in FORMATS]
    if unknown:
        raise InputError(f"There is no export {unknown[0]!r}: choose from {', '.join(FORMATS)}.")
    if exports and single_file:
        raise InputError("A single file has no place for exports: leave out one of the two.")


def _parse_latents(latents: str | Sequence[int], d_sae: int) -> int | list[int] | None:
    """None for all, a number for the top ones, or the latents themselves."""
    if isinstance(latents, str):
        if latents == "all":
            return None
        kind, _, number = latents.partition(":")
        if kind == "top" and number.isdigit() and int(number) > 0:
            return int(number)
        raise InputError(f"latents is {latents!r}: give 'all', 'top:512' or a list of numbers.")
    chosen = list(dict.fromkeys(int(i) for i in latents))
    wrong = [i for i in chosen if not 0 <= i < d_sae]
    if wrong:
        raise InputError(f"There is no latent {wrong[0]}: the SAE has latents 0–{d_sae - 1}.")
    if not chosen:
        raise InputError("The list of latents is empty: give at least one, or 'all'.")
    return chosen


def _select(chosen: int | list[int] | None, stats: LatentStats) -> np.ndarray:
    if isinstance(chosen, list):
        return np.array(sorted(chosen))
    alive = np.flatnonzero(stats.count)
    if not len(alive):
        raise InputError(f"None of the {stats.d_sae} latents was active on {stats.n_tokens:,} tokens.")
    if chosen is None:
        return alive
    most = alive[np.argsort(-stats.count[alive], kind="stable")[:chosen]]
    return np.sort(most)


def _summary(sae: SAE, stats: LatentStats, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is known without an evaluation, and what `given` says."""
    measured = {
        "arch": sae.arch,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "l0": float(stats.count.sum()) / stats.n_tokens,
        "dead_fraction": float((stats.count == 0).mean()),
    }
    return {**measured, **{key: value for key, value in given.items() if value is not None}}
