"""SAEs read and written in the formats of other toolkits compute the same function there and here."""

import json
import warnings

import pytest
import torch

import sae
from sae import formats
from sae.architectures.jumprelu import JumpReLU
from steerkit.errors import CheckpointError, InputError

D_IN, D_SAE = 12, 40
CONFIGS = [
    sae.L1(D_SAE, target_l0=6.0),
    sae.SqrtL1(D_SAE, target_l0=6.0),
    sae.Gated(D_SAE, target_l0=6.0),
    sae.TopK(D_SAE, k=4),
    sae.HierarchicalTopK(D_SAE, k=4),
    sae.PAnneal(D_SAE, target_l0=6.0),
]
EACH = pytest.mark.parametrize(
    "config", [*CONFIGS, JumpReLU(D_SAE, target_l0=6.0)], ids=lambda config: config.name
)
SITE = "blocks.2.hook_resid_post"


def made(config, pruned=False):
    """An SAE with random parameters and raw activations for it, far from unit scale."""
    generator = torch.Generator().manual_seed(4)
    x = 5 * torch.randn(256, D_IN, generator=generator) + 3
    model = config.build(D_IN)
    model.initialise(x, x.mean(0), generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        if pruned or config.name == "jumprelu":
            model.threshold = torch.rand(D_SAE, generator=generator)
    model.fold_scale(0.3)
    model.metadata = {"model": "tiny", "site": SITE, "scale": 0.3}
    return model.eval().requires_grad_(False), x


def assert_same(model, other, x):
    torch.testing.assert_close(other.encode(x), model.encode(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@EACH
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_saving_and_loading_gives_the_same_sae(config, pruned, tmp_path):
    model, x = made(config, pruned)
    model.save(tmp_path)
    loaded = sae.load(tmp_path)
    assert_same(model, loaded, x)
    assert loaded.arch == model.arch == ("jumprelu" if pruned else config.name)
    assert {key: loaded.metadata[key] for key in model.metadata} == model.metadata
    if not pruned:
        assert loaded.config == config
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values())
        )
    elif config.name != "jumprelu":
        assert loaded.metadata["trained_as"]["name"] == config.name


@EACH
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_sae_lens_computes_the_same_from_our_files(config, pruned, tmp_path, sae_lens):
    model, x = made(config, pruned)
    model.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == ("jumprelu" if pruned else config.saelens_architecture)
    assert theirs.cfg.metadata.hook_name == SITE
    assert_same(model, theirs, x)


def training_sae(sae_lens, architecture, **options):
    from sae_lens.saes import gated_sae, standard_sae, topk_sae

    classes = {
        "standard": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig),
        "gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig),
        "topk": (topk_sae.TopKTrainingSAE, topk_sae.TopKTrainingSAEConfig),
    }
    make, configure = classes[architecture]
    return make(configure(d_in=D_IN, d_sae=D_SAE, **options))


def trained_by_sae_lens(sae_lens, architecture, **options):
    """One of theirs after a few steps of their own objective, all parameters away from zero."""
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(0)
    theirs = training_sae(sae_lens, architecture, **options)
    x = 2 * torch.randn(256, D_IN) + 1
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    optimiser = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    for step in range(5):
        coefficients = dict.fromkeys(theirs.get_coefficients(), 1.0)
        dead = torch.zeros(D_SAE, dtype=torch.bool)
        out = theirs.training_forward_pass(TrainStepInput(x, coefficients, dead, step, False))
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return theirs, x


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": "expected_average_only_in"}),
        ("gated", {}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": False}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
    ],
    ids=str,
)
def test_what_sae_lens_trained_computes_the_same_here(architecture, options, tmp_path, sae_lens):
    theirs, x = trained_by_sae_lens(sae_lens, architecture, **options)
    theirs.save_inference_model(tmp_path)
    oracle = sae_lens.SAE.load_from_disk(tmp_path)
    loaded = sae.load(tmp_path)
    assert loaded.arch == {"standard": "l1"}.get(architecture, architecture)
    with torch.no_grad():
        assert_same(oracle, loaded, x)


def test_half_precision_files_are_read_into_float32(tmp_path, sae_lens):
    theirs, x = trained_by_sae_lens(sae_lens, "gated")
    theirs.to(dtype=torch.bfloat16)
    theirs.save_inference_model(tmp_path)
    oracle = sae_lens.SAE.load_from_disk(tmp_path, dtype="float32")
    assert sae.load(tmp_path).dtype == torch.float32
    with torch.no_grad():
        assert_same(oracle, sae.load(tmp_path), x)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_normalisation_token_by_token_is_refused(normalisation, tmp_path, sae_lens):
    theirs, _ = trained_by_sae_lens(sae_lens, "standard")
    theirs.save_inference_model(tmp_path)
    edit(tmp_path / "cfg.json", normalize_activations=normalisation)
    with pytest.raises(InputError, match=normalisation):
        sae.load(tmp_path)


