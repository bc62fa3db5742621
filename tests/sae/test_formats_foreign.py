"""SAEs of other people: every layout computes here what it computes there, and bad or evil files do nothing but an error."""

import fnmatch
import inspect
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae import formats
from sae.formats.base import model_name, site_name
from sae.pretrained import attach
from steerkit.errors import CheckpointError, InputError, SteerkitError

D_IN, D_SAE = 12, 40
GEMMA = "google/gemma-scope-9b-pt-att/layer_7/width_16k/average_l0_30"
LLAMA = "fnlp/Llama3_1-8B-Base-LXR-8x/Llama3_1-8B-Base-L3R-8x"


@pytest.fixture(scope="module")
def sae_lens():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sae_lens")


@pytest.fixture
def x():
    return 5 * torch.randn(256, D_IN, generator=torch.Generator().manual_seed(1)) + 3


def weights(unit_decoder=True):
    """Random weights under our names, with a b_dec far from zero."""
    generator = torch.Generator().manual_seed(4)
    W_dec = torch.randn(D_SAE, D_IN, generator=generator)
    norms = W_dec.norm(dim=1, keepdim=True)
    made = {
        "W_enc": torch.randn(D_IN, D_SAE, generator=generator) / 3,
        "W_dec": W_dec / norms if unit_decoder else W_dec,
        "b_enc": torch.randn(D_SAE, generator=generator),
        "b_dec": 2 * torch.randn(D_IN, generator=generator) + 1,
        "threshold": torch.rand(D_SAE, generator=generator),
    }
    return {name: tensor.contiguous() for name, tensor in made.items()}


def jumprelu(w, x):
    """Latents and reconstruction of a JumpReLU SAE that subtracts nothing from its input."""
    pre = x @ w["W_enc"] + w["b_enc"]
    latents = torch.relu(pre) * (pre > w["threshold"])
    return latents, latents @ w["W_dec"] + w["b_dec"]


def assert_computes(model, expected, x):
    latents, reconstruction = expected
    assert 0 < float((latents > 0).float().mean()) < 1
    torch.testing.assert_close(model.encode(x), latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), reconstruction, rtol=1e-5, atol=1e-5)


# what each toolkit writes


def write_gemma_scope(path):
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / "params.npz", **{name: tensor.numpy() for name, tensor in weights().items()})
    return weights()


def write_gemma_scope_2(path, **settings):
    path.mkdir(parents=True, exist_ok=True)
    w = weights()
    save_file({n.replace("W_", "w_"): t for n, t in w.items()}, path / "params.safetensors")
    config = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-pt",
        "hf_hook_point_in": "model.layers.5.output",
    }
    (path / "config.json").write_text(json.dumps(config | settings))
    return w


def write_llama_scope(path, unit_decoder=True, norm=9.0, **settings):
    (path / "checkpoints").mkdir(parents=True, exist_ok=True)
    w = weights(unit_decoder)
    stored = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T,
        "decoder.bias": w["b_dec"],
    }
    save_file({n: t.contiguous() for n, t in stored.items()}, path / "checkpoints/final.safetensors")
    config = {
        "hook_point_in": "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": D_IN,
        "d_sae": D_SAE,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.7,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
    }
    (path / "hyperparams.json").write_text(json.dumps(config | settings))
    return w


