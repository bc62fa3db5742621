"""`steerkit steer extract|apply|inspect`: steering vectors from pairs, in use, and what is in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit.cli.common import Device, Dtype, Json, Model, Quiet, Seed, Set, emit, load_model, say
from steerkit.cli.settings import build, merge
from steerkit.errors import InputError
from steerkit.steering import METHODS, SteeringVector, Where, fit, load_pairs
from steerkit.steering.fitting import get

WHERES = {
    "everywhere": Where(),
    "prompt": Where.prompt_only(),
    "generation": Where.generation_only(),
}


def extract(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write (safetensors).")],
    model: Model = None,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs", "-p", help="A file of pairs, or storyworld:mood=happy and the like (the default)."
        ),
    ] = "storyworld:mood=happy",
    method: Annotated[str, typer.Option("--method", help=f"One of {', '.join(METHODS)}.")] = "mean_diff",
    site: Annotated[
        str | None,
        typer.Option(
            "--site", "-s", help="Hook site, or several with commas; the middle block's by default."
        ),
    ] = None,
    n: Annotated[int | None, typer.Option("--n", help="Use the first pairs only.")] = None,
    set_: Set = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a steering vector from contrastive pairs."""
    settings = build(get(method), merge(None, set_ or [], {}))
    loaded = load_pairs(pairs, n=n)
    hooked = load_model(model or "storyworld", device, dtype)
    sites = None if site is None else [name.strip() for name in site.split(",")]
    vector = fit(hooked, loaded, settings, sites)
    path = vector.save(out)
    say(f"{path}: {vector!r}, from {len(loaded)} pairs of {loaded.name}", quiet=quiet)
    emit({"file": str(path), **_described(vector)}, as_json=json)


def apply(
    vector: Annotated[Path, typer.Option("--vector", "-v", help="A file of `steer extract`.")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="Text to go on from.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model; the one of the vector by default.")
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="Multiple of the vector.")] = 1.0,
    where: Annotated[
        str | None,
        typer.Option("--where", help="everywhere, prompt or generation; the vector's own by default."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to generate.")] = 60,
    temperature: Annotated[float, typer.Option("--temperature", help="0: the likeliest token.")] = 1.0,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Allow a model that the vector was not made for.")
    ] = False,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on from a prompt, unsteered and steered side by side."""
    import torch

    loaded = SteeringVector.load(vector)
    if where is not None and where not in WHERES:
        raise InputError(f"--where is {where!r}; it is {', '.join(WHERES)}.")
    if temperature < 0:
        raise InputError(f"--temperature is {temperature}; it is 0 or more.")
    name = model or loaded.provenance.get("model")
    if name is None:
        raise InputError(f"{vector} does not say which model it is for: give --model.")
    hooked = load_model(name, device, dtype)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed or 0)
    shown = None if quiet else _SideBySide(hooked.tokenizer)
    with hooked.steer(
        loaded,
        strength=[0.0, strength],
        where=None if where is None else WHERES[where],
        other_model=other_model,
    ):
        base, steered = hooked.generate([prompt, prompt], max_new_tokens, streamer=shown, **options)
    emit({"prompt": prompt, "strength": strength, "base": base, "steered": steered}, as_json=json)


def inspect(
    file: Annotated[Path, typer.Argument(help="A file of `steer extract`.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a steering vector does, and where it came from."""
    vector = SteeringVector.load(file)
    found = _described(vector)
    for edit in found["edits"]:
        norm = "" if edit["norm"] is None else f", norm {edit['norm']:.4g}"
        say(f"{edit['kind']:<14}{edit['site']}{norm}, scale {edit['scale']:g}", quiet=quiet)
    for key, value in found["provenance"].items():
        say(f"{key:<14}{value}", quiet=quiet)
    emit({"file": str(file), **found}, as_json=json)


def _described(vector: SteeringVector) -> dict[str, Any]:
    edits = []
    for edit in vector.edits:
        try:
            norm = SteeringVector((edit,)).norm
        except InputError:  # a projection, a rotation …
            norm = None
        edits.append({"kind": edit.name, "site": edit.site, "scale": edit.scale, "norm": norm})
    return {"edits": edits, "where": vector.where.to_dict(), "provenance": dict(vector.provenance)}


class _SideBySide:
    """Shows two rows of tokens while they are generated: in two columns on a terminal, one after the other elsewhere."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.rows: list[list[int]] = []
        self.live: Any = None

    def put(self, tokens: Any) -> None:
        if not self.rows:  # the prompt
            self.rows = [[], []]
            return
        for row, token in zip(self.rows, tokens.view(-1).tolist()):
            row.append(token)
        if sys.stdout.isatty():
            self._draw()

    def end(self) -> None:
        if self.live is not None:
            self.live.stop()
            return
        for title, text in zip(("unsteered", "steered"), self._texts()):
            print(f"{title}:\n{text}\n")

    def _texts(self) -> list[str]:
        return [self.tokenizer.decode(row, skip_special_tokens=True).strip() for row in self.rows]

    def _draw(self) -> None:
        from rich.live import Live
        from rich.table import Table

        table = Table("unsteered", "steered", expand=True, show_lines=False)
        table.add_row(*self._texts())
        if self.live is None:
            self.live = Live(table, transient=False)
            self.live.start()
        self.live.update(table)
