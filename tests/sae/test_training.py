"""Training reaches what was asked for, on data it has never seen."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sae
from sae.schedule import Multiplier, TargetL0, learning_rate_factor
from sae.trainer import Trainer
from steerkit.errors import InputError
from steerkit.runs import Run

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import SITE, SparseStream

PENALISED = [sae.L1, sae.SqrtL1, sae.Gated, sae.JumpReLU]


def figures(model, x):
    """(L0, FVU, share of dead latents)."""
    latents = model.encode(x)
    error = (model.decode(latents) - x).square().sum()
    active = latents > 0
    l0 = float(active.sum(1).float().mean())
    return l0, float(error / (x - x.mean(0)).square().sum()), float((~active.any(0)).float().mean())


@pytest.mark.parametrize("kind", ["even", "heavy", "zipf"])
@pytest.mark.parametrize("arch", PENALISED, ids=lambda arch: arch.name)
def test_the_held_out_l0_ends_within_a_tenth_of_the_target(arch, kind):
    # Three distributions, three scales, three targets: nothing of them is known to the controller beforehand.
    scale, target = {"even": (1.0, 4.0), "heavy": (40.0, 8.0), "zipf": (0.02, 3.0)}[kind]
    stream = SparseStream(kind, scale=scale)
    made, _ = sae.fit(
        stream, SITE, arch(80, target_l0=target), 200_000, config=sae.TrainConfig(batch_size=512)
    )
    l0, fvu, dead = figures(made, stream.held_out())
    assert l0 == pytest.approx(target, rel=0.1)
    assert fvu < 0.6
    assert dead <= (
        0.3 if arch is sae.SqrtL1 else 8.1 / 80
    )  # the root gives up the rarest of Zipf's features


def test_topk_finds_the_dictionary():
    stream = SparseStream("even", n=48, k=3)
    made, _ = sae.fit(stream, SITE, sae.TopK(64, k=3), 400_000, config=sae.TrainConfig(batch_size=512))
    _, fvu, _ = figures(made, stream.held_out())
    cosines = torch.nn.functional.normalize(made.W_dec, dim=1) @ stream.dictionary.T
    assert fvu < 0.1
    assert float((cosines.amax(0) > 0.9).float().mean()) > 0.8


def test_dead_latents_are_made_anew():
    stream = SparseStream()
    config = sae.TrainConfig(batch_size=512, dead_after=2048)
    trainer = Trainer(
        sae.Gated(64, target_l0=4.0), SITE, stream.statistics(SITE), 40_960, config, torch.device("cpu")
    )
    for step in range(80):
        trainer.step(next(stream)[SITE])
        if step == 5:
            with torch.no_grad():
                trainer.sae.b_gate[:7] = -1e4
    assert (trainer.silent < 2048).all()
    assert (trainer.sae.b_gate[:7] > -100).all()
    torch.testing.assert_close(trainer.sae.W_dec.norm(dim=1), torch.ones(64))


def test_a_fixed_coefficient_is_reached_after_the_warm_up_and_kept(tmp_path):
    run = Run.open(tmp_path / "r", "train sae", {})
    sae.fit(
        SparseStream(),
        SITE,
        sae.L1(64, l1=0.7),
        40 * 512,
        config=sae.TrainConfig(batch_size=512, log_every=1),
        run=run,
    )
    coefficients = [line["coefficient"] for line in run.metrics()]
    assert coefficients[0] == pytest.approx(0.35)
    assert set(coefficients[2:]) == {0.7}


def test_bfloat16_products_reach_what_float32_reaches():
    found = {}
    for dtype in ("float32", "bfloat16"):
        for arch in (sae.Gated(96, target_l0=4.0), sae.TopK(96, k=4), sae.SqrtL1(96, target_l0=4.0)):
            config = sae.TrainConfig(batch_size=512, dtype=dtype)
            made, _ = sae.fit(SparseStream(), SITE, arch, 150_000, config=config)
            assert made.dtype == torch.float32
            found[arch.name, dtype] = figures(made, SparseStream().held_out())[1]
    for name in ("gated", "topk", "sqrt_l1"):
        assert found[name, "bfloat16"] == pytest.approx(found[name, "float32"], rel=0.15)


def test_training_is_the_same_for_activations_of_any_scale():
    made = {}
    for scale in (1.0, 1024.0):
        made[scale], _ = sae.fit(
            SparseStream(scale=scale),
            SITE,
            sae.Gated(96, target_l0=4.0),
            20_000,
            config=sae.TrainConfig(batch_size=512),
        )
    x = SparseStream().held_out(512)
    torch.testing.assert_close(made[1024.0](1024 * x) / 1024, made[1.0](x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made[1024.0].encode(1024 * x), made[1.0].encode(x), rtol=1e-3, atol=1e-3)


def test_decoder_rows_are_of_unit_norm_in_training_units_and_the_seed_decides():
    def trained(seed):
        stream = SparseStream()
        config = sae.TrainConfig(batch_size=512, seed=seed)
        made, _ = sae.fit(stream, SITE, sae.TopK(96, k=4), 10_000, config=config)
        return made.W_dec * stream.statistics(SITE).scale

    first = trained(0)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(96))
    assert torch.equal(first, trained(0))
    assert not torch.allclose(first, trained(1))


def test_silence_is_counted_in_tokens():
    stream = SparseStream()
    config = sae.TrainConfig(batch_size=512, dead_after=1000)
    trainer = Trainer(
        sae.TopK(64, k=4, aux_coefficient=0),
        SITE,
        stream.statistics(SITE),
        10_000,
        config,
        torch.device("cpu"),
    )
    trainer.step(next(stream)[SITE])
    with torch.no_grad():
        trainer.sae.b_enc[5] = -1e4
    trainer.silent.zero_()
    for _ in range(3):
        trainer.step(next(stream)[SITE])
    assert trainer.silent[5] == 3 * 512
    assert trainer.metrics()["dead_fraction"] >= 1 / 64


def test_metrics_say_how_it_goes(tmp_path):
    run = Run.open(tmp_path / "r", "train sae", {})
    config = sae.TrainConfig(batch_size=512, log_every=10)
    sae.fit(SparseStream(), SITE, sae.Gated(96, target_l0=4.0), 40 * 512, config=config, run=run)
    lines = run.metrics()
    assert [line["tokens"] for line in lines] == [512 * step for step in (10, 20, 30, 40)]
    assert {"loss", "fvu", "l0", "coefficient", "lr", "dead_fraction", "tokens_per_second"} <= lines[0].keys()
    assert lines[0]["tokens_per_second"].keys() == {"model", "buffer", "sae", "total"}
    assert lines[-1]["fvu"] < lines[0]["fvu"]
    assert lines[-1]["lr"] < 0.1 * lines[0]["lr"]


def test_the_learning_rate_rises_stays_and_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.1, 0.5) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert factors[75] == pytest.approx(0.5)
    assert factors[100] == 0.0


CONTROLLERS = [TargetL0(16.0, 1000), Multiplier(16.0, 1000)]
EACH_CONTROLLER = pytest.mark.parametrize(
    "fresh", CONTROLLERS, ids=lambda controller: type(controller).__name__
)


@EACH_CONTROLLER
def test_the_controller_goes_on_where_its_state_was_taken(fresh):
    first, second = replace(fresh), replace(fresh)
    for l0 in (40.0, 30.0, 18.0):
        first.update(l0, 2.0)
    second.load_state_dict(first.state_dict())
    for controller in (first, second):
        controller.update(21.0, 2.0)
    assert first.coefficient == second.coefficient


@EACH_CONTROLLER
def test_the_controller_raises_the_penalty_while_too_much_is_active(fresh):
    controller = replace(fresh)
    before = controller.coefficient
    for _ in range(20):
        controller.update(32.0, 2.0)
    raised = controller.coefficient
    for _ in range(60):
        controller.update(8.0, 2.0)
    assert before < raised
    assert controller.coefficient < raised


def test_the_price_of_an_active_latent_is_kept_once_the_target_is_met():
    controller = Multiplier(16.0, 100)
    for _ in range(50):
        controller.update(32.0, 2.0)
    for _ in range(200):
        controller.update(16.0, 2.0)
    assert controller.coefficient == pytest.approx(controller.price * 2.0 / 16.0)
    assert controller.price > 0
    for _ in range(50):
        controller.update(4.0, 2.0)
    assert controller.coefficient < 0 <= controller.price


def test_batch_size_and_learning_rate_follow_from_the_length_of_the_run():
    found = {
        tokens: sae.TrainConfig().resolve(tokens) for tokens in (100_000, 1_000_000, 2_000_000, 100_000_000)
    }
    assert [config.batch_size for config in found.values()] == [512, 1024, 2048, 4096]
    rates = [sae.TrainConfig().peak_lr(128, 1024, n_steps) for n_steps in (390, 1000, 4000, 100_000)]
    assert rates[0] == rates[1] == 2 * rates[2] == 10 * rates[3] == pytest.approx(5 / (128 * 1024) ** 0.5)
    assert sae.TrainConfig(lr=1e-4).peak_lr(128, 1024, 390) == 1e-4
    with pytest.raises(InputError, match="100 tokens are less than one batch of 512"):
        sae.TrainConfig().resolve(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"lr": -1.0}, "lr is -1"),
        ({"warmup": 1.5}, "warmup is 1.5"),
        ({"batchsize": 3}, "Did you mean 'batch_size'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        sae.TrainConfig().with_(settings)