def write_dictionary(path, name="BatchTopKSAE"):
    path.mkdir(parents=True, exist_ok=True)
    w = weights()
    linear = {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.weight": w["W_dec"].T.contiguous(),
    }
    count = {"k": torch.tensor(5, dtype=torch.int), "threshold": torch.tensor(0.6)}
    stored = {
        "BatchTopKSAE": {**linear, "b_dec": w["b_dec"], **count},
        "AutoEncoderTopK": {**linear, "b_dec": w["b_dec"], **count},
        "MatryoshkaBatchTopKSAE": {**w, **count, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": w,
        "AutoEncoder": {**linear, "bias": w["b_dec"]},
        "AutoEncoderNew": {**linear, "decoder.bias": w["b_dec"]},
    }[name]
    torch.save(stored, path / "ae.pt")
    trainer = {
        "dict_class": name,
        "lm_name": "org/tiny",
        "submodule_name": "resid_post_layer_3",
        "layer": 3,
        "k": 5,
    }
    (path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    return w


def write_sparsify(path):
    path.mkdir(parents=True, exist_ok=True)
    w = weights()
    stored = {
        "encoder.weight": w["W_enc"].T,
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file({n: t.contiguous() for n, t in stored.items()}, path / "sae.safetensors")
    (path / "cfg.json").write_text(
        json.dumps({"activation": "topk", "k": 5, "d_in": D_IN, "num_latents": D_SAE})
    )
    (path.parent / "config.json").write_text(json.dumps({"model": "org/tiny"}))
    return w


WRITE = {
    "gemma_scope": (write_gemma_scope, "params.npz"),
    "gemma_scope_2": (write_gemma_scope_2, "params.safetensors"),
    "llama_scope": (write_llama_scope, "checkpoints/final.safetensors"),
    "dictionary_learning": (write_dictionary, "ae.pt"),
    "sparsify": (write_sparsify, "sae.safetensors"),
}
FOREIGN = pytest.mark.parametrize("name", WRITE)


# the same function


def test_gemma_scope_computes_the_same_here(tmp_path, x):
    path = tmp_path / GEMMA
    expected = jumprelu(write_gemma_scope(path), x)
    for source in (path, path / "params.npz"):
        loaded = sae.load(source)
        assert_computes(loaded, expected, x)
        assert loaded.arch == loaded.saelens_architecture == "jumprelu"
        assert loaded.metadata["model"] == "google/gemma-2-9b"
        assert loaded.metadata["site"] == "blocks.7.attn.hook_z"


def test_sae_lens_computes_from_gemma_scope_what_we_do(tmp_path, x, sae_lens):
    w = write_gemma_scope(tmp_path)
    theirs = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(D_IN, D_SAE, apply_b_dec_to_input=False))
    theirs.load_state_dict(w)
    with torch.no_grad():
        assert_computes(sae.load(tmp_path), (theirs.encode(x), theirs(x)), x)


def test_gemma_scope_2_computes_the_same_here(tmp_path, x):
    expected = jumprelu(write_gemma_scope_2(tmp_path / "resid_post" / "layer_5_width_16k_l0_big"), x)
    loaded = sae.load(tmp_path / "resid_post" / "layer_5_width_16k_l0_big")
    assert_computes(loaded, expected, x)
    assert (loaded.metadata["model"], loaded.metadata["site"]) == (
        "google/gemma-3-1b-pt",
        "blocks.5.hook_resid_post",
    )


def llama_scope_forward(w, x, norm, counts, theta=0.7):
    """Its authors' own inference: constants folded for raw activations, decoder rows to unit norm, then the threshold; latents
    brought back to the units of normalised activations and of the decoder in the file."""
    scale = D_IN**0.5 / norm
    W_enc, W_dec, b_enc, b_dec = w["W_enc"], w["W_dec"], w["b_enc"] / scale, w["b_dec"] / scale
    norms = W_dec.norm(dim=1) if counts else torch.ones(D_SAE)
    pre = (x @ W_enc + b_enc) * norms
    latents = pre.where(pre > theta, torch.zeros(()))
    return scale * latents / norms, (latents / norms) @ W_dec + b_dec


@pytest.mark.parametrize("counts", [True, False], ids=["decoder norm counts", "it does not"])
def test_llama_scope_computes_the_same_here(counts, tmp_path, x):
    w = write_llama_scope(tmp_path / LLAMA, unit_decoder=False, sparsity_include_decoder_norm=counts)
    loaded = sae.load(tmp_path / LLAMA)
    assert_computes(loaded, llama_scope_forward(w, x, 9.0, counts), x)
    assert (loaded.metadata["model"], loaded.metadata["site"]) == (
        "meta-llama/Llama-3.1-8B",
        "blocks.3.hook_resid_post",
    )


def test_llama_scope_before_its_conversion_to_jumprelu_is_topk(tmp_path, x):
    w = write_llama_scope(tmp_path, unit_decoder=False, act_fn="topk", jump_relu_threshold=0.0)
    scale, norms = D_IN**0.5 / 9.0, w["W_dec"].norm(dim=1)
    strength = torch.relu(scale * x @ w["W_enc"] + w["b_enc"]) * norms
    top = strength.topk(5, dim=-1)
    latents = torch.zeros_like(strength).scatter_(-1, top.indices, top.values)
    expected = (latents / norms @ w["W_dec"] + w["b_dec"]) / scale
    torch.testing.assert_close(sae.load(tmp_path)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        (write_llama_scope, {"hook_point_out": "blocks.3.hook_mlp_out"}, "transcoder"),
        (write_llama_scope, {"use_glu_encoder": True}, "use_glu_encoder"),
        (write_llama_scope, {"norm_activation": "token-wise"}, "token-wise"),
        (write_llama_scope, {"act_fn": "batchtopk"}, "batchtopk"),
        (write_gemma_scope_2, {"hf_hook_point_out": "model.layers.5.mlp.output"}, "transcoder"),
        (write_gemma_scope_2, {"affine_connection": True}, "transcoder"),
    ],
)
def test_what_cannot_be_expressed_is_refused_by_name(write, settings, message, tmp_path):
    write(tmp_path, **settings)
    with pytest.raises(InputError, match=message):
        sae.load(tmp_path)


def dictionary_forward(name, w, x):
    """Latents and reconstruction as dictionary_learning's source has them."""
    if name in ("JumpReluAutoEncoder", "AutoEncoderNew"):
        return jumprelu(w if name.startswith("Jump") else {**w, "threshold": torch.zeros(D_SAE)}, x)
    latents = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    if name == "AutoEncoderTopK":
        top = latents.topk(5, dim=-1)
        latents = torch.zeros_like(latents).scatter_(-1, top.indices, top.values)
    elif name != "AutoEncoder":
        latents = latents * (latents > 0.6)
    return latents, latents @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder",
    ],
)
def test_dictionary_learning_computes_the_same_here(name, tmp_path, x):
    loaded_from = write_dictionary(tmp_path, name)
    loaded = sae.load(tmp_path)
    assert_computes(loaded, dictionary_forward(name, loaded_from, x), x)
    assert (loaded.metadata["model"], loaded.metadata["site"]) == ("org/tiny", "blocks.3.hook_resid_post")


