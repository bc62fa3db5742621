"""Evaluating sparse autoencoders on held-out text.

    evaluation = evaluate(model, sae, held_out, "blocks.2.hook_resid_post")
    evaluation.fvu, evaluation.delta_ce, evaluation.intervals["fvu"]
    evaluate_nulls(model, sae, held_out, site)                            # beside what it has to beat

One pass over the text. Each batch is run once as it is, which gives the activations and the outputs, and then
from the site on (`steerkit.replay`): once with the activations of the tokens that count set to zero, once to
their mean, and once for each SAE with its reconstructions spliced in. Pads, BOS, special and sink tokens are
left as they are in all of them.

    fvu = Σ‖x - x̂‖² / Σ‖x - x̄‖²                            x̄: mean over the same tokens
    ce_recovered = (ce_zero - ce_sae) / (ce_zero - ce_clean)       ce_recovered_mean: with ce_mean for ce_zero

What a transcoder makes of its site is measured and spliced in at its target site: there x is, in all of the above. A crosscoder is
measured at each of its sites in turn, by what it makes of the activations at all of them; those figures are in `sites`. The whole
evaluation has the FVU over all sites, each scaled to unit mean square, and no figure of the model's outputs.

Cross-entropies are nats per predicted token: every text token that has one before it in its row, special
tokens left out, sinks included. A model that is not causal has no next token: there the output at each token
is scored against that token, unmasked. A model without a language-model head has no cross-entropies; what its
final states turned into is in `final_cosine`, as it is for every model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.architectures import SAE
from sae.architectures.base import column_counts
from sae.architectures.crosscoder import CrosscoderSAE
from sae.architectures.transcoder import TranscoderSAE
from sae.thresholds import mean_l0, strongest
from steerkit.activations import TokenBatch, Tokenization, collect, is_sink, token_batches
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.pair import ModelPair, at
from steerkit.replay import Replay
from steerkit.runs import progress, write_json
from steerkit.sites import ActivationHook
from steerkit.stats import Interval, jackknife

DEAD_TOKENS = 200_000
"""A latent is dead if it is silent on so many held-out tokens, or on all there are."""

_FIRST_LOT = 16_384
"""Tokens on which the sink threshold and the mean for mean ablation are measured."""
_ENTRIES = 1 << 24
"""Largest array of latents or logits that is made at once."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """How well an SAE stands in for the activations of a site. Means over tokens; None where there is no
    value."""

    l0: float
    """Active latents a token."""
    l1: float
    """Sum of the latents of a token, in the SAE's own units."""
    fvu: float
    """Fraction of variance unexplained."""
    cosine: float | None
    """Cosine between activation and reconstruction."""
    norm_ratio: float | None
    """‖x̂‖ / ‖x‖."""
    shrinkage: float | None
    """Σ‖x̂ - x̄‖² / Σ(x̂ - x̄)·(x - x̄): below 1 when a larger reconstruction would be nearer to x (about
    x̄)."""
    dead_fraction: float
    """Share of latents that are silent on all `tokens`."""
    final_cosine: float | None
    """Cosine of the model's final states, spliced with clean, at the text tokens."""
    final_cosine_zero: float | None
    final_cosine_mean: float | None
    ce_clean: float | None
    ce_sae: float | None
    ce_zero: float | None
    ce_mean: float | None
    delta_ce: float | None
    """ce_sae - ce_clean."""
    ce_recovered: float | None
    ce_recovered_mean: float | None
    kl: float | None
    """KL(clean ‖ spliced) of the predictions, nats."""
    kl_zero: float | None
    kl_mean: float | None
    fvu_zero: float | None
    """Σ‖x‖² / Σ‖x - x̄‖², what zeros leave unexplained; the mean leaves 1."""
    tokens: int
    """Tokens that count: reconstructed and spliced."""
    predicted: int
    """Tokens whose cross-entropy is measured."""
    documents: int
    predicts: str | None
    """What cross-entropies are of: `next token`, `own token`, or None."""
    sink_threshold: float | None
    """Norm above which a token was left out as a sink."""
    intervals: Mapping[str, Interval] = field(repr=False)
    """95 % intervals of some of the above, jackknifed over documents."""
    density: Float[Tensor, " d_sae"] = field(repr=False)
    """Share of tokens on which each latent is active."""
    sites: Mapping[str, Evaluation] = field(default_factory=dict, repr=False)
    """A crosscoder's figures at each of its sites."""

    def density_histogram(self) -> dict[str, list[float]]:
        """Counts of latents per half decade of density; silent ones are in none."""
        edges = np.arange(-7, 0.5, 0.5)
        counts, _ = np.histogram(self.density[self.density > 0].log10().numpy(), bins=edges)
        return {"log10_edges": edges.tolist(), "counts": counts.tolist()}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the density as a histogram."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("intervals", "density", "sites")
        }
        intervals = {name: interval.to_dict() for name, interval in self.intervals.items()}
        found = {**values, "intervals": intervals, "density_histogram": self.density_histogram()}
        sites = {site: evaluation.to_dict() for site, evaluation in self.sites.items()}
        return {**found, "sites": sites} if sites else found

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        def shown(name: str) -> str:
            if name in self.intervals:
                return repr(self.intervals[name])
            value = getattr(self, name)
            return "–" if value is None else f"{value:.4g}"

        lines = [
            f"Evaluation on {self.tokens:,} tokens of {self.documents:,} documents",
            f"  L0 {shown('l0')}   L1 {shown('l1')}   FVU {shown('fvu')}   cosine {shown('cosine')}",
            f"  norm ratio {shown('norm_ratio')}   shrinkage {shown('shrinkage')}",
            f"  dead {self.dead_fraction:.1%}",
        ]
        if self.predicts is not None:
            lines += [
                f"  cross-entropy of the {self.predicts}: clean {shown('ce_clean')}   SAE {shown('ce_sae')}",
                f"    ablated: zero {shown('ce_zero')}   mean {shown('ce_mean')}",
                f"  ΔCE {shown('delta_ce')}   KL {shown('kl')}",
                f"  recovered {shown('ce_recovered')}   against mean {shown('ce_recovered_mean')}",
            ]
        if self.final_cosine is not None:
            lines.append(
                f"  final cosine: SAE {shown('final_cosine')}   zero {shown('final_cosine_zero')}   "
                f"mean {shown('final_cosine_mean')}"
            )
        for site, found in self.sites.items():
            lines += [f"at {site}:", *repr(found).splitlines()[1:]]
        return "\n".join(lines)


