"""Every adapter: what it starts from, what it trains, what it leaves behind."""

from pathlib import Path

import pytest
import torch

from steerkit import adapters
from steerkit.adapters import METHODS
from steerkit.adapters.base import EditMethod
from steerkit.errors import InputError
from steerkit.models import HookedModel

SMALL: dict[str, dict] = {
    "adalora": {"rank": 4},
    "antipasto": {"rank": 8},
    "c3a": {"block": 16},
    "clover": {"width": 16},
    "compacter": {"rank": 8},
    "diff_pruning": {"gate": 1.0},
    "dora": {"rank": 4},
    "fourierft": {"entries": 64},
    "gralora": {"rank": 4},
    "houlsby": {"rank": 4},
    "hra": {"rank": 4},
    "loha": {"rank": 2},
    "lokr": {"rank": 2},
    "lora": {"rank": 4},
    "lora_orthogonal": {"rank": 4},
    "lora_plus": {"rank": 4},
    "loreft": {"rank": 2, "first": 2, "last": 3},
    "mam": {"rank": 4, "prefix": 3},
    "mica": {"rank": 4},
    "miss": {"rank": 8},
    "oft": {"block": 8},
    "olora": {"rank": 4},
    "parallel": {"rank": 4},
    "pissa": {"rank": 4},
    "prefix_tuning": {"length": 4},
    "prompt_tuning": {"length": 4},
    "psoft": {"rank": 8},
    "qa_lora": {"rank": 4, "group": 8},
    "randlora": {"rank": 8},
    "road": {"group": 8},
    "rslora": {"rank": 4},
    "shira": {"rank": 2},
    "ssvd": {"rank": 8},
    "svft": {"rank": 2},
    "tied_lora": {"rank": 4},
    "trainable_tokens": {"tokens": tuple(range(5, 300))},
    "vblora": {"rank": 2, "vectors": 16, "length": 8},
    "vera": {"rank": 16},
    "waveft": {"entries": 64},
    "xlora": {"rank": 2, "experts": 3},
}
"""Settings that fit the tiny models; the defaults otherwise."""
NEEDS_MORE = {"qlora"}
"""Methods that want a base of another kind; they have tests of their own."""
ALL = sorted({*METHODS} - NEEDS_MORE)
MERGED = [name for name in ALL if METHODS[name].merge == "exact"]


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def before(model, ids):
    return model.logits(ids).detach()


@pytest.fixture
def settings_of(request):
    def settings(name):
        if name == "adapter_fusion":
            return {"adapters": request.getfixturevalue("houlsbys")}
        return SMALL.get(name, {})

    return settings


@pytest.fixture
def tuned(model, request, settings_of):
    made = adapters.get(model, request.param, **settings_of(request.param))
    yield made
    made.remove()


def loss_of(model, ids):
    logits = model.logits(ids)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def train(tuned, ids, steps=2):
    """A few steps; the losses before each, and after."""
    optimiser = torch.optim.AdamW(tuned.trainable().values(), lr=tuned.method.lr, weight_decay=0.0)
    losses = []
    for step in range(steps):
        loss = loss_of(tuned, ids)
        extra = tuned.method.regulariser(tuned.model)
        optimiser.zero_grad()
        (loss if extra is None else loss + extra).backward()
        optimiser.step()
        tuned.method.after_step(tuned.model, step, 100)
        losses.append(float(loss))
    return [*losses, float(loss_of(tuned, ids))]


def each(names):
    return pytest.mark.parametrize("tuned", names, indirect=True)


@each(ALL)
def test_it_starts_as_the_base_or_says_why_not(tuned, ids, before):
    difference = (tuned.logits(ids) - before).abs().max().item()
    identity = tuned.method.identity
    if identity == "exact":
        assert difference == 0
    elif identity == "rounding":
        assert difference < 1e-4
    else:
        assert difference > 1e-6
        assert len(identity) > 10


@each(ALL)
def test_gradients_reach_what_is_trained_and_nothing_else(tuned, ids):
    train(tuned, ids, 1)  # a factor behind one that starts at zero has no gradient before
    tuned.model.zero_grad()
    loss_of(tuned, ids).backward()
    trained = tuned.trainable()
    assert trained
    for name, parameter in tuned.model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == (name in trained), name


@each(ALL)
def test_its_parameters_are_counted_by_its_formula(tuned, model):
    assert tuned.n_trainable == tuned.method.count(model, tuned.slots)


@each(ALL)
def test_training_lowers_the_loss(tuned, ids):
    first, *_, last = train(tuned, ids, 4)
    assert last < first


