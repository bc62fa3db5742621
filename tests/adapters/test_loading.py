"""Saved adapters: read by anybody, put on the model they were made for, or refused by name."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from steerkit import adapters
from steerkit.adapters import tuner
from steerkit.errors import InputError
from steerkit.loading import quiet
from steerkit.models import HookedModel


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(5, model.d_vocab, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(model, ids, tmp_path):
    """A saved houlsby adapter that does something, and its logits beside it."""
    tuned = adapters.get(model, "houlsby", rank=4)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(0.3)
    (tmp_path / "logits.json").write_text(json.dumps(tuned.logits(ids).tolist()))
    tuned.save(tmp_path / "adapter")
    tuned.remove()
    return tmp_path / "adapter"


def expected(folder):
    return torch.tensor(json.loads((folder.parent / "logits.json").read_text()))


def other_base(folder, model_folder, width=32):
    """The adapter with its base exchanged for a model of other random weights."""
    config = transformers.AutoConfig.from_pretrained(model_folder)
    config.hidden_size = width
    torch.manual_seed(5)
    place = folder.parent / "other"
    with quiet():
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(place)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(place)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return place


def test_a_process_that_knows_nothing_of_adapters_loads_them(folder, ids):
    program = (
        "import sys, json, torch\n"
        "from steerkit.models import HookedModel\n"
        "assert not [name for name in sys.modules if name.startswith('steerkit.adapters')]\n"
        "model = HookedModel.from_pretrained(sys.argv[1])\n"
        "print(json.dumps(model.logits(torch.tensor(json.loads(sys.argv[2]))).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        check=True,
    )
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected(folder), rtol=0, atol=1e-6)


def test_a_type_that_nobody_has_is_named(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["peft_type"] = "FUTURE"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="type FUTURE, which neither peft"):
        HookedModel.from_pretrained(folder)


def test_a_method_that_is_not_here_is_named(folder):
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["method"] = "future"
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="no adapter 'future' here"):
        HookedModel.from_pretrained(folder)


def test_another_base_is_refused_by_name_unless_it_is_meant(folder, model, model_folder, ids):
    place = other_base(folder, model_folder)
    with pytest.raises(InputError) as refused:
        HookedModel.from_pretrained(folder)
    for part in (str(model_folder), str(place), model.fingerprint, "other_model=True"):
        assert part in str(refused.value)
    HookedModel.from_pretrained(folder, other_model=True)
    other = HookedModel.from_pretrained(place)
    with pytest.raises(InputError, match="is another model"):
        adapters.load(folder, other)
    assert not hasattr(other.model, "peft_config")
    adapters.load(folder, other, other_model=True).remove()


def test_a_base_of_another_width_is_refused_by_name(folder, model_folder):
    place = other_base(folder, model_folder, width=16)
    with pytest.raises(InputError) as refused:
        HookedModel.from_pretrained(folder)
    for part in (str(folder), str(place), str(model_folder)):
        assert part in str(refused.value)


def test_a_loaded_adapter_can_be_trained_on(folder, model, ids):
    tuned = adapters.load(folder, model)
    assert torch.equal(tuned.logits(ids), expected(folder))
    assert (tuned.method.rank, tuned.seed) == (4, 0)
    tuned.logits(ids).square().mean().backward()
    assert tuned.trainable()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in tuned.trainable().values())
    assert tuned.n_trainable == tuned.method.count(model, tuned.slots)
    tuned.remove()


def test_an_adapter_of_others_is_read_but_not_trained_on(folder, model):
    (folder / "steerkit_adapter.json").unlink()
    HookedModel.from_pretrained(folder)
    with pytest.raises(InputError, match=r"HookedModel.from_pretrained reads"):
        adapters.load(folder, model)


def test_peft_can_load_an_adapter_under_another_name(folder, model, ids):
    import peft

    copy = shutil.copytree(folder, folder.parent / "copy")
    both = peft.PeftModel.from_pretrained(model.model, str(folder), adapter_name="first")
    both.load_adapter(str(copy), adapter_name="second")
    found = []
    for name in ("first", "second"):
        both.set_adapter(name)
        found.append(HookedModel.from_pretrained(both.eval(), tokenizer=model.tokenizer).logits(ids))
    both.unload()
    model.model.__dict__.pop("peft_config", None)
    for logits in found:
        torch.testing.assert_close(logits, expected(folder), rtol=0, atol=1e-6)


class _Breaks(tuner.Edit):
    def __init__(self, target):
        super().__init__()
        if target.path.endswith("layers.1.mlp.down_proj"):
            raise InputError("it breaks at the last one.")
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x, base):
        return self.gain * base(x)


def test_an_adapter_that_fails_half_way_leaves_the_base_alone(model, ids, monkeypatch):
    before, modules = model.logits(ids), [name for name, _ in model.model.named_modules()]
    flags = [p.requires_grad for p in model.model.parameters()]
    monkeypatch.setitem(tuner.EDITS, "svft", lambda target, settings: _Breaks(target))
    with pytest.raises(InputError, match="breaks at the last one"):
        adapters.get(model, "svft", modules="down")
    assert [name for name, _ in model.model.named_modules()] == modules
    assert [p.requires_grad for p in model.model.parameters()] == flags
    assert torch.equal(model.logits(ids), before)
    assert not hasattr(model.model, "peft_config")