def evaluate(
    model: HookedModel | ModelPair,
    sae: SAE,
    documents: Documents | Sequence[str],
    site: str,
    *,
    tokenization: Tokenization | None = None,
    tokens: int = DEAD_TOKENS,
    sink_threshold: float | None = None,
    batch_tokens: int = 8192,
    quiet: bool = True,
) -> Evaluation:
    """Measure an SAE on `tokens` held-out tokens. `documents` are all used as they are: hold them out before.

    Without `sink_threshold` it is measured on the first tokens, if the tokenization drops sinks. With fewer
    than `DEAD_TOKENS` tokens `dead_fraction` is an upper bound, unless there is no more text. Raises
    InputError when no token is left or the SAE does not fit the site, NumericsError on NaN or inf.
    """
    found = evaluate_all(
        model,
        {"sae": sae},
        documents,
        site,
        tokenization=tokenization,
        tokens=tokens,
        sink_threshold=sink_threshold,
        batch_tokens=batch_tokens,
        quiet=quiet,
    )
    return found["sae"]


@torch.no_grad()
def evaluate_all(
    model: HookedModel | ModelPair,
    saes: Mapping[str, SAE],
    documents: Documents | Sequence[str],
    site: str,
    *,
    tokenization: Tokenization | None = None,
    tokens: int = DEAD_TOKENS,
    sink_threshold: float | None = None,
    batch_tokens: int = 8192,
    quiet: bool = True,
) -> dict[str, Evaluation]:
    """`evaluate` for several SAEs of one site in one pass: the clean and the ablated runs are shared by those that stand in for the
    same activations."""
    documents = load_documents(documents)
    tokenization = tokenization or Tokenization()
    if not len(documents) or tokens < 1:
        raise InputError(
            "There is no held-out text: give at least one document and one token to evaluate on."
        )
    alike: dict[tuple[tuple[str, ...], tuple[str, ...]], dict[str, SAE]] = {}
    for name, sae in saes.items():
        check_fits(model, sae, site, name)
        sites = sae.config.inputs(site), sae.config.outputs(site)
        alike.setdefault(sites, {})[name] = sae
    found: dict[str, Evaluation] = {}
    for (inputs, outputs), group in alike.items():
        lot = collect(
            model,
            documents,
            (*inputs, *outputs),
            tokenization=tokenization,
            max_tokens=min(tokens, _FIRST_LOT),
            batch_tokens=batch_tokens,
        ).statistics
        thresholds = {name: statistics.sink_threshold for name, statistics in lot.items()}
        if tokenization.drop_sinks:
            known = next(iter(group.values())).metadata.get("sink_thresholds") or {}
            given = {} if sink_threshold is None else {site: sink_threshold}
            thresholds |= {name: value for name, value in {**known, **given}.items() if name in thresholds}
        sums = {}
        for target in outputs:
            place = _Place(model, inputs, outputs, target, thresholds)
            sums[target] = _Sums(place, group, len(documents), lot[target].mean)
            batches = token_batches(
                model, documents, tokenization, batch_tokens=batch_tokens, max_tokens=tokens
            )
            replay = Replay(*at(model, target))
            with progress(tokens, "evaluation", quiet=quiet) as bar:
                for number, batch in enumerate(batches):
                    _evaluate_batch(replay, group, batch, number, sums[target])
                    bar.advance(batch.n_kept)
        for name, sae in group.items():
            parts = {target: of_target.evaluation(name) for target, of_target in sums.items()}
            found[name] = parts[outputs[0]] if len(parts) == 1 else _whole(name, sae, sums, parts)
    return {name: found[name] for name in saes}


