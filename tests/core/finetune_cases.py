"""Small models and data to fine-tune, and runs by name; `torchrun --nproc-per-node 2 finetune_cases.py OUT` does them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from steerkit import distributed
from steerkit.finetuning import FinetuneConfig, Outcome, finetune
from steerkit.models import HookedModel
from steerkit.objectives import Classification, LanguageModelling, Objective, Preference
from steerkit.storyworld.tokenizer import build_tokenizer

COLOURS = ("red", "blue", "green", "white", "black")
ANIMALS = ("fox", "cat", "dog", "hen", "owl", "bear", "mouse")


def texts(n: int, start: int = 0) -> list[str]:
    """Sentences of different lengths."""
    found = []
    for i in range(start, start + n):
        colour, animal = COLOURS[i * 7 % 5], ANIMALS[i * 11 % 7]
        found.append(f"The {animal} took the {colour} ball." + f" The ball is {colour}." * (i * 13 % 4))
    return found


def labelled(n: int, start: int = 0) -> list[tuple[str, str]]:
    """Sentences and whether their colour is warm, every tenth label being wrong."""
    return [
        (text, "yes" if ("red" in text or "white" in text) != (i % 10 == 0) else "no")
        for i, text in enumerate(texts(n, start))
    ]


def pairs(n: int, start: int = 0) -> list[tuple[str, str]]:
    return [(text, text.replace("ball", "box")) for text in texts(n, start)]


def decoder(*, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> HookedModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _with_biases(GPT2LMHeadModel(config)).to(dtype).eval()
    return HookedModel.from_pretrained(model, tokenizer=tokenizer, device="cpu")


def encoder(*, dropout: float = 0.1, dtype: torch.dtype = torch.float32) -> HookedModel:
    """A model with CLS before each text, SEP after it, and no pad token."""
    from tokenizers import processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    backend = build_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, cls_token="<s>", sep_token="</s>")
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _with_biases(BertModel(config, add_pooling_layer=False)).to(dtype).eval()
    return HookedModel.from_pretrained(model, tokenizer=tokenizer, device="cpu")


def _with_biases(model: Any) -> Any:
    """Biases that are not 0: the regulariser then has gradients where the loss has none but rounding errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def classification(model: HookedModel, **options: Any) -> Classification:
    return Classification(model, labelled(30), labelled(12, 30), labelled(12, 50), **options)


def modelling(model: HookedModel, **options: Any) -> LanguageModelling:
    return LanguageModelling(model, texts(30), texts(12, 30), texts(12, 50), **options)


def preference(model: HookedModel, **options: Any) -> Preference:
    return Preference(model, pairs(30), pairs(12, 30), pairs(12, 50), **options)


CASES: dict[str, tuple[Callable[..., HookedModel], Callable[..., Objective[Any]]]] = {
    "classification": (encoder, classification),
    "language modelling": (decoder, modelling),
    "preference": (decoder, preference),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "drrho": {"tau": 0.3, "gamma": 0.7, "accumulation": 2},
    "ragged": {"batch_size": 29},  # every other batch is of one example
}


def exactly(case: str, **settings: Any) -> tuple[dict[str, torch.Tensor], Outcome]:
    """Ten steps in float64 without dropout, with a regulariser: the weights and what the run came to."""
    build, make = CASES[case]
    model = build(dropout=0.0, dtype=torch.float64)
    objective = make(model)
    config = FinetuneConfig(**{"lr": 1e-2, "batch_size": 12, "epochs": 4, "eval_every": 5, **settings})
    reference = objective.evaluate(model, "train")["loss"] - 0.5 if config.tau is not None else None
    outcome = finetune(
        model,
        objective,
        config,
        reference=reference,
        regulariser=lambda model: 1e-3 * sum(p.square().sum() for p in model.model.parameters()),
    )
    return weights(model, objective), outcome


def weights(model: HookedModel, objective: Objective[Any]) -> dict[str, torch.Tensor]:
    """Copies of all parameters, the head's too."""
    found = {name: value.detach().clone() for name, value in model.model.named_parameters()}
    head = {} if objective.head is None else objective.head.state_dict()
    return {**found, **{f"head.{name}": value.clone() for name, value in head.items()}}


RESUMED = FinetuneConfig(
    lr=1e-2, batch_size=8, epochs=3, eval_every=3, log_every=2, schedule="cosine", tau=0.5, seed=3
)


def resumable(case: str, out: Path | None, *, at: int | None = None, number: int = 0, **options: Any) -> Any:
    """(weights, outcome) of a run with dropout, which gets signal `number` after step `at`."""
    build, make = CASES[case]
    model = build(dropout=0.2)
    objective = make(model)
    reference = objective.evaluate(model, "train")["loss"]

    def after_step(model: HookedModel, step: int, n_steps: int) -> None:
        torch.rand(3)  # random numbers that functions take change nothing
        if step == at:
            os.kill(os.getpid(), number)

    found = finetune(
        model, objective, RESUMED, out=out, reference=reference, after_step=after_step, **options
    )
    return weights(model, objective), found


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    with distributed.launched():
        for case in CASES:
            for variant, settings in VARIANTS.items():
                found, outcome = exactly(case, **settings)
                found["losses"] = torch.tensor(outcome.losses, dtype=torch.float64)
                save_file(found, out / f"{case} {variant} {distributed.rank()}.safetensors")


if __name__ == "__main__":
    main()
