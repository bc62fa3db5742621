"""Houlsby, parallel, Compacter, AdapterFusion: what they compute, what they share, what they refuse."""

import shutil

import pytest
import torch
import transformers
from torch.nn import functional as F

from steerkit import adapters
from steerkit.adapters.methods.compacter import kronecker
from steerkit.errors import InputError
from steerkit.models import HookedModel


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


def stirred(tuned, size=0.3, seed=0):
    """The adapter with random numbers added to what is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


def edit_at(tuned, path):
    return tuned.tuner_layers()[path].steerkit_edits["default"]


def recorded(model, path, ids):
    """(input, output) of a module in a forward."""
    seen = []
    handle = model.model.get_submodule(path).register_forward_hook(
        lambda m, args, out: seen.append((args[0], out))
    )
    try:
        model.logits(ids)
    finally:
        handle.remove()
    return seen[0]


def family(name, tokenizer):
    """A tiny random model of another build."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    if name == "gpt2":
        made = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64)
        )
    elif name == "bert":
        made = transformers.BertForMaskedLM(
            transformers.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=64)
        )
    elif name == "neox":
        made = transformers.GPTNeoXForCausalLM(
            transformers.GPTNeoXConfig(**sizes, intermediate_size=48, max_position_embeddings=64)
        )
    elif name == "opt":
        made = transformers.OPTForCausalLM(
            transformers.OPTConfig(**sizes, ffn_dim=48, max_position_embeddings=64, word_embed_proj_dim=32)
        )
    else:
        made = transformers.T5ForConditionalGeneration(
            transformers.T5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_ff=48,
                d_kv=8,
                num_layers=2,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
    return HookedModel.from_pretrained(made.eval(), tokenizer=tokenizer)


def test_houlsby_adds_a_bottleneck_of_what_the_sublayers_give(model, ids):
    tuned = stirred(adapters.get(model, "houlsby", rank=4, activation="silu"))
    for path in ("model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj"):
        x, y = recorded(tuned.base, path, ids)
        adapter = edit_at(tuned, path).adapter
        plain = tuned.tuner_layers()[path].get_base_layer()(x)
        inner = F.silu(plain @ adapter.D.T + adapter.b_D)
        torch.testing.assert_close(y, plain + inner @ adapter.U.T + adapter.b_U)
    tuned.remove()


@pytest.mark.parametrize(
    ("name", "ffn_input", "down"),
    [
        ("gpt2", "transformer.h.1.mlp", "transformer.h.1.mlp.c_proj"),
        ("bert", "bert.encoder.layer.1.intermediate", "bert.encoder.layer.1.output.dense"),
        ("neox", "gpt_neox.layers.1.mlp", "gpt_neox.layers.1.mlp.dense_4h_to_h"),
        ("opt", "model.decoder.layers.1.fc1", "model.decoder.layers.1.fc2"),
        ("t5", "decoder.block.1.layer.2.DenseReluDense", "decoder.block.1.layer.2.DenseReluDense.wo"),
    ],
)
def test_parallel_reads_the_ffns_input_and_adds_to_its_output(tokenizer, name, ffn_input, down):
    model = family(name, tokenizer)
    ids = torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))
    tuned = stirred(adapters.get(model, "parallel", rank=4, scale=2.5))
    x, _ = recorded(model, ffn_input, ids)
    hidden, y = recorded(model, down, ids)
    adapter = edit_at(tuned, down).adapter
    inner = F.relu(x @ adapter.D.T + adapter.b_D)
    plain = tuned.tuner_layers()[down].get_base_layer()(hidden)
    added = (inner @ adapter.U.T + adapter.b_U).reshape(plain.shape)
    torch.testing.assert_close(y, plain + 2.5 * added)
    assert tuned.n_trainable == len(tuned.slots) // 2 * (2 * 32 * 4 + 4 + 32)


def test_parallel_goes_beside_ffns_only(model):
    with pytest.raises(InputError, match="down projection"):
        adapters.get(model, "parallel", modules="attention")


def test_a_compacters_matrices_are_sums_of_kronecker_products():
    generator = torch.Generator().manual_seed(0)
    A, s, t, x = (
        torch.randn(shape, generator=generator) for shape in ((4, 4, 4), (4, 3), (4, 5), (2, 6, 20))
    )
    expected = sum(torch.kron(A[i], torch.outer(s[i], t[i])) for i in range(4))
    torch.testing.assert_close(kronecker(x, A, s, t), x @ expected.T)


def test_compacters_share_one_factor(model, tmp_path):
    tuned = stirred(adapters.get(model, "compacter", rank=8, n=4))
    factors = {id(edit_at(tuned, slot.path).A) for slot in tuned.slots}
    assert len(factors) == 1
    assert len([name for name in tuned.trainable() if name.endswith(".A")]) == 1
    folder = tuned.save(tmp_path / "compacter")
    tuned.remove()
    loaded = adapters.load(folder)
    assert len({id(edit_at(loaded, slot.path).A) for slot in loaded.slots}) == 1


