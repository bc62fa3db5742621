"""LoRA and what is made from it: places, ranks, scales, starts; what is left on disk and in the base."""

import importlib.util
import math

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from steerkit import adapters, storyworld
from steerkit.errors import InputError
from steerkit.models import HookedModel


@pytest.fixture(scope="module")
def gpt2(tokenizer, tmp_path_factory):
    """A tiny random GPT-2: queries, keys and values are one map, whose weight lies on its side."""
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HookedModel.from_pretrained(folder)


@pytest.fixture
def ids():
    return torch.randint(5, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def fill(tuned, seed=0, size=0.3):
    """Random numbers in all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def step(tuned, ids, n=2):
    groups = tuned.method.groups(tuned.model, 1e-2, 0.5)
    groups = groups or [{"params": list(tuned.trainable().values()), "weight_decay": 0.5}]
    optimiser = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(n):
        optimiser.zero_grad()
        tuned.logits(ids).logsumexp(-1).sum().backward()
        optimiser.step()


@pytest.mark.parametrize("name", ["lora", "rslora", "lora_plus", "dora", "ia3"])
def test_of_a_fused_map_only_the_rows_asked_for_change(gpt2, ids, name, tmp_path):
    tuned = adapters.get(gpt2, name, modules=["q", "v"])
    step(tuned, ids)
    folder = tuned.save(tmp_path / "a")
    for _ in range(2):  # fresh, and loaded to be trained further
        for change in tuned.changes().values():
            q, k, v = change.delta.chunk(3)
            assert q.abs().max() > 1e-4
            assert v.abs().max() > 1e-4
            assert k.abs().max() < 1e-5
        every = sum(p.numel() for p in tuned.trainable().values())
        held = {"dora": 2 * 16 * 9, "ia3": 2 * 16}.get(name, 2 * 16 * 8)
        assert tuned.n_trainable == every - held == tuned.method.count(gpt2, tuned.slots)
        tuned.remove()
        tuned = adapters.load(folder, gpt2)
        step(tuned, ids)
    tuned.remove()


def test_ranks_by_pattern(model):
    tuned = adapters.get(model, "lora", rank=4, ranks={"q": 2, "layers.1.mlp.down_proj": 6})
    shapes = {path: layer.lora_A["default"].weight.shape[0] for path, layer in tuned.tuner_layers().items()}
    scales = {layer.scaling["default"] for layer in tuned.tuner_layers().values()}
    assert scales == {2.0}
    assert tuned.n_trainable == tuned.method.count(model, tuned.slots)
    for path, rank in shapes.items():
        expected = 2 if path.endswith("q_proj") else 6 if path.endswith("layers.1.mlp.down_proj") else 4
        assert rank == expected, path
    tuned.remove()


def test_the_scales_of_lora_and_rslora(model):
    deltas = []
    for name, alpha in (("lora", 16), ("rslora", 8)):  # 16/4 = 8/√4
        tuned = adapters.get(model, name, rank=4, alpha=alpha, modules="q", seed=3)
        fill(tuned)
        deltas.append({path: change.delta for path, change in tuned.changes().items()})
        tuned.remove()
    for path, delta in deltas[0].items():
        torch.testing.assert_close(delta, deltas[1][path], rtol=1e-5, atol=1e-6)


def test_lora_plus_gives_b_a_faster_rate(model):
    tuned = adapters.get(model, "lora_plus", rank=4, ratio=8.0)
    slow, fast = tuned.method.groups(tuned.model, 1e-3, 0.1)
    assert (slow["lr"], fast["lr"]) == (1e-3, 8e-3)
    assert sum(p.numel() for g in (slow, fast) for p in g["params"]) == tuned.n_trainable
    outputs = {slot.d_out for slot in tuned.slots}
    assert all(p.shape[0] in outputs and p.shape[1] == 4 for p in fast["params"])
    tuned.remove()


def test_dora_is_its_equation(model):
    tuned = adapters.get(model, "dora", rank=4, modules=["q", "down"])
    fill(tuned)
    for path, layer in tuned.tuner_layers().items():
        change = tuned.changes()[path]
        moved = change.base + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        m = layer.lora_magnitude_vector["default"].weight
        expected = m[:, None] * moved / moved.norm(dim=1, keepdim=True)
        torch.testing.assert_close(change.tuned, expected, rtol=1e-4, atol=1e-5)
    tuned.remove()


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_what_has_changed_its_base_is_saved_for_the_base_as_it_was(model_folder, model, ids, name, tmp_path):
    tuned = adapters.get(model, name, rank=4, ranks={"q": 2})
    fill(tuned, size=0.05)
    before = tuned.logits(ids).detach()
    trained = {key: p.detach().clone() for key, p in tuned.trainable().items()}
    folder = tuned.save(tmp_path / "a")
    tuned.remove()
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    weight = {key: p.clone() for key, p in base.named_parameters()}
    plain = peft.PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(plain(ids).logits, before, rtol=0, atol=1e-4)
    unloaded = dict(plain.unload().named_parameters())
    assert all(torch.equal(unloaded[key], value) for key, value in weight.items())
    assert {
        v.shape[0] for k, v in load_file(folder / "adapter_model.safetensors").items() if "lora_A" in k
    } == {4, 8}
    again = adapters.load(folder, model)  # the adapter itself, to be trained further
    assert all(torch.equal(p, trained[key]) for key, p in again.trainable().items())
    torch.testing.assert_close(again.logits(ids), before, rtol=0, atol=1e-4)
    assert again.n_trainable == again.method.count(model, again.slots)
    again.remove()


def test_pissa_starts_from_the_greatest_singular_directions(model):
    originals = {path: model.model.get_submodule(path).weight.clone() for path in model.linear_modules()}
    tuned = adapters.get(model, "pissa", rank=4)
    for path, layer in tuned.tuner_layers().items():
        U, S, Vh = torch.linalg.svd(originals[path], full_matrices=False)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-4, atol=1e-5)
    tuned.remove()


def test_mica_stays_in_the_least_singular_directions(model):
    tuned = adapters.get(model, "mica", rank=4, modules="q")
    fill(tuned)
    for change in tuned.changes().values():
        U = torch.linalg.svd(change.base, full_matrices=False)[0]
        assert change.norm > 0.1
        assert (U[:, :-4].T @ change.delta).norm() < 1e-4 * change.norm
    tuned.remove()


def test_adalora_ends_with_its_budget(model, ids, tmp_path):
    tuned = adapters.get(model, "adalora", rank=2, begin=0.1, end=0.2)
    optimiser = torch.optim.AdamW(tuned.trainable().values(), lr=1e-2)
    for i in range(30):
        optimiser.zero_grad()
        loss = tuned.logits(ids).logsumexp(-1).mean() + tuned.method.regulariser(tuned.model)
        loss.backward()
        optimiser.step()
        tuned.method.after_step(tuned.model, i, 30)
    kept = [int((layer.lora_E["default"] != 0).sum()) for layer in tuned.tuner_layers().values()]
    assert sum(kept) == 2 * len(kept)
    assert tuned.method.first_rank == 3
    loaded = HookedModel.from_pretrained(tuned.save(tmp_path / "a"))
    torch.testing.assert_close(loaded.logits(ids), tuned.logits(ids), rtol=0, atol=1e-5)
    tuned.remove()


def test_adaloras_penalty_is_its_formula(model):
    tuned = adapters.get(model, "adalora", rank=2, modules="q", orthogonality=0.25)
    fill(tuned)
    terms = []
    for layer in tuned.tuner_layers().values():
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        terms += [(A @ A.T - torch.eye(3)).norm(), (B.T @ B - torch.eye(3)).norm()]
    expected = 0.25 * sum(terms) / len(terms)
    torch.testing.assert_close(tuned.method.regulariser(tuned.model), expected)
    tuned.remove()


def test_qlora_says_what_it_lacks(model):
    there = importlib.util.find_spec("bitsandbytes") is not None
    with pytest.raises(InputError, match="is not quantised" if there else "needs bitsandbytes"):
        adapters.get(model, "qlora")


def test_qlora_on_a_base_in_4_bits(ids):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    whole = transformers.AutoModelForCausalLM.from_pretrained(
        str(storyworld.model_path()), quantization_config=config
    )
    base = HookedModel.from_pretrained(whole)
    base.logits(
        ids
    )  # the first forward on a CPU packs the weights anew, and rounds otherwise than those after it
    before = base.logits(ids).detach()
    tuned = adapters.get(base, "qlora", rank=4)
    assert torch.equal(tuned.logits(ids), before)
    assert (
        tuned.n_trainable
        == tuned.method.count(base, tuned.slots)
        == 4 * 4 * (4 * 256 + 3 * (128 + tuned.slots[-1].d_in))
    )
    step(tuned, ids)
    assert not torch.equal(tuned.logits(ids), before)
    with tuned.disabled():
        assert torch.equal(tuned.logits(ids), before)
    with pytest.raises(InputError, match="4 bits again"):
        tuned.merge("nowhere")
    tuned.remove()
    assert torch.equal(base.logits(ids), before)
    with pytest.raises(InputError, match="quantised"):
        adapters.get(base, "svft")


@pytest.mark.parametrize("name", ["olora", "osf", "hra", "oft"])
def test_a_weight_on_its_side_is_refused_where_peft_does_not_take_it(gpt2, ids, name):
    before = gpt2.logits(ids)
    with pytest.raises(InputError, match="Conv1D"):
        adapters.get(gpt2, name)
    assert torch.equal(gpt2.logits(ids), before)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in gpt2.model.modules())


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("lora", {"rank": 0}, "rank is 0; lora takes 1 or more"),
        ("lora", {"rank": 33}, r"rank is 33, but .*q_proj is 32 × 32"),
        ("lora", {"ranks": {"qq": 2}}, "ranks names 'qq'"),
        ("lora_orthogonal", {"rank": 3}, "even"),
        ("lora_plus", {"ratio": 0.0}, "ratio is 0.0"),
        ("adalora", {"begin": 0.6, "end": 0.4}, "shares"),
    ],
)
def test_mistakes_are_named(model, name, settings, match):
    with pytest.raises(InputError, match=match):
        adapters.get(model, name, **settings)


def test_orthogonal_factors_cancel(model):
    tuned = adapters.get(model, "lora_orthogonal", rank=4, modules="q")
    for layer in tuned.tuner_layers().values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert (B @ A).abs().max() < 1e-6
        assert min(A.norm(), B.norm()) > math.sqrt(A.numel()) * 0.03
    tuned.remove()
