"""The gradient noise scale: unbiased, with intervals that cover, equal to per-example gradients of real models."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from training_cases import classification, encoder, modelling, state
from training_cases import decoder as make_decoder

from probes.noise_scale import NoiseMeter, critical_batch, noise_scale, noise_scale_of
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, finetune, layers, matching, trainable


def batches(gradients, size):
    """Micro-batches of per-example gradients, (n, p), as of two modules."""
    half = gradients.shape[1] // 2

    def once():
        for part in torch.as_tensor(gradients).split(size):
            total = part.sum(0)
            yield {"a.weight": total[:half], "b.weight": total[half:]}, len(part)

    return once


def simulated(generator, n, true, noise):
    return true + noise * generator.normal(size=(n, len(true)))


def test_the_planted_scale_of_a_simulated_regression_is_found():
    """Loss (x w - y)² / 2 with x ~ N(0, I), y = x w* + ε: the gradient of an example is x (x (w - w*) - ε), G = w - w*, and
    tr Σ = (d + 1) |G|² + σ² d."""
    generator = np.random.default_rng(0)
    d, sigma, n = 20, 2.0, 5_000
    gap = generator.normal(size=d)
    x = generator.normal(size=(n, d))
    gradients = x * (x @ gap + sigma * generator.normal(size=n))[:, None]
    square = gap @ gap
    planted = ((d + 1) * square + sigma**2 * d) / square
    for size in (1, 10):
        found = noise_scale_of(batches(gradients, size), interval=False)
        assert found.batch_size.estimate == pytest.approx(planted, rel=0.1)
        assert found.total.squared_norm.estimate == pytest.approx(square, rel=0.1)


def test_micro_batches_of_one_give_the_sample_variance_and_modules_add_up():
    gradients = simulated(np.random.default_rng(1), 30, np.full(8, 0.5), 1.0)
    found = noise_scale_of(batches(gradients, 1))
    variance = gradients.var(0, ddof=1).sum()
    assert found.total.trace.estimate == pytest.approx(variance)
    assert found.total.squared_norm.estimate == pytest.approx(
        np.square(gradients.mean(0)).sum() - variance / 30
    )
    for name in ("squared_norm", "trace"):
        parts = [getattr(noise, name).estimate for noise in found.modules.values()]
        assert sum(parts) == pytest.approx(getattr(found.total, name).estimate)
    assert found.total.n_parameters == 8


def test_the_estimates_are_unbiased_with_unequal_micro_batches():
    true, norms, traces = np.full(6, 0.2), [], []
    for seed in range(400):
        gradients = simulated(np.random.default_rng(seed), 23, true, 1.0)
        found = noise_scale_of(batches(gradients, 5), interval=False)  # the last is of 3
        norms.append(found.total.squared_norm.estimate)
        traces.append(found.total.trace.estimate)
    for values, wanted in ((norms, true @ true), (traces, 6.0)):
        assert abs(np.mean(values) - wanted) < 3 * np.std(values) / 20


def test_the_jackknife_is_the_brute_force_one():
    gradients = simulated(np.random.default_rng(2), 14, np.full(6, 0.7), 1.0)
    found = noise_scale_of(batches(gradients, 2)).total
    left_out = []
    for i in range(7):
        rest = np.delete(gradients, [2 * i, 2 * i + 1], axis=0)
        left_out.append(noise_scale_of(batches(rest, 2), interval=False).total.trace.estimate)
    error = np.sqrt(6 / 7 * np.square(np.array(left_out) - np.mean(left_out)).sum())
    assert found.trace.standard_error == pytest.approx(error)


def test_intervals_cover_the_true_scale():
    true, covered = np.full(50, 0.1), 0
    for seed in range(200):
        gradients = simulated(np.random.default_rng(seed), 200, true, 1.0)
        interval = noise_scale_of(batches(gradients, 4)).batch_size
        covered += interval.low <= 50 / 0.5 <= interval.high
    assert 0.90 <= covered / 200 <= 0.99


def test_a_gradient_of_nothing_but_noise_is_unresolved():
    found = noise_scale_of(batches(simulated(np.random.default_rng(0), 64, np.zeros(40), 1.0), 1))
    assert not found.resolved
    assert found.batch_size.high == np.inf
    assert found.batch_size.low > 1
    assert "unresolved" in repr(found)


@pytest.mark.parametrize("case", ["classification", "language modelling"])
def test_a_model_s_scale_is_that_of_its_examples_gradients(case):
    model = (encoder if case == "classification" else make_decoder)(dtype=torch.float64)
    objective = (classification if case == "classification" else modelling)(model)
    before = state(model)
    with trainable(model, layers(1)):
        found = noise_scale(model, objective, examples=None, micro_batch=3)
        own = [p for p in model.model.parameters() if p.requires_grad]
        own += [] if objective.head is None else list(objective.head.parameters())
        rows, examples = [], objective.examples("train")
        mean_weight = np.mean([objective.weight(e) for e in examples])
        for example in examples:
            loss = (
                objective.outcomes(model, [example])["loss"].sum() * objective.weight(example) / mean_weight
            )
            rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, own)]).double().numpy())
        assert all(p.grad is None for p in own)
    order = np.random.default_rng(0).permutation(len(rows))
    wanted = noise_scale_of(batches(np.array(rows)[order], 3))
    for name in ("squared_norm", "trace", "batch_size"):
        a, b = getattr(found.total, name), getattr(wanted.total, name)
        assert (a.estimate, a.standard_error) == pytest.approx((b.estimate, b.standard_error), rel=1e-6)
    assert found.total.n_parameters == len(rows[0])
    assert all(".1." in name or "head" in name for name in found.modules)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert len(found.figure().data[0].y) <= len(found.modules)


def test_the_meter_sees_each_step_s_parts_as_they_are():
    model = encoder(dropout=0.0, dtype=torch.float64)
    objective = classification(model)
    meter, seen, wanted = NoiseMeter(model, objective), [], []
    outcomes = objective.outcomes

    def noting(model, batch):
        if model.model.training:
            seen.append(list(batch))
        return outcomes(model, batch)

    def after_backward(model, step):
        """By hand, at the weights of this step."""
        meter.after_backward(model, step)
        own = [p for p in [*model.model.parameters(), *objective.head.parameters()] if p.requires_grad]
        rows = []
        with torch.enable_grad():
            for part in seen:
                found = torch.autograd.grad(outcomes(model, part)["loss"].sum(), own)
                rows.append(({"x.w": torch.cat([g.flatten() for g in found])}, len(part)))
        wanted.append(noise_scale_of(lambda: rows, interval=False).total)
        seen.clear()

    objective.outcomes = noting
    config = FinetuneConfig(lr=1e-2, batch_size=8, epochs=2, accumulation=3)
    with trainable(model, matching("layer.1")), meter.watching():
        finetune(model, objective, config, after_backward=after_backward)
    assert objective.outcomes is noting
    assert "reset" not in vars(objective)
    assert len(meter.steps) == 8
    for step, own in zip(meter.steps, wanted):
        norm, trace = np.sum(list(step.values()), axis=0)
        assert norm == pytest.approx(own.squared_norm.estimate, rel=1e-6)
        assert trace == pytest.approx(own.trace.estimate, rel=1e-6)
    found = meter.result(last=5)
    ratio = np.mean([w.trace.estimate for w in wanted[3:]]) / np.mean(
        [w.squared_norm.estimate for w in wanted[3:]]
    )
    assert found.batch_size.estimate == pytest.approx(ratio if ratio > 0 else np.inf)
    assert found.n_batches == 5
    assert len(meter.figure().data[0].x) == 8


def test_adapters_are_measured_and_lora_s_first_factor_begins_without_a_gradient():
    import peft

    model = make_decoder(dropout=0.0)
    adapted = peft.get_peft_model(
        model.model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    from steerkit.models import HookedModel

    wrapped = HookedModel.from_pretrained(adapted, tokenizer=model.tokenizer)
    found = noise_scale(wrapped, modelling(wrapped), examples=12, interval=False)
    assert all("lora_" in name for name in found.modules)
    for name, noise in found.modules.items():
        assert (noise.trace.estimate == 0) == ("lora_A" in name)


def test_the_critical_batch_of_planted_runs_comes_back():
    sizes = np.array([8.0, 16, 64, 256, 1024])
    steps = 500 * (1 + 120 / sizes)  # S = S_min (1 + B_crit / B), E = B S
    found = critical_batch(steps, sizes * steps)
    assert found.min_steps == pytest.approx(500)
    assert found.min_examples == pytest.approx(500 * 120)
    assert found.batch_size.estimate == pytest.approx(120)
    noisy = critical_batch(steps * np.exp(0.05 * np.random.default_rng(0).normal(size=5)), sizes * steps)
    assert noisy.batch_size.low < 120 < noisy.batch_size.high


def test_errors_name_what_is_wrong(tmp_path):
    model = encoder()
    objective = classification(model)
    with pytest.raises(InputError, match="at least two"):
        noise_scale(model, objective, examples=4, micro_batch=3)
    with pytest.raises(NumericsError, match=r"a\.weight in micro-batch 0"):
        noise_scale_of(batches(np.full((4, 4), np.nan), 1))
    with pytest.raises(InputError, match="at least two"):
        noise_scale_of(batches(np.ones((1, 4)), 1))
    with pytest.raises(InputError, match="accumulation"):
        NoiseMeter(model, objective).result()
    with pytest.raises(InputError, match="one batch size"):
        critical_batch([10, 20, 30], [100, 200, 300])
    with pytest.raises(InputError, match="trade"):
        critical_batch([10, 20, 30], [100, 250, 500])
    meter = NoiseMeter(model, objective)
    with meter.watching(), pytest.raises(InputError, match="without a regulariser"):
        finetune(
            model, objective, FinetuneConfig(batch_size=8, accumulation=2),
            after_backward=meter.after_backward, regulariser=lambda m: sum(p.square().sum() for p in m.model.parameters()),
        )  # fmt: skip
    model.model.requires_grad_(False)
    objective.head.requires_grad_(False)
    with pytest.raises(InputError, match="takes gradients"):
        noise_scale(model, objective)
    noise_scale_of(batches(np.ones((4, 4)), 1)).save(tmp_path / "noise.json")