def test_a_compacter_needs_widths_that_n_divides(model):
    with pytest.raises(InputError, match="divide the rank, 6"):
        adapters.get(model, "compacter", rank=6)
    with pytest.raises(InputError, match=r"divide the width of model.layers.0.self_attn.o_proj, 32"):
        adapters.get(model, "compacter", rank=15, n=5)


def test_identical_adapters_fused_are_the_adapter_itself(model, ids, houlsbys):
    alone = HookedModel.from_pretrained(houlsbys[0])
    fused = adapters.get(model, "adapter_fusion", adapters=(houlsbys[0],) * 3)
    torch.testing.assert_close(fused.logits(ids), alone.logits(ids), rtol=0, atol=1e-5)
    fused.remove()


def test_a_fusion_mixes_what_its_adapters_add(model, ids, houlsbys):
    path = "model.layers.0.self_attn.o_proj"
    added = []
    for folder in houlsbys:
        one = adapters.load(folder, model)
        x, y = recorded(model, path, ids)
        plain = one.tuner_layers()[path].get_base_layer()(x)
        added.append(y - plain)
        one.remove()
    fused = stirred(adapters.get(model, "adapter_fusion", adapters=houlsbys), size=0.1)
    edit = edit_at(fused, path)
    _, y = recorded(model, path, ids)
    scores = torch.stack([((plain @ edit.Q.T) * (one @ edit.K.T)).sum(-1) for one in added], -1)
    shares = scores.softmax(-1)
    assert shares.std() > 1e-3
    expected = plain + sum(shares[..., i : i + 1] * added[i] @ edit.V.T for i in range(2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    fused.remove()


def test_a_fusion_pulls_its_values_to_the_identity(model, houlsbys):
    fused = adapters.get(model, "adapter_fusion", adapters=houlsbys, penalty=0.5)
    assert float(fused.method.regulariser(fused.model)) == 0
    values = [edit_at(fused, slot.path).V for slot in fused.slots]
    with torch.no_grad():
        values[0][0, 1] += 2
    assert float(fused.method.regulariser(fused.model)) == pytest.approx(0.5 * 4)
    fused.remove()


def test_a_saved_fusion_needs_its_adapters_no_more(model, ids, houlsbys, tmp_path):
    copies = tuple(str(shutil.copytree(folder, tmp_path / str(i))) for i, folder in enumerate(houlsbys))
    fused = stirred(adapters.get(model, "adapter_fusion", adapters=copies), size=0.1)
    expected = fused.logits(ids).detach()
    folder = fused.save(tmp_path / "fusion")
    fused.remove()
    for copy in copies:
        shutil.rmtree(copy)
    torch.testing.assert_close(HookedModel.from_pretrained(folder).logits(ids), expected, rtol=0, atol=1e-6)
    again = adapters.load(folder, model)
    torch.testing.assert_close(again.logits(ids), expected, rtol=0, atol=1e-6)
    assert {name.rpartition(".")[2] for name in again.trainable()} == {"Q", "K", "V"}
    again.remove()


def test_what_cannot_be_fused_is_named(model, houlsbys, tmp_path):
    with pytest.raises(InputError, match="fewer than two"):
        adapters.get(model, "adapter_fusion", adapters=houlsbys[:1])
    with pytest.raises(InputError, match="There is no adapter in"):
        adapters.get(model, "adapter_fusion", adapters=(houlsbys[0], str(tmp_path / "none")))
    with pytest.raises(InputError, match=r"no adapter at model.layers.0.self_attn.q_proj"):
        adapters.get(model, "adapter_fusion", adapters=houlsbys, modules="q")
    others = {}
    for name, settings in (("lora", {"rank": 2}), ("houlsby", {"rank": 5})):
        tuned = adapters.get(model, name, **settings)
        others[name] = str(tuned.save(tmp_path / name))
        tuned.remove()
    with pytest.raises(InputError, match="no houlsby adapter"):
        adapters.get(model, "adapter_fusion", adapters=(houlsbys[0], others["lora"]))
    with pytest.raises(InputError, match="differ in their settings"):
        adapters.get(model, "adapter_fusion", adapters=(houlsbys[0], others["houlsby"]))
    assert not hasattr(model.model, "peft_config")


@pytest.mark.parametrize("name", ["houlsby", "parallel", "compacter", "adapter_fusion", "loreft"])
def test_scaled_they_add_so_much(model, ids, houlsbys, name):
    settings = {"adapter_fusion": {"adapters": houlsbys}, "loreft": {"rank": 2}, "compacter": {"rank": 8}}
    tuned = stirred(adapters.get(model, name, layers=[1], **settings.get(name, {"rank": 4})))
    site = "blocks.1.hook_resid_post"
    states = {}
    with torch.no_grad():
        for alpha in (0.0, 0.5, 1.0):
            with tuned.scaled(alpha):
                states[alpha] = tuned.run(ids, sites=[site])[site]
        assert torch.equal(states[1.0], tuned.run(ids, sites=[site])[site])
        with tuned.disabled():
            assert torch.equal(states[0.0], tuned.run(ids, sites=[site])[site])
    if name in ("parallel", "loreft"):  # the others' attention half is read by the FFN half
        torch.testing.assert_close(states[0.5], (states[0.0] + states[1.0]) / 2, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(states[0.5], states[1.0], atol=1e-4)
    tuned.remove()
