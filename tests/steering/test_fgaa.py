"""Feature-guided activation addition: what is kept of the latents, and what the approximator measures."""

import pytest
import torch

import sae
from steerkit import HookedModel, steering
from steerkit.errors import InputError
from steerkit.steering.methods.fgaa import Effects
from steerkit.steering.vector import SteeringVector

SITE = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def pairs():
    return steering.load_pairs("storyworld:tense=past", n=24)


@pytest.fixture(scope="module")
def trained(model):
    """An SAE whose first latents read the axes of the stream about its mean."""
    acts = model.activations(["Anna is happy. Tom was in the garden.", "The fox slept."], [SITE])[
        SITE
    ].float()
    made = sae.L1(2 * model.d_model).build(model.d_model)
    with torch.no_grad():
        eye = torch.eye(model.d_model)
        made.W_enc.copy_(torch.cat([eye, -eye], 1))
        made.W_dec.copy_(torch.cat([eye, -eye]))
        made.b_dec.copy_(acts.mean(0))
    made.metadata["site"] = SITE
    return made.eval().requires_grad_(False)


def test_with_a_dictionary_of_axes_and_no_filter_it_is_the_mean_difference(model, pairs, trained):
    n = trained.d_sae
    vector = steering.fit(
        model, pairs, method="fgaa", sae=trained, n=n, n_negative=n, densest=0.0, first_tokens=0
    )
    plain = steering.fit(model, pairs, method="mean_diff", site=SITE)
    assert vector.cosine(plain) > 0.999
    assert vector.norm == pytest.approx(plain.norm, rel=1e-3)


def test_filters_leave_the_strongest_that_are_not_too_dense(model, pairs, trained, tmp_path):
    vector = steering.fit(model, pairs, method="fgaa", sae=trained, n=3)
    latents = vector.provenance["latents"]
    assert len(latents) == 3
    assert sum(abs(value) for value in latents.values()) == pytest.approx(1.0, abs=1e-3)
    assert all(value > 0 for value in latents.values())
    rows = sum(value * trained.W_dec[latent] for latent, value in latents.items())
    assert torch.cosine_similarity(vector.directions[SITE], rows, dim=0) > 0.999
    loaded = SteeringVector.load(vector.save(tmp_path / "v.safetensors"))
    assert loaded.cosine(vector) == pytest.approx(1.0)
    with pytest.raises(InputError, match="after the filters"):
        steering.fit(model, pairs, method="fgaa", sae=trained, densest=1.0)
    with pytest.raises(InputError, match="needs the latents"):
        steering.fit(model, pairs, method="fgaa")
    other = sae.L1(8, target_l0=2.0).build(4)
    other.metadata["site"] = SITE
    with pytest.raises(InputError, match="wide"):
        steering.fit(model, pairs, method="fgaa", sae=other)


def test_the_vector_of_an_approximator_is_its_equation(model, pairs, trained):
    generator = torch.Generator().manual_seed(0)
    effects = Effects(
        torch.randn(model.d_model, trained.d_sae, generator=generator),
        torch.randn(trained.d_sae, generator=generator),
        0.5,
    )
    plain = steering.fit(model, pairs, method="fgaa", sae=trained, n=4)
    target = torch.zeros(trained.d_sae)
    for latent, value in plain.provenance["latents"].items():
        target[latent] = value
    toward, always = effects.M @ target, effects.M @ effects.b
    wanted = toward / toward.norm() - always / always.norm()
    vector = steering.fit(model, pairs, method="fgaa", sae=trained, n=4, effects=effects)
    assert torch.cosine_similarity(vector.directions[SITE], wanted, dim=0) > 0.9999


def test_measured_effects_are_of_the_vectors_that_were_added(model, trained):
    prompts = ["Anna is", "Tom was in", "The fox"]
    effects = steering.fit_effects(
        model, trained, prompts, n_vectors=160, max_new_tokens=6, strength=40.0, ridge=1e-3
    )
    assert effects.M.shape == (model.d_model, trained.d_sae)
    again = steering.fit_effects(
        model, trained, prompts, n_vectors=160, max_new_tokens=6, strength=40.0, ridge=1e-3
    )
    torch.testing.assert_close(effects.M, again.M)
    assert effects.b.isfinite().all()
    assert effects.r2 < 1.0
    with pytest.raises(InputError, match="prompts"):
        steering.fit_effects(model, trained, [])
