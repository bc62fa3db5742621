"""Directions that files hold – a steering vector's, probes', an adapter's – for `steerkit dashboard FILE`.

found = read_directions("happy.safetensors")             # names, vectors and thresholds at a site
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from probes.linear import FORMAT as PROBES
from probes.linear import LinearProbe, load_probes
from sae.dashboard import build_directions
from sae.dashboard.directions import fitted_latents
from sae.dashboard.serve import Reader
from steerkit.cli.common import load_model
from steerkit.data import Documents, load_documents
from steerkit.errors import InputError, SiteError
from steerkit.loading import ADAPTER_RECORD
from steerkit.models import HookedModel
from steerkit.runs import read_json
from steerkit.sites import probe_ids
from steerkit.steering import load_any
from steerkit.steering.vector import FORMAT as VECTOR

N_SINGULAR = 8
"""Singular directions of a weight change that are shown, at most."""


@dataclass(frozen=True)
class Directions:
    """What a dashboard of directions shows."""

    site: str
    names: list[str | tuple[str, str]]
    """Of each direction, or of its two ends."""
    vectors: Float[Tensor, "n width"]
    thresholds: Float[Tensor, " n"] | None = None
    """Of the projections on the unit directions; None: the data's mean."""
    about: dict[str, Any] = field(default_factory=dict)
    title: str | None = None


def holds_directions(path: str | Path) -> bool:
    """Whether `path` is a file of a steering vector or of probes, or an adapter's directory."""
    path = Path(path)
    return path.suffix == ".gguf" or _format(path) in (PROBES, VECTOR) or _adapter(path) is not None


@dataclass(frozen=True)
class Opened:
    """Directions, and what they are looked at with."""

    directions: Directions
    model: HookedModel
    documents: Documents

    def draw(
        self, out: str | Path, tokens: int = 200_000, single_file: bool = False, quiet: bool = False
    ) -> Path:
        """Write the dashboard; returns its page."""
        found = self.directions
        return build_directions(
            self.model,
            found.vectors,
            found.names,
            self.documents,
            found.site,
            out,
            thresholds=found.thresholds,
            tokens=tokens,
            single_file=single_file,
            title=found.title,
            provenance=found.about,
            quiet=quiet,
        )

    def reader(self) -> Reader:
        """What reads and steers by the directions' ends."""
        found = self.directions
        sae = fitted_latents(
            self.model, found.vectors, self.documents, found.site, thresholds=found.thresholds
        )
        return Reader(self.model, sae, found.site, sink_threshold=sae.metadata["sink_threshold"])


def open_directions(
    path: str | Path,
    model: str | None = None,
    data: str | None = None,
    site: str | None = None,
    text_column: str | None = None,
    device: str | None = None,
    module: str | None = None,
    writes: bool = False,
) -> Opened:
    """See `read_directions`; model and text that are not given are the file's own, and StoryWorld's stories for its model."""
    name = model or model_of(path)
    if name is None:
        raise InputError(f"{path} does not say which model it is for: give --model.")
    if data is None and name != "storyworld":
        raise InputError("Which text? Give --data: a file, a data set id or storyworld.")
    hooked = load_model(name, device, None)
    found = read_directions(path, hooked, site=site, module=module, writes=writes)
    return Opened(found, hooked, load_documents(data or "storyworld", text_column=text_column))


def model_of(path: str | Path) -> str | None:
    """The model that the file or adapter says it is for."""
    path = Path(path)
    adapter = _adapter(path)
    if adapter is not None:
        return read_json(adapter / ADAPTER_RECORD)["base"]
    if _format(path) == PROBES:
        run = path.parent / "summary.json"
        return read_json(run).get("model") if run.is_file() else None
    return load_any(path).provenance.get("model")


def read_directions(
    path: str | Path,
    model: HookedModel,
    *,
    site: str | None = None,
    module: str | None = None,
    writes: bool = False,
) -> Directions:
    """The directions at `path`, which must fit the model.

    Of several sites `site` chooses one. Of an adapter `module` is a module's path or the end of it, by default the one that is
    changed most; its directions are those that ΔW reads, or those that it writes. Raises InputError when something is missing.
    """
    path = Path(path)
    if _adapter(path) is not None:
        return _of_adapter(path, model, module, writes)
    if module is not None or writes:
        raise InputError(f"{path} is no adapter: --module and --writes are for one.")
    return _of_probes(path, site) if _format(path) == PROBES else _of_vector(path, model, site)


def _adapter(path: Path) -> Path | None:
    """The directory of an adapter that was written by steerkit."""
    return next((p for p in (path / "adapter", path) if (p / ADAPTER_RECORD).is_file()), None)


