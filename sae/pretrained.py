"""SAEs that are no run of ours – other toolkits', a repository's, a release of SAELens – opened as if they were.

    run = open_run("saelens:gpt2-small-res-jb/blocks.7.hook_resid_pre", data="corpus.txt")
    run = attach(run, run.hooked());  run.evaluate();  run.dashboard().save("dash")

Model and site come from what the SAE says of itself; what it does not say is given.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sae import formats
from sae.architectures import SAE
from sae.evaluation import check_fits
from sae.training import SAERun
from steerkit.activations import Tokenization, collect
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.pair import ModelPair
from steerkit.tokens import DEFAULT_CONTEXT

_MEASURED_TOKENS = 8192
"""Tokens that tell the norm of attention sinks."""


def open_run(
    source: str | Path,
    *,
    model: str | HookedModel | None = None,
    data: str | Path | None = None,
    site: str | None = None,
    text_column: str | None = None,
) -> SAERun:
    """A run for the SAE at `source`: a run directory, or anything that `sae.load` takes.

    `model`, `data` and `site` go before what the run or the SAE says. Raises InputError when one is neither given nor known.
    """
    given = {"model": model.name if isinstance(model, HookedModel) else model, "data": data, "site": site}
    given = {key: str(value) for key, value in given.items() if value is not None}
    if data is not None:
        given["text_column"] = text_column
    hooked = model if isinstance(model, HookedModel) else None
    if is_run(source):
        run = SAERun.load(source, hooked)
        return replace(run, config={**run.config, **given})
    sae = formats.load(source)
    config = {**_config(sae), **given}
    for key in ("model", "site", "data"):
        if config[key] is None:
            raise InputError(
                f"{source} does not say which {key} it is for: give it (--{key} on the command line)."
            )
    return SAERun(Path(source), sae, {}, config, hooked)


def is_run(source: str | Path) -> bool:
    """Whether `source` is the directory of a run of `sae.train`."""
    return not formats.is_remote(source) and (Path(source) / "run.yaml").exists()


def attach(run: SAERun, model: HookedModel | ModelPair) -> SAERun:
    """The run with its model at hand, the SAE on the model's device, and the norm of attention sinks measured if it is unknown.

    Raises SiteError or InputError when the SAE does not fit the model's site.
    """
    check_fits(model, run.sae, run.config["site"], str(run.path))
    run.sae.to(model.device)
    if run.sae.metadata.get("sink_threshold") is None:
        sites = run.sae.config.inputs(run.config["site"])
        tokenization = Tokenization(**run.config["tokenization"])
        first = collect(model, run.documents(), sites, tokenization=tokenization, max_tokens=_MEASURED_TOKENS)
        found = {site: first.statistics[site].sink_threshold for site in sites}
        run.sae.metadata["sink_threshold"] = found[sites[0]]
        if len(sites) > 1:
            run.sae.metadata["sink_thresholds"] = found
    return replace(run, model=model)


def _config(sae: SAE) -> dict[str, Any]:
    """What the run.yaml of such an SAE would say."""
    known = sae.metadata
    context = known.get("context")
    tokenization = known.get("tokenization") or asdict(
        Tokenization(
            context=context if isinstance(context, int) and context < DEFAULT_CONTEXT else None,
            bos={True: "always", False: "never"}.get(known.get("bos"), "auto"),  # type: ignore[arg-type]
        )
    )
    return {
        "model": known.get("model"),
        "data": known.get("data"),
        "text_column": None,
        "site": known.get("site"),
        "arch": sae.config.to_dict(),
        "dtype": "float32",
        "tokenization": tokenization,
        "training": {"seed": None, **(known.get("training") or {})},
    }
