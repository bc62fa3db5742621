"""Micro-batches, number formats, forced settings and refused checkpoints."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae
from sae.architectures.crosscoder import Crosscoder
from sae.memory import choose_micro_batch
from sae.trainer import Trainer
from steerkit.checkpoints import Checkpoints
from steerkit.errors import CheckpointError, InputError, NumericsError
from steerkit.runs import Run, read_json

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import SITE, SparseStream
from test_architectures import CONFIGS, D_IN, made, terms

CPU = torch.device("cpu")
CUTTABLE = [config for config in CONFIGS if not config.build(D_IN).needs_whole_batch]
WHOLE = [config for config in CONFIGS if config.build(D_IN).needs_whole_batch]


def name_of(config):
    return f"{config.name}-{getattr(config, 'sparsity', '')}".rstrip("-")


def trained(config, steps=6, **settings):
    stream = SparseStream("heavy", batch_size=256)
    made = sae.TrainConfig(batch_size=256, **settings)
    trainer = Trainer(config, SITE, stream.statistics(SITE), steps * 256, made, CPU)
    for _ in range(steps):
        trainer.step(next(stream)[SITE])
    return trainer


@pytest.mark.parametrize("config", CUTTABLE, ids=name_of)
def test_micro_batches_add_up_to_the_gradient_of_the_batch(config):
    model, x, dead = made(config, torch.float64)
    every = terms(model, x, 0.3, dead)
    trainer = object.__new__(Trainer)
    trainer.sae = model
    found = {}
    for size in (None, 16, 24):
        trainer.config = sae.TrainConfig(micro_batch=size)
        step = trainer._gradients(x, every)
        found[size] = (
            step,
            {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        )
    whole, gradients = found.pop(None)
    for step, cut in found.values():
        assert torch.equal(step.counts, whole.counts)
        for value in ("loss", "mse", "l0"):
            assert float(getattr(step, value)) == pytest.approx(float(getattr(whole, value)), rel=1e-9)
        for name, gradient in gradients.items():
            scale = gradient.abs().max().clamp_min(1e-9)
            assert float((cut[name] - gradient).abs().max() / scale) < 1e-6, name


def test_what_is_chosen_over_the_batch_cannot_be_cut():
    assert {config.name for config in WHOLE} >= {"batch_topk", "matryoshka", "crosscoder"}
    for config in (sae.BatchTopK(64, k=4), sae.JumpReLU(64, target_l0=4.0, sparsity="quadratic")):
        with pytest.raises(InputError, match="cannot be cut into micro-batches"):
            trained(config, micro_batch=64)


def test_micro_batches_are_as_large_as_fits():
    jobs = [(sae.Gated(65_536), 4096)]
    sizes = [
        choose_micro_batch(jobs, 4096, torch.float32, CPU, free=int(free * 2**30))
        for free in (400, 20, 18, 14, 1)
    ]
    assert sizes[0] is None
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert all(size is not None and size >= 64 and 4096 % size == 0 for size in sizes[1:])
    assert choose_micro_batch([(sae.BatchTopK(65_536), 4096)], 4096, torch.float32, CPU, free=2**30) is None
    assert choose_micro_batch([(sae.TopK(256), 64)], 512, torch.float32, CPU) is None


def test_the_micro_batch_that_was_chosen_is_written_down_and_kept(tmp_path, monkeypatch, tiny_llama):
    from sae import training
    from steerkit import HookedModel

    model = HookedModel.from_pretrained(tiny_llama(width=32))
    options = {
        "tokens": 4096,
        "batch_size": 512,
        "held_out_tokens": 200,
        "micro_batch": "auto",
        "quiet": True,
    }
    texts = [f"The {word} fox number {i} sees a hat." for i in range(400) for word in ("red", "blue")]
    monkeypatch.setattr(training, "choose_micro_batch", lambda *args, **kwargs: 128)
    run = sae.train(
        model, texts, "blocks.1.hook_resid_post", sae.TopK(64, k=4), out=tmp_path / "r", **options
    )
    assert Run.load(run.path).config["training"]["micro_batch"] == 128
    monkeypatch.setattr(training, "choose_micro_batch", lambda *args, **kwargs: 32)
    again = sae.train(
        model,
        texts,
        "blocks.1.hook_resid_post",
        sae.TopK(64, k=4),
        out=tmp_path / "r",
        resume=True,
        **options,
    )
    assert torch.equal(again.sae.W_dec, run.sae.W_dec)
    assert Run.load(run.path).config["training"]["micro_batch"] == 128


@pytest.mark.parametrize("dtype", ["tf32", "float64"])
def test_other_number_formats_train_the_same(dtype):
    here, plain = trained(sae.Gated(64, target_l0=4.0), dtype=dtype), trained(sae.Gated(64, target_l0=4.0))
    assert here.sae.W_dec.dtype == (torch.float64 if dtype == "float64" else torch.float32)
    torch.testing.assert_close(here.sae.W_dec.float(), plain.sae.W_dec, rtol=0, atol=2e-3)
    assert torch.backends.cuda.matmul.allow_tf32 is False


def test_a_checkpoint_of_another_architecture_or_width_is_refused(tmp_path):
    run = Run.open(tmp_path / "r", "train sae", {})
    stream = SparseStream("heavy", batch_size=256)
    stream.nan_at = 4
    config = sae.TrainConfig(batch_size=256)
    with pytest.raises(NumericsError):
        sae.fit(stream, SITE, sae.TopK(64, k=4), 2560, config=config, run=run, checkpoint_seconds=0.0)
    for other, said in (
        (sae.Gated(64), "of topk with 64 latents"),
        (sae.TopK(96, k=4), "not of topk with 96"),
    ):
        with pytest.raises(CheckpointError, match=said):
            sae.fit(SparseStream("heavy", batch_size=256), SITE, other, 2560, config=config, run=run)
    assert Checkpoints(tmp_path / "r/checkpoint").load()[1]["steps"] == 4


def test_changed_settings_are_named_and_refused_unless_forced(tmp_path, tiny_llama):
    from steerkit import HookedModel

    model = HookedModel.from_pretrained(tiny_llama(width=32))
    texts = [f"The {word} fox number {i} sees a hat." for i in range(400) for word in ("red", "blue")]

    def train(**changed):
        options = {"tokens": 4096, "batch_size": 512, "held_out_tokens": 200, "quiet": True, **changed}
        return sae.train(
            model, texts, "blocks.1.hook_resid_post", sae.TopK(64, k=4), out=tmp_path / "r", **options
        )

    original = sae.training.fit_all

    def killed(stream, jobs, tokens, **options):
        original(stream, jobs, tokens, **options)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sae.training, "fit_all", killed)
        with pytest.raises(KeyboardInterrupt):
            train()
    with pytest.raises(InputError, match=r"training\.held_out_tokens is 200 there and 100 here.*--force"):
        train(held_out_tokens=100, resume=True)
    run = train(held_out_tokens=100, resume=True, force=True)
    (change,) = read_json(run.path / "provenance.json")["changed"]
    assert change["settings"] == [["training.held_out_tokens", 200, 100]]
    assert Run.load(run.path).config["training"]["held_out_tokens"] == 100


def test_where_the_time_goes_is_told_while_it_goes(tmp_path):
    run = Run.open(tmp_path / "r", "train sae", {})
    config = sae.TrainConfig(batch_size=256, log_every=2)
    sae.fit(SparseStream("heavy", batch_size=256), SITE, sae.TopK(64, k=4), 2560, config=config, run=run)
    for line in run.metrics():
        rates = line["tokens_per_second"]
        assert rates.keys() == {"model", "buffer", "sae", "total"}
        assert all(rate > 0 for rate in rates.values())
        assert rates["total"] <= min(rates["sae"], rates["buffer"]) * 1.01


def test_a_crosscoder_knows_its_widths_when_it_is_cut_to_size():
    config = replace(Crosscoder(64, k=4), widths=(20, 12))
    with pytest.raises(InputError, match="do not make 30"):
        config.build(30)
