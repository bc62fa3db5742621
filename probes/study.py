"""What is in a model's activations, site by site, beside everything that a probe has to beat.

    found = probe_model(model, "storyworld:mood", StudyConfig(texts=500))
    found.best, found.results
    save_study(found, "runs/p")           # summary.json, probes.safetensors, report.html

For every site: a probe's held-out accuracy, AUROC, cross-entropy and calibration, on folds that never split
a group; the same of labels shuffled within the folds, of the same site in the randomly initialised model,
of the embedding layer, of the class frequencies, and on StoryWorld of the exact posterior, the ceiling;
selectivity against a control task; description length. At the best site the labels are erased, and what
happens to the model's predictions and to the sites after it is measured.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.causal import CausalCheck, causal_check
from probes.controls import control_codes
from probes.crossval import CrossValidation, cross_validate
from probes.data import LabelledData, ProbeRows, Reading, ceiling, load_labelled, read_rows
from probes.latents import latent_probes
from probes.linear import LinearProbe, Probe
from probes.mdl import OnlineCode, online_code
from probes.methods import Logistic, MassMean, Method, ProbeWarning, get
from probes.scores import HeldOut, Scores, difference, difference_on_other_labels
from probes.splits import Classes, encode_labels
from sae.architectures import SAE
from sae.judging.sparse_probing import SparseProbing
from steerkit.errors import InputError
from steerkit.models import HookedModel
from steerkit.runs import peak_memory_mb, progress
from steerkit.stats import Comparison
from steerkit.tokens import Tokenization

EMBEDDING = "hook_embed"


@dataclass(frozen=True)
class StudyConfig:
    """What is probed, and how."""

    reading: Reading | None = None
    """What a row is; None: tokens of StoryWorld, else the last token of a causal model and the mean of an encoder's."""
    sites: tuple[str, ...] = ()
    """Default: the embedding and the residual stream after each block."""
    heads: bool = False
    """Probe every head's output too."""
    methods: tuple[str, ...] = ("logistic", "mass_mean")
    """The first is the one that baselines, control task, code and erasure are made with."""
    Cs: tuple[float, ...] = Logistic.Cs
    balanced: bool = False
    """Give every class the same weight in logistic probes."""
    texts: int = 1000
    """Texts at most."""
    per_text: int = 16
    """Tokens of a text at most."""
    n_folds: int = 5
    random_model: bool = True
    mdl: bool = True
    erase: bool = True
    seed: int = 0

    def method(self, name: str) -> Method:
        """The probe of that name with these settings, in float32 where it can."""
        if name == Logistic.name:
            return Logistic(Cs=self.Cs, balanced=self.balanced, exact=False)
        return get(name)


@dataclass(frozen=True)
class SiteResult:
    """One method's probe at one site (or head)."""

    site: str
    method: str
    scores: Scores
    layer: int | None = None
    """None: before the first block, or after the last."""
    head: int | None = None
    shuffled: Scores | None = None
    random_model: Scores | None = None
    above_random_model: Comparison | None = None
    """Accuracy less that in the randomly initialised model."""
    above_embedding: Comparison | None = None
    """Accuracy less that of the embedding."""
    control: Scores | None = None
    selectivity: Comparison | None = None
    """Accuracy less that on the control task."""
    mdl: OnlineCode | None = None
    settings: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {k: v.to_dict() if hasattr(v, "to_dict") else v for k, v in vars(self).items()}


