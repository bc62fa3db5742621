"""Probes as values: fitted once, kept, applied, turned into a direction.

    probe = fit_linear(acts[site], labels)                     # LinearProbe
    probe.predict(acts[site]);  probe.direction()              # classes;  (d,) for a steering vector
    every = fit_linear(acts, labels, groups=documents)         # {site: LinearProbe}, all sites in one pass
    save_probes(every, "probes.safetensors");  load_probes("probes.safetensors")

A figure of a probe on the rows that it was fitted on says nothing: see `probes.cross_validate`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from probes.methods import LinearFit, Method, MlpFit, ProbeWarning, Problems, get
from probes.methods.base import Fit, Link, to_probabilities
from probes.splits import Classes, Labels, encode_labels, grouped_folds
from steerkit.errors import InputError, NumericsError
from steerkit.value_files import read_values, write_values

FORMAT = "steerkit-probes-1"
_STACK_BYTES = 1 << 29
"""Activations of one width that are stacked and fitted together."""


@dataclass(frozen=True)
class LinearProbe:
    """logits = (x − center) · weight + bias; two classes have one logit, that of the second."""

    weight: Float[Tensor, "k d"] = field(repr=False)
    bias: Float[Tensor, " k"] = field(repr=False)
    center: Float[Tensor, " d"] = field(repr=False)
    classes: Classes
    method: str = ""
    site: str = ""
    link: Link = "logit"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def logits(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... k"]:
        if x.shape[-1] != self.weight.shape[1]:
            raise InputError(
                f"The probe reads activations {self.weight.shape[1]} wide, and these are {x.shape[-1]} wide."
            )
        probe = self.to(x.device)
        return (x.float() - probe.center) @ probe.weight.T + probe.bias

    def probabilities(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... classes"]:
        return to_probabilities(self.logits(x), self.link)

    def predict(self, x: Float[Tensor, "... d"]) -> Shaped[np.ndarray, "..."]:
        """The most probable class of each row."""
        return np.array(self.classes)[self.probabilities(x).argmax(-1).cpu().numpy()]

    def direction(self, label: Any = None) -> Float[Tensor, " d"]:
        """What to add to move towards a class, in the activations' units: its logit's gradient, less the others' mean.

        Of two classes the second is the default. Raises InputError for a label that the probe does not know.
        """
        if label is None and len(self.classes) > 2:
            raise InputError(f"Towards which class? The probe tells {', '.join(map(str, self.classes))}.")
        if label is not None and label not in self.classes:
            raise InputError(
                f"The probe does not know {label!r}: it tells {', '.join(map(str, self.classes))}."
            )
        code = len(self.classes) - 1 if label is None else self.classes.index(label)
        if len(self.weight) == 1:
            return self.weight[0].clone() if code == 1 else -self.weight[0]
        others = (self.weight.sum(0) - self.weight[code]) / (len(self.classes) - 1)
        return self.weight[code] - others

    def to(self, device: torch.device | str) -> LinearProbe:
        if self.weight.device == torch.device(device):
            return self
        moved = {name: getattr(self, name).to(device) for name in ("weight", "bias", "center")}
        return LinearProbe(**{**vars(self), **moved})

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, whole or not at all."""
        return save_probes({self.site: self}, path)

    @classmethod
    def load(cls, path: str | Path) -> LinearProbe:
        """Read what `save` wrote. Raises InputError for a file of several probes, and as `load_probes` does."""
        found = list(load_probes(path).values())
        if len(found) != 1 or not isinstance(found[0], cls):
            raise InputError(f"{path} does not hold one {cls.__name__}: read it with load_probes.")
        return found[0]

    def __repr__(self) -> str:
        return _described(self, f"{self.weight.shape[1]} wide")


