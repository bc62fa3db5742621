import pytest
import torch
import transformers

from steerkit import adapters
from steerkit.loading import quiet
from steerkit.models import HookedModel


@pytest.fixture(scope="session")
def tokenizer():
    return HookedModel.from_pretrained("storyworld").tokenizer


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A tiny random Qwen2 with grouped queries, biases and norm gains, in a directory."""
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(model_folder):
    return HookedModel.from_pretrained(model_folder)


@pytest.fixture(scope="session")
def houlsbys(model_folder, tmp_path_factory):
    """Directories of two houlsby adapters of the tiny model that do something."""
    model, folders = HookedModel.from_pretrained(model_folder), []
    for seed in (1, 2):
        tuned = adapters.get(model, "houlsby", rank=4, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in tuned.trainable().values():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        folders.append(str(tuned.save(tmp_path_factory.mktemp("houlsby") / str(seed))))
        tuned.remove()
    return tuple(folders)
