"""`steerkit steer …`: steering vectors from pairs, in use, what is in a file, in other formats, and merged into a model."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from steerkit.cli.common import (
    Config,
    Device,
    Dtype,
    Json,
    Model,
    Quiet,
    Seed,
    Set,
    emit,
    items,
    load_model,
    say,
)
from steerkit.cli.settings import build, merge
from steerkit.errors import InputError
from steerkit.runs import write_json
from steerkit.steering import METHODS, SteeringVector, export, fit, load_any, load_pairs
from steerkit.steering import merge as merge_weights
from steerkit.steering.fitting import get
from steerkit.steering.formats import FORMATS, ConversionWarning, format_of
from steerkit.steering.sweep import (
    WHERES,
    SweepConfig,
    SweepResult,
    across_seeds,
    default_sites,
    without_training,
)
from steerkit.steering.sweep import sweep as run_sweep
from steerkit.steering.sweep_report import write_report, write_seeds_report
from steerkit.steering.tasks import make_task


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
    vector: Annotated[Path, typer.Option("--vector", "-v", help="A steering vector in any format.")],
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
    """Go on from a prompt, unsteered and steered side by side, with the same random numbers."""
    from steerkit.steering.sampling import Draws, text_ends

    loaded = load_any(vector)
    if where is not None and where not in WHERES:
        raise InputError(f"--where is {where!r}; it is {', '.join(WHERES)}.")
    if temperature < 0:
        raise InputError(f"--temperature is {temperature}; it is 0 or more.")
    hooked = load_model(_model_of(loaded, model, vector), device, dtype)
    drawn = []
    if temperature > 0:
        drawn = [Draws([(seed or 0,)] * 2, temperature, text_ends(hooked), hooked.device)]
    shown = None if quiet else _SideBySide(hooked.tokenizer)
    with hooked.steer(
        loaded,
        strength=[0.0, strength],
        where=None if where is None else WHERES[where],
        other_model=other_model,
    ):
        base, steered = hooked.generate(
            [prompt, prompt],
            max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=drawn,
            streamer=shown,
        )
    emit({"prompt": prompt, "strength": strength, "base": base, "steered": steered}, as_json=json)


def sweep_vectors(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the vectors and the report.")],
    model: Model = None,
    pairs: Annotated[
        str,
        typer.Option(
            "--pairs", "-p", help="A file of pairs, or storyworld:mood=happy and the like (the default)."
        ),
    ] = "storyworld:mood=happy",
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Names with commas; all that fit the model by default."),
    ] = None,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites", "-s", help="Hook sites with commas, each tried by itself; joined by + they are one."
        ),
    ] = None,
    strengths: Annotated[
        str | None,
        typer.Option(
            "--strengths", help="Fixed strengths with commas, instead of such as cost --kl-targets."
        ),
    ] = None,
    kl_targets: Annotated[
        str | None,
        typer.Option("--kl-targets", help="Divergences to compare at, nats a sequence, with commas."),
    ] = None,
    effect: Annotated[
        str | None,
        typer.Option(
            "--effect",
            help="What counts as success: words:happy,glad. By default StoryWorld's judge, or the pairs' most telling words.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A file with a prompt a line; by default the pairs' own, or StoryWorld's."
        ),
    ] = None,
    prompting: Annotated[
        str | None, typer.Option("--prompting", help="An instruction to show prompting's effect with.")
    ] = None,
    n_prompts: Annotated[
        int | None,
        typer.Option("--n-prompts", help="Prompts: a third to choose by, the rest to report. [180]"),
    ] = None,
    sae: Annotated[
        Path | None,
        typer.Option(
            "--sae", exists=True, help="A trained autoencoder's run: its latents are among the methods."
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Sweeps with seeds of their own, told as mean and spread.")
    ] = 1,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Few prompts, pairs and sites, no null of trained methods: minutes."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished sweep; start if there is none.")
    ] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare steering methods at equal divergence from the unsteered model, and write one report."""
    flags: dict[str, Any] = {
        "methods": items(methods),
        "sites": items(sites),
        "strengths": None if strengths is None else [_number(s) for s in items(strengths) or ()],
        "kl_targets": None if kl_targets is None else [_number(s) for s in items(kl_targets) or ()],
        "seed": seed,
        **{f"settings.{name}.sae": None if sae is None else str(sae) for name in ("fgaa", "sae_latent")},
    }
    if seeds < 1:
        raise InputError(f"--seeds is {seeds}; it is at least 1.")
    values = merge(config, set_ or [], flags)
    if quick:
        few = {
            "n_pairs": 192,
            "samples": 1,
            "max_new_tokens": 32,
            "shuffled": without_training(),
            "study": None,
        }
        values = {**few, **values}
    settings = build(SweepConfig, values)
    hooked = load_model(model or "storyworld", device, dtype)
    if quick and not settings.sites:
        everywhere = default_sites(hooked)[-1]
        settings = replace(
            settings, sites=(f"blocks.{(hooked.n_layers - 1) // 2}.hook_resid_post", everywhere)
        )
    results = {}
    for number in range(settings.seed, settings.seed + seeds):
        place = out if seeds == 1 else out / f"seed-{number}"
        task = make_task(
            hooked,
            pairs,
            effect=effect,
            prompts=prompts,
            n_prompts=n_prompts or (90 if quick else 180),
            seed=number,
        )
        results[number] = run_sweep(
            hooked,
            task.pairs,
            task.effect,
            task.validation,
            task.test,
            place,
            replace(settings, seed=number),
            prompting=prompting or task.instruction,
            resume=resume,
            quiet=quiet,
        )
        write_report(results[number], place / "report.html")
    if seeds == 1:
        summary = results[settings.seed].to_dict()
        _tell_sweep(results[settings.seed], quiet)
    else:
        summary = _tell_seeds(results, out, quiet)
    say(f"{out / 'report.html'}", quiet=quiet)
    emit(summary, as_json=json)


