"""What a study of one concept is made of: its methods, its detectors, and divergences that are asked for."""

import math

import numpy as np
import pytest
import torch

import sae
from probes.linear import fit_linear
from steerkit import HookedModel, steering
from steerkit.errors import InputError
from steerkit.finetune import log_probs
from steerkit.stats import auroc
from steerkit.steering.concept import ConceptConfig, _Detector, _figures, n_parameters
from steerkit.steering.methods.learning import encode_pairs, sides_of
from steerkit.steering.pairs import Pair, Pairs
from steerkit.steering.reading import collect_pairs
from steerkit.steering.sweep import SHUFFLED, SweepConfig, sweep
from steerkit.steering.tasks import make_task

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def pairs():
    return steering.load_pairs("storyworld:mood=happy", n=40)


@pytest.fixture(scope="module")
def axes(model):
    """An SAE whose latents are the coordinates of the stream, and their negatives, above zero."""
    made = sae.L1(2 * model.d_model).build(model.d_model)
    with torch.no_grad():
        eye = torch.eye(model.d_model)
        made.W_enc.copy_(torch.cat([eye, -eye], 1))
        made.W_dec.copy_(torch.cat([eye, -eye]))
        made.b_dec.zero_()
        made.b_enc.zero_()
    made.metadata["site"] = SITE
    return made.eval().requires_grad_(False)


def test_the_latent_is_the_one_that_tells_the_sides_apart_best(model, pairs, axes):
    vector = steering.fit(model, pairs, method="sae_latent", sae=axes)
    latent = vector.provenance["latent"]
    direction = vector.directions[SITE]
    assert torch.cosine_similarity(direction, axes.W_dec[latent], dim=0) > 1 - 1e-6

    rows = torch.zeros(2, len(pairs), axes.d_sae)
    for i, pair in enumerate(pairs):
        for side, text in enumerate(pair.texts()):
            ids = model.tokenizer(text)["input_ids"]
            own = [j for j, token in enumerate(ids) if token not in model.special_ids]
            acts = model.run(torch.tensor([ids]), sites=[SITE])[SITE][0, own].detach()
            rows[side, i] = torch.cat([acts, -acts], 1).relu().mean(0)
    plain = steering.fit(model, pairs, method="mean_diff", site=SITE)
    assert float(direction.norm()) == pytest.approx(plain.norm, rel=1e-3)
    labels = np.repeat([True, False], len(pairs))
    areas = [auroc(column, labels) for column in rows.flatten(0, 1).double().numpy().T]
    assert areas[latent] == pytest.approx(max(areas), abs=2e-3)
    assert vector.provenance["auroc"] == pytest.approx(areas[latent], abs=2e-3)