def test_a_dictionary_of_an_unknown_kind_is_refused_by_name(tmp_path):
    write_dictionary(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    with pytest.raises(InputError, match="CrossCoder"):
        sae.load(tmp_path)


def test_sparsify_computes_the_same_here(tmp_path, x):
    w = write_sparsify(tmp_path / "layers.5")
    loaded = sae.load(tmp_path / "layers.5")
    assert_computes(loaded, dictionary_forward("AutoEncoderTopK", w, x), x)
    assert (loaded.metadata["model"], loaded.metadata["site"]) == ("org/tiny", "blocks.5.hook_resid_post")


@FOREIGN
@pytest.mark.parametrize("to", ["saelens", "dictionary_learning", "jumprelu"])
def test_every_foreign_sae_converts_without_a_change(name, to, tmp_path, x, sae_lens):
    WRITE[name][0](tmp_path / "a")
    model = sae.load(tmp_path / "a")
    if (name, to) == ("sparsify", "jumprelu"):
        with pytest.raises(InputError, match="limit to k latents"):
            sae.convert(tmp_path / "a", to, tmp_path / "b")
        return
    sae.convert(tmp_path / "a", to, tmp_path / "b")
    again = sae.load(tmp_path / "b")
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-5)
    assert (again.metadata["model"], again.metadata["site"]) == (
        model.metadata["model"],
        model.metadata["site"],
    )
    if to != "dictionary_learning":
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "b")
        with torch.no_grad():
            assert_computes(model, (theirs.encode(x), theirs(x)), x)


def test_gated_exports_as_jumprelu_exactly(tmp_path, x, sae_lens):
    gated = sae.Gated(D_SAE, target_l0=6.0).build(D_IN)
    generator = torch.Generator().manual_seed(0)
    gated.initialise(x, x.mean(0), generator)
    with torch.no_grad():
        for parameter in gated.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    gated.save(tmp_path / "gated")
    sae.convert(tmp_path / "gated", "jumprelu", tmp_path / "jumprelu")
    loaded = sae.load(tmp_path / "jumprelu")
    assert loaded.arch == "jumprelu"
    assert loaded.metadata["trained_as"]["name"] == "gated"
    with torch.no_grad():
        assert_computes(loaded, (gated.encode(x), gated(x)), x)
        theirs = sae_lens.SAE.load_from_disk(tmp_path / "jumprelu")
        assert_computes(loaded, (theirs.encode(x), theirs(x)), x)