@torch.no_grad()
def random_sae(
    like: SAE,
    acts: Float[Tensor, "n d_in"],
    *,
    seed: int = 0,
    target: Float[Tensor, "n d_out"] | None = None,
) -> SAE:
    """The null for an SAE: the same architecture, width and mean L0 on `acts`, but random.

    Decoder rows are random unit vectors, the encoder their transpose, the decoder bias the mean of `acts`;
    thresholds per latent cut every latent alike until the L0 is that of `like`; then the decoder is scaled by
    the one factor that fits `acts` best. Of a transcoder it is `target` that is fitted, by random directions on
    either side; without it the decoder is left as it is.
    """
    acts = acts.to(like.device, like.dtype)
    found = like.config.build(like.d_in).to(like.device, like.dtype).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(found.W_dec.shape, generator=generator).to(acts)
    found.W_dec.copy_(F.normalize(rows, dim=1))
    if isinstance(like, TranscoderSAE):
        columns = torch.randn(like.d_sae, like.d_in, generator=generator).to(acts)
        found.W_enc.copy_(F.normalize(columns, dim=1).T)
    else:
        found.W_enc.copy_(found.W_dec.T)
        target = acts
    if target is not None:
        target = target.to(acts)
        found.b_dec.copy_(target.mean(0))
    l0, wanted = mean_l0(found, acts), mean_l0(like, acts)
    if like.threshold is not None or l0 > wanted:
        found.threshold = strongest(found, acts, wanted / l0)
    if target is not None:
        found.W_dec.mul_(_best_factor(found, acts, target))
    found.metadata = {**like.metadata, "null": "random SAE", "null_seed": seed}
    return found