@dataclass(frozen=True)
class MlpProbe:
    """logits = relu((x − center) · hidden_weight + hidden_bias) · weight + bias."""

    hidden_weight: Float[Tensor, "h d"] = field(repr=False)
    hidden_bias: Float[Tensor, " h"] = field(repr=False)
    weight: Float[Tensor, "classes h"] = field(repr=False)
    bias: Float[Tensor, " classes"] = field(repr=False)
    center: Float[Tensor, " d"] = field(repr=False)
    classes: Classes
    method: str = "mlp"
    site: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def probabilities(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... classes"]:
        """On the device of the probe's weights."""
        hidden = (
            (x.float().to(self.weight.device) - self.center) @ self.hidden_weight.T + self.hidden_bias
        ).relu()
        return (hidden @ self.weight.T + self.bias).softmax(-1)

    def predict(self, x: Float[Tensor, "... d"]) -> Shaped[np.ndarray, "..."]:
        """The most probable class of each row."""
        return np.array(self.classes)[self.probabilities(x).argmax(-1).cpu().numpy()]

    def __repr__(self) -> str:
        h, d = self.hidden_weight.shape
        return _described(self, f"{d} wide, {h} hidden units")


Probe = LinearProbe | MlpProbe
_KINDS: dict[str, type] = {"linear": LinearProbe, "mlp": MlpProbe}


def _described(probe: Probe, size: str) -> str:
    classes = ", ".join(map(str, probe.classes[:6])) + (" …" if len(probe.classes) > 6 else "")
    chosen = "".join(f", {key} {value:g}" for key, value in probe.settings.items())
    where = f" at {probe.site}" if probe.site else ""
    return f"{type(probe).__name__}({probe.method}{where}: {classes}; {size}{chosen})"


# fitting


@overload
def fit_linear(
    acts: Tensor, labels: Labels, *, method: str | Method = ..., groups: Any = ..., seed: int = ...
) -> Any: ...
@overload
def fit_linear(
    acts: Mapping[str, Tensor],
    labels: Labels,
    *,
    method: str | Method = ...,
    groups: Any = ...,
    seed: int = ...,
) -> dict[str, Any]: ...
def fit_linear(
    acts: Any,
    labels: Labels,
    *,
    method: str | Method = "logistic",
    groups: Shaped[np.ndarray, " n"] | None = None,
    seed: int = 0,
) -> Any:
    """A probe of the activations (n, d), or one for each site of a mapping, all in one pass.

    `method` is a name (`logistic`, `least_squares`, `mass_mean`, `lda`, `mlp`) or settings such as
    `Logistic(C=0.1)`. Settings that are to be chosen (C) are chosen on five folds of the rows, which do not
    split `groups`. Raises InputError when labels and rows do not match or there is one class, NumericsError
    on NaN.
    """
    codes, classes = encode_labels(labels)
    sites = checked(acts if isinstance(acts, Mapping) else {"": acts}, len(codes))
    groups = np.arange(len(codes)) if groups is None else np.asarray(groups)
    n_folds = min(5, len(np.unique(groups)))
    inner = None
    if n_folds > 1 and not _fixed(get(method)):
        folds = grouped_folds(codes, groups, n_folds, seed=seed)
        inner = torch.from_numpy(folds[None, :, None] == np.arange(n_folds)[:, None, None])
    problems = Problems(
        torch.from_numpy(codes)[:, None],
        torch.ones(len(codes), 1, dtype=torch.bool),
        len(classes),
        inner,
        seed,
    )
    found = {
        site: probe_of(fit, s, 0, classes, get(method).name, site)
        for names, x in stacks(sites)
        for fit in [get(method).fit(x, problems.to(x.device))]
        for s, site in enumerate(names)
    }
    return found if isinstance(acts, Mapping) else found[""]


def _fixed(method: Method) -> bool:
    """Whether nothing is to be chosen on folds."""
    return getattr(method, "C", 0.0) is not None


def checked(acts: Mapping[str, Float[Tensor, "n d"]], n: int) -> dict[str, Float[Tensor, "n d"]]:
    """Activations that probes can be fitted to. Raises InputError for the wrong shape or number of rows, NumericsError on NaN or
    inf; warns of a site that is constant."""
    if not acts:
        raise InputError("No activations are given: at least one site is needed.")
    for site, x in acts.items():
        where = f" at {site}" if site else ""
        if x.ndim != 2:
            raise InputError(f"Activations{where} have the shape {tuple(x.shape)}, not (rows, width).")
        if len(x) != n:
            raise InputError(f"{n} labels for {len(x)} rows of activations{where}: each row needs one.")
        wrong = int((~x.isfinite().all(1)).sum())
        if wrong:
            raise NumericsError(
                f"NaN or inf{where} in {wrong} of {n} rows: leave them out, or run the model in float32."
            )
        if bool((x == x[:1]).all()):
            warnings.warn(
                f"Activations{where} are constant: a probe knows nothing but the class frequencies.",
                ProbeWarning,
                stacklevel=3,
            )
    return {site: x.detach() for site, x in acts.items()}


def stacks(acts: Mapping[str, Float[Tensor, "n d"]]) -> Iterator[tuple[list[str], Float[Tensor, "S n d"]]]:
    """(sites, their activations) by width and device, as many together as fit into half a gigabyte of float64."""
    kinds: dict[tuple[int, torch.device], list[str]] = {}
    for site, x in acts.items():
        kinds.setdefault((x.shape[1], x.device), []).append(site)
    for (width, _), sites in kinds.items():
        rows = len(acts[sites[0]])
        together = max(1, _STACK_BYTES // (8 * max(1, rows * width)))
        for start in range(0, len(sites), together):
            names = sites[start : start + together]
            yield (
                names,
                torch.stack(
                    [x if x.dtype == torch.float64 else x.float() for x in map(acts.__getitem__, names)]
                ),
            )


def probe_of(fit: Fit, site: int, problem: int, classes: Classes, method: str, name: str) -> Probe:
    """One of the probes of a fit, as a value on the CPU."""
    if isinstance(fit, MlpFit):
        keys = ("hidden_weight", "hidden_bias", "weight", "bias")
        tensors = {key: getattr(fit, key)[site, problem].cpu().clone() for key in keys}
        return MlpProbe(
            **tensors, center=fit.center[site].cpu().clone(), classes=classes, method=method, site=name
        )
    assert isinstance(fit, LinearFit)
    settings = {key: float(value[site, problem]) for key, value in fit.settings.items()}
    parts = (fit.weight[site, problem], fit.bias[site, problem], fit.center[site])
    weight, bias, center = (part.float().cpu().clone() for part in parts)
    return LinearProbe(weight, bias, center, classes, method, name, fit.link, settings)


# files


def save_probes(probes: Mapping[str, Probe], path: str | Path) -> Path:
    """Write probes by name to one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}
    known: dict[str, Any] = {}
    for i, (name, probe) in enumerate(probes.items()):
        values = vars(probe)
        kind = next(key for key, value in _KINDS.items() if type(probe) is value)
        tensors |= {f"{i}.{k}": v for k, v in values.items() if isinstance(v, Tensor)}
        known[name] = {"kind": kind, **{k: v for k, v in values.items() if not isinstance(v, Tensor)}}
    return write_values(path, tensors, {"format": FORMAT, "probes": known})


def load_probes(path: str | Path) -> dict[str, Probe]:
    """Read what `save_probes` wrote. Raises InputError for a missing or foreign file, CheckpointError for a damaged one."""
    tensors, known = read_values(path, "probe", FORMAT)
    found = {}
    for i, (name, values) in enumerate(known["probes"].items()):
        own = {key.split(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{i}.")}
        kind = _KINDS[values.pop("kind")]
        found[name] = kind(**own, **{**values, "classes": tuple(values["classes"])})
    return found