def test_a_conversion_that_changes_the_function_does_not_pass_as_done(tmp_path, monkeypatch):
    def wrong(model, out):
        model.W_dec *= 1.01
        model.save(out)
        model.W_dec /= 1.01

    monkeypatch.setitem(formats.WRITERS, "steerkit", wrong)
    write_gemma_scope(tmp_path / "a")
    with pytest.raises(SteerkitError, match="does not compute"):
        sae.convert(tmp_path / "a", "steerkit", tmp_path / "b")


def test_a_config_of_sae_lens_before_6_is_read_as_sae_lens_reads_it(tmp_path, x, sae_lens):
    w = weights()
    save_file(
        {name: w[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}, tmp_path / "sae_weights.safetensors"
    )
    config = {
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "torch.float32",
        "device": "cpu",
        "model_name": "gpt2-small",
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 4},
        "apply_b_dec_to_input": False,
        "normalize_activations": False,
        "prepend_bos": True,
        "context_size": 128,
    }
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "dtype": "float32"}))
    theirs, loaded = sae_lens.SAE.load_from_disk(tmp_path), sae.load(tmp_path)
    with torch.no_grad():
        assert_computes(loaded, (theirs.encode(x), theirs(x)), x)
    assert loaded.metadata["model"] == "openai-community/gpt2"
    assert loaded.metadata["site"] == theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_pre"
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "activation_fn_str": "tanh-relu"}))
    with pytest.raises(InputError, match="tanh-relu"):
        sae.load(tmp_path)


def test_names_become_ours():
    assert site_name("resid_post_layer_12") == site_name("model.layers.12") == "blocks.12.hook_resid_post"
    assert site_name("transformer.h.3") == "blocks.3.hook_resid_post"
    assert site_name("layers.3.mlp") == "layers.3.mlp"
    assert model_name("gemma-2-2b") == "google/gemma-2-2b"
    assert model_name("org/gemma-2-2b") == "org/gemma-2-2b"


# SAELens's releases


@pytest.fixture
def release(tmp_path, monkeypatch, sae_lens):
    """A function that lets sae-lens find a directory's files in place of the Hugging Face hub."""

    def serve(directory):
        def download(repo_id, filename, subfolder=None, **_):
            return str(directory / (subfolder or "") / filename)

        monkeypatch.setattr(sae_lens.loading.pretrained_sae_loaders, "hf_hub_download", download)

    return serve


def test_a_release_of_sae_lens_computes_the_same_here(tmp_path, x, release, sae_lens):
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    factor = get_norm_scaling_factor("llama_scope_lxr_8x", "l3r_8x")
    write_llama_scope(tmp_path / "Llama3_1-8B-Base-L3R-8x", norm=D_IN**0.5 / factor)
    release(tmp_path)
    theirs = sae_lens.SAE.from_pretrained("llama_scope_lxr_8x", "l3r_8x", dtype="float32")
    loaded = sae.load("saelens:llama_scope_lxr_8x/l3r_8x")
    x = x / factor
    with torch.no_grad():
        assert_computes(loaded, (theirs.encode(x), theirs(x)), x)
        own = sae.load(tmp_path / "Llama3_1-8B-Base-L3R-8x")
        assert_computes(own, (theirs.encode(x), theirs(x)), x)
    assert loaded.metadata["model"] == "meta-llama/Llama-3.1-8B"
    assert loaded.metadata["site"] == "blocks.3.hook_resid_post"
    assert loaded.metadata["loaded_from"] == "saelens:llama_scope_lxr_8x/l3r_8x"


