"""A merged checkpoint computes under plain Hugging Face what the steered model computes; what weights cannot do is refused."""

import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerkit import HookedModel
from steerkit.errors import InputError, SiteError, SteerkitError
from steerkit.sites import weight_of
from steerkit.steering import (
    Add,
    Clamp,
    Condition,
    Decay,
    LowRank,
    Project,
    SingularRotate,
    SteeringVector,
    WeightDelta,
    Where,
    export,
    load_any,
    merge,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from core.families import FAMILIES, build

EVERY_TOKEN = Where(bos=True)
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [3, 14, 15, 92, 65, 35, 8]])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooked(family):
    return HookedModel.from_pretrained(build(family))


def adding(model, *sites, where=EVERY_TOKEN):
    edits = tuple(
        Add(site, normal(model.site(site).width, seed=i), scale=0.5) for i, site in enumerate(sites)
    )
    return SteeringVector(edits, where=where)


def same(model, vector, strength, out, ids=IDS):
    """Logits and greedy texts of the checkpoint are those of the steered model, and nothing like the unsteered ones."""
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    before = model.logits(ids)
    with model.steer(vector, strength=strength, where=EVERY_TOKEN), torch.no_grad():
        wanted = model.logits(ids)
        told = model.model.generate(input_ids=ids, attention_mask=mask, **options)
    plain = AutoModelForCausalLM.from_pretrained(out).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=ids).logits, wanted, rtol=1e-5, atol=2e-5)
    assert torch.equal(plain.generate(input_ids=ids, attention_mask=mask, **options), told)
    assert not torch.allclose(wanted, before, atol=0.1)


ANY = [
    "hook_resid_post",
    "hook_mlp_out",
    "hook_attn_out",
    "hook_resid_mid",
    "hook_resid_pre",
    "mlp.hook_post",
    "attn.hook_z",
]
SITES = {
    "gpt2": ANY,
    "llama": ANY,
    "opt": ANY,
    "neox": ["hook_resid_post", "hook_attn_out", "hook_resid_pre", "attn.hook_z"],
    "qwen3": ["hook_attn_out", "hook_resid_mid", "attn.hook_z"],
}


@pytest.mark.parametrize("family", SITES)
def test_additions_become_biases(tmp_path, family):
    model = hooked(family)
    state = {name: value.clone() for name, value in model.model.state_dict().items()}
    config = model.model.config.to_dict()
    for i, kind in enumerate(SITES[family]):
        vector = adding(model, f"blocks.1.{kind}")
        merged = merge(model, vector, 2.0, tmp_path / str(i))
        same(model, vector, 2.0, merged.path)
        assert merged.difference < 2e-5
        assert merged.notes == ()
        assert all(name.endswith(".bias") for name in merged.changed)
    every = adding(
        model, *(f"blocks.{i}.{kind}" for kind in SITES[family] for i in range(3) if i or "pre" not in kind)
    )
    merge(model, every, -1.0, tmp_path / "all")
    same(model, every, -1.0, tmp_path / "all")
    assert model.model.config.to_dict() == config
    assert all(torch.equal(value, state[name]) for name, value in model.model.state_dict().items())


def test_the_configuration_gets_the_flag_that_makes_room(tmp_path):
    model = hooked("llama")
    merged = merge(model, adding(model, "blocks.1.hook_resid_post"), 1.0, tmp_path / "a")
    assert merged.config == {"mlp_bias": True}
    assert json.loads((merged.path / "config.json").read_text())["mlp_bias"] is True
    state = AutoModelForCausalLM.from_pretrained(merged.path).state_dict()
    biases = {name: value for name, value in state.items() if name.endswith(".bias")}
    nonzero = [name for name, value in biases.items() if value.any()]
    assert nonzero == ["model.layers.1.mlp.down_proj.bias"]
    torch.testing.assert_close(biases[nonzero[0]], 0.5 * normal(32))
    both = merge(
        model, adding(model, "blocks.0.hook_attn_out", "blocks.1.hook_resid_post"), 1.0, tmp_path / "b"
    )
    assert both.config == {"mlp_bias": True, "attention_bias": True}
    gpt2 = hooked("gpt2")
    assert merge(gpt2, adding(gpt2, "blocks.1.hook_resid_post"), 1.0, tmp_path / "c").config == {}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_enters_the_first_block_goes_into_the_embedding(tmp_path, family):
    model = hooked(family)
    vector = adding(model, "blocks.0.hook_resid_pre")
    merged = merge(model, vector, 2.0, tmp_path / "m")
    same(model, vector, 2.0, merged.path)
    tied = family == "gpt2"
    assert merged.config == ({"tie_word_embeddings": False} if tied else {})
    assert len(merged.notes) == tied


