"""Dashboards of directions: what they encode, and that the pages show what was planted."""

from __future__ import annotations

import json

import pytest
import torch

from probes.data import load_labelled, read_rows
from probes.linear import LinearProbe, fit_linear, save_probes
from sae.dashboard import build_directions
from sae.dashboard.directions import as_latents, fitted_latents
from sae.dashboard.pieces import readable_tokens
from steerkit import adapters
from steerkit.cli.directions import holds_directions, model_of, open_directions, read_directions
from steerkit.data import load_documents
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.steering import SteeringVector

SITE = "blocks.1.hook_resid_post"
WIDTH = 128


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def documents():
    stories = load_documents("storyworld")
    return load_documents([stories[i] for i in range(100)])


def shards(page):
    """The data that a dashboard's page loads, by name."""
    found = {}
    for file in [page, *(page.parent / "data").glob("*.js")]:
        text = file.read_text()
        for part in text.split("window.__shard(")[1:]:
            decoder = json.JSONDecoder()
            name, end = decoder.raw_decode(part)
            found[name] = decoder.raw_decode(part[end + 1 :])[0]
    return found


def tokens_of(found, latent: int) -> list[str]:
    """The tokens at the strongest contexts of a latent's page."""
    text = dict(zip(found["tokens"]["ids"], found["tokens"]["text"]))
    rows = [row for name in sorted(found) if name.startswith("rows-") for row in found[name]]
    place = found["head"]["table"]["id"].index(latent)
    examples = found["latents-0"][place]["examples"]
    return [text[rows[row][position]] for interval, row, position, *_ in examples if interval == 0]


def test_the_ends_are_the_signed_distance_from_the_threshold():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 16, generator=generator), torch.randn(50, 16, generator=generator)
    mean, thresholds = torch.randn(16, generator=generator), torch.tensor([0.5, float("nan"), -2.0])
    latents = as_latents(w, mean, thresholds).encode(x)
    unit = w / w.norm(dim=1, keepdim=True)
    expected = x @ unit.T - torch.tensor([0.5, float(unit[1] @ mean), -2.0])
    torch.testing.assert_close(latents[:, 0::2] - latents[:, 1::2], expected)
    assert bool((latents[:, 0::2] * latents[:, 1::2] == 0).all())
    torch.testing.assert_close(as_latents(w, mean).W_dec[0::2], w)


@pytest.mark.parametrize(
    ("w", "error"),
    [
        (torch.zeros(1, 4), InputError),
        (torch.ones(4), InputError),
        (torch.ones(1, 5), InputError),
        (torch.full((1, 4), float("nan")), NumericsError),
    ],
)
def test_what_is_no_direction_is_refused(w, error):
    with pytest.raises(error):
        as_latents(w, torch.zeros(4))


def test_a_planted_directions_page_shows_the_planted_tokens(documents, tmp_path):
    model = HookedModel.from_pretrained("storyworld")
    red, fox = (model.tokenizer(word, add_special_tokens=False)["input_ids"][-1] for word in (" red", " fox"))
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = model.model.get_input_embeddings().weight
        embedding[red] += direction
        embedding[fox] -= direction
    page = build_directions(
        model, direction[None], ["planted"], documents, "hook_embed", tmp_path / "d", tokens=8_000, quiet=True
    )
    found = shards(page)
    assert found["head"]["directions"] is True
    assert found["head"]["table"]["name"] == ["+ planted", "− planted"]
    assert [record["near"][0] for record in found["latents-0"]] == [[1, -1.0], [0, -1.0]]
    assert found["head"]["summary"] == {}
    assert tokens_of(found, 0)[:5] == [" red"] * 5
    assert tokens_of(found, 1)[:5] == [" fox"] * 5


def test_a_probe_of_tense_shows_words_of_each_tense(model, documents, tmp_path):
    rows = read_rows(model, load_labelled("storyworld:tense", n_texts=200), ["hook_embed"])
    file = save_probes(
        fit_linear(rows.acts, rows.labels, groups=rows.groups), tmp_path / "probes.safetensors"
    )
    read = read_directions(file, model)
    assert read.names == [("present", "past")]
    page = build_directions(
        model,
        read.vectors,
        read.names,
        documents,
        read.site,
        tmp_path / "dash",
        thresholds=read.thresholds,
        tokens=8_000,
        quiet=True,
    )
    found = shards(page)
    assert set(tokens_of(found, 0)) <= {" is", " says", " are"}
    assert set(tokens_of(found, 1)) <= {" was", " said", " were"}
    words = found["latents-0"][1]["tokens"]
    assert {" was", " said"} <= set(readable_tokens(model.tokenizer, [token for token, *_ in words]))