def test_a_release_that_is_wrong_or_out_of_reach_is_refused_in_one_line(tmp_path, release, monkeypatch):
    with pytest.raises(InputError, match="Did you mean 'llama_scope_lxr_8x'"):
        sae.load("saelens:llama_scope_lxr_8/l3r_8x")
    with pytest.raises(InputError, match=r"no SAE 'l3r_9x'.* Did you mean"):
        sae.load("saelens:llama_scope_lxr_8x/l3r_9x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="could not be fetched") as raised:
        sae.load("saelens:llama_scope_lxr_8x/l3r_8x")
    assert "\n" not in str(raised.value)


# Hugging Face repositories


class FakeHub:
    """A directory in place of the hub; what is asked of it goes through huggingface_hub's own names."""

    def __init__(self, path, monkeypatch):
        self.path, self.fetched = path, []
        hub, real = self, huggingface_hub.HfApi
        for_real = {name: inspect.signature(getattr(real, name)) for name in ("create_repo", "upload_folder")}
        for_real["snapshot_download"] = inspect.signature(huggingface_hub.snapshot_download)

        class Api:
            def __init__(self, token=None):
                pass

            def create_repo(self, repo_id, **options):
                for_real["create_repo"].bind(self, repo_id, **options)
                (hub.path / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])

            def upload_folder(self, *, repo_id, folder_path, path_in_repo, **options):
                given = {"repo_id": repo_id, "folder_path": folder_path, "path_in_repo": path_in_repo}
                for_real["upload_folder"].bind(self, **given, **options)
                target = hub.path / repo_id / (path_in_repo or "")
                shutil.copytree(folder_path, target, dirs_exist_ok=True)

        def snapshot_download(repo_id, revision, allow_patterns):
            for_real["snapshot_download"].bind(repo_id, revision=revision, allow_patterns=allow_patterns)
            self.fetched.append((repo_id, revision))
            snapshot = hub.path / "cache" / repo_id
            for file in (hub.path / repo_id).rglob("*"):
                name = file.relative_to(hub.path / repo_id).as_posix()
                if file.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                    (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, snapshot / name)
            return str(snapshot)

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


@pytest.mark.parametrize("folder", ["", "gated/layer_2"])
def test_what_is_pushed_is_pulled_again(folder, tmp_path, x, monkeypatch):
    hub = FakeHub(tmp_path, monkeypatch)
    write_gemma_scope(tmp_path / GEMMA)
    model = sae.load(tmp_path / GEMMA)
    source = sae.push_to_hub(model, "me/my-saes", folder)
    assert source == "hf://me/my-saes" + ("/" + folder if folder else "")
    (hub.path / "me/my-saes" / folder / "huge.bin").write_bytes(b"no one needs it")
    for name in (source, f"me/my-saes:{folder}"):
        again = sae.load(name)
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values())
        )
        assert {key: again.metadata[key] for key in model.metadata} == model.metadata
        assert again.metadata["loaded_from"] == name
    assert not list((hub.path / "cache").rglob("huge.bin"))
    card = (hub.path / "me/my-saes" / folder / "README.md").read_text()
    assert "base_model: google/gemma-2-9b" in card
    assert repr(source) in card


@FOREIGN
def test_every_format_is_found_in_a_repository(name, tmp_path, x, monkeypatch):
    hub = FakeHub(tmp_path, monkeypatch)
    WRITE[name][0](tmp_path / "org/repo/some/layers.5")
    loaded = sae.load("hf://org/repo@v1/some/layers.5")
    torch.testing.assert_close(loaded(x), sae.load(tmp_path / "org/repo/some/layers.5")(x))
    assert hub.fetched == [("org/repo", "v1")]


def test_a_repository_that_is_wrong_or_out_of_reach_is_refused_in_one_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        for source in ("hf://org/nothing-of-the-kind/a", "org/nothing-of-the-kind:a"):
            with pytest.raises(InputError, match="could not be fetched") as raised:
                sae.load(source)
            assert "\n" not in str(raised.value)
        model = sae.L1(D_SAE, target_l0=4.0).build(D_IN)
        with pytest.raises(InputError, match="could not be written"):
            sae.push_to_hub(model, "org/nothing-of-the-kind")
    with pytest.raises(InputError, match="write user/repo"):
        sae.push_to_hub(model, "just-a-name")
    with pytest.raises(InputError, match="names no repository"):
        sae.load("hf://just-a-name")
    with pytest.raises(InputError, match="inside the repository"):
        sae.load("hf://a/b/../../etc")
    FakeHub(tmp_path, monkeypatch)
    (tmp_path / "org/repo").mkdir(parents=True)
    with pytest.raises(InputError, match="no SAE in 'a'"):
        sae.load("hf://org/repo/a")


