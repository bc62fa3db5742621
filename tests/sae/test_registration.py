"""sae-lens reads what it lacks once it is imported beside us, in either order, and is not imported by us."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

D_IN, D_OUT, D_SAE, K = 6, 9, 20, 3

ORDERS = {
    "sae first": "import sys, sae; assert 'sae_lens' not in sys.modules; import sae_lens",
    "sae-lens first": "import sae_lens, sae",
    "a submodule": "import sae; from sae_lens.saes import sae as _",
}


@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_registered_whenever_both_are_imported(imports):
    code = (
        f"{imports}\n"
        "from sae_lens.registry import SAE_CLASS_REGISTRY as known\n"
        "from sae.formats.registration import ARCHITECTURES, register\n"
        "import importlib.resources, sae_lens, sys\n"
        "assert ARCHITECTURES.keys() <= known.keys(), known.keys()\n"
        "register()\n"
        "assert importlib.resources.files('sae_lens').joinpath('pretrained_saes.yaml').is_file()\n"
        "assert not any('registration' in type(finder).__module__ for finder in sys.meta_path)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("skip", [False, True])
def test_sae_lens_computes_topk_transcoders(skip, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    from sae.formats.registration import register

    register()
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_OUT), "b_dec": (D_OUT,)}
    shapes |= {"W_skip": (D_OUT, D_IN)} if skip else {}
    w = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(w, tmp_path / "sae_weights.safetensors")
    config = {
        "architecture": "topk_skip_transcoder" if skip else "topk_transcoder",
        "d_in": D_IN,
        "d_out": D_OUT,
        "d_sae": D_SAE,
        "k": K,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "metadata": {"sae_lens_version": "6.54.12"},
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))

    x = torch.randn(50, D_IN, generator=generator)
    pre = x @ w["W_enc"] + w["b_enc"]
    latents = torch.relu(pre * (pre >= pre.sort(dim=-1, descending=True).values[:, K - 1 : K]))
    expected = latents @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if skip else 0)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    again_at = tmp_path / "again"
    theirs.save_model(again_at)
    for model in (theirs, sae_lens.SAE.load_from_disk(again_at)):
        with torch.no_grad():
            torch.testing.assert_close(model.encode(x), latents, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