def _format(path: Path) -> str | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["steerkit"]).get("format")
    except (SafetensorError, OSError, KeyError, ValueError):
        return None


def _one_of(path: Path, sites: list[str], site: str | None) -> str:
    if site is not None and site in sites:
        return site
    if site is None and len(sites) == 1:
        return sites[0]
    asked = "several sites" if site is None else f"nothing at {site}"
    raise InputError(f"{path} has {asked}: give --site, one of {', '.join(sites)}.")


def _of_vector(path: Path, model: HookedModel, site: str | None) -> Directions:
    vector = load_any(path)
    vector.require_fit(model)
    found = vector.directions
    chosen = _one_of(path, list(found), site)
    origin = vector.provenance
    name = " ".join(str(origin[key]) for key in ("method", "data") if origin.get(key)) or path.stem
    return Directions(chosen, [name], found[chosen][None], about={"vector": str(path), **origin})


def _of_probes(path: Path, site: str | None) -> Directions:
    probes = load_probes(path)
    linear = {name: probe for name, probe in probes.items() if isinstance(probe, LinearProbe)}
    if not linear:
        raise InputError(f"{path} has no linear probe: only those have directions.")
    at_site = [name for name, probe in linear.items() if site is not None and probe.site == site]
    chosen = _one_of(path, list(linear), at_site[0] if at_site else site)
    probe = linear[chosen]
    names: list[str | tuple[str, str]]
    if len(probe.weight) == 1:
        names = [(str(probe.classes[1]), str(probe.classes[0]))]
        vectors, bias = probe.direction()[None], probe.bias
    else:
        names = [str(label) for label in probe.classes]
        vectors = torch.stack([probe.direction(label) for label in probe.classes])
        bias = _against_others(probe.bias)
    thresholds = (vectors @ probe.center - bias) / vectors.norm(dim=1)
    about = {"probes": str(path), "method": probe.method, "classes": list(map(str, probe.classes))}
    return Directions(probe.site or chosen, names, vectors, thresholds, about)


def _against_others(bias: Float[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Each class's less the mean of the others', as `LinearProbe.direction` has the weights."""
    return bias - (bias.sum() - bias) / (len(bias) - 1)


def _of_adapter(path: Path, model: HookedModel, module: str | None, writes: bool) -> Directions:
    from steerkit import adapters

    tuned = adapters.load(_adapter(path) or path, model)
    try:
        changes = {p: change for p, change in tuned.changes().items() if change.norm > 0}
        name = tuned.method.name
    finally:
        tuned.remove()
    if not changes:
        raise InputError(f"{path} changes no weights: it has no directions.")
    if module is None:
        module = max(changes, key=lambda p: changes[p].relative_norm)
    ends = [p for p in changes if p == module or p.endswith("." + module)]
    if len(ends) != 1:
        found = "no module" if not ends else "several modules"
        raise InputError(f"--module {module} names {found} of {path}: give one of {', '.join(changes)}.")
    change = changes[ends[0]]
    U, values, Vh = change.delta_svd
    energy = values.square() / values.square().sum()
    n = int((energy[:N_SINGULAR] > 1e-6).sum())
    verb = "writes" if writes else "reads"
    return Directions(
        _site_at(model, ends[0], change.base.shape[0 if writes else 1], writes),
        [f"{verb} {i + 1}, {float(share):.0%} of ΔW" for i, share in enumerate(energy[:n])],
        (U.T if writes else Vh)[:n],
        about={
            "adapter": str(path),
            "method": name,
            "module": ends[0],
            "relative_norm": change.relative_norm,
        },
    )


@torch.no_grad()
def _site_at(model: HookedModel, path: str, width: int, output: bool) -> str:
    """The site that holds a module's input, or its output, bit for bit: one of the model's named sites if there is one.

    Raises InputError for an input that is at no site.
    """
    seen: list[Tensor] = []
    inner = model.model.get_submodule(path)
    handle = inner.register_forward_hook(
        lambda module, args, y: seen.append((y if output else args[0]).clone())
    )
    try:
        acts = model.run(probe_ids(model.d_vocab, model.special_ids), sites=_sites(model, width), stop=False)
    finally:
        handle.remove()
    for name, found in acts.items():
        if torch.equal(found.flatten(0, -2), seen[0].flatten(0, -2)):
            return name
    raise InputError(f"What {path} of {model.name} reads is at no site: give --writes, or another --module.")


def _sites(model: HookedModel, width: int) -> list[str]:
    """Sites of that width, the named ones first."""
    found = []
    for name in [*model.sites, *(path for path, _ in model.model.named_modules() if path)]:
        try:
            if model.site(name).width == width:
                found.append(name)
        except SiteError:
            continue
    return found