# bad files


def tensors_of(file):
    if file.suffix == ".npz":
        return {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    return torch.load(file, weights_only=True) if file.suffix == ".pt" else load_file(file)


def rewrite(file, tensors):
    if file.suffix == ".npz":
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".pt":
        torch.save(tensors, file)
    else:
        save_file(tensors, file)


def bias_of(tensors):
    return next(name for name in tensors if name in ("b_dec", "decoder.bias"))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def garble(file):
    file.write_bytes(bytes(range(256)) * 8)


def empty(file):
    file.write_bytes(b"")


def drop(file):
    tensors = tensors_of(file)
    del tensors[bias_of(tensors)]
    rewrite(file, tensors)


def resize(file):
    tensors = tensors_of(file)
    name = bias_of(tensors)
    rewrite(file, {**tensors, name: tensors[name][:-1].clone()})


def fold_up(file):
    tensors = tensors_of(file)
    name = bias_of(tensors)
    rewrite(file, {**tensors, name: tensors[name].view(2, -1).clone()})


def swap(file):
    """Encoder and decoder exchanged."""
    tensors = tensors_of(file)
    a, b = sorted(name for name, tensor in tensors.items() if tensor.ndim == 2)
    rewrite(file, {**tensors, a: tensors[a].T.contiguous()})


def poison(file):
    tensors = tensors_of(file)
    tensors[bias_of(tensors)][0] = float("nan")
    rewrite(file, tensors)


@FOREIGN
@pytest.mark.parametrize("damage", [truncate, garble, empty, drop, resize, fold_up, swap, poison])
def test_damaged_weights_are_refused_in_one_line(name, damage, tmp_path):
    write, file = WRITE[name]
    write(tmp_path / "a")
    damage(tmp_path / "a" / file)
    with pytest.raises((CheckpointError, InputError)) as raised:
        sae.load(tmp_path / "a")
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("name", ["llama_scope", "dictionary_learning", "sparsify", "gemma_scope_2"])
@pytest.mark.parametrize("text", ["{", "[]", '"x"', ""])
def test_damaged_settings_are_refused_in_one_line(name, text, tmp_path):
    WRITE[name][0](tmp_path / "a")
    next((tmp_path / "a").glob("*.json")).write_text(text)
    with pytest.raises(CheckpointError) as raised:
        sae.load(tmp_path / "a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama_scope", {"jump_relu_threshold": "high"}),
        ("llama_scope", {"dataset_average_activation_norm": None}),
        ("llama_scope", {"dataset_average_activation_norm": {"in": 0.0}}),
        ("llama_scope", {"dataset_average_activation_norm": {"in": float("nan")}}),
        ("llama_scope", {"hook_point_in": 3, "hook_point_out": 3}),
        ("dictionary_learning", {"trainer": []}),
        ("dictionary_learning", {"trainer": {"dict_class": []}}),
        ("dictionary_learning", {"trainer": {"dict_class": "AutoEncoder"}}),
        ("sparsify", {"k": "many"}),
        ("sparsify", {"k": 41}),
        ("sparsify", {"k": None}),
    ],
    ids=str,
)
def test_edited_settings_are_refused_in_one_line(name, settings, tmp_path):
    WRITE[name][0](tmp_path / "a")
    file = next((tmp_path / "a").glob("*.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    with pytest.raises(InputError) as raised:
        sae.load(tmp_path / "a")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "stored", [torch.zeros(3), [torch.zeros(3)], {"a": 1}, {}, {1: torch.zeros(3)}], ids=str
)
def test_a_file_of_something_else_is_refused_in_one_line(stored, tmp_path):
    torch.save(stored, tmp_path / "ae.pt")
    with pytest.raises(InputError) as raised:
        sae.load(tmp_path)
    assert "\n" not in str(raised.value)


class Evil:
    """Makes the file that it names when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


def evil_pt(path, marker):
    torch.save({"encoder.weight": torch.zeros(3, 2), "x": Evil(marker)}, path / "ae.pt")


def evil_raw_pickle(path, marker):
    (path / "ae.pt").write_bytes(pickle.dumps(Evil(marker)))


def evil_settings_in_pt(path, marker):
    torch.save({**weights(), "k": Evil(marker)}, path / "ae.pt")


def evil_npz(path, marker):
    write_gemma_scope(path)
    arrays = {name: tensor.numpy() for name, tensor in weights().items()}
    np.savez(path / "params.npz", **{**arrays, "b_dec": np.array([Evil(marker)], dtype=object)})


def evil_pickle_named_npz(path, marker):
    (path / "params.npz").write_bytes(pickle.dumps(Evil(marker)))


def evil_pickle_named_safetensors(path, marker):
    write_llama_scope(path)
    (path / "checkpoints/final.safetensors").write_bytes(pickle.dumps(Evil(marker)))


@pytest.mark.parametrize(
    "write",
    [
        evil_pt,
        evil_raw_pickle,
        evil_settings_in_pt,
        evil_npz,
        evil_pickle_named_npz,
        evil_pickle_named_safetensors,
    ],
)
def test_a_file_with_pickled_code_is_refused_and_nothing_is_run(write, tmp_path):
    (tmp_path / "a").mkdir()
    marker = tmp_path / "was-here"
    write(tmp_path / "a", marker)
    with pytest.raises(CheckpointError) as raised:
        sae.load(tmp_path / "a")
    assert "\n" not in str(raised.value)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Evil(marker)))
    assert marker.exists(), "the pickle is a real one"


# evaluated and drawn like our own


def foreign_run(tmp_path, model, x):
    """A dictionary_learning SAE of a tiny model's activations, and text for it."""
    config = sae.TopK(30, k=4)
    made = config.build(x.shape[1])
    made.initialise(x, x.mean(0), torch.Generator().manual_seed(0))
    made.save(tmp_path / "own")
    sae.convert(tmp_path / "own", "dictionary_learning", tmp_path / "foreign")
    (tmp_path / "text.txt").write_text("\n".join(["The fox is happy .", "Tom has the red ball ."] * 40))
    return tmp_path / "foreign", tmp_path / "text.txt"


def test_a_foreign_sae_is_evaluated_and_drawn_like_a_run(tmp_path, tiny_llama):
    model, site = tiny_llama(), "blocks.1.hook_resid_post"
    x = model.activations(["The fox is happy .", "Tom has the red ball ."] * 10, sites=[site])[site]
    source, text = foreign_run(tmp_path, model, x)
    with pytest.raises(InputError, match="which site it is for: give it"):
        sae.open_run(source, model=model, data=text)
    with pytest.raises(InputError, match="which model it is for: give it"):
        sae.open_run(source, site=site, data=text)
    run = attach(sae.open_run(source, model=model, data=text, site=site), model)
    direct = sae.evaluate(model, sae.load(source), run.held_out(), site)
    assert run.evaluate().fvu == direct.fvu
    page = run.dashboard(latents="top:3", tokens=500, quiet=True).save(tmp_path / "dash")
    assert page.exists()
    with pytest.raises(SteerkitError):
        attach(sae.open_run(source, model=model, data=text, site="blocks.1.mlp.hook_post"), model)


def test_what_an_sae_of_ours_says_of_itself_needs_not_be_said_again(tmp_path, tiny_llama):
    model, site = tiny_llama(), "blocks.1.hook_resid_post"
    (tmp_path / "text.txt").write_text("\n".join(["The fox is happy .", "Tom has the red ball ."] * 100))
    run = sae.train(
        model,
        tmp_path / "text.txt",
        site,
        sae.TopK(20, k=3),
        1024,
        tmp_path / "run",
        batch_size=256,
        quiet=True,
    )
    sae.load(tmp_path / "run").save(tmp_path / "copy")
    again = sae.open_run(tmp_path / "copy", model=model)
    for key in ("model", "data", "site", "tokenization"):
        assert again.config[key] == run.config[key]
    assert sae.open_run(tmp_path / "run", model=model).config == run.config
    assert Path(sae.open_run(tmp_path / "run", model=model).path) == tmp_path / "run"
