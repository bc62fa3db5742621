"""Speed of steering, ours beside others', by turns.

    python scripts/bench_steering.py                                 # a Llama with random weights, 12 layers of width 512
    python scripts/bench_steering.py --model DIR --pairs PAIRS.jsonl

    extraction    a vector at the middle layer: our mean difference, steering-vectors' (if it is installed), repeng's pca_center
    generation    Hugging Face's `generate` alone, and with an addition at one site
    bipo          a step of ours, reference log-probabilities precomputed, beside the published scheme with a live reference model

repeng wants an older numpy than steerkit: it runs in a process of its own, with the Python of an environment that has it.

    python -m venv peer && peer/bin/pip install repeng && python scripts/bench_steering.py --repeng-python peer/bin/python

Figures are medians with quartiles over rounds; ratios are taken within a round. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import json
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from steerkit import HookedModel, steering
from steerkit.finetune import frozen, log_probs
from steerkit.steering.methods.below import Below
from steerkit.steering.methods.learning import encode_pairs, preference, sides_of, with_references
from steerkit.steering.pairs import Pairs

Work = Callable[[], Any]


def random_llama(layers: int, width: int) -> HookedModel:
    """A Llama of that shape with random weights and StoryWorld's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    story = HookedModel.from_pretrained("storyworld")
    config = LlamaConfig(
        vocab_size=story.d_vocab,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=512,
        pad_token_id=story.pad_id,
        bos_token_id=story.bos_id,
        eos_token_id=story.tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return HookedModel.from_pretrained(LlamaForCausalLM(config).eval(), tokenizer=story.tokenizer)


def extraction(model: HookedModel, pairs: Pairs, batch: int, repeng_python: str) -> dict[str, Work]:
    """The same pairs at the same layer, last token of each side."""
    layer = (model.n_layers - 1) // 2
    site = f"blocks.{layer}.hook_resid_post"
    works: dict[str, Work] = {
        "steerkit": lambda: steering.fit(model, pairs, method="mean_diff", site=site, read="last")
    }
    texts = [pair.texts() for pair in pairs]
    inner: Any = model.model
    model.tokenizer.padding_side = "right"
    if model.tokenizer.pad_token is None:
        model.tokenizer.pad_token = model.tokenizer.eos_token
    if importlib.util.find_spec("steering_vectors"):
        from steering_vectors import train_steering_vector

        works["steering-vectors"] = lambda: train_steering_vector(
            inner, model.tokenizer, texts, layers=[layer], read_token_index=-1, batch_size=batch
        )
    else:
        print("steering-vectors is not installed: left out.")
    repeng = _repeng(model, texts, layer, batch, repeng_python)
    if repeng is not None:
        works["repeng"] = repeng
    return works


def _repeng(
    model: HookedModel, texts: Sequence[tuple[str, str]], layer: int, batch: int, python: str
) -> Work | None:
    """repeng in a process of its own, which waits while the others work; None, with a line that says so, where there is none."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    inner: Any = model.model
    inner.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    (place / "pairs.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("bench_steering_repeng.py")
    settings = [place / "model", place / "pairs.json", layer, batch, torch.get_num_threads()]
    child = subprocess.Popen(
        [python, str(script), *map(str, settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    atexit.register(child.kill)
    asked, told, errors = child.stdin, child.stdout, child.stderr
    assert asked is not None
    assert told is not None
    assert errors is not None
    if told.readline().strip() != "ready":
        reason = (errors.read().strip().splitlines() or ["it ended"])[-1]
        print(
            f"repeng does not run with {python} ({reason}): left out. Name a Python that has it: --repeng-python."
        )
        return None
    threading.Thread(target=errors.read, daemon=True).start()

    def work() -> None:
        print("go", file=asked, flush=True)
        if told.readline().strip() != "done":
            raise RuntimeError("repeng stopped.")

    return work


def generation(model: HookedModel, n: int, tokens: int) -> dict[str, Work]:
    """`n` rows of `tokens` new tokens, greedy."""
    prompt = model.tokenizer("There is a happy fox named Anna.")["input_ids"][:-1]
    ids = torch.tensor([prompt] * n, device=model.device)
    inner: Any = model.model
    vector = steering.SteeringVector.add(
        {f"blocks.{model.n_layers // 2}.hook_resid_post": 0.01 * torch.randn(model.d_model)}
    )
    options = {
        "max_new_tokens": tokens,
        "min_new_tokens": tokens,
        "do_sample": False,
        "pad_token_id": model.pad_id,
    }

    def plain() -> Any:
        with torch.no_grad():
            return inner.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)

    def steered() -> Any:
        with model.steer(vector):
            return plain()

    return {"Hugging Face": plain, "steerkit": steered}


def bipo(model: HookedModel, pairs: Pairs, batch: int) -> dict[str, Work]:
    """One step's forward and backward passes."""
    examples = with_references(model, encode_pairs(model, pairs))[:batch]
    site = f"blocks.{model.n_layers // 2}.hook_resid_post"
    below = Below.of(model, sides_of(examples), [site])
    vector = torch.zeros(model.d_model, device=model.device, requires_grad=True)
    signs = torch.ones(len(examples))

    def make() -> steering.SteeringVector:
        return steering.SteeringVector.add({site: vector})

    def ours() -> None:
        with frozen(model):
            preference(model, make, examples, beta=0.1, signs=signs, below=below).backward()

    def published() -> None:
        sides = [e.positive for e in examples] + [e.negative for e in examples]
        with frozen(model):
            with torch.no_grad():
                log_probs(model, sides)  # the reference model, a copy of the same size
            preference(model, make, examples, beta=0.1, signs=signs).backward()

    return {"live reference": published, "steerkit": ours}


def by_turns(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round; one round before is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        names = list(works) if turn % 2 else list(reversed(works))
        for name in names:
            started = time.perf_counter()
            works[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                taken[name].append(time.perf_counter() - started)
    return taken


def told(title: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    """Print a part's figures, ours as a share of each other's time, and give them back."""
    print(f"\n{title}")
    found: dict[str, Any] = {}
    for name, seconds in taken.items():
        ratios = [mine / theirs for mine, theirs in zip(taken["steerkit"], seconds)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        print(
            f"  {name:18} {statistics.median(seconds):8.3f} s   steerkit takes {middle:.3f} ({low:.3f}–{high:.3f}) of it"
        )
        found[name] = {"seconds": statistics.median(seconds), "ratio": middle, "quartiles": [low, high]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a model that steerkit loads; a random Llama by default")
    parser.add_argument("--pairs", default="storyworld:mood=happy")
    parser.add_argument("--n", type=int, default=128, help="pairs")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="generated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeng-python", default=sys.executable, help="of an environment with repeng")
    parser.add_argument("--parts", nargs="+", default=["extraction", "generation", "bipo"])
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads)
    model = (
        HookedModel.from_pretrained(arguments.model)
        if arguments.model
        else random_llama(arguments.layers, arguments.width)
    )
    pairs = steering.load_pairs(arguments.pairs, n=arguments.n)
    print(
        f"{date.today()}, {platform.machine()}, {arguments.threads} threads, torch {torch.__version__}; {model!r}, "
        f"{len(pairs)} pairs, batches of {arguments.batch}, {arguments.rounds} rounds by turns: medians (quartiles)"
    )
    parts: dict[str, Callable[[], dict[str, Work]]] = {
        "extraction": lambda: extraction(model, pairs, arguments.batch, arguments.repeng_python),
        "generation": lambda: generation(model, arguments.batch, arguments.tokens),
        "bipo": lambda: bipo(model, pairs, arguments.batch),
    }
    found = {name: told(name, by_turns(parts[name](), arguments.rounds)) for name in arguments.parts}
    print(json.dumps({**vars(arguments), "results": found}))


if __name__ == "__main__":
    main()
