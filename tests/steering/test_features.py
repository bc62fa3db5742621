"""Steering by latents: what the SAE encodes afterwards is what was asked for."""

import pytest
import torch

import sae
from steerkit import HookedModel, steering
from steerkit.errors import InputError
from steerkit.steering import SteeringVector

SITE = "blocks.2.hook_resid_post"
KINDS = [sae.L1(256), sae.Gated(256), sae.JumpReLU(256), sae.BatchTopK(256, k=8)]


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def acts(model):
    texts = [
        "Anna is an angry bear. Every word that she says is true.",
        "It is a sunny Friday in the market.",
    ]
    return model.activations(texts, sites=[SITE])[SITE]


def made(config, acts):
    """An SAE with orthogonal decoder rows in part, started on activations, and the latents that are active on them."""
    found = config.build(acts.shape[1])
    found.initialise(acts, acts.mean(0), torch.Generator().manual_seed(0))
    with torch.no_grad():
        found.W_dec[:128] = torch.linalg.qr(
            torch.randn(128, 128, generator=torch.Generator().manual_seed(1))
        )[0]
        found.W_enc[:, :128] = found.W_dec[:128].T
    if config.name == "batch_topk":
        found.threshold = torch.full((256,), 0.5)
    found.metadata = {"site": SITE, "model": "storyworld"}
    return found.eval().requires_grad_(False)


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.name)
def test_clamping_sets_the_latents_and_leaves_the_rest_of_h(config, model, acts):
    made_sae = made(config, acts)
    latents = made_sae.encode(acts)
    ids = latents[:, :128].sum(0).topk(3).indices.tolist()
    ids_text = model.tokenizer("Anna is an angry bear. Every word that she says is true.")["input_ids"]
    inputs = torch.tensor([ids_text])
    before = model.run(inputs, sites=[SITE])[SITE][0, 1:].detach()
    for vector, value in (
        (steering.clamp_latents(made_sae, ids, 5.0), 5.0),
        (steering.ablate_latents(made_sae, ids), 0.0),
    ):
        with model.steer(vector):
            after = model.run(inputs, sites=[SITE])[SITE][0, 1:].detach()
        wanted = (value - made_sae.encode(before)[:, ids]) @ made_sae.W_dec[ids]
        torch.testing.assert_close(after - before, wanted, rtol=1e-4, atol=1e-4)


def test_adding_latents_adds_their_decoder_rows(model, acts, tmp_path):
    made_sae = made(KINDS[0], acts)
    vector = steering.add_latents(made_sae, {3: 2.0, 200: -1.0})
    expected = 2 * made_sae.W_dec[3] - made_sae.W_dec[200]
    torch.testing.assert_close(vector.directions[SITE], expected)
    assert vector.provenance["method"] == "sae_latents"
    clamp = steering.clamp_latents(made_sae, [3, 200], 1.5)
    loaded = SteeringVector.load(clamp.save(tmp_path / "clamp.safetensors"))
    ids = torch.tensor([model.tokenizer("It is a sunny Friday.")["input_ids"]])
    with model.steer(clamp, strength=0.7):
        steered = model.logits(ids)
    with model.steer(loaded, strength=0.7):
        assert torch.equal(model.logits(ids), steered)
    assert not torch.equal(model.logits(ids), steered)


def test_what_cannot_be_is_refused(acts):
    made_sae = made(KINDS[0], acts)
    for make, message in [
        (lambda: steering.add_latents(made_sae, {256: 1.0}), "There is no latent 256"),
        (lambda: steering.add_latents(made_sae, {}), "at least one latent"),
        (
            lambda: steering.clamp_latents(made(sae.TopK(256, k=8), acts), [3], 1.0),
            "thresholds of its own first",
        ),
        (
            lambda: steering.add_latents(
                sae.Transcoder(64, k=4, d_out=128, target_site=SITE).build(128), {1: 1.0}
            ),
            "other sites",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            make()
    made_sae.metadata = {}
    with pytest.raises(InputError, match="does not say which site"):
        steering.add_latents(made_sae, {1: 1.0})