@each(ALL)
def test_disabled_it_is_the_base(tuned, ids, before):
    train(tuned, ids)
    changed = tuned.logits(ids).detach()
    assert not torch.allclose(changed, before, atol=1e-6)
    with tuned.disabled():
        assert torch.equal(tuned.logits(ids), before)
    assert torch.equal(tuned.logits(ids), changed)


@each(ALL)
def test_saved_and_loaded_it_is_the_same(tuned, ids, tmp_path):
    train(tuned, ids)
    folder = tuned.save(tmp_path / "adapter")
    loaded = adapters.load(folder) if tuned.method.no_sites else HookedModel.from_pretrained(folder)
    rounded = 1e-4 if tuned.method.mutates_base else 1e-6  # saved for the base as it was
    torch.testing.assert_close(loaded.logits(ids), tuned.logits(ids), rtol=0, atol=rounded)


@each(MERGED)
def test_merged_it_computes_the_same(tuned, ids, tmp_path):
    train(tuned, ids)
    merged = HookedModel.from_pretrained(tuned.merge(tmp_path / "merged"))
    assert not hasattr(merged.model, "peft_config")
    torch.testing.assert_close(merged.logits(ids), tuned.logits(ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_removed_the_base_is_what_it_was(model, ids, before, name, settings_of):
    state = {key: value.clone() for key, value in model.model.state_dict().items()}
    flags = {key: p.requires_grad for key, p in model.model.named_parameters()}
    tuned = adapters.get(model, name, **settings_of(name))
    train(tuned, ids)
    assert tuned.remove() is model
    after = model.model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], value) for key, value in state.items())
    assert {key: p.requires_grad for key, p in model.model.named_parameters()} == flags
    assert torch.equal(model.logits(ids), before)
    assert not hasattr(model.model, "peft_config")


@each([name for name in ALL if METHODS[name].linear])
def test_its_effective_change_is_what_merging_adds(tuned, ids, before):
    train(tuned, ids)
    changes = tuned.changes()
    assert changes
    weights = {path: change.tuned for path, change in changes.items()}
    changed = tuned.logits(ids).detach()
    with tuned.scaled(0.0):
        torch.testing.assert_close(tuned.logits(ids), before, rtol=0, atol=1e-5)
    with tuned.scaled(1.0):
        torch.testing.assert_close(tuned.logits(ids), changed, rtol=0, atol=1e-5)
    assert all(bool(weight.isfinite().all()) for weight in weights.values())


@pytest.mark.parametrize("name", [name for name in ALL if issubclass(METHODS[name], EditMethod)])
def test_over_bfloat16_its_own_numbers_stay_float32(model_folder, ids, name, settings_of):
    half = HookedModel.from_pretrained(model_folder, dtype=torch.bfloat16)
    tuned = adapters.get(half, name, **settings_of(name))
    train(tuned, ids, 1)
    assert {p.dtype for p in tuned.trainable().values()} == {torch.float32}
    assert tuned.logits(ids).dtype == torch.bfloat16
    assert bool(tuned.logits(ids).isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_it_says_what_it_is(name):
    method = METHODS[name]
    for text in (method.paper, method.equation, method.hypothesis, method.family):
        assert text
    assert "https://" in method.paper or method.name in ("full", "layers")


def test_mistakes_are_named(model):
    with pytest.raises(InputError, match="did you mean svft"):
        adapters.get(model, "svfd")
    with pytest.raises(InputError, match="q_proj"):
        adapters.get(model, "svft", modules="q_prj")
    with pytest.raises(InputError, match="no layer 9"):
        adapters.get(model, "svft", layers=[9])
    with pytest.raises(InputError, match="rank"):
        adapters.get(model, "svft", rnk=3)


def test_settings_have_the_types_of_their_fields():
    assert adapters.make("diff_pruning", kept="1e-3").kept == 1e-3  # what YAML makes of 1e-3
    assert adapters.make("lora", rank=2.0).rank == 2
    assert adapters.make("loreft", rank=2).rank == 2
    assert adapters.make("trainable_tokens", tokens=[5, 6]).tokens == (5, 6)
    for name, setting, value, kind in (
        ("svft", "rank", 2.5, "a whole number"),
        ("lora", "rank", True, "a whole number"),
        ("lora", "alpha", "x", "a whole number"),
        ("diff_pruning", "kept", "half", "a number"),
        ("lora", "ranks", 3, "names with values"),
    ):
        with pytest.raises(InputError, match=f"{setting} is {value!r}; it must be {kind}"):
            adapters.make(name, **{setting: value})


def test_the_docs_tell_of_every_method():
    text = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    assert [name for name in ALL if f"`{name}`" not in text] == []