def _best_factor(sae: SAE, acts: Tensor, target: Tensor) -> float:
    """argmin_s Σ‖y - b - s (ŷ - b)‖² over `acts` and their `target` y."""
    part_of_x = of_squares = 0.0
    size = max(1, _ENTRIES // sae.d_sae)
    for x, y in zip(acts.split(size), target.split(size)):
        direction = sae(x) - sae.b_dec
        part_of_x += float(((y - sae.b_dec) * direction).sum(dtype=torch.float64))
        of_squares += float(direction.square().sum(dtype=torch.float64))
    return part_of_x / of_squares if of_squares else 1.0


@dataclass(frozen=True)
class Null:
    """One line of `NullTable`."""

    name: str
    l0: float | None
    fvu: float | None
    delta_ce: float | None
    ce_recovered: float | None
    kl: float | None
    final_cosine: float | None


@dataclass(frozen=True, repr=False)
class NullTable:
    """An SAE beside what it has to beat."""

    rows: tuple[Null, ...]
    evaluations: Mapping[str, Evaluation]
    """Name -> evaluation, of those lines that are of SAEs."""

    def __getitem__(self, name: str) -> Null:
        return next(row for row in self.rows if row.name == name)

    def to_dict(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def save(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON."""
        write_json(path, self.to_dict())

    def __repr__(self) -> str:
        names = [f.name for f in fields(Null)][1:]
        width = max(len(row.name) for row in self.rows)
        lines = ["".join([" " * width, *(f"{name:>14}" for name in names)])]
        for row in self.rows:
            values = (getattr(row, name) for name in names)
            cells = ("–" if value is None else f"{value:.4g}" for value in values)
            lines.append("".join([f"{row.name:<{width}}", *(f"{cell:>14}" for cell in cells)]))
        return "\n".join(lines)


def evaluate_nulls(
    model: HookedModel,
    sae: SAE,
    documents: Documents | Sequence[str],
    site: str,
    *,
    random_model_sae: SAE | None = None,
    random_model_seed: int = 0,
    seed: int = 0,
    tokenization: Tokenization | None = None,
    tokens: int = DEAD_TOKENS,
    sink_threshold: float | None = None,
    batch_tokens: int = 8192,
    quiet: bool = True,
) -> NullTable:
    """The SAE beside a random one of the same sparsity, mean ablation and zeros, on the same tokens.

    `random_model_sae` is an SAE trained on `model.randomized(random_model_seed)`: it gets a line in the model
    itself, and one on the random model, where cross-entropies mean little and the FVU is the baseline.
    """
    documents = load_documents(documents)
    check_fits(model, sae, site)
    settings: dict[str, Any] = {"tokenization": tokenization, "batch_tokens": batch_tokens}
    inputs, outputs = sae.config.inputs(site), sae.config.outputs(site)
    if len(inputs) > 1:
        raise InputError("A random crosscoder is no null that means anything: evaluate it without nulls.")
    lot = collect(model, documents, (*inputs, *outputs), max_tokens=min(tokens, _FIRST_LOT), **settings)
    null = random_sae(sae, lot[site].float(), seed=seed, target=lot[outputs[0]].float())
    saes = {"trained": sae, "random SAE": null}
    if random_model_sae is not None:
        saes["SAE of the random model"] = random_model_sae
    settings |= {"tokens": tokens, "quiet": quiet}
    found = evaluate_all(model, saes, documents, site, sink_threshold=sink_threshold, **settings)
    if random_model_sae is not None:
        random_model = model.randomized(random_model_seed)
        found["the same, on the random model"] = evaluate(
            random_model, random_model_sae, documents, site, **settings
        )
    names = [f.name for f in fields(Null)][1:]
    rows = [Null(name, *(getattr(evaluation, key) for key in names)) for name, evaluation in found.items()]
    return NullTable((*rows, *_ablations(found["trained"])), found)


def _ablations(found: Evaluation) -> tuple[Null, Null]:
    """The lines of mean ablation and of zeros, from the evaluation of any SAE."""

    def less(ce: float | None) -> float | None:
        return None if ce is None or found.ce_clean is None else ce - found.ce_clean

    mean, zero = less(found.ce_mean), less(found.ce_zero)
    recovered = 1 - mean / zero if mean is not None and zero else None
    return (
        Null("mean ablation", None, 1.0, mean, recovered, found.kl_mean, found.final_cosine_mean),
        Null(
            "zero",
            None,
            found.fvu_zero,
            zero,
            None if zero is None else 0.0,
            found.kl_zero,
            found.final_cosine_zero,
        ),
    )


def check_fits(model: HookedModel | ModelPair, sae: SAE, site: str, name: str = "sae") -> None:
    """Raise InputError unless the SAE's widths are those of its sites."""
    for sites, own in ((sae.config.inputs(site), sae.d_in), (sae.config.outputs(site), len(sae.b_dec))):
        width = sum(model.site(one).width for one in sites)
        if own != width:
            raise InputError(
                f"The SAE ({name}) is of width {own}, but {', '.join(sites)} of {model.name} is of width {width}: "
                "give the site and model that it was trained on."
            )


@dataclass(frozen=True)
class _Place:
    """Where SAEs read, and where they are measured and spliced in."""

    model: HookedModel | ModelPair
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    target: str
    sink_thresholds: Mapping[str, float | None]

    @property
    def part(self) -> slice:
        """Where the target is in a reconstruction."""
        before = self.outputs[: self.outputs.index(self.target)]
        start = sum(self.model.site(site).width for site in before)
        return slice(start, start + self.model.site(self.target).width)

    def read(self, batch: TokenBatch, acts: Tensor) -> tuple[Tensor, Tensor]:
        """(what is encoded, which tokens count) of a batch whose activations at the target are `acts`."""
        keep = batch.keep.to(acts.device) & ~is_sink(acts, self.sink_thresholds[self.target])
        if self.inputs == (self.target,):
            return acts, keep
        found = self.model.run(batch.input_ids, _mask(self.model, batch), sites=self.inputs)
        for site, read in found.items():
            keep &= ~is_sink(read, self.sink_thresholds[site]).to(keep.device)
        return torch.cat([read.to(acts.device) for read in found.values()], -1), keep


# one batch


def _evaluate_batch(
    replay: Replay, saes: Mapping[str, SAE], batch: TokenBatch, number: int, sums: _Sums
) -> None:
    model, site = replay.model, replay.site
    acts, clean = replay.run(batch.input_ids, _mask(model, batch))
    inputs, keep = sums.place.read(batch, acts)
    x, inputs = acts[keep].float(), inputs[keep].float()
    document = batch.token_document.to(acts.device)[keep]
    if not x.isfinite().all():
        wrong = document[~x.isfinite().all(-1)].unique().tolist()
        raise NumericsError(
            f"NaN or inf at {site} in batch {number} (documents {', '.join(map(str, wrong[:5]))}). "
            "Check the model's weights, or load it in float32 or bfloat16."
        )
    mean = sums.centre.to(x)
    replacements = {"zero": torch.zeros_like(x), "mean": mean.expand_as(x)}
    sums.add_activations(x, document)
    for name, sae in saes.items():
        replacements[name] = sums.reconstruct(name, sae, inputs, x, document, number)
    finals = {name: replay.again(_splice(keep, values)) for name, values in replacements.items()}
    _add_outputs(model, batch, clean, finals, sums)


def _splice(keep: Bool[Tensor, "batch pos"], values: Float[Tensor, "n width"]) -> ActivationHook:
    """Put `values` in the place of the activations at `keep`."""

    def splice(act: Tensor) -> Tensor:
        act = act.clone()
        act[keep] = values.to(act.dtype)
        return act

    return splice


def _mask(model: HookedModel | ModelPair, batch: TokenBatch) -> Tensor | None:
    """Pads on the right of a causal model change nothing before them."""
    return None if model.is_causal else batch.attention_mask


def _add_outputs(
    model: HookedModel, batch: TokenBatch, clean: Tensor, finals: Mapping[str, Tensor], sums: _Sums
) -> None:
    device = clean.device
    batch = batch.to(device)
    text = _text(model, batch)
    document = batch.token_document
    cosines = {
        name: F.cosine_similarity(clean[text].float(), f[text].float(), dim=-1) for name, f in finals.items()
    }
    sums.add("cosine", cosines, document[text])
    if not model.has_lm_head:
        return
    ahead = 1 if model.is_causal else 0
    target = text[:, ahead:]
    ids, document = batch.input_ids[:, ahead:][target], document[:, ahead:][target]
    states = {name: f[:, : f.shape[1] - ahead][target] for name, f in {"clean": clean, **finals}.items()}
    chunk = max(1, _ENTRIES // model.d_vocab)
    for start in range(0, len(ids), chunk):
        part = slice(start, start + chunk)
        predictions = F.log_softmax(model.unembed(states["clean"][part]).float(), -1)
        ce, kl = {"clean": _at(predictions, ids[part])}, {}
        for name in finals:
            spliced = F.log_softmax(model.unembed(states[name][part]).float(), -1)
            ce[name] = _at(spliced, ids[part])
            kl[name] = F.kl_div(spliced, predictions, reduction="none", log_target=True).sum(-1)
        sums.add("ce", ce, document[part])
        sums.add("kl", kl, document[part])


def _at(log_probabilities: Float[Tensor, "n d_vocab"], ids: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    return -log_probabilities.gather(-1, ids[:, None])[:, 0]


def _text(model: HookedModel, batch: TokenBatch) -> Bool[Tensor, "batch pos"]:
    """Text tokens: no pads, no special tokens, wherever they stand."""
    special = torch.tensor(sorted(model.special_ids), dtype=torch.int64, device=batch.input_ids.device)
    return (batch.token_position >= 0) & ~torch.isin(batch.input_ids, special)


# sums


class _Sums:
    """Everything that is summed over tokens: per document in float64, so that intervals come from the same
    pass."""

    def __init__(
        self,
        place: _Place,
        saes: Mapping[str, SAE],
        n_documents: int,
        centre: Float[Tensor, " d_out"],
    ) -> None:
        self.place = place
        self.centre = centre
        """What sums of squares are taken about, so that none cancels; the measured mean differs hardly."""
        self.n_documents = n_documents
        self.by_document: dict[tuple[str, str], Tensor] = {}
        self.vectors: dict[str, Tensor] = {}
        self.counts = {name: torch.zeros(sae.d_sae, dtype=torch.int64) for name, sae in saes.items()}

    def add(
        self, quantity: str, values: Mapping[str, Float[Tensor, " n"]], document: Int[Tensor, " n"]
    ) -> None:
        """Add one value a token for each of several names; the tokens themselves are counted under 'n'."""
        ones = torch.ones(len(document), device=document.device)
        for name, value in {"n": ones, **values}.items():
            total = self.by_document.setdefault(
                (quantity, name), torch.zeros(self.n_documents, dtype=torch.float64, device=document.device)
            )
            total.index_add_(0, document, value.double())

    def add_vector(self, name: str, values: Float[Tensor, "n d_in"]) -> None:
        total = values.sum(0, dtype=torch.float64)
        self.vectors[name] = self.vectors[name] + total if name in self.vectors else total

    def add_activations(self, x: Float[Tensor, "n d_in"], document: Int[Tensor, " n"]) -> None:
        centred = x - self.centre.to(x)
        self.add("site", {"variance": centred.square().sum(-1, dtype=torch.float64)}, document)
        self.add_vector("x", centred)

    def reconstruct(
        self,
        name: str,
        sae: SAE,
        inputs: Float[Tensor, "n d_in"],
        x: Float[Tensor, "n d_out"],
        document: Int[Tensor, " n"],
        number: int,
    ) -> Float[Tensor, "n d_out"]:
        """The reconstructions of `x` from `inputs`, after adding up what they are like."""
        found = torch.empty_like(x)
        chunk = max(1, _ENTRIES // sae.d_sae)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            encoded = inputs[part].to(sae.device, sae.dtype)
            latents = sae.encode(encoded)
            found[part] = sae.reconstruct(latents, encoded)[:, self.place.part].to(x)
            active = latents > 0
            self.counts[name] += column_counts(active).long().cpu()
            self._add_chunk(
                name, x[part], found[part], active.to(x.device), latents.to(x.device), document[part]
            )
        if not found.isfinite().all():
            raise NumericsError(
                f"The SAE ({name}) gives NaN or inf at {self.place.target} in batch {number}: check its weights."
            )
        return found

    def _add_chunk(
        self, name: str, x: Tensor, found: Tensor, active: Tensor, latents: Tensor, document: Tensor
    ) -> None:
        centre = self.centre.to(x)
        centred, aligned = found - centre, (x - centre) * (found - centre)
        values = {
            "error": (x - found).square().sum(-1, dtype=torch.float64),
            "l0": active.float().sum(-1),
            "l1": latents.float().sum(-1),
            "cosine": F.cosine_similarity(x, found, dim=-1),
            "ratio": found.norm(dim=-1) / x.norm(dim=-1).clamp_min(torch.finfo(x.dtype).tiny),
            "square": centred.square().sum(-1, dtype=torch.float64),
            "aligned": aligned.sum(-1, dtype=torch.float64),
        }
        self.add(name, values, document)
        self.add_vector(name, centred)

    def column(self, quantity: str, name: str) -> Float[np.ndarray, " documents"]:
        found = self.by_document.get((quantity, name))
        return np.zeros(self.n_documents) if found is None else found.cpu().numpy()

    def evaluation(self, name: str) -> Evaluation:
        n = int(self.column("site", "n").sum())
        if not n:
            raise InputError(
                "Not one held-out token is left without special and sink tokens: nothing to evaluate."
            )
        site = {
            key: self.column(name, key)
            for key in ("error", "l0", "l1", "cosine", "ratio", "square", "aligned")
        }
        total = {key: float(values.sum()) for key, values in site.items()}
        mean_x, mean_found = (self.vectors[key].cpu().numpy() / n for key in ("x", name))
        mean_all = self.centre.double().numpy() + mean_x
        # The sums were taken about the centre; x̄ is the centre plus mean_x.
        variance = self.variance()
        square = total["square"] - 2 * n * float(mean_found @ mean_x) + n * float(mean_x @ mean_x)
        aligned = total["aligned"] - n * float(mean_found @ mean_x)
        cosines = {key: self._mean("cosine", key) for key in (name, "zero", "mean")}
        density = self.counts[name].double() / n
        return Evaluation(
            l0=total["l0"] / n,
            l1=total["l1"] / n,
            fvu=total["error"] / variance if variance > 0 else float("nan"),
            fvu_zero=1 + n * float(mean_all @ mean_all) / variance if variance > 0 else float("nan"),
            cosine=total["cosine"] / n,
            norm_ratio=total["ratio"] / n,
            shrinkage=square / aligned if aligned > 0 else None,
            dead_fraction=float((density == 0).double().mean()),
            final_cosine=cosines[name],
            final_cosine_zero=cosines["zero"],
            final_cosine_mean=cosines["mean"],
            **self._cross_entropies(name),
            tokens=n,
            documents=int((self.column("site", "n") > 0).sum()),
            sink_threshold=self.place.sink_thresholds[self.place.target],
            intervals=self._intervals(name, variance),
            density=density,
        )

    def variance(self) -> float:
        """Σ‖x - x̄‖²."""
        n, sum_x = self.column("site", "n").sum(), self.vectors["x"].cpu().numpy()
        return float(self.column("site", "variance").sum() - sum_x @ sum_x / n)

    def _mean(self, quantity: str, name: str) -> float:
        return float(self.column(quantity, name).sum() / self.column(quantity, "n").sum())

    def _cross_entropies(self, name: str) -> dict[str, Any]:
        keys = (
            "ce_clean",
            "ce_sae",
            "ce_zero",
            "ce_mean",
            "delta_ce",
            "ce_recovered",
            "ce_recovered_mean",
            "kl",
            "kl_zero",
            "kl_mean",
        )
        predicted = int(self.column("ce", "n").sum())
        if not predicted:
            return {**dict.fromkeys(keys), "predicted": 0, "predicts": None}
        clean, spliced, zero, mean = (self._mean("ce", key) for key in ("clean", name, "zero", "mean"))
        values = (
            clean,
            spliced,
            zero,
            mean,
            spliced - clean,
            _share(zero - spliced, zero - clean),
            _share(mean - spliced, mean - clean),
            *(self._mean("kl", key) for key in (name, "zero", "mean")),
        )
        predicts = "next token" if self.place.model.is_causal else "own token"
        return {**dict(zip(keys, values)), "predicted": predicted, "predicts": predicts}

    def _intervals(self, name: str, variance: float) -> dict[str, Interval]:
        """Jackknifed over documents; a document's share of the variance is that of its squares about the
        centre."""
        n, squares = self.column("site", "n"), self.column("site", "variance")
        used = n > 0
        if used.sum() < 2:
            return {}
        pairs = {
            "l0": (self.column(name, "l0"), n),
            "fvu": (self.column(name, "error"), squares * (variance / squares.sum())),
            "final_cosine": (self.column("cosine", name), self.column("cosine", "n")),
        }
        predicted = self.column("ce", "n")
        if predicted.any():
            clean, spliced, zero, mean = (self.column("ce", key) for key in ("clean", name, "zero", "mean"))
            pairs |= {
                "delta_ce": (spliced - clean, predicted),
                "ce_recovered": (zero - spliced, zero - clean),
                "ce_recovered_mean": (mean - spliced, mean - clean),
                "kl": (self.column("kl", name), predicted),
            }
        return {
            key: jackknife(np.stack(columns, 1)[used], lambda s: s[..., 0] / s[..., 1])
            for key, columns in pairs.items()
        }


def _whole(name: str, sae: SAE, sums: Mapping[str, _Sums], parts: Mapping[str, Evaluation]) -> Evaluation:
    """A crosscoder's evaluation, from the sums and the evaluations at each of its sites: what concerns latents is the same at all,
    errors are added in units in which every site has unit mean square."""
    assert isinstance(sae, CrosscoderSAE)
    errors = variances = 0.0
    by_document = np.zeros((2, next(iter(sums.values())).n_documents))
    for of_site, scale in zip(sums.values(), sae.scales.tolist()):
        squares, variance = of_site.column("site", "variance"), scale**2 * of_site.variance()
        error = scale**2 * of_site.column(name, "error")
        errors, variances = errors + float(error.sum()), variances + variance
        by_document += np.stack([error, squares * (variance / squares.sum())])
    first = next(iter(parts.values()))
    intervals = {key: first.intervals[key] for key in ("l0",) if key in first.intervals}
    used = next(iter(sums.values())).column("site", "n") > 0
    if used.sum() > 1:
        intervals["fvu"] = jackknife(by_document.T[used], lambda s: s[..., 0] / s[..., 1])
    alike = ("l0", "l1", "dead_fraction", "tokens", "documents", "density")
    blank: dict[str, Any] = {f.name: None for f in fields(Evaluation)}
    return Evaluation(
        **{
            **blank,
            **{key: getattr(first, key) for key in alike},
            "fvu": errors / variances if variances > 0 else float("nan"),
            "predicted": 0,
            "intervals": intervals,
            "sites": parts,
        }
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