def test_an_sae_of_another_width_or_none_is_refused(model, pairs):
    other = sae.L1(64).build(model.d_model // 2)
    other.metadata["site"] = SITE
    with pytest.raises(InputError, match="width 64"):
        steering.fit(model, pairs, method="sae_latent", sae=other)
    with pytest.raises(InputError, match="needs the latents"):
        steering.fit(model, pairs, method="sae_latent")


def test_lora_is_the_positive_half_of_weight_arithmetic(model, pairs):
    few = pairs[:8]
    ours = steering.fit(model, few, method="lora", epochs=1)
    half = steering.fit(model, few, method="weight_arithmetic", epochs=1, contrast=False)
    assert ours.cosine(half) > 1 - 1e-5
    assert n_parameters(ours) == sum(
        8 * sum(model.model.get_submodule(path).weight.shape) for path in model.linear_modules()
    )
    examples = [e.positive for e in encode_pairs(model, few)]
    with torch.no_grad():
        before = log_probs(model, examples).mean()
        with model.steer(ours):
            assert log_probs(model, examples).mean() > before


def test_a_probe_gives_its_direction_as_long_as_the_mean_difference(model, pairs):
    vector = steering.fit(model, pairs, method="linear_probe", site=SITE).directions[SITE]
    positive, negative = collect_pairs(model, pairs, [SITE])[SITE]
    n = len(pairs)
    probe = fit_linear(torch.cat([positive, negative]), np.repeat([1, 0], n), groups=np.tile(np.arange(n), 2))
    assert torch.cosine_similarity(vector, probe.direction(1), dim=0) > 0.999
    assert float(vector.norm()) == pytest.approx(float((positive - negative).mean(0).norm()), rel=1e-4)


@pytest.mark.parametrize("n", [2, 7, 40])
def test_just_half_of_the_sides_are_exchanged(pairs, n):
    shuffled = pairs[:n].shuffled_sides(3)
    exchanged = [a.positive != b.positive for a, b in zip(pairs[:n], shuffled)]
    assert sum(exchanged) == n // 2
    assert all({a.positive, a.negative} == {b.positive, b.negative} for a, b in zip(pairs[:n], shuffled))


# detection


def test_a_projection_is_on_what_is_added(model, pairs):
    vector = steering.fit(model, pairs, method="mean_diff", site=[SITE, "blocks.2.hook_resid_post"])
    found = _Detector(model, pairs).of_vector(vector, 1.0)
    sides = collect_pairs(model, pairs, list(vector.directions))
    scores = [sum(sides[s][i] @ v for s, v in vector.directions.items()) for i in (0, 1)]
    labels = np.repeat([True, False], len(pairs))
    assert found["detected_by"] == "projection"
    assert found["auroc"] == pytest.approx(auroc(torch.cat(scores).double().numpy(), labels))
    assert found["auroc_ci"][0] <= found["auroc"] <= found["auroc_ci"][1]
    opposite = _Detector(model, pairs).of_vector(-vector, 1.0)["auroc"]
    assert opposite == pytest.approx(1 - found["auroc"])


def test_a_change_of_weights_detects_by_what_it_makes_likelier(model, pairs):
    vector = steering.fit(model, pairs[:24], method="weight_arithmetic", epochs=1)
    held_out = pairs[24:]
    found = _Detector(model, held_out).of_vector(vector, 2.0)
    scores = []
    for side in sides_of(encode_pairs(model, held_out)):
        with torch.no_grad():
            before = log_probs(model, [side])
            with model.steer(vector, strength=2.0, prompt_lengths=[side.start]):
                scores.append(float(log_probs(model, [side]) - before))
    labels = np.repeat([True, False], len(held_out))
    assert found["detected_by"] == "likelihood"
    assert found["auroc"] == pytest.approx(auroc(np.array(scores), labels), abs=0.01)
    assert found["auroc"] > 0.8


def test_an_instruction_detects_and_what_does_not_fit_says_so(model, pairs):
    detector = _Detector(model, pairs)
    assert detector.of_prefix("Write a happy story.")["auroc"] > 0.8
    assert detector.of_prefix("Write a sad story.")["auroc"] < 0.5
    long = detector.of_prefix("Anna is happy. " * 60)
    assert long["auroc"] is None
    assert "exceeds the context" in long["undetected"]
    one = Pairs([Pair("Anna", "Anna is")], "beginnings")
    assert "beginning of the other" in _Detector(model, one).of_prefix("Write a happy story.")["undetected"]


def test_parameters_are_what_the_pairs_decide(model, pairs):
    few = pairs[:8]
    width = model.d_model
    assert n_parameters(steering.fit(model, few, method="mean_diff", site=SITE)) == width
    reft = steering.fit(model, few, method="reft", site=SITE, rank=3, epochs=1)
    assert n_parameters(reft) == 3 * (2 * width + 1)
    turned = steering.fit(model, few, method="antipasto", site=SITE, rank=4, epochs=1)
    assert n_parameters(turned) == len(turned.edits) * (4 * 4 + 4)


def test_side_effects_are_of_attributes_that_enough_texts_tell():
    record = dict.fromkeys(
        ("strength", "effect", "effect_base", "effect_ci", "kl", "kl_ci", "perplexity_ratio"), 1.0
    ) | {"grammaticality": 0.9, "grammaticality_base": 1.0}
    record["side_effects"] = {
        "tense": {"tv": 0.3, "tv_ci": [0.1, 0.5], "null": 0.1},
        "place": {"tv": 0.1, "tv_ci": [0.0, 0.2], "null": 0.2},
        "number": {"tv": 1.0, "tv_ci": [None, None], "null": None},
        "object": {"tv": None, "tv_ci": [None, None], "null": None},
    }
    found = _figures(record)
    assert found["side_effects"] == pytest.approx({"tense": 0.2, "place": 0.0})
    assert found["side_effect"] == pytest.approx(0.1)
    assert found["fluency"] == 0.9
    assert _figures({**record, "grammaticality_base": None})["fluency"] == 1.0


# divergence


def test_at_a_divergence_methods_and_their_nulls_are_told_there(model, pairs, tmp_path):
    task = make_task(model, pairs, n_prompts=40)
    config = SweepConfig(
        methods=("mean_diff", "random"),
        sites=(SITE,),
        kl_targets=(1.0, 4.0),
        at=1.0,
        kl_budget=0.01,  # `at` asks for no budget
        few_shot=0,
        study=None,
        samples=1,
        max_new_tokens=12,
    )
    result = sweep(model, task.pairs, task.effect, task.validation, task.test, tmp_path / "r", config)
    assert set(result.best) == {"mean_diff", "mean_diff" + SHUFFLED, "random"}
    for name, record in result.best.items():
        (own,) = (r for r in result.validation if r["method"] == name and r["strength"] == record["strength"])
        assert abs(math.log(own["kl"])) < 0.4
    with pytest.raises(InputError, match="one of kl_targets"):
        SweepConfig(at=2.0)
    with pytest.raises(InputError, match="without strengths"):
        SweepConfig(at=1.0, strengths=(1.0,))


def test_settings_are_checked(model):
    for settings, message in (
        ({"at": 2.0}, "kl_targets"),
        ({"seeds": 0}, "seeds is 0"),
        ({"methods": ("mean",)}, "mean_diff"),
        ({"methods": ()}, "at least one"),
        ({"n_held_out": 0}, "n_held_out"),
    ):
        with pytest.raises(InputError, match=message):
            ConceptConfig(**settings)
    quick = ConceptConfig(**ConceptConfig.quick(model))
    assert set(quick.shuffled) == {"mean_diff", "linear_probe", "sae_latent"}