REFUSED = {
    "gemma2": {"hook_resid_post": "norm", "hook_attn_out": "norm", "hook_resid_mid": "norm"},
    "gemma3": {"hook_resid_post": "norm", "hook_mlp_out": "norm"},
    "bert": {"hook_resid_post": "norm", "hook_resid_mid": "norm"},
    "opt-post-norm": {"hook_resid_post": "norm"},
    "qwen3": {"hook_resid_post": "no flag|not and its configuration", "mlp.hook_post": "bias of"},
    "qwen2": {"hook_resid_post": "bias of", "hook_attn_out": "bias of"},
    "mistral": {"hook_resid_post": "bias of", "attn.hook_z": "bias of"},
}


@pytest.mark.parametrize("family", REFUSED)
def test_additions_that_no_bias_can_make_are_refused(tmp_path, family):
    model = hooked(family)
    for kind, why in REFUSED[family].items():
        with pytest.raises(SiteError, match=why):
            merge(model, adding(model, f"blocks.1.{kind}"), 1.0, tmp_path / "m")
    if family.startswith("gemma"):
        with pytest.raises(SiteError, match="scales its embeddings"):
            merge(model, adding(model, "blocks.0.hook_resid_pre"), 1.0, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_every_family_is_merged_exactly_or_refused(tmp_path):
    """The check of what was written is independent of how it was made: no family slips through."""
    for family in FAMILIES:
        model, out = hooked(family), tmp_path / family
        try:
            merged = merge(model, adding(model, "blocks.1.hook_resid_post"), 1.0, out)
        except SteerkitError:
            assert not out.exists()
        else:
            assert merged.difference < 1e-4


def ablating(model, directions, scale=1.0, leave_out=()):
    kinds = ("hook_resid_mid", "hook_resid_post")
    sites = ["blocks.0.hook_resid_pre", *(f"blocks.{i}.{k}" for i in range(model.n_layers) for k in kinds)]
    sites = [site for site in sites if model.sites[site].verified and site not in leave_out]
    return SteeringVector(tuple(Project(site, directions, scale=scale) for site in sites), where=EVERY_TOKEN)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3", "neox", "neox-sequential", "mistral"])
@pytest.mark.parametrize("k", [1, 2])
def test_directional_ablation_is_orthogonal_weights(tmp_path, family, k):
    model = hooked(family)
    vector = ablating(model, torch.linalg.qr(normal(model.d_model, k))[0].T.contiguous())
    merged = merge(model, vector, 1.0, tmp_path / "m")
    same(model, vector, 1.0, merged.path)
    found = HookedModel.from_pretrained(AutoModelForCausalLM.from_pretrained(merged.path).eval())
    directions = vector.edits[0].directions
    for site, act in found.run(IDS, sites=["blocks.2.hook_resid_post"]).items():
        assert (act @ directions.T).abs().max() < 1e-5, site


def test_a_projection_that_weights_cannot_make_is_refused(tmp_path):
    model, out = hooked("llama"), tmp_path / "m"
    q = torch.linalg.qr(normal(32, 2))[0].T.contiguous()
    with pytest.raises(InputError, match=r"none at blocks\.1\.hook_resid_mid"):
        merge(model, ablating(model, q, leave_out=["blocks.1.hook_resid_mid"]), 1.0, out)
    with pytest.raises(InputError, match="strength 1 only"):
        merge(model, ablating(model, q), 0.5, out)
    mixed = ablating(model, q[:1])
    mixed = replace(mixed, edits=(*mixed.edits[:-1], replace(mixed.edits[-1], directions=q[1:])))
    with pytest.raises(InputError, match="different directions"):
        merge(model, mixed, 1.0, out)
    with pytest.raises(InputError, match="order"):
        merge(model, ablating(model, q) + adding(model, "blocks.1.hook_resid_post"), 1.0, out)
    inner = Project("blocks.1.mlp.hook_post", torch.eye(48)[:1])
    vector = ablating(model, q)
    with pytest.raises(InputError, match="not one of the residual stream"):
        merge(model, replace(vector, edits=(*vector.edits, inner)), 1.0, out)
    gemma = hooked("gemma2")
    with pytest.raises(InputError, match="norms or scales"):
        merge(gemma, ablating(gemma, q), 1.0, out)
    assert not out.exists()


DELTAS = {
    "llama": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"],
    "gpt2": ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj", "lm_head"],
    "gemma2": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"],
    "opt": ["model.decoder.layers.0.self_attn.q_proj", "model.decoder.layers.1.fc1"],
}


@pytest.mark.parametrize("family", DELTAS)
def test_weight_deltas_go_into_weights(tmp_path, family):
    model = hooked(family)
    edits = []
    for i, path in enumerate(DELTAS[family]):
        shape = model.model.get_submodule(path).weight.shape
        out, inward = shape[::-1] if "c_" in path else shape
        edits.append(
            WeightDelta(path, normal(2, inward, seed=i) / 4, normal(out, 2, seed=i + 9) / 4, scale=0.5)
        )
    edits.append(edits[0].scaled(-0.3))
    vector = SteeringVector(tuple(edits), where=EVERY_TOKEN)
    merged = merge(model, vector, 2.0, tmp_path / "m")
    same(model, vector, 2.0, merged.path)
    assert set(merged.changed) == {f"{path}.weight" for path in DELTAS[family]}
    assert merged.config == ({"tie_word_embeddings": False} if family == "gpt2" else {})


def rotating(model, *paths, scale=1.0):
    """Singular dimensions of modules turned and stretched, as AntiPaSTO does."""
    edits = []
    for i, path in enumerate(paths):
        U, S, Vh = torch.linalg.svd(weight_of(model.model.get_submodule(path)).detach(), full_matrices=False)
        P, dS = normal(6, 6, seed=i), 0.3 * normal(6, seed=i + 9)
        edits.append(SingularRotate(path, Vh[:6].T, S[:6], U[:, :6], P, dS, scale=scale))
    return SteeringVector(tuple(edits), where=EVERY_TOKEN)


ROTATED = {
    "llama": ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"],
    "gpt2": ["transformer.h.0.attn.c_proj", "transformer.h.1.mlp.c_proj"],
    "opt": ["model.decoder.layers.0.self_attn.out_proj", "model.decoder.layers.1.fc2"],
}


@pytest.mark.parametrize("family", ROTATED)
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_rotations_at_a_strength_go_into_weights_and_adapters(tmp_path, family, strength):
    import peft

    model = hooked(family)
    vector = rotating(model, *ROTATED[family], scale=0.5)
    merged = merge(model, vector, strength, tmp_path / "m")
    same(model, vector, strength, merged.path)
    assert set(merged.changed) == {f"{path}.weight" for path in ROTATED[family]}
    path = export(vector, "lora", tmp_path / "lora", strength=strength)
    with model.steer(vector, strength=strength):
        wanted = model.logits(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(build(family), str(path)).eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)


def test_additions_through_a_changed_weight(tmp_path):
    model = hooked("llama")
    delta = WeightDelta("model.layers.1.mlp.down_proj", normal(2, 48) / 4, normal(32, 2) / 4)
    inside = adding(model, "blocks.1.mlp.hook_post", "blocks.1.hook_resid_post")
    vector = SteeringVector((delta, *inside.edits), where=EVERY_TOKEN)
    same(model, vector, 1.5, merge(model, vector, 1.5, tmp_path / "m").path)


def test_the_built_in_model_with_its_tokenizer_and_bos(tmp_path):
    model = HookedModel.from_pretrained("storyworld")
    vector = adding(model, "blocks.2.hook_resid_post", where=Where())
    with pytest.raises(InputError, match="leaves BOS alone"):
        merge(model, vector, 2.0, tmp_path / "m")
    merged = merge(model, vector, 2.0, tmp_path / "m", bos=True)
    assert merged.notes == ("BOS is steered too, which the vector leaves alone.",)
    tokenizer = AutoTokenizer.from_pretrained(merged.path)
    ids = tokenizer("The fox is happy. The red hat is", return_tensors="pt")["input_ids"]
    same(model, vector, 2.0, merged.path, ids)
    again = HookedModel.from_pretrained(str(merged.path))
    with model.steer(vector, strength=2.0, where=EVERY_TOKEN):
        told = model.generate("The fox", max_new_tokens=12, do_sample=False)
    assert again.generate("The fox", max_new_tokens=12, do_sample=False) == told
    record = json.loads((merged.path / "steering.json").read_text())
    assert (record["model"], record["strength"]) == ("storyworld", 2.0)
    assert record["edits"] == [{"kind": "add", "site": "blocks.2.hook_resid_post", "scale": 0.5}]
    modes = {file.stat().st_mode for file in merged.path.iterdir()}
    assert len(modes) == 1


def test_what_weights_cannot_do_is_refused(tmp_path):
    model, out = hooked("llama"), tmp_path / "m"
    plain = adding(model, "blocks.1.hook_resid_post")
    for where in (Where.prompt_only(), Where.positions(3), replace(EVERY_TOKEN, schedule=Decay(2.0))):
        with pytest.raises(InputError, match="some tokens or steps"):
            merge(model, replace(plain, where=where), 1.0, out, bos=True)
    with pytest.raises(InputError, match="condition"):
        merge(
            model, replace(plain, condition=Condition("blocks.0.hook_resid_post", normal(32), 0.1)), 1.0, out
        )
    for edit in (
        Clamp("blocks.1.hook_resid_post", normal(32)),
        LowRank("blocks.1.hook_resid_post", normal(2, 32), normal(2, 32), normal(2)),
    ):
        with pytest.raises(InputError, match=f"The {edit.name} edit"):
            merge(model, SteeringVector((edit,), where=EVERY_TOKEN), 1.0, out)
    with pytest.raises(InputError, match="16 wide"):
        merge(
            model, SteeringVector((Add("blocks.1.hook_resid_post", normal(16)),), where=EVERY_TOKEN), 1.0, out
        )
    with pytest.raises(InputError, match="finite"):
        merge(model, plain, float("nan"), out)
    with pytest.raises(SiteError, match="No weight alone"):
        merge(model, adding(model, "ln_final"), 1.0, out)
    wrong = WeightDelta("model.layers.1.mlp.down_proj", normal(2, 9), normal(32, 2))
    with pytest.raises(InputError, match="the delta"):
        merge(model, SteeringVector((wrong,), where=EVERY_TOKEN), 1.0, out)
    assert not out.exists()


def test_a_model_with_an_adapter_or_of_another_kind_is_refused(tmp_path):
    import peft

    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    model = HookedModel.from_pretrained(adapted)
    with pytest.raises(InputError, match="adapter"):
        merge(model, adding(model, "blocks.1.hook_resid_post"), 1.0, tmp_path / "m")


def test_nothing_is_overwritten_but_a_model_when_forced(tmp_path):
    model = hooked("gpt2")
    vector = adding(model, "blocks.1.hook_resid_post")
    out = tmp_path / "m"
    out.mkdir()
    merge(model, vector, 1.0, out)
    with pytest.raises(InputError, match="not empty"):
        merge(model, vector, 2.0, out)
    same(model, vector, 1.0, out)
    merge(model, vector, 2.0, out, force=True)
    same(model, vector, 2.0, out)
    other = tmp_path / "mine"
    other.mkdir()
    (other / "thesis.txt").write_text("…")
    for place in (other, other / "thesis.txt"):
        with pytest.raises(InputError, match="something else"):
            merge(model, vector, 1.0, place, force=True)
    assert [file.name for file in other.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_computes_something_else_does_not_appear(tmp_path, monkeypatch):
    from steerkit.steering import merging

    model = hooked("gpt2")
    monkeypatch.setattr(merging, "_bias", lambda plan, path, site: "transformer.h.2.mlp.c_proj.bias")
    with pytest.raises(SteerkitError, match="does not compute"):
        merge(model, adding(model, "blocks.1.hook_resid_post"), 1.0, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_control_vector_of_llama_cpp_can_be_merged(tmp_path):
    model = hooked("gpt2")
    vector = adding(model, "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
    read = load_any(export(vector, "gguf", tmp_path / "v.gguf"))
    same(model, vector, 2.0, merge(model, read, 2.0, tmp_path / "m").path)


def test_half_precision_is_merged_to_its_rounding(tmp_path):
    model = HookedModel.from_pretrained(build("llama"), dtype="bfloat16")
    merged = merge(model, adding(model, "blocks.1.hook_resid_post"), 1.0, tmp_path / "m")
    stored = AutoModelForCausalLM.from_pretrained(merged.path)
    assert stored.dtype == torch.bfloat16
    assert isinstance(stored.model.layers[1].mlp.down_proj.bias, nn.Parameter)
    assert 0 < merged.difference < 0.25
