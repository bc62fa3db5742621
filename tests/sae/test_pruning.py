"""Pruning removes what it says, keeps the rest, and loses nothing on the way to a file."""

import json

import pytest
import torch

from sae.architectures import L1, Gated, SqrtL1, TopK
from sae.evaluation import evaluate
from sae.formats import load
from sae.pruning import keep_top, prune, prune_curve
from steerkit import storyworld
from steerkit.errors import InputError

D = 16
SITE = "blocks.0.hook_resid_post"
ARCHITECTURES = [L1(48, target_l0=6), SqrtL1(48, target_l0=6), Gated(48, target_l0=6), TopK(48, k=6)]


@pytest.fixture(scope="module")
def acts():
    return torch.randn(2000, D, generator=torch.Generator().manual_seed(0)) * 3 + 1


@pytest.fixture(params=ARCHITECTURES, ids=lambda config: config.name)
def sae(request, acts):
    sae = request.param.build(D).requires_grad_(False)
    sae.initialise(acts, acts.mean(0), torch.Generator().manual_seed(1))
    if isinstance(request.param, Gated):
        sae.r_mag.copy_(torch.linspace(-0.5, 0.5, 48))
        sae.b_mag.copy_(torch.linspace(-0.5, 0.5, 48))
        sae.b_gate.sub_(1e-3)  # initialise puts the gate's border onto one of these very activations
    return sae


@pytest.mark.parametrize("quantile", [0.0, 0.25, 0.5, 1.0])
def test_each_latent_loses_its_share(sae, acts, quantile):
    before = (sae.encode(acts) > 0).sum(0)
    pruned = prune(sae, acts, quantile=quantile)
    kept = pruned.encode(acts)
    assert torch.equal((kept > 0).sum(0), (before * (1 - quantile)).round().long())
    assert sae.threshold is None


@pytest.mark.parametrize("quantile", [0.3, 0.7])
def test_only_the_weakest_activations_go(sae, acts, quantile):
    """What stays is as it was, and above everything that went. (TopK latents get theirs from all tokens.)"""
    before, kept = sae.encode(acts), prune(sae, acts, quantile=quantile).encode(acts)
    for latent in range(sae.d_sae):
        stays = kept[:, latent] > 0
        if sae.arch != "topk":
            torch.testing.assert_close(kept[stays, latent], before[stays, latent])
        gone = (before[:, latent] > 0) & ~stays
        if stays.any() and gone.any():
            assert kept[stays, latent].min() > before[gone, latent].max()


def test_an_absolute_cut_is_one_for_all(sae, acts):
    before = sae.encode(acts)
    cut = float(before[before > 0].median())
    pruned = prune(sae, acts, absolute=cut)
    kept = pruned.encode(acts)
    assert kept[kept > 0].min() > cut
    if sae.arch != "topk":
        torch.testing.assert_close(kept, before * (before > cut))


def test_pruning_again_prunes_more(sae, acts):
    once = prune(sae, acts, quantile=0.5)
    twice = prune(once, acts, quantile=0.5)
    assert (twice.threshold >= once.threshold).all()
    ratio = (twice.encode(acts) > 0).sum() / (once.encode(acts) > 0).sum()
    assert float(ratio) == pytest.approx(0.5, abs=0.02)
    assert (prune(once, absolute=0.0).threshold == once.threshold).all()


def test_a_pruned_sae_comes_back_from_its_file(sae, acts, tmp_path):
    pruned = prune(sae, acts, quantile=0.4)
    pruned.save(tmp_path)
    assert json.loads((tmp_path / "cfg.json").read_text())["architecture"] == "jumprelu"
    same = load(tmp_path)
    assert torch.equal(same.encode(acts), pruned.encode(acts))
    assert torch.equal(same(acts), pruned(acts))
    assert same.metadata["trained_as"]["name"] == sae.arch
    import sae_lens

    theirs = sae_lens.SAE.load_from_disk(str(tmp_path))
    torch.testing.assert_close(theirs.encode(acts), pruned.encode(acts), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(acts), pruned(acts), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 3, 48])
def test_the_strongest_latents_of_each_token_are_kept(sae, acts, k):
    before, kept = sae.encode(acts), keep_top(sae, k).encode(acts)
    assert ((kept == before) | (kept == 0)).all()
    assert torch.equal((kept > 0).sum(1), (before > 0).sum(1).clamp(max=k))
    left_out = torch.where(kept > 0, torch.zeros_like(before), before).amax(1)
    weakest = torch.where(kept > 0, kept, torch.full_like(kept, torch.inf)).amin(1)
    assert (left_out <= weakest).all()


def test_keeping_the_strongest_is_saved_where_a_format_has_it(sae, acts, tmp_path):
    found = keep_top(sae, 3)
    if sae.arch == "gated":
        with pytest.raises(InputError, match="No format"):
            found.save(tmp_path)
    else:
        found.save(tmp_path)
        torch.testing.assert_close(load(tmp_path).encode(acts), found.encode(acts))


def test_a_pruned_sae_keeps_its_strongest_too(sae, acts):
    pruned = prune(sae, acts, quantile=0.5)
    latents = keep_top(pruned, 2).encode(acts)
    assert torch.equal((latents > 0).sum(1), (pruned.encode(acts) > 0).sum(1).clamp(max=2))


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(width=D, d_mlp=32, context=256)


def test_the_curve_of_an_sae(model, tmp_path):
    texts = [story.text for story in storyworld.sample(15, seed=0)]
    from steerkit.activations import collect

    acts = collect(model, texts, SITE)[SITE]
    sae = L1(48, target_l0=6).build(D).requires_grad_(False)
    sae.initialise(acts, acts.mean(0), torch.Generator().manual_seed(1))
    curve = prune_curve(model, sae, texts, SITE, quantiles=(0.2, 0.6), top=(4, 1))
    assert [(p.kind, p.value) for p in curve.points] == [
        ("original", None),
        ("quantile", 0.2),
        ("quantile", 0.6),
        ("top", 4),
        ("top", 1),
    ]
    l0 = [p.l0 for p in curve.of("quantile")]
    assert l0[1] == pytest.approx(0.8 * l0[0], rel=0.1)
    assert l0[2] == pytest.approx(0.4 * l0[0], rel=0.2)
    assert curve.points[-1].l0 <= 1
    alone = evaluate(model, sae, texts[5:], SITE, tokens=100_000)
    assert curve.points[0].fvu == pytest.approx(alone.fvu)
    assert curve.points[0].delta_ce == pytest.approx(alone.delta_ce, abs=1e-6)
    figure = curve.figure()
    assert len(figure.data) == 4
    assert list(figure.data[0].x) == pytest.approx(l0)
    curve.save(tmp_path / "curve.json")
    assert json.loads((tmp_path / "curve.json").read_text())[2]["value"] == 0.6
    assert "quantile 0.6" in repr(curve)


def test_bad_input_is_named(sae, acts, model):
    with pytest.raises(InputError, match="either a quantile or an absolute"):
        prune(sae, acts)
    with pytest.raises(InputError, match="either a quantile or an absolute"):
        prune(sae, acts, quantile=0.1, absolute=0.1)
    with pytest.raises(InputError, match="quantile is 2"):
        prune(sae, acts, quantile=2)
    with pytest.raises(InputError, match="needs activations"):
        prune(sae, quantile=0.2)
    with pytest.raises(InputError, match="0 or more"):
        prune(sae, acts, absolute=-1.0)
    with pytest.raises(InputError, match="k is 0"):
        keep_top(sae, 0)
    with pytest.raises(InputError, match="one document"):
        prune_curve(model, sae, ["The fox sleeps."], SITE)