def _tell_sweep(result: SweepResult, quiet: bool) -> None:
    for name, record in sorted(result.best.items(), key=lambda item: -(item[1].get("effect") or -1.0)):
        told = record.get("reason") or (
            f"{record['effect']:.3f} ({record['effect_base']:.3f} unsteered) at strength {record['strength']:.3g}, "
            f"{record['kl']:.3g} nats"
        )
        say(f"{name:<28}{told}", quiet=quiet)


def _tell_seeds(results: dict[int, SweepResult], out: Path, quiet: bool) -> dict[str, Any]:
    """Write the page and the summary of several seeds."""
    write_seeds_report(results, out / "report.html")
    best = across_seeds(list(results.values()))
    listed = [{"seed": seed, **record} for seed, result in results.items() for record in result.results]
    summary = {"seeds": list(results), "best": best, "results": listed}
    write_json(out / "summary.json", summary)
    for name, record in sorted(best.items(), key=lambda item: -(item[1]["effect"] or -1.0)):
        told = "no strength within the budgets"
        if record["effect"] is not None:
            sd = "" if record["effect_sd"] is None else f" ± {record['effect_sd']:.3f}"
            told = f"{record['effect']:.3f}{sd} at {record['kl']:.3g} nats, in {record['seeds']} of {len(results)} seeds"
        say(f"{name:<28}{told}", quiet=quiet)
    return summary


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"{text!r} is no number.") from None


def inspect(
    file: Annotated[Path, typer.Argument(help="A steering vector in any format.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What a steering vector does, and where it came from."""
    vector = load_any(file)
    found = _described(vector)
    for edit in found["edits"]:
        norm = "" if edit["norm"] is None else f", norm {edit['norm']:.4g}"
        say(f"{edit['kind']:<14}{edit['site']}{norm}, scale {edit['scale']:g}", quiet=quiet)
    for key, value in found["provenance"].items():
        say(f"{key:<14}{value}", quiet=quiet)
    emit({"file": str(file), **found}, as_json=json)


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="A steering vector: ours, .gguf, .pt, or a directory of pyreft or of a LoRA adapter."
        ),
    ],
    to: Annotated[str, typer.Option("--to", help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write; a directory for pyreft and lora.")],
    strength: Annotated[float, typer.Option("--strength", help="Multiple of the vector to write.")] = 1.0,
    site: Annotated[
        str | None, typer.Option("--site", "-s", help="Of a .pt file of one tensor: where it acts.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", help="The same, as the block whose output it is, from 0.")
    ] = None,
    index: Annotated[
        int | None, typer.Option("--index", help="Of a .pt file of a matrix: the row, from 0.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option("--positions", help="Of a pyreft directory: its tokens, such as f7+l7.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a directory that holds a vector.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a steering vector in another toolkit's format, and say what that format does not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConversionWarning)
        found = format_of(file)
        vector = load_any(file, site=site, layer=layer, index=index, positions=positions)
        export(vector, to, out, strength=strength, force=force)
    lost = [str(warning.message) for warning in caught if warning.category is ConversionWarning]
    say(f"{file} ({found}) is now {out} ({to}).", quiet=quiet)
    for text in lost:
        say(f"Note: {text}", quiet=quiet)
    emit(
        {"file": str(file), "from": found, "to": to, "out": str(out), "warnings": lost, **_described(vector)},
        as_json=json,
    )


def merge_vector(
    vector: Annotated[Path, typer.Option("--vector", "-v", help="A steering vector in any format.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory of the new model.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model; the one of the vector by default.")
    ] = None,
    strength: Annotated[float, typer.Option("--strength", help="Multiple of the vector.")] = 1.0,
    merge_bos: Annotated[
        bool, typer.Option("--merge-bos", help="Steer BOS too, where the vector leaves it alone.")
    ] = False,
    other_model: Annotated[
        bool, typer.Option("--other-model", help="Allow a model that the vector was not made for.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a model that is in --out.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge a steering vector into a model's weights: a checkpoint that needs no hooks."""
    loaded = load_any(vector)
    hooked = load_model(_model_of(loaded, model, vector), device, dtype)
    merged = merge_weights(hooked, loaded, strength, out, bos=merge_bos, other_model=other_model, force=force)
    say(
        f"{merged.path}: {hooked.name} with {vector.name} at strength {strength:g} in its weights.",
        quiet=quiet,
    )
    for text in merged.notes:
        say(f"Note: {text}", quiet=quiet)
    emit({"model": hooked.name, "vector": str(vector), "strength": strength, **asdict(merged)}, as_json=json)


def _model_of(vector: SteeringVector, model: str | None, file: Path) -> str:
    name = model or vector.provenance.get("model")
    if name is None:
        raise InputError(f"{file} does not say which model it is for: give --model.")
    return name


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