def test_a_probe_of_several_methods_is_found_by_its_site(model, tmp_path):
    sites = ["hook_embed", "blocks.0.hook_resid_post"]
    rows = read_rows(model, load_labelled("storyworld:tense", n_texts=20), sites)
    fitted = fit_linear(rows.acts, rows.labels, groups=rows.groups)
    named = {f"{method}:{site}": fitted[site] for method in ("logistic", "lda") for site in sites}
    read = read_directions(save_probes(named, tmp_path / "probes.safetensors"), model, site=sites[1])
    assert read.site == sites[1]
    assert torch.equal(read.vectors[0], fitted[sites[1]].direction())


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c")])
def test_a_probes_boundary_is_where_its_page_changes_sides(model, tmp_path, classes):
    generator = torch.Generator().manual_seed(1)
    k = 1 if len(classes) == 2 else len(classes)
    weight, bias, center = (
        torch.randn(*shape, generator=generator) for shape in ((k, WIDTH), (k,), (WIDTH,))
    )
    probe = LinearProbe(weight, bias, center, classes, "logistic", SITE)
    read = read_directions(probe.save(tmp_path / "p.safetensors"), model)
    x = torch.randn(40, WIDTH, generator=generator)
    latents = as_latents(read.vectors, torch.zeros(WIDTH), read.thresholds).encode(x)
    logits = probe.logits(x)
    others = (logits.sum(1, keepdim=True) - logits) / max(1, k - 1)
    expected = logits - (others if k > 1 else 0)
    assert bool(((latents[:, 0::2] > 0) == (expected > 0)).all())
    assert len(read.names) == k


def test_a_steering_vector_is_looked_at_from_the_datas_mean(model, documents, tmp_path):
    vector = SteeringVector.add({SITE: torch.arange(128.0)}, method="mean_diff", model="storyworld")
    file = vector.save(tmp_path / "v.safetensors")
    assert holds_directions(file)
    assert model_of(file) == "storyworld"
    read = read_directions(file, model)
    sae = fitted_latents(model, read.vectors, documents, read.site)
    acts = model.activations(documents, [SITE], max_tokens=8192)[SITE]
    latents = sae.encode(acts)
    assert float((latents[:, 0] - latents[:, 1]).mean()) == pytest.approx(0, abs=1e-4)
    both = SteeringVector.add({SITE: torch.ones(128), "hook_embed": torch.ones(128)}).save(
        tmp_path / "two.safetensors"
    )
    with pytest.raises(InputError, match="--site"):
        read_directions(both, model)
    assert read_directions(both, model, site="hook_embed").site == "hook_embed"


def test_an_adapters_directions_are_at_its_modules_ends(tmp_path):
    """A rank-1 change of a module is found again, at the sites that hold the module's input and output."""
    model = HookedModel.from_pretrained("storyworld")
    tuned = adapters.get(model, "lora", modules="down", layers=[1], rank=1)
    down = next(path for path in tuned.changes())
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    change = tuned.changes()[down].delta
    tuned.save(tmp_path / "run" / "adapter")
    assert tuned.remove() is model
    assert holds_directions(tmp_path / "run")
    reads = read_directions(tmp_path / "run", model)
    writes = read_directions(tmp_path / "run", model, module="down_proj", writes=True)
    assert (reads.site, writes.site) == ("blocks.1.mlp.hook_post", "blocks.1.hook_mlp_out")
    assert len(reads.vectors) == len(writes.vectors) == 1
    rebuilt = float(change.norm()) * torch.outer(writes.vectors[0], reads.vectors[0])
    torch.testing.assert_close(rebuilt, change, atol=1e-4, rtol=1e-3)
    attention = model.model.get_submodule("model.layers.1.self_attn.q_proj").weight
    assert attention.requires_grad  # the adapter is gone again
    with pytest.raises(InputError, match="--module"):
        read_directions(tmp_path / "run", model, module="q_proj")


def test_what_a_query_projection_reads_is_the_norm_before_it(model, tmp_path):
    tuned = adapters.get(HookedModel.from_pretrained("storyworld"), "lora", modules="q", layers=[0], rank=1)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.fill_(0.1)
    tuned.save(tmp_path / "adapter")
    found = read_directions(tmp_path, model)
    assert model.site(found.site).path == "model.layers.0.input_layernorm"


def test_missing_names_models_and_texts_are_asked_for(model, documents, tmp_path):
    with pytest.raises(InputError, match="names"):
        build_directions(model, torch.ones(2, 128), ["one"], documents, SITE, tmp_path / "d")
    bare = SteeringVector.add({SITE: torch.ones(128)}).save(tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="--model"):
        open_directions(bare)
    with pytest.raises(InputError, match="adapter"):
        read_directions(bare, model, writes=True)
