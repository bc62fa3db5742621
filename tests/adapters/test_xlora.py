"""X-LoRA: equal to peft's on the same weights, and nothing of it left behind."""

import peft
import pytest
import torch
import transformers

from steerkit import adapters
from steerkit.errors import InputError, SiteError
from steerkit.models import HookedModel


@pytest.fixture
def ids(model):
    return torch.randint(5, model.d_vocab, (3, 9), generator=torch.Generator().manual_seed(0))


def fill(tuned, seed, size=0.2):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.trainable().values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def loras(model, tmp_path_factory):
    """Directories of two LoRAs that do something."""
    folders = []
    for seed in (1, 2):
        tuned = adapters.get(model, "lora", rank=4, alpha=6, modules=["q", "down"], seed=seed)
        fill(tuned, seed)
        folders.append(str(tuned.save(tmp_path_factory.mktemp("loras") / str(seed))))
        tuned.remove()
    return tuple(folders)


def test_it_equals_pefts_on_the_same_weights(model, model_folder, loras, ids, tmp_path):
    tuned = adapters.get(model, "xlora", adapters=loras, modules=["q", "down"])
    assert tuned.n_trainable == 2 * (model.d_model + 1) == tuned.method.count(model, tuned.slots)
    fill(tuned, 5, size=1.0)
    gate, offset = (
        next(p for name, p in tuned.trainable().items() if name.endswith(end)) for end in ("gate", "offset")
    )
    found = tuned.logits(ids).detach()
    again = adapters.load(tuned.save(tmp_path / "x"), HookedModel.from_pretrained(model_folder))
    torch.testing.assert_close(again.logits(ids), found, rtol=0, atol=1e-6)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    base.config.use_cache = False
    config = peft.XLoraConfig(
        hidden_size=model.d_model,
        adapters={"0": loras[0], "1": loras[1]},
        xlora_depth=1,
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base, config)
    layer = theirs.base_model.internal_xlora_classifier.layers[0]
    with torch.no_grad():
        layer.weight.copy_(gate)
        layer.bias.copy_(offset)
    torch.testing.assert_close(found, theirs(ids).logits, rtol=0, atol=1e-5)
    tuned.remove()


def test_it_works_with_pads_final_states_and_texts_and_leaves_nothing(model, ids):
    settings = model.model.generation_config.use_cache
    tuned = adapters.get(model, "xlora", rank=2, experts=3)
    fill(tuned, 0)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    torch.testing.assert_close(
        tuned.logits(ids, mask)[1:2, :6], tuned.logits(ids[1:2, :6]), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(model.unembed(tuned.final(ids)), tuned.logits(ids), rtol=0, atol=1e-5)
    text = tuned.generate("The fox", max_new_tokens=4, do_sample=False)
    row = torch.tensor([model.tokenizer("The fox")["input_ids"]])
    for _ in range(4):
        row = torch.cat([row, tuned.logits(row)[:, -1:].argmax(-1)], 1)
    prompt = len(model.tokenizer("The fox")["input_ids"])
    assert text == model.tokenizer.decode(row[0, prompt:], skip_special_tokens=True)
    with pytest.raises(SiteError, match="twice"):
        tuned.run(ids, sites=["blocks.0.hook_resid_post"])
    tuned.remove()
    assert model.model.generation_config.use_cache == settings
    assert not any(module._forward_pre_hooks for module in model.model.modules())


def test_mistakes_are_named(model, loras, tmp_path):
    tuned = adapters.get(model, "xlora", rank=2)
    folder = tuned.save(tmp_path / "x")
    tuned.remove()
    with pytest.raises(InputError, match=r"adapters\.load"):
        HookedModel.from_pretrained(folder)
    for settings, match in (
        ({"experts": 1}, "two experts"),
        ({"adapters": loras[:1]}, "two experts"),
        ({"adapters": (loras[0], "nowhere")}, "no adapter in nowhere"),
        ({"adapters": loras}, "nothing at"),
        ({"adapters": (loras[0], str(folder))}, "no plain LoRA"),
    ):
        with pytest.raises(InputError, match=match):
            adapters.get(model, "xlora", **settings)
    assert not any(module._forward_pre_hooks for module in model.model.modules())
