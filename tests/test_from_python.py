"""The README's and the design's script, as printed but for its size."""

import torch

import sae
from steerkit import HookedModel, steering
from steerkit.steering import Where, load_pairs


def test_the_script_of_the_readme_runs(tmp_path):
    site = "blocks.2.hook_resid_post"
    model = HookedModel.from_pretrained("storyworld")
    texts = ["Tom was a happy fox. He had a red ball."]
    acts = model.activations(texts, sites=[site])
    n_tokens = len(model.tokenizer(texts[0], add_special_tokens=False).input_ids)
    assert acts[site].shape == (n_tokens, model.d_model)
    assert [model.tokenizer.decode(i).strip() for i in acts.token_ids][:3] == ["Tom", "was", "a"]
    assert acts.position.tolist() == list(range(n_tokens))

    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    plain = model.generate("Tom was", max_new_tokens=20, do_sample=False)
    with model.hooks({site: lambda act: act * 0.0}):
        hooked = model.generate("Tom was", max_new_tokens=20, do_sample=False)
    assert hooked != plain
    assert model.generate("Tom was", max_new_tokens=20, do_sample=False) == plain

    arch = sae.Gated(d_sae=128, target_l0=8.0)
    run = sae.train(
        model,
        "storyworld",
        site=site,
        arch=arch,
        tokens=30_000,
        out=tmp_path / "g",
        held_out_tokens=4_000,
        quiet=True,
    )
    latents = run.sae.encode(acts[site])
    assert latents.shape == (n_tokens, 128)
    assert (latents >= 0).all()
    assert run.summary["fvu"] < 1
    page = run.dashboard(tokens=4_000, quiet=True).save(tmp_path / "dash")
    assert page.read_text().startswith("<!doctype html>")
    assert all(torch.equal(value, before[name]) for name, value in model.model.state_dict().items())

    vector = steering.fit(model, load_pairs("storyworld:mood=happy", n=32), method="mean_diff", site=site)
    with model.steer(vector, strength=4.0, where=Where.generation_only()):
        assert model.generate("Tom was", max_new_tokens=20, do_sample=False) != plain
    assert model.generate("Tom was", max_new_tokens=20, do_sample=False) == plain

    again = sae.SAERun.load(tmp_path / "g")
    assert torch.equal(again.sae.encode(acts[site]), latents)
    assert "fvu" in repr(again)
