"""Full fine-tuning and parts of it: which weights are trained, and what becomes of the others."""

import pytest
import torch

from steerkit import adapters
from steerkit.errors import InputError
from steerkit.models import HookedModel


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


def moved(tuned, size=0.1):
    """The model with its trained weights moved at random."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return tuned


def loss(model, ids):
    logits = model.logits(ids)[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def state(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.3, 1.0, 1.5])
def test_scaled_it_has_interpolated_weights(model_folder, ids, alpha):
    model = HookedModel.from_pretrained(model_folder)
    start = state(model.model)
    tuned = moved(adapters.get(model, "full"))
    end = state(tuned.model)
    with tuned.scaled(alpha):
        found = tuned.logits(ids).detach()
    assert all(torch.equal(p, end[name]) for name, p in tuned.model.named_parameters())
    by_hand = HookedModel.from_pretrained(model_folder)
    with torch.no_grad():
        for name, parameter in by_hand.model.named_parameters():
            parameter.copy_(start[name] + alpha * (end[name] - start[name]))
    torch.testing.assert_close(found, by_hand.logits(ids), rtol=0, atol=2e-4)


def test_the_ends_of_the_path_are_exact(model, ids):
    before = model.logits(ids)
    tuned = moved(adapters.get(model, "full"))
    after = tuned.logits(ids)
    with tuned.scaled(0.0):
        assert torch.equal(tuned.logits(ids), before)
    with tuned.scaled(1.0):
        assert torch.equal(tuned.logits(ids), after)
    tuned.remove()


def test_full_trains_every_parameter(model):
    tuned = adapters.get(model, "full")
    assert set(tuned.trainable()) == {name for name, _ in model.model.named_parameters()}
    tuned.remove()
    with pytest.raises(InputError, match="take layers"):
        adapters.get(model, "full", layers=[0])


def test_layers_are_trained_whole_and_maps_alone(model):
    def trained(**where):
        tuned = adapters.get(model, "layers", **where)
        names = set(tuned.trainable())
        tuned.remove()
        return names

    names = {name for name, _ in model.model.named_parameters()}
    block = [{name for name in names if name.startswith(f"model.layers.{i}.")} for i in range(2)]
    assert any("norm" in name for name in block[1])
    assert trained(top=1) == trained(layers=[1]) == block[1]
    assert trained(bottom=1) == block[0]
    assert trained(bottom=1, top=1) == trained() == block[0] | block[1]
    attention = {name for name in block[0] if "self_attn" in name}
    assert trained(modules="attention", bottom=1) == attention
    assert trained(modules=["attention", "ffn"], bottom=1) == block[0]
    assert trained(modules="down") == {f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)}


def test_mistakes_are_named(model):
    with pytest.raises(InputError, match="has 2 layers: top 3"):
        adapters.get(model, "layers", top=3)
    with pytest.raises(InputError, match="not both"):
        adapters.get(model, "layers", top=1, layers=[0])
    with pytest.raises(InputError, match="numbers of blocks"):
        adapters.get(model, "layers", top=-1)
    tuned = adapters.get(model, "layers", top=1)
    with pytest.raises(InputError, match="adapter already"):
        adapters.get(model, "lora")
    tuned.remove()
    adapters.get(model, "lora", rank=2).remove()


def test_a_graph_survives_a_look_at_the_base(model, ids):
    tuned = moved(adapters.get(model, "full"))
    (expected,) = torch.autograd.grad(loss(tuned, ids), [tuned.trainable()["model.norm.weight"]])
    value = loss(tuned, ids)
    with tuned.disabled(), torch.no_grad():
        tuned.logits(ids)
    value.backward()
    assert torch.equal(tuned.trainable()["model.norm.weight"].grad, expected)
    tuned.remove()


def test_its_changes_are_the_differences_of_its_maps(model):
    start = state(model.model)
    tuned = moved(adapters.get(model, "layers", top=1))
    changes = tuned.changes()
    assert set(changes) == {slot.path for slot in tuned.slots}
    for path, change in changes.items():
        weight = model.model.get_submodule(path).weight
        assert torch.equal(change.base, start[f"{path}.weight"])
        torch.testing.assert_close(change.tuned, weight.detach())
    tuned.remove()


def test_a_saved_one_can_be_trained_on(model, ids, tmp_path):
    tuned = moved(adapters.get(model, "layers", top=1))
    expected = tuned.logits(ids).detach()
    folder = tuned.save(tmp_path / "top")
    tuned.remove()
    before = model.logits(ids)
    again = adapters.load(folder, model)
    assert torch.equal(again.logits(ids), expected)
    with again.disabled():
        assert torch.equal(again.logits(ids), before)
    assert set(again.trainable()) == {
        name for name, _ in model.model.named_parameters() if "layers.1." in name
    }
    again.remove()
    assert torch.equal(model.logits(ids), before)