@dataclass(frozen=True, repr=False)
class Study:
    """All of it."""

    model: str
    data: str
    reading: Reading
    config: StudyConfig
    classes: Classes
    rows: int
    groups: int
    results: tuple[SiteResult, ...]
    majority: Scores
    ceiling: Scores | None
    causal: CausalCheck | None
    latents: SparseProbing | None
    probes: dict[str, Probe] = field(repr=False)
    """`method:site` -> the probe fitted on all rows."""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def best(self) -> SiteResult:
        """Of the first method's sites (no heads), the one with the least cross-entropy: the highest accuracy for `mass_mean`."""
        own = [r for r in self.results if r.method == self.config.methods[0] and r.head is None]
        return min(own, key=_badness)

    def of_method(self, method: str) -> list[SiteResult]:
        """One method's sites, in the order of the forward pass; heads are apart."""
        return [r for r in self.results if r.method == method and r.head is None]

    def to_dict(self) -> dict[str, Any]:
        """The content of summary.json."""
        return {
            "model": self.model,
            "data": self.data,
            "reading": self.reading,
            "classes": list(self.classes),
            "rows": self.rows,
            "groups": self.groups,
            "majority": self.majority.to_dict(),
            "ceiling": self.ceiling and self.ceiling.to_dict(),
            "best": self.best.to_dict(),
            "results": [r.to_dict() for r in self.results],
            "causal": self.causal and self.causal.to_dict(),
            "latents": self.latents and self.latents.to_dict(),
            "notes": list(self.notes),
            "seconds": self.seconds,
            "peak_memory_mb": peak_memory_mb(),
        }

    def __repr__(self) -> str:
        lines = [
            f"{len(self.classes)} classes of {self.data}, {self.reading} of {self.model}: {self.rows:,} rows, "
            f"{self.groups:,} groups",
            f"  {'class frequencies':<34}{self.majority.accuracy!r}",
        ]
        lines += [f"  {r.site:<34}{r.scores.accuracy!r}" for r in self.of_method(self.config.methods[0])]
        if self.ceiling is not None:
            lines.append(f"  {'exact posterior':<34}{self.ceiling.accuracy!r}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def probe_model(
    model: HookedModel,
    data: str | LabelledData = "storyworld:mood",
    config: StudyConfig = StudyConfig(),
    *,
    tokenization: Tokenization | None = None,
    sae: SAE | None = None,
    sae_site: str = "",
    quiet: bool = True,
) -> Study:
    """Probe a model. `data` is as in `load_labelled`; with `sae`, its latents at `sae_site` are probed too.

    Raises InputError for data without labels, with one class or too few groups, and for sites that the model lacks.
    """
    started = time.perf_counter()
    labelled = load_labelled(data, n_texts=config.texts, seed=config.seed).without_rare_classes(
        config.n_folds
    )
    sites = list(config.sites) or default_sites(model)
    heads = _head_sites(model) if config.heads else []
    read = partial(
        read_rows,
        data=labelled,
        reading=config.reading or _default_reading(model, labelled),
        per_text=config.per_text,
        tokenization=tokenization,
        seed=config.seed,
    )
    with warnings.catch_warnings(record=True) as caught, progress(5, "probing", "steps", quiet=quiet) as bar:
        warnings.simplefilter("always", ProbeWarning)
        latent_sites = [] if sae is None else [sae_site]
        rows = read(model, sites=list(dict.fromkeys([*sites, *heads, *latent_sites])))
        bar.advance(1, done="rows read")
        found = _cross_validated(rows, sites, config)
        bar.advance(1, done="probes fitted")
        random = None
        if config.random_model:
            others = read(model.randomized(config.seed), sites=sites).acts
            random = _validated(others, rows, config, config.methods[0], shuffled=False)
        bar.advance(1, done="random model probed")
        results = _results(model, found, random, _codes(rows, sites, config), config.methods[0])
        of_heads = _head_results(model, rows, heads, config)
        first = found[config.methods[0]]
        made = Study(
            model.name,
            labelled.name,
            rows.reading,
            config,
            first.classes,
            len(rows),
            len(np.unique(rows.groups)),
            (*results, *(result for result, _ in of_heads)),
            majority=_majority(rows, config),
            ceiling=_ceiling_scores(model, labelled, rows, first),
            causal=None,
            latents=None if sae is None else _latents(sae, sae_site, rows, config),
            probes={
                f"{name}:{site}": probe for name, cv in found.items() for site, probe in cv.probes.items()
            }
            | {f"{r.method}:{r.site}:head{r.head}": probe for r, probe in of_heads},
            notes=labelled.notes,
        )
        bar.advance(1, done="labels coded")
        if config.erase:
            made = _with_causal_check(made, model, labelled, rows, sites, tokenization)
        bar.advance(1, done="labels erased")
    notes = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, ProbeWarning))
    return replace(made, notes=(*made.notes, *notes), seconds=time.perf_counter() - started)


def _head_sites(model: HookedModel) -> list[str]:
    return [name for name, site in model.sites.items() if name.endswith(".attn.hook_z") and site.verified]


def _codes(rows: ProbeRows, sites: Sequence[str], config: StudyConfig) -> dict[str, OnlineCode]:
    """Empty if not asked for."""
    if not config.mdl:
        return {}
    own = {site: rows.acts[site] for site in sites}
    return online_code(
        own, rows.labels, rows.groups, method=config.method(config.methods[0]), seed=config.seed
    )


def _latents(sae: SAE, site: str, rows: ProbeRows, config: StudyConfig) -> SparseProbing:
    return latent_probes(sae, rows.acts[site], rows.labels, rows.groups, seed=config.seed)


def default_sites(model: HookedModel) -> list[str]:
    """The embedding and the residual stream after each block."""
    wanted = [EMBEDDING, *(f"blocks.{i}.hook_resid_post" for i in range(model.n_layers))]
    found = [site for site in wanted if site in model.sites and model.sites[site].verified]
    if not found:
        raise InputError(
            f"{model.name} has no embedding and no residual stream by these names: name --sites."
        )
    return found


def _default_reading(model: HookedModel, data: LabelledData) -> Reading:
    if data.attribute:
        return "token" if model.is_causal else "mean"
    return "last" if model.is_causal else "mean"


def _cross_validated(
    rows: ProbeRows, sites: Sequence[str], config: StudyConfig
) -> dict[str, CrossValidation]:
    control = None
    if rows.reading == "token":
        control = control_codes(rows.token_ids, encode_labels(rows.labels)[0], seed=config.seed)
    return {
        name: _validated(
            {site: rows.acts[site] for site in sites},
            rows,
            config,
            name,
            shuffled=name == config.methods[0],
            control=control if name == config.methods[0] else None,
        )
        for name in config.methods
    }


