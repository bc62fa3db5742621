"""Sites hold what a block computed by hand holds there, and what is written at them is what the model computes on with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steerkit.errors import SiteError
from steerkit.models import HookedModel
from steerkit.sites import BLOCK_SITES, CROSS_SITES

from .families import FAMILIES, build
from .reference import LAYOUTS, substituted

IDS = torch.tensor([[5, 17, 42, 8, 61, 90], [33, 2, 71, 19, 6, 54]])
PARALLEL = ("neox", "phi")
NO_FINAL_NORM = ("bert", "roberta", "distilbert", "opt-post-norm")
STACKS = [
    (family, stack) for family in FAMILIES for stack in (("encoder", "decoder") if "t5" in family else ("",))
]


@pytest.fixture(scope="module", params=STACKS, ids=lambda p: "-".join(filter(None, p)))
def case(request: pytest.FixtureRequest) -> tuple[str, str, HookedModel]:
    family, stack = request.param
    return family, stack, HookedModel.from_pretrained(build(family))


def kinds(family: str, stack: str) -> list[str]:
    found = [k for k in BLOCK_SITES if not (k == "hook_resid_mid" and family in PARALLEL)]
    return found + (list(CROSS_SITES) if stack == "decoder" else [])


def outputs(model: HookedModel) -> Tensor:
    return model.logits(IDS)


@torch.no_grad()
def test_every_site_holds_what_the_block_computed_by_hand_has_there(
    case: tuple[str, str, HookedModel],
) -> None:
    family, stack, model = case
    prefix = f"{stack}.blocks.1." if stack else "blocks.1."
    by_hand: dict[str, Tensor] = {}

    def note(kind: str, value: Tensor) -> Tensor:
        by_hand[kind] = value.clone()
        return value

    with substituted(family, model.model, 1, note, stack):
        outputs(model)
    acts = model.run(IDS, sites=[prefix + kind for kind in kinds(family, stack)])
    assert set(by_hand) == set(kinds(family, stack))
    for kind, value in by_hand.items():
        assert acts[prefix + kind].shape == (*IDS.shape, model.sites[prefix + kind].width)
        torch.testing.assert_close(acts[prefix + kind], value, rtol=1e-5, atol=1e-5, msg=kind)


@torch.no_grad()
def test_writing_at_every_site_does_what_the_block_computed_by_hand_does(
    case: tuple[str, str, HookedModel],
) -> None:
    family, stack, model = case
    prefix = f"{stack}.blocks.1." if stack else "blocks.1."
    clean = outputs(model)
    for kind in kinds(family, stack):
        width = model.site(prefix + kind).width
        noise = torch.randn(*IDS.shape, width, generator=torch.Generator().manual_seed(1))
        writes = {
            "replace": lambda x, noise=noise: noise,
            "add": lambda x, noise=noise: x + noise,
            "ablate": lambda x: 0 * x,
        }
        for name, fn in writes.items():

            def edit(at: str, value: Tensor, kind: str = kind, fn=fn) -> Tensor:
                return fn(value) if at == kind else value

            with substituted(family, model.model, 1, edit, stack):
                expected = outputs(model)
            with model.hooks({prefix + kind: fn}):
                written = outputs(model)
            torch.testing.assert_close(written, expected, rtol=1e-3, atol=2e-4, msg=f"{name} at {kind}")
            assert (written - clean).abs().max() > 1e-3, f"{name} at {kind} does nothing"


@torch.no_grad()
def test_residual_sites_are_the_hidden_states(case: tuple[str, str, HookedModel]) -> None:
    family, stack, model = case
    inputs = {"input_ids": IDS}
    if stack:
        start = torch.zeros(len(IDS), 1, dtype=torch.long)
        inputs["decoder_input_ids"] = torch.cat(
            [start, IDS[:, :-1]], 1
        )  # the text, shifted behind the start token
    out = build(family)(**inputs, output_hidden_states=True)
    states = out[f"{stack}_hidden_states" if stack else "hidden_states"]
    prefix = f"{stack}.blocks." if stack else "blocks."
    n = len(states) - 1
    names = [f"{prefix}{i}.hook_resid_{side}" for i in range(n) for side in ("pre", "post")]
    acts = model.run(IDS, sites=names, stop=False)
    for i in range(n):
        assert torch.equal(acts[f"{prefix}{i}.hook_resid_pre"], states[i])
        if i < n - 1:
            assert torch.equal(acts[f"{prefix}{i}.hook_resid_post"], states[i + 1])
    ln_final = f"{stack}.ln_final" if stack else "ln_final"
    if family in NO_FINAL_NORM:
        with pytest.raises(SiteError, match="no norm after its last block"):
            model.site(ln_final)
        if family != "opt-post-norm":
            assert torch.equal(acts[f"{prefix}{n - 1}.hook_resid_post"], states[n])
    else:
        assert torch.equal(model.run(IDS, sites=[ln_final])[ln_final], states[n])


@torch.no_grad()
def test_projections_of_heads_and_neurons_give_what_attention_and_mlp_add(
    case: tuple[str, str, HookedModel],
) -> None:
    family, stack, model = case
    if stack:
        parts = (
            "layer.0.SelfAttention.o",
            "layer.2.DenseReluDense.wo" if stack == "decoder" else "layer.1.DenseReluDense.wo",
        )
        block, posts, prefix = f"{stack}.block.1.", ("", ""), f"{stack}.blocks.1."
    else:
        layout = LAYOUTS[family]
        parts, posts = (layout.o, layout.down), (layout.attn_post, layout.mlp_post)
        block, prefix = f"{layout.blocks}.1.", "blocks.1."
    pairs = (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out"))
    for (inner, added), part, post in zip(pairs, parts, posts):
        acts = model.run(IDS, sites=[prefix + inner, prefix + added])
        linear = model.model.get_submodule(block + part)
        weight = linear.weight if family == "gpt2" else linear.weight.T
        out = acts[prefix + inner] @ weight + (0 if linear.bias is None else linear.bias)
        if post:
            out = model.model.get_submodule(block + post)(out)
        torch.testing.assert_close(acts[prefix + added], out, rtol=1e-4, atol=1e-5)


def test_all_sites_of_all_families_are_verified_but_for_the_stated_ones(
    case: tuple[str, str, HookedModel],
) -> None:
    family, _, model = case
    refused = {name for name, site in model.sites.items() if not site.verified}
    expected = set()
    if family in PARALLEL:
        expected = {f"blocks.{i}.hook_resid_mid" for i in range(3)}
    if family in NO_FINAL_NORM:
        expected = {"ln_final"}
    if "t5" in family:
        expected = {"hook_embed"}
    assert refused == expected
    assert all(site.reason for site in model.sites.values() if not site.verified)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_sites_are_verified_in_bfloat16_too(family: str) -> None:
    single, half = (HookedModel.from_pretrained(build(family), dtype=d) for d in ("float32", "bf16"))
    assert half.dtype == torch.bfloat16
    assert {n: s.verified for n, s in half.sites.items()} == {n: s.verified for n, s in single.sites.items()}
    assert {n: s.path for n, s in half.sites.items()} == {n: s.path for n, s in single.sites.items()}


@torch.no_grad()
def test_embedding_site_is_the_rows_of_the_table_and_writing_there_changes_the_input() -> None:
    for family in ("gpt2", "llama", "gemma3", "bert"):
        model = HookedModel.from_pretrained(build(family))
        table = model.model.get_input_embeddings()
        scale = 32**0.5 if family == "gemma3" else 1.0
        torch.testing.assert_close(
            model.run(IDS, sites=["hook_embed"])["hook_embed"], table.weight[IDS] * scale
        )
        other = IDS.flip(0)
        with model.hooks({"hook_embed": lambda x: x.flip(0)}):
            written = model.final(IDS)
        torch.testing.assert_close(written, model.final(other))


@torch.no_grad()
def test_any_module_path_is_a_site_for_its_output() -> None:
    model = HookedModel.from_pretrained(build("llama"))
    modules = ["model.layers.1.mlp", "model.layers.1.self_attn"]
    acts = model.run(IDS, sites=[*modules, "blocks.1.hook_mlp_out", "blocks.1.hook_attn_out"])
    assert torch.equal(acts["model.layers.1.mlp"], acts["blocks.1.hook_mlp_out"])
    assert torch.equal(acts["model.layers.1.self_attn"], acts["blocks.1.hook_attn_out"])
    flat = HookedModel.from_pretrained(build("opt"))  # its fc1 sees (batch * pos, width)
    acts = flat.run(IDS, sites=["model.decoder.layers.1.fc1", "blocks.1.mlp.hook_post"])
    assert torch.equal(acts["model.decoder.layers.1.fc1"].relu(), acts["blocks.1.mlp.hook_post"])


def test_unknown_and_refused_sites_are_one_clear_line() -> None:
    model = HookedModel.from_pretrained(build("neox"))
    with pytest.raises(
        SiteError, match=r"'blocks\.9\.hook_resid_post' does not exist: .* has layers 0–2\. Did you mean"
    ):
        model.site("blocks.9.hook_resid_post")
    with pytest.raises(SiteError, match=r"refused: attention and MLP run in parallel"):
        model.run(IDS, sites=["blocks.0.hook_resid_mid"])
    with pytest.raises(SiteError, match="does not exist"):
        model.site("")
    with pytest.raises(SiteError, match="runs 2 times"):
        HookedModel.from_pretrained(build("phi")).site("model.layers.0.resid_dropout")


def test_aliases_name_the_same_place() -> None:
    model = HookedModel.from_pretrained(build("llama"))
    assert model.site("ln_final.hook_normalized") == model.site("ln_final")
    t5 = HookedModel.from_pretrained(build("t5"))
    assert t5.site("blocks.1.hook_resid_post") == t5.site("encoder.blocks.1.hook_resid_post")


def test_a_mixture_of_experts_has_no_neurons_site_but_all_others() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=40, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = HookedModel.from_pretrained(transformers.MixtralForCausalLM(config).eval())
    refused = {name: site.reason for name, site in model.sites.items() if not site.verified}
    assert set(refused) == {f"blocks.{i}.mlp.hook_post" for i in range(2)}
    assert "mixture of experts" in refused["blocks.0.mlp.hook_post"]


def test_a_tensor_that_the_model_overwrites_later_is_kept_as_it_was() -> None:
    import transformers

    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3
    )
    torch.manual_seed(0)
    model = HookedModel.from_pretrained(transformers.FalconForCausalLM(config).eval())
    assert model.site("blocks.0.hook_mlp_out").volatile  # `mlp_output += attention_output`
    names = [
        "blocks.0.hook_resid_pre",
        "blocks.0.hook_attn_out",
        "blocks.0.hook_mlp_out",
        "blocks.0.hook_resid_post",
    ]
    with torch.no_grad():
        pre, attn, mlp, post = model.run(IDS, sites=names, stop=False).values()
    torch.testing.assert_close(pre + attn + mlp, post)
    own = torch.ones(*IDS.shape, 32)
    with torch.no_grad(), model.hooks({"blocks.0.hook_mlp_out": lambda act: own}):
        model.final(IDS)
    assert torch.equal(own, torch.ones_like(own))
