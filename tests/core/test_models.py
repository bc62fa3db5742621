"""HookedModel: hooks compose and vanish, batches of any padding agree, and every kind of model gives the same numbers."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerkit.errors import InputError, SiteError
from steerkit.models import HookedModel

from .families import CAUSAL, FAMILIES, build
from .reference import substituted

IDS = torch.tensor([[5, 17, 42, 8, 61, 90], [33, 2, 71, 19, 6, 54]])
SITE = "blocks.1.hook_resid_mid"
DECODERS = ("llama", "gpt2", "opt", "neox-sequential")


def hooked(family: str = "llama", **options: Any) -> HookedModel:
    return HookedModel.from_pretrained(build(family), **options)


def n_hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()
    )


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    model.config.attention_dropout = 0.0
    return model


# nothing is left behind


@pytest.mark.parametrize("family", ["llama", "bert", "t5", "opt"])
def test_loading_reading_writing_and_failing_leave_the_model_as_it_was(family: str) -> None:
    model = build(family)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, nn.Linear))
    frozen.eval()
    state = copy.deepcopy(model.state_dict())
    config, flags, attributes = (
        model.config.to_dict(),
        [m.training for m in model.modules()],
        set(vars(model)),
    )
    rng = torch.get_rng_state()

    hooks = HookedModel.from_pretrained(model)
    with torch.no_grad():
        hooks.run(IDS, sites=["blocks.0.hook_resid_post"])
        with hooks.hooks({SITE: lambda x: x * 0, "blocks.0.attn.hook_z": lambda x: x + 1}):
            hooks.final(IDS)

        def fail(act: Tensor) -> Tensor:
            raise RuntimeError("from the hook")

        with pytest.raises(RuntimeError, match="from the hook"), hooks.hooks({SITE: fail}):
            hooks.final(IDS)
        with pytest.raises(InputError, match="gave"), hooks.hooks({SITE: lambda x: x[:, :1]}):
            hooks.final(IDS)
        with pytest.raises(SiteError), hooks.hooks({SITE: fail, "blocks.7.hook_resid_post": fail}):
            pass

    assert n_hooks(model) == 0
    assert model.config.to_dict() == config
    assert [m.training for m in model.modules()] == flags
    assert set(vars(model)) == attributes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    if family != "opt":  # OPT draws from the generator when it trains, hooked or not
        assert torch.equal(torch.get_rng_state(), rng) or model.training


def test_a_model_that_has_hooks_of_its_own_keeps_them() -> None:
    model = build("llama")
    seen: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    hooks = HookedModel.from_pretrained(model)
    seen.clear()
    with torch.no_grad():
        hooks.run(IDS, sites=["ln_final"])
    assert seen == [1]
    assert n_hooks(model) == 1


# reading and stopping


def test_a_forward_ends_after_the_last_site_that_is_needed() -> None:
    model = hooked()
    ran: list[str] = []
    for name, module in model.model.named_modules():
        module.register_forward_hook(lambda m, a, o, name=name: ran.append(name))
    with torch.no_grad():
        model.run(IDS, sites=["blocks.1.hook_attn_out", "blocks.0.hook_resid_post"])
    assert "model.layers.1.self_attn" in ran
    assert not any(name.startswith(("model.layers.1.mlp", "model.layers.2", "lm_head")) for name in ran)
    ran.clear()
    with torch.no_grad():
        model.run(IDS, sites=["blocks.1.hook_attn_out"], stop=False)
    assert "model.layers.2" in ran
    assert "lm_head" not in ran


def test_what_is_read_does_not_depend_on_stopping_or_on_what_else_is_read() -> None:
    model = hooked()
    names = [name for name, site in model.sites.items() if site.verified]
    with torch.no_grad():
        together = model.run(IDS, sites=names)
        for name in names:
            for stop in (True, False):
                assert torch.equal(model.run(IDS, sites=[name], stop=stop)[name], together[name]), name
    assert list(model.run(IDS, sites=[names[3], names[1]])) == [names[3], names[1]]


def test_an_interrupted_forward_inside_a_hook_of_another_model_stops_only_itself() -> None:
    inner, outer = hooked("gpt2"), hooked("llama")
    with torch.no_grad():
        plain = inner.run(IDS, sites=["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]

        def graft(act: Tensor) -> Tensor:
            return inner.run(IDS, sites=["blocks.0.hook_resid_post"])["blocks.0.hook_resid_post"]

        with outer.hooks({"blocks.1.hook_resid_pre": graft}):
            acts = outer.run(IDS, sites=["blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"])
    assert torch.equal(acts["blocks.1.hook_resid_pre"], plain)


# writing


@pytest.mark.parametrize(
    "site", [SITE, "blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"]
)
@torch.no_grad()
def test_contexts_nest_and_the_inner_one_acts_last(site: str) -> None:
    model = hooked()
    seen: list[Tensor] = []
    double, plus = (lambda x: 2 * x), (lambda x: x + 1)
    clean = model.run(IDS, sites=[site])[site]
    with model.hooks({site: double}), model.hooks({site: seen.append}), model.hooks({site: plus}):
        nested, inside = model.logits(IDS), model.run(IDS, sites=[site])[site]
    with model.hooks({site: lambda x: 2 * x + 1}):
        once = model.logits(IDS)
    torch.testing.assert_close(nested, once)
    torch.testing.assert_close(inside, 2 * clean + 1)
    torch.testing.assert_close(seen[0], 2 * clean)  # and the later write has not changed what was read


@torch.no_grad()
def test_several_sites_are_written_in_one_pass_and_a_write_upstream_shows_downstream() -> None:
    model = hooked()
    with model.hooks(
        {"blocks.0.hook_resid_post": lambda x: x * 0, "blocks.1.hook_attn_out": lambda x: x * 0 + 1}
    ):
        acts = model.run(IDS, sites=["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"])
    assert not acts["blocks.1.hook_resid_pre"].any()
    assert torch.equal(acts["blocks.1.hook_resid_mid"], torch.ones_like(acts["blocks.1.hook_resid_mid"]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "gemma2"])
@pytest.mark.parametrize(
    "kind", ["hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_resid_post"]
)
def test_gradients_flow_through_a_write_as_through_the_block_computed_by_hand(family: str, kind: str) -> None:
    model = hooked(family)
    width = model.site(f"blocks.1.{kind}").width
    gradients = []
    for by_hand in (True, False):
        vector = torch.linspace(-1, 1, width).requires_grad_()

        def fn(act: Tensor, vector: Tensor = vector) -> Tensor:
            return act * vector + vector

        def edit(at: str, value: Tensor, fn=fn) -> Tensor:
            return fn(value) if at == kind else value

        with substituted(family, model.model, 1, edit) if by_hand else model.hooks({f"blocks.1.{kind}": fn}):
            loss = model.logits(IDS).log_softmax(-1)[..., 3].mean()
        embedding = model.model.get_input_embeddings().weight
        gradients.append(torch.autograd.grad(loss, [vector, embedding]))
    for hand, hook in zip(*gradients):
        torch.testing.assert_close(hook, hand, rtol=1e-3, atol=1e-6)
        assert hook.abs().max() > 0


def test_gradients_flow_from_what_is_read() -> None:
    model = hooked()
    act = model.run(IDS, sites=["blocks.1.hook_resid_mid"])["blocks.1.hook_resid_mid"]
    act.sum().backward()
    assert model.model.model.layers[1].self_attn.o_proj.weight.grad.abs().max() > 0
    assert model.model.model.layers[1].mlp.down_proj.weight.grad is None
    with torch.inference_mode():
        assert not model.run(IDS, sites=[SITE])[SITE].requires_grad


def test_hooks_act_only_in_the_thread_that_opened_them() -> None:
    model = hooked()
    results: dict[str, Tensor] = {}

    def elsewhere() -> None:
        with torch.no_grad():
            results["other"] = model.run(IDS, sites=["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]

    with torch.no_grad():
        clean = model.run(IDS, sites=["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
        with model.hooks({"blocks.1.hook_resid_post": lambda x: x * 0}):
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            here = model.run(IDS, sites=["blocks.2.hook_resid_post"])["blocks.2.hook_resid_post"]
    assert torch.equal(results["other"], clean)
    assert not torch.equal(here, clean)


# padding, dtype, generation


@pytest.mark.parametrize("family", [*CAUSAL, "bert", "roberta", "distilbert", "t5"])
@torch.no_grad()
def test_a_padded_row_equals_the_unpadded_one(family: str) -> None:
    model = hooked(family)
    pad = torch.full((2, 3), model.pad_id)
    ones, zeros = torch.ones_like(IDS), torch.zeros_like(pad)
    site = "blocks.2.hook_resid_post"
    alone, alone_final = model.run(IDS, sites=[site])[site], model.final(IDS)
    for side in ("left", "right"):
        ids = torch.cat([pad, IDS] if side == "left" else [IDS, pad], 1)
        mask = torch.cat([zeros, ones] if side == "left" else [ones, zeros], 1)
        rows = slice(3, None) if side == "left" else slice(None, -3)
        torch.testing.assert_close(
            model.run(ids, mask, sites=[site])[site][:, rows], alone, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(model.final(ids, mask)[:, rows], alone_final, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_mask_of_ones_changes_nothing() -> None:
    model = hooked("gpt2")
    assert torch.equal(model.logits(IDS, torch.ones_like(IDS)), model.logits(IDS))


@torch.no_grad()
def test_a_float32_write_into_a_bfloat16_model_is_cast() -> None:
    model = hooked(dtype="bfloat16")
    vector = torch.linspace(-1, 1, 32)
    with model.hooks({SITE: lambda x: x.float() + vector}):
        act = model.run(IDS, sites=["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"]
    assert act.dtype == torch.bfloat16
    with model.hooks({SITE: lambda x: torch.zeros_like(x).float() + vector}):
        mid = model.run(IDS, sites=[SITE])[SITE]
    assert torch.equal(mid, vector.bfloat16().expand_as(mid))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "neox", "mistral"])
@torch.no_grad()
def test_generation_with_the_cache_equals_greedy_decoding_without_it_under_hooks(family: str) -> None:
    model = hooked(family)
    vector = torch.linspace(-2, 2, 32)
    widths: list[int] = []

    def steer(act: Tensor) -> Tensor:
        widths.append(act.shape[1])
        return act + vector

    sites = {"blocks.1.hook_resid_post": steer, "blocks.0.hook_mlp_out": lambda x: x * 0.5}
    expected = IDS[:1]
    with model.hooks(sites):
        for _ in range(6):
            expected = torch.cat([expected, model.logits(expected)[:, -1:].argmax(-1)], 1)
        widths.clear()
        found = model._backend.generate(
            IDS[:1], torch.ones_like(IDS[:1]), 6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
    assert torch.equal(found, expected)
    assert widths == [6, 1, 1, 1, 1, 1]
    with model.hooks(sites):
        steered = model.logits(found)
    assert not torch.allclose(steered, model.logits(found))


# heads


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_unembedding_the_final_state_gives_the_logits(family: str) -> None:
    model = hooked(family)
    torch.testing.assert_close(model.unembed(model.final(IDS)), model.logits(IDS))
    assert model.W_U.shape[1] == model.d_vocab == 97
    assert model.is_causal == (family in CAUSAL)
    assert model.context == 40


@torch.no_grad()
def test_sizes_are_those_of_the_configuration() -> None:
    model = hooked("qwen3")
    assert (model.n_layers, model.d_model, model.n_heads) == (3, 32, 4)
    assert model.site("blocks.0.attn.hook_z").width == 64  # 4 heads of 16 in a stream of 32
    assert model.site("blocks.0.mlp.hook_post").width == 48


def test_a_model_without_a_head_says_so() -> None:
    model = HookedModel.from_pretrained(build("llama").model)
    assert not model.has_lm_head
    assert model.final(IDS).shape == (2, 6, 32)
    for use in (lambda: model.logits(IDS), lambda: model.W_U, lambda: model.unembed(torch.zeros(32))):
        with pytest.raises(InputError, match="no language-model head"):
            use()


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@torch.no_grad()
def test_randomised_weights_come_from_the_seed_alone(family: str) -> None:
    model = hooked(family)
    before = torch.get_rng_state()
    first, again, other = model.randomized(3), model.randomized(3), model.randomized(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.logits(IDS), again.logits(IDS))
    assert not torch.equal(first.logits(IDS), other.logits(IDS))
    assert not torch.equal(first.logits(IDS), model.logits(IDS))
    assert type(first.model) is type(model.model)
    assert {n: s.path for n, s in first.sites.items()} == {n: s.path for n, s in model.sites.items()}


# bad input


def test_bad_token_ids_are_one_clear_line() -> None:
    model = hooked()
    with pytest.raises(InputError, match=r"41 tokens exceed the context .* \(40\)"):
        model.logits(torch.zeros(1, 41, dtype=torch.long))
    with pytest.raises(InputError, match=r"outside the vocabulary .* \(0–96\)"):
        model.run(torch.tensor([[3, 97]]), sites=[SITE])
    with pytest.raises(InputError, match="at least one token"):
        model.logits(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(InputError, match="attention_mask"):
        model.logits(IDS, torch.ones(2, 3))


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(InputError, match="Linear is no model that steerkit knows"):
        HookedModel.from_pretrained(nn.Linear(2, 2))
    with pytest.raises(InputError, match="a name, a directory or a loaded model, not int"):
        HookedModel.from_pretrained(3)
    with pytest.raises(InputError, match="Unknown dtype 'float33'"):
        hooked(dtype="float33")
    with pytest.raises(InputError, match="no tokenizer: pass one"):
        hooked().generate("hello")
    with pytest.raises(InputError, match="is an encoder"):
        hooked("bert").generate("hello")