def _validated(
    acts: Mapping[str, Tensor], rows: ProbeRows, config: StudyConfig, method: str, **options: Any
) -> CrossValidation:
    return cross_validate(
        acts,
        rows.labels,
        rows.groups,
        method=config.method(method),
        n_folds=config.n_folds,
        seed=config.seed,
        **options,
    )


def _results(
    model: HookedModel,
    found: Mapping[str, CrossValidation],
    random: CrossValidation | None,
    codes: Mapping[str, OnlineCode],
    first: str,
) -> list[SiteResult]:
    """Every method at every site, the first beside what was measured for it alone."""
    results = []
    for method, own in found.items():
        embedding = own.held_out.get(EMBEDDING)
        for site, held_out in own.held_out.items():
            other = random.held_out[site] if random is not None and method == first else None
            control = own.control.get(site)
            results.append(
                SiteResult(
                    site,
                    method,
                    held_out.scores(),
                    layer=model.site(site).layer,
                    shuffled=_scores(own.shuffled.get(site)),
                    random_model=_scores(other),
                    above_random_model=None if other is None else difference(held_out, other),
                    above_embedding=None
                    if embedding is None or site == EMBEDDING
                    else difference(held_out, embedding),
                    control=_scores(control),
                    selectivity=None if control is None else difference_on_other_labels(held_out, control),
                    mdl=codes.get(site) if method == first else None,
                    settings=dict(own.probes[site].settings),
                )
            )
    return results


def _scores(held_out: HeldOut | None) -> Scores | None:
    return None if held_out is None else held_out.scores()


def _head_results(
    model: HookedModel, rows: ProbeRows, sites: Sequence[str], config: StudyConfig
) -> list[tuple[SiteResult, Probe]]:
    """Every head's own slice of hook_z; the probes are as wide as the site, zero at the other heads."""
    slices = {
        (site, head): part
        for site in sites
        for head, part in enumerate(split_heads(rows.acts[site], model.n_heads))
    }
    if not slices:
        return []
    name = config.methods[0]
    found = _validated(
        {f"{site}:{head}": x for (site, head), x in slices.items()}, rows, config, name, shuffled=False
    )
    results = []
    for (site, head), part in slices.items():
        key = f"{site}:{head}"
        probe = found.probes[key]
        if isinstance(probe, LinearProbe):
            probe = _widened(probe, site, head * part.shape[1], rows.acts[site].shape[1])
        result = SiteResult(site, name, found.held_out[key].scores(), layer=model.site(site).layer, head=head)
        results.append((result, probe))
    return results


def split_heads(z: Float[Tensor, "n width"], n_heads: int) -> tuple[Float[Tensor, "n d_head"], ...]:
    """The heads' outputs, of activations at attn.hook_z. Raises InputError when the width is no multiple of the heads."""
    if z.shape[1] % n_heads:
        raise InputError(f"Activations {z.shape[1]} wide are not {n_heads} heads side by side.")
    return z.split(z.shape[1] // n_heads, dim=1)


def _widened(probe: LinearProbe, site: str, start: int, width: int) -> LinearProbe:
    weight = torch.zeros(len(probe.weight), width)
    center = torch.zeros(width)
    end = start + probe.weight.shape[1]
    weight[:, start:end], center[start:end] = probe.weight, probe.center
    return replace(probe, weight=weight, center=center, site=site)


def _majority(rows: ProbeRows, config: StudyConfig) -> Scores:
    unread = {"": torch.arange(len(rows))[:, None].float()}
    return _validated(unread, rows, config, "prior", shuffled=False).held_out[""].scores()


def _ceiling_scores(
    model: HookedModel, data: LabelledData, rows: ProbeRows, found: CrossValidation
) -> Scores | None:
    probabilities: Shaped[np.ndarray, "n k"] | None = ceiling(model, data, rows, found.classes)
    if probabilities is None:
        return None
    return HeldOut(probabilities, encode_labels(rows.labels)[0], rows.groups).scores()


def _with_causal_check(
    made: Study,
    model: HookedModel,
    data: LabelledData,
    rows: ProbeRows,
    sites: Sequence[str],
    tokenization: Tokenization | None,
) -> Study:
    """The causal check at the best site, with the penalty that was chosen there; a note where there are too few texts."""
    config, best = made.config, made.best
    method = config.method(best.method)
    if isinstance(method, Logistic):
        method = replace(method, C=best.settings["C"])
    later = list(sites)[list(sites).index(best.site) + 1 :]
    try:
        causal = causal_check(
            model,
            data,
            rows,
            best.site,
            sites=later,
            method=method,
            per_text=config.per_text,
            n_folds=min(config.n_folds, 3),
            tokenization=tokenization,
            seed=config.seed,
        )
    except InputError as error:
        return replace(made, notes=(*made.notes, f"The labels were not erased: {error}"))
    return replace(made, causal=causal)


def _badness(result: SiteResult) -> float:
    if result.method == MassMean.name:  # its probabilities have no scale
        return -result.scores.accuracy.estimate
    return result.scores.cross_entropy.estimate
