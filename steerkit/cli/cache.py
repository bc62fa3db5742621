"""`steerkit cache`: a model's activations on disk, for training that need not run the model again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from steerkit.activation_cache import cache as write_cache
from steerkit.cli.common import (
    Config,
    Context,
    Data,
    Device,
    Dtype,
    Json,
    Model,
    Packing,
    Quiet,
    Seed,
    Set,
    TextColumn,
    emit,
    load_model,
    say,
)
from steerkit.cli.settings import build, merge
from steerkit.data import load_documents
from steerkit.tokens import Tokenization


@dataclass(frozen=True)
class Cache:
    """Every setting of `cache`."""

    site: list[str]
    out: Path
    tokens: int
    model: str = "storyworld"
    data: str = "storyworld"
    store: str = "float32"
    shard_tokens: int = 65_536
    text_column: str | None = None
    seed: int = 0
    device: str | None = None
    dtype: str | None = None
    tokenization: Tokenization = field(default_factory=Tokenization)


def cache(
    model: Model = None,
    data: Data = None,
    site: Annotated[
        list[str] | None, typer.Option("--site", "-s", help="A hook site; may be repeated.")
    ] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", "-n", help="How many tokens to keep.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Directory of the cache.")] = None,
    store: Annotated[str | None, typer.Option("--store", help="float32, bfloat16, float16 or int8.")] = None,
    context: Context = None,
    packing: Packing = None,
    text_column: TextColumn = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a cache that was cut short.")] = False,
    config: Config = None,
    set_: Set = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep activations of one or more sites on disk, in shards that are written whole. Train on them with `--data DIR`."""
    flags = {
        "model": model,
        "data": data,
        "site": site or None,
        "tokens": tokens,
        "out": out,
        "store": store,
        "tokenization.context": context,
        "tokenization.packing": packing,
        "text_column": text_column,
        "seed": seed,
        "device": device,
        "dtype": dtype,
    }
    settings = build(Cache, merge(config, set_ or [], flags))
    made = write_cache(
        load_model(settings.model, settings.device, settings.dtype),
        load_documents(settings.data, text_column=settings.text_column),
        settings.site,
        settings.out,
        tokens=settings.tokens,
        tokenization=settings.tokenization,
        dtype=settings.store,
        shard_tokens=settings.shard_tokens,
        seed=settings.seed,
        resume=resume,
        quiet=quiet,
    )
    size = sum(file.stat().st_size for file in made.path.iterdir())
    say(f"{made.path}: {made.tokens:,} tokens at {', '.join(made.sites)}, {size / 1e6:,.0f} MB", quiet=quiet)
    result = {"out": str(made.path), "tokens": made.tokens, "sites": list(made.sites), "bytes": size}
    emit(result | {"made_with": made.made_with}, as_json=json)