@EACH
@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "sparsify", "steerkit"])
def test_a_round_trip_through_every_format_changes_nothing(config, to, tmp_path):
    model, x = made(config)
    model.save(tmp_path / "a")
    if to == "sparsify" and config.saelens_architecture != "topk":
        with pytest.raises(InputError, match="TopK SAEs only"):
            sae.convert(tmp_path / "a", to, tmp_path / "b")
        return
    sae.convert(tmp_path / "a", to, tmp_path / "b")
    assert_same(model, sae.load(tmp_path / "b"), x)
    sae.convert(tmp_path / "b", "steerkit", tmp_path / "c")
    assert_same(model, sae.load(tmp_path / "c"), x)


def dictionary_learning_forward(stored, x):
    """dictionary_learning's AutoEncoder, GatedAutoEncoder, AutoEncoderTopK and JumpReluAutoEncoder, as their source has them."""
    if "W_enc" in stored:
        pre = x @ stored["W_enc"] + stored["b_enc"]
        return torch.relu(pre * (pre > stored["threshold"])) @ stored["W_dec"] + stored["b_dec"]
    bias = stored.get("decoder_bias", stored.get("bias", stored.get("b_dec")))
    pre = (x - bias) @ stored["encoder.weight"].T + stored.get("encoder.bias", 0)
    if "r_mag" in stored:
        latents = (pre + stored["gate_bias"] > 0) * torch.relu(
            stored["r_mag"].exp() * pre + stored["mag_bias"]
        )
    else:
        latents = torch.relu(pre)
    if "k" in stored:
        top = latents.topk(int(stored["k"]), dim=-1)
        latents = torch.zeros_like(latents).scatter_(-1, top.indices, top.values)
    return latents @ stored["decoder.weight"].T + bias


@EACH
def test_dictionary_learning_computes_the_same_from_our_files(config, tmp_path):
    model, x = made(config)
    model.save(tmp_path / "a")
    sae.convert(tmp_path / "a", "dictionary_learning", tmp_path / "b")
    stored = torch.load(tmp_path / "b/ae.pt", weights_only=True)
    torch.testing.assert_close(dictionary_learning_forward(stored, x), model(x), rtol=1e-5, atol=1e-4)
    trainer = json.loads((tmp_path / "b/config.json").read_text())["trainer"]
    assert (trainer["activation_dim"], trainer["dict_size"]) == (D_IN, D_SAE)


def test_sparsify_computes_the_same_from_our_files(tmp_path):
    from safetensors.torch import load_file

    model, x = made(CONFIGS[3])
    model.save(tmp_path / "a")
    sae.convert(tmp_path / "a", "sparsify", tmp_path / "b")
    stored, config = (
        load_file(tmp_path / "b/sae.safetensors"),
        json.loads((tmp_path / "b/cfg.json").read_text()),
    )
    pre = torch.relu((x - stored["b_dec"]) @ stored["encoder.weight"].T + stored["encoder.bias"])
    top = pre.topk(config["k"], dim=-1)
    reconstruction = (
        torch.zeros_like(pre).scatter_(-1, top.indices, top.values) @ stored["W_dec"] + stored["b_dec"]
    )
    torch.testing.assert_close(reconstruction, model(x), rtol=1e-5, atol=1e-4)
    assert (config["d_in"], config["num_latents"]) == (D_IN, D_SAE)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_tensor(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "sae_weights.safetensors")
    del tensors["W_dec"]
    save_file(tensors, path / "sae_weights.safetensors")


def break_value(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "sae_weights.safetensors")
    tensors["W_dec"][0, 0] = float("nan")
    save_file(tensors, path / "sae_weights.safetensors")


def truncate(path):
    file = path / "sae_weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged"),
        (drop_tensor, "no tensor 'W_dec'"),
        (break_value, "NaN or inf"),
        (lambda path: edit(path / "cfg.json", d_sae=41), "the tensor 'W_enc' is"),
        (lambda path: (path / "cfg.json").write_text("{"), "damaged"),
        (lambda path: (path / "cfg.json").write_text("[]"), "damaged"),
        (lambda path: (path / "cfg.json").unlink(), "does not exist"),
        (lambda path: edit(path / "cfg.json", k="many"), "damaged"),
    ],
)
def test_damaged_files_are_refused_in_one_line(damage, message, tmp_path):
    made(CONFIGS[3])[0].save(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as raised:
        sae.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_what_is_no_sae_is_refused_in_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no SAE"):
        sae.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        sae.load(tmp_path / "nowhere")
    made(CONFIGS[0])[0].save(tmp_path / "a")
    with pytest.raises(InputError, match="Did you mean 'sparsify'"):
        sae.convert(tmp_path / "a", "sparsifi", tmp_path / "b")
    with pytest.raises(InputError, match="is not empty"):
        sae.convert(tmp_path / "a", "saelens", tmp_path / "a")
    edit(tmp_path / "a/cfg.json", architecture="temporal", metadata={})
    with pytest.raises(InputError, match="'temporal' cannot be read"):
        sae.load(tmp_path / "a")


class Evil:
    def __reduce__(self):
        return (open, ("/tmp/steerkit-was-here", "w"))


def test_a_foreign_file_that_holds_more_than_tensors_is_not_unpickled(tmp_path):
    torch.save({"encoder.weight": torch.zeros(3, 2), "x": Evil()}, tmp_path / "ae.pt")
    with pytest.raises(CheckpointError, match="tensors alone"):
        formats.load(tmp_path)
