"""Every architecture of the registry goes to disk and back, to sae-lens, and through every format, or is refused in one line."""

import json
import warnings

import pytest
import torch

import sae
from sae.architectures import REGISTRY
from sae.formats import WRITERS
from steerkit.errors import InputError

D_IN, D_OUT, D_SAE = 12, 9, 40
SITE, TARGET = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
SETTINGS = {
    "guided": {"labels": ("mood=happy", "tense=past"), "k": 4},
    "transcoder": {"target_site": TARGET, "d_out": D_OUT, "k": 4},
    "crosscoder": {"widths": (5, 7), "k": 4},
    **{name: {"k": 4} for name in ("topk", "batch_topk", "matryoshka", "hierarchical_topk")},
}
CONFIGS = {name: config(D_SAE, **SETTINGS.get(name, {})) for name, config in REGISTRY.items()}
CONFIGS["transcoder with a skip connection"] = sae.Transcoder(
    D_SAE, k=4, target_site=TARGET, d_out=D_OUT, skip=True
)
EACH = pytest.mark.parametrize("name", CONFIGS)
PRUNED = pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])


def made(name, pruned=False):
    """An SAE as training leaves it, its parameters all random, with activations far from unit scale."""
    config = CONFIGS[name]
    generator = torch.Generator().manual_seed(4)
    x = 5 * torch.randn(256, D_IN, generator=generator) + 3
    model = config.build(D_IN)
    target = x @ torch.randn(D_IN, len(model.b_dec), generator=generator)
    model.initialise(x, target.mean(0), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        for key, buffer in model.named_buffers():
            if key == "smallest":
                buffer.copy_(torch.tensor([3.0, 1.0]))
    model.finish()
    model.fold_scale(0.3, 0.2 if isinstance(config, sae.Transcoder) else 0.3)
    model.metadata = {"model": "tiny", "site": SITE, "scale": 0.3}
    model = model.eval().requires_grad_(False)
    return (sae.prune(model, x, quantile=0.4) if pruned else model), x


def assert_same(model, other, x):
    latents, y = model.encode(x), model(x)
    assert 0 < float((latents > 0).float().mean()) < 1
    torch.testing.assert_close(other.encode(x), latents, rtol=1e-5, atol=1e-5 * float(latents.max()))
    torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-5 * float(y.std()))


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


def test_the_registry_is_whole():
    assert {config.name for config in CONFIGS.values()} == set(REGISTRY)


@EACH
@PRUNED
def test_saving_and_loading_gives_the_same(name, pruned, tmp_path):
    model, x = made(name, pruned)
    model.save(tmp_path)
    loaded = sae.load(tmp_path)
    assert_same(model, loaded, x)
    assert loaded.arch == model.arch
    assert loaded.metadata["site"] == SITE
    assert loaded.decode(loaded.encode(x)).shape == model.decode(model.encode(x)).shape
    loaded.save(tmp_path / "again")
    again = sae.load(tmp_path / "again")
    assert again.config == loaded.config
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values()))


@EACH
@PRUNED
def test_sae_lens_computes_the_same_from_what_is_saved(name, pruned, tmp_path, sae_lens):
    model, x = made(name, pruned)
    model.save(tmp_path)
    if name == "crosscoder":
        # sae-lens has none: it says so, rather than to read something else.
        with pytest.raises(Exception, match="crosscoder"):
            sae_lens.SAE.load_from_disk(tmp_path)
        return
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert_same(model, theirs, x)
    assert theirs.cfg.metadata.hook_name == SITE
    if "transcoder" in name:
        assert (theirs.cfg.d_out, theirs.cfg.apply_b_dec_to_input) == (D_OUT, False)
        assert theirs.cfg.metadata.hook_name_out == TARGET
        assert theirs.cfg.architecture().startswith("jumprelu_" if pruned else "topk_")


@pytest.mark.parametrize("name", [name for name in CONFIGS if "transcoder" in name])
@PRUNED
def test_a_transcoder_of_sae_lens_is_one_of_ours(name, pruned, tmp_path, sae_lens):
    """Also without what only steerkit writes into the file."""
    model, x = made(name, pruned)
    model.save(tmp_path / "ours")
    sae_lens.SAE.load_from_disk(tmp_path / "ours").save_model(tmp_path / "theirs")
    file = tmp_path / "theirs" / "cfg.json"
    config = json.loads(file.read_text())
    config["metadata"].pop("steerkit", None)
    file.write_text(json.dumps(config))
    loaded = sae.load(tmp_path / "theirs")
    assert_same(model, loaded, x)
    assert (loaded.config.target_site, loaded.config.d_out) == (TARGET, D_OUT)
    assert loaded.config.skip == model.config.skip


@EACH
@PRUNED
@pytest.mark.parametrize("to", WRITERS)
def test_every_conversion_computes_the_same_or_is_refused_in_one_line(name, pruned, to, tmp_path):
    model, x = made(name, pruned)
    model.save(tmp_path / "a")
    refusal = expected_refusal(name, model, to)
    if refusal is not None:
        with pytest.raises(InputError, match=refusal) as raised:
            sae.convert(tmp_path / "a", to, tmp_path / "b")
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "b").exists()
        return
    sae.convert(tmp_path / "a", to, tmp_path / "b")
    converted = sae.load(tmp_path / "b")
    assert_same(model, converted, x)
    if to == "jumprelu":
        assert converted.arch == "jumprelu"
    sae.convert(tmp_path / "b", "steerkit", tmp_path / "c")
    assert_same(model, sae.load(tmp_path / "c"), x)


def expected_refusal(name, model, to):
    """What the refusal says, None where there is none."""
    if to == "steerkit" or (to == "saelens" and name != "crosscoder"):
        return None
    if name == "crosscoder":
        return "crosscoder"
    if to == "sparsify":
        return None if model.saelens_architecture == "topk" else "TopK SAEs only"
    if "transcoder" in name:
        return "transcoder"
    if to == "jumprelu" and model.saelens_architecture == "topk":
        return "limit to k latents a token would be lost"
    return None
