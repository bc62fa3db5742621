"""A dashboard's content for other programs.

    csv, json       export/latents.csv and export/latents.json: a line or object a latent
    neuronpedia     export/neuronpedia/batch-N.json, 128 latents each, as SAEDashboard 0.8's `neuronpedia-runner` writes them

What Neuronpedia's files hold that is not measured here – alignment and correlation with neurons, effects on heads – is left empty.
Their contexts are the 31 tokens around the strongest, their histograms those of the dashboard.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae.dashboard.content import Content, short
from sae.latents import N_INTERVALS, WINDOW
from steerkit.runs import jsonable, write_json

_BATCH = 128
_NOT_MEASURED = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "neg_str",
    "neg_values",
    "pos_str",
    "pos_values",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)
"""Empty in Neuronpedia's files unless something fills them."""
_CSV = (
    "id",
    "label",
    "density",
    "max",
    "mean",
    "concept",
    "auroc",
    "tokens",
    "promoted",
    "suppressed",
    "warnings",
)


def export(folder: Path, content: Content, formats: Sequence[str]) -> list[str]:
    """Write the formats named into `folder`/export; returns the paths of the files, seen from `folder`."""
    files: list[str] = []
    for name in formats:
        files += FORMATS[name](folder / "export", content)
    return [f"export/{file}" for file in files]


def _csv(folder: Path, content: Content) -> list[str]:
    folder.mkdir(exist_ok=True)
    with (folder / "latents.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, _CSV)
        table.writeheader()
        for latent in _latents(content):
            lists = {
                key: " | ".join(_plain(v) for v in value)
                for key, value in latent.items()
                if isinstance(value, list)
            }
            table.writerow({**latent, **lists, "label": _plain(latent["label"])})
    return ["latents.csv"]


def _json(folder: Path, content: Content) -> list[str]:
    folder.mkdir(exist_ok=True)
    with (folder / "latents.json").open("w", encoding="utf-8") as file:
        for number, latent in enumerate(_latents(content)):
            file.write("[\n" if number == 0 else ",\n")
            json.dump(latent, file, allow_nan=False)
        file.write("\n]\n")
    return ["latents.json"]


def _latents(content: Content) -> Iterator[dict[str, Any]]:
    """One latent after the other, as plain data."""
    stats, texts, words = content.stats, content.words.texts, content.words
    for i in map(int, content.ids):
        concept = content.concepts.get(i)
        logits = [] if stats.logit_ids is None else [texts[t] for t in stats.logit_ids[i]]
        half = len(logits) // 2
        yield {
            "id": i,
            "label": words.label(i),
            "density": short(stats.density[i]),
            "max": short(stats.maximum[i]),
            "mean": short(stats.mean[i]),
            "concept": concept and str(concept[0]),
            "auroc": concept and round(float(concept[1]), 4),
            "tokens": [texts[t] for t in stats.token_ids[i] if t >= 0],
            "promoted": logits[:half],
            "suppressed": logits[half:][::-1],
            "warnings": words.warnings(i),
        }


def _plain(text: str) -> str:
    """Text that a spreadsheet does not take for a formula."""
    return "'" + text if text.startswith(("=", "+", "-", "@")) else text


def _neuronpedia(folder: Path, content: Content) -> list[str]:
    (folder / "neuronpedia").mkdir(parents=True, exist_ok=True)
    info = content.stats.info
    layer = content.model.site(info["site"]).layer
    files = []
    for number, start in enumerate(range(0, len(content.ids), _BATCH)):
        batch = {
            "model_id": info["model"],
            "layer": 0 if layer is None else layer,
            "sae_set": info["site"],
            "sae_id_suffix": None,
            "features": [_feature(content, int(i)) for i in content.ids[start : start + _BATCH]],
        }
        files.append(f"neuronpedia/batch-{number}.json")
        write_json(folder / files[-1], jsonable(batch))
    return files


def _feature(content: Content, i: int) -> dict[str, Any]:
    stats, texts = content.stats, content.words.texts
    centres, used = (stats.edges[1:] + stats.edges[:-1]) / 2, np.flatnonzero(stats.histogram[i])
    found: dict[str, Any] = {
        **{key: [] for key in _NOT_MEASURED},
        "feature_index": i,
        "frac_nonzero": float(stats.density[i]),
        "freq_hist_data_bar_values": centres[used].round(3),
        "freq_hist_data_bar_heights": stats.histogram[i][used],
        "n_prompts_total": len(stats.row_document),
        "n_tokens_in_prompt": int(np.diff(stats.row_start).max()),
        "dataset": stats.info["documents"],
        "activations": list(_activations(content, i)),
    }
    if stats.logit_ids is not None and stats.logit_values is not None:
        half = stats.logit_ids.shape[1] // 2
        tokens, values = [texts[t] for t in stats.logit_ids[i]], stats.logit_values[i].round(3)
        found |= {"pos_str": tokens[:half], "pos_values": values[:half]}
        found |= {"neg_str": tokens[half:][::-1], "neg_values": values[half:][::-1]}
    if stats.logit_range is not None and stats.logit_histogram is not None:
        low, high = stats.logit_range[i].tolist()
        n = stats.logit_histogram.shape[1]
        found["logits_hist_data_bar_values"] = (low + (high - low) * (np.arange(n) + 0.5) / n).round(3)
        found["logits_hist_data_bar_heights"] = stats.logit_histogram[i]
    return found


def _activations(content: Content, i: int) -> Iterator[dict[str, Any]]:
    """The contexts: the strongest (bin −1 to the maximum), then the fifths of the sample, between their own extremes."""
    stats, texts = content.stats, content.words.texts
    examples = stats.examples(i)
    for example in examples:
        group = [e.activation for e in examples if e.interval == example.interval]
        low, high, share = (
            (-1, max(group), -1) if not example.interval else (min(group), max(group), 1 / N_INTERVALS)
        )
        row = stats.row(example.row)
        first, end = max(0, example.position - WINDOW), min(len(row), example.position + WINDOW + 1)
        around = slice(first - example.position + WINDOW, end - example.position + WINDOW)
        yield {
            "bin_min": round(low, 3),
            "bin_max": round(high, 3),
            "bin_contains": share,
            "tokens": [texts[t] for t in row[first:end]],
            "values": example.window[around].round(3),
            "qualifying_token_index": example.position - first,
        }


FORMATS: dict[str, Callable[[Path, Content], list[str]]] = {
    "csv": _csv,
    "json": _json,
    "neuronpedia": _neuronpedia,
}
