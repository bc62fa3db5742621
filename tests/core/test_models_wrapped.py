"""Compiled, checkpointed, split, adapted and TransformerLens models give what the plain model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steerkit.errors import InputError
from steerkit.models import HookedModel

from .families import build
from .test_models import IDS, SITE, hooked, n_hooks, without_dropout

VECTOR = torch.linspace(-1, 1, 32)


def steer(act: Tensor) -> Tensor:
    return act * 0.5 + VECTOR


@torch.no_grad()
def steered_logits(model: HookedModel) -> Tensor:
    with model.hooks({SITE: steer, "blocks.2.attn.hook_z": steer, "blocks.0.hook_resid_post": steer}):
        return model.logits(IDS)


@pytest.mark.parametrize("how", ["whole", "whole in place", "a block", "a block in place"])
@torch.no_grad()
def test_hooks_reach_into_a_compiled_model_that_has_already_run(how: str) -> None:
    model = build("llama")
    compiled: Any = model
    layers = model.model.layers
    if how == "whole":
        compiled = torch.compile(model, backend="eager")
    elif how == "whole in place":
        model.compile(backend="eager")
    elif how == "a block":
        layers[1] = torch.compile(layers[1], backend="eager")
    else:
        layers[1].compile(backend="eager")
    compiled(IDS)
    model = HookedModel.from_pretrained(compiled)
    assert all(site.verified for site in model.sites.values())
    clean = hooked("llama")
    torch.testing.assert_close(steered_logits(model), steered_logits(clean))
    torch.testing.assert_close(model.logits(IDS), clean.logits(IDS))
    torch.testing.assert_close(model.run(IDS, sites=[SITE])[SITE], clean.run(IDS, sites=[SITE])[SITE])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "opt"])
def test_gradients_under_checkpointing_are_the_plain_ones_though_the_hooks_are_closed_before_backward(
    family: str, reentrant: bool
) -> None:
    gradients = []
    for checkpointed in (False, True):
        model = without_dropout(build(family))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        hooks = HookedModel.from_pretrained(model)
        before = n_hooks(model)
        vector = VECTOR.clone().requires_grad_()

        def fn(act: Tensor, vector: Tensor = vector) -> Tensor:
            return act * vector + vector

        sites = (SITE, "blocks.0.hook_mlp_out", "blocks.2.attn.hook_z", "blocks.1.hook_resid_post")
        with hooks.hooks(dict.fromkeys(sites, fn)):
            loss = hooks.logits(IDS).pow(2).mean()
        loss.backward()
        weight = model.get_input_embeddings().weight
        gradients.append((loss.detach(), vector.grad, weight.grad))
        assert n_hooks(model) == before
        assert not any(
            "<locals>" in repr(vars(m).get("_gradient_checkpointing_func")) for m in model.modules()
        )
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(recomputed, plain)


def test_what_is_read_under_checkpointing_carries_the_plain_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = without_dropout(build("llama")).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        act = HookedModel.from_pretrained(model).run(IDS, sites=["blocks.1.hook_resid_post"])
        act["blocks.1.hook_resid_post"].pow(2).mean().backward()
        gradients.append(model.model.layers[0].mlp.down_proj.weight.grad)
    torch.testing.assert_close(*gradients)


@torch.no_grad()
def test_a_model_whose_weights_accelerate_brings_in_one_by_one() -> None:
    from accelerate import cpu_offload

    model = build("llama")
    cpu_offload(model, execution_device=torch.device("cpu"))
    split, plain = HookedModel.from_pretrained(model), hooked("llama")
    assert all(site.verified for site in split.sites.values())
    torch.testing.assert_close(steered_logits(split), steered_logits(plain))
    torch.testing.assert_close(split.W_U, plain.W_U)


@torch.no_grad()
def test_a_directory_is_split_by_a_device_map(tmp_path: Any) -> None:
    build("llama").save_pretrained(tmp_path)
    parts = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
    }
    rest = {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = HookedModel.from_pretrained(
        tmp_path, tokenizer=object.__new__(_NoTokenizer), device_map={**parts, **rest}
    )
    torch.testing.assert_close(steered_logits(model), steered_logits(hooked("llama")))


class _NoTokenizer:
    """Stands where a tokenizer is not needed."""

    all_special_ids: tuple = ()
    special_tokens_map: dict = {}  # noqa: RUF012
    unk_token = None


# PEFT


def lora(model: Any, **options: Any) -> Any:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(
        target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config).eval()


@torch.no_grad()
def test_a_peft_model_is_hooked_with_its_adapters_active() -> None:
    adapted, plain = lora(build("llama")), hooked("llama")
    model = HookedModel.from_pretrained(adapted)
    assert all(site.verified for site in model.sites.values())
    assert torch.equal(model.logits(IDS), adapted(IDS).logits)
    site = "blocks.1.hook_resid_post"
    states = adapted(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(model.run(IDS, sites=[site])[site], states[2])
    assert (model.logits(IDS) - plain.logits(IDS)).abs().max() > 0.1
    with adapted.disable_adapter():
        torch.testing.assert_close(steered_logits(model), steered_logits(plain))
    with_adapters = steered_logits(model)
    merged = HookedModel.from_pretrained(adapted.merge_and_unload())
    torch.testing.assert_close(steered_logits(merged), with_adapters, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_adapter_directory_is_a_model(tmp_path: Any) -> None:
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    adapted = lora(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    model = HookedModel.from_pretrained(tmp_path / "adapter", tokenizer=_NoTokenizer())
    torch.testing.assert_close(model.logits(IDS), adapted(IDS).logits)
    assert all(site.verified for site in model.sites.values())


def test_adapters_with_virtual_tokens_are_refused_with_a_reason() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(InputError, match=r"PROMPT_TUNING adds virtual tokens"):
        HookedModel.from_pretrained(peft.get_peft_model(build("llama"), config))


# TransformerLens


@pytest.fixture(scope="module")
def bridged(tmp_path_factory: pytest.TempPathFactory) -> tuple[HookedModel, HookedModel]:
    """The same Llama as a TransformerBridge and as a plain model."""
    pytest.importorskip("transformer_lens")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    place = tmp_path_factory.mktemp("bridge")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(96)} | {"<unk>": 96}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", unk_token="<unk>"
    )
    tokenizer.save_pretrained(place)
    build("llama").save_pretrained(place)
    bridge = TransformerBridge.boot_transformers(str(place))
    plain = HookedModel.from_pretrained(place)
    return HookedModel.from_pretrained(
        bridge, tokenizer=plain.tokenizer
    ), plain  # TransformerLens's own adds a BOS


@torch.no_grad()
def test_a_transformer_bridge_reads_and_writes_what_the_hugging_face_model_does(
    bridged: tuple[HookedModel, HookedModel],
) -> None:
    bridge, plain = bridged
    names = [n for n, site in plain.sites.items() if site.verified]
    assert names == [n for n, site in bridge.sites.items() if site.verified]
    acts, expected = bridge.run(IDS, sites=names), plain.run(IDS, sites=names)
    for name in names:
        torch.testing.assert_close(acts[name], expected[name], rtol=1e-3, atol=1e-4)
        vector = torch.linspace(-2, 2, plain.sites[name].width)
        with bridge.hooks({name: lambda x, v=vector: x + v}), plain.hooks({name: lambda x, v=vector: x + v}):
            torch.testing.assert_close(bridge.logits(IDS), plain.logits(IDS), rtol=1e-3, atol=1e-3, msg=name)
    torch.testing.assert_close(bridge.final(IDS), plain.final(IDS), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bridge.unembed(plain.final(IDS)), plain.logits(IDS), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(bridge.W_U, plain.W_U)
    greedy = {"max_new_tokens": 5, "do_sample": False}
    assert bridge.generate("w5 w6 w7", **greedy) == plain.generate("w5 w6 w7", **greedy)
    assert n_hooks(bridge.model) == n_hooks(HookedModel.from_pretrained(bridge.model).model)


@pytest.mark.parametrize(
    "options",
    [
        {"normalization_type": "LN"},
        {"normalization_type": "LN", "parallel_attn_mlp": True},
        {"normalization_type": "RMS", "gated_mlp": True, "positional_embedding_type": "rotary", "rotary_dim": 8,
         "n_key_value_heads": 2},
    ],
    ids=["gpt2-like", "parallel", "llama-like"],
)  # fmt: skip
@torch.no_grad()
def test_a_hooked_transformer_reads_as_its_own_cache_and_writes_as_its_own_hooks(
    options: dict[str, Any],
) -> None:
    lens = pytest.importorskip("transformer_lens")
    config = lens.HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=40, d_head=8, n_heads=4, d_mlp=48, d_vocab=97, act_fn="gelu", init_weights=True,
        seed=0, initializer_range=0.3, device="cpu", **options,
    )  # fmt: skip
    original = lens.HookedTransformer(config)
    model = HookedModel.from_pretrained(original)
    refused = {name for name, site in model.sites.items() if not site.verified}
    parallel = bool(options.get("parallel_attn_mlp"))
    assert refused == ({f"blocks.{i}.hook_resid_mid" for i in range(2)} if parallel else set())
    logits, cache = original.run_with_cache(IDS)
    for name, site in model.sites.items():
        if not site.verified or name == "ln_final":
            continue
        assert torch.equal(model.run(IDS, sites=[name])[name], cache[name].flatten(2)), name
        with model.hooks({name: lambda x: x * 0}):
            written = model.logits(IDS)
        expected = original.run_with_hooks(IDS, fwd_hooks=[(name, lambda x, hook: x * 0)])
        torch.testing.assert_close(written, expected, msg=name)
    torch.testing.assert_close(model.unembed(model.final(IDS)), logits)
    pad = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([pad, torch.ones_like(IDS)], 1)
    torch.testing.assert_close(
        model.logits(torch.cat([pad, IDS], 1), mask)[:, 3:], logits, rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(model.randomized(1).W_U, model.W_U)
