"""Evaluation: closed forms, an independent two-pass computation, and a model that is left as it was."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from sae.architectures import L1, Gated, SqrtL1, TopK
from sae.evaluation import evaluate, evaluate_all, evaluate_nulls, random_sae
from steerkit import storyworld
from steerkit.activations import Tokenization, collect
from steerkit.errors import InputError, NumericsError
from steerkit.models import HookedModel
from steerkit.storyworld.tokenizer import build_tokenizer

SITE = "blocks.1.hook_resid_post"
D = 24


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama(n_layers=3, context=256)


@pytest.fixture(scope="module")
def texts():
    return [story.text for story in storyworld.sample(12, seed=0)]


def identity(dtype=torch.float64):
    """f = (ReLU(x), ReLU(-x)), decoded without error."""
    sae = L1(2 * D).build(D).to(dtype).requires_grad_(False)
    eye = torch.eye(D)
    sae.W_enc.copy_(torch.cat([eye, -eye], 1))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae


def zeros():
    return L1(2 * D).build(D).requires_grad_(False)


def some_sae(config, acts, seed=0):
    sae = config.build(D).requires_grad_(False)
    sae.initialise(acts, acts.mean(0), torch.Generator().manual_seed(seed))
    return sae


@pytest.fixture(scope="module")
def acts(model, texts):
    return collect(model, texts, SITE)[SITE]


@pytest.fixture(scope="module")
def topk(acts):
    return some_sae(TopK(64, k=4), acts)


def test_a_perfect_sae_changes_nothing(model, texts):
    found = evaluate(model, identity(), texts, SITE)
    assert found.fvu == pytest.approx(0, abs=1e-12)
    assert found.cosine == pytest.approx(1, abs=1e-6)
    assert found.norm_ratio == pytest.approx(1, abs=1e-6)
    assert found.shrinkage == pytest.approx(1, abs=1e-9)
    assert found.ce_recovered == pytest.approx(1, abs=1e-6)
    assert found.ce_recovered_mean == pytest.approx(1, abs=1e-6)
    assert found.delta_ce == pytest.approx(0, abs=1e-6)
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.final_cosine == pytest.approx(1, abs=1e-6)
    assert found.l0 == pytest.approx(D, rel=1e-3)


def test_an_sae_of_zeros_is_zero_ablation(model, texts):
    found = evaluate(model, zeros(), texts, SITE)
    assert found.ce_sae == pytest.approx(found.ce_zero, abs=1e-9)
    assert found.ce_recovered == pytest.approx(0, abs=1e-9)
    assert found.kl == pytest.approx(found.kl_zero, abs=1e-9)
    assert found.fvu == pytest.approx(found.fvu_zero, rel=1e-6)
    assert (found.l0, found.dead_fraction) == (0, 1)


def test_an_sae_of_the_mean_is_mean_ablation(model, texts, acts):
    sae = zeros()
    sae.b_dec.copy_(acts.mean(0))
    found = evaluate(model, sae, texts, SITE)
    assert found.ce_sae == pytest.approx(found.ce_mean, abs=1e-5)
    assert found.ce_recovered_mean == pytest.approx(0, abs=1e-4)
    assert found.fvu == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_streamed_figures_are_those_of_two_passes(model, texts, topk, packing, offset):
    """Against numpy on all activations at once, also where the mean is far greater than the spread."""
    tokenization = Tokenization(context=40, packing=packing)
    sae = TopK(64, k=4).build(D).requires_grad_(False)
    sae.load_state_dict(topk.state_dict())
    shift = torch.full((D,), offset)
    with model.hooks({SITE: lambda act: act + shift}):
        x = collect(model, texts, SITE, tokenization=tokenization)[SITE]
        sae.b_dec.copy_(x.mean(0) + 0.1)
        found = evaluate(model, sae, texts, SITE, tokenization=tokenization, batch_tokens=100)
    latents = sae.encode(x)
    x_hat = sae.decode(latents).double().numpy()
    x, latents = x.double().numpy(), latents.double().numpy()
    centred, centred_hat = x - x.mean(0), x_hat - x.mean(0)
    assert found.tokens == len(x)
    near = {"rel": 1e-4 if offset else 1e-6}
    assert found.fvu == pytest.approx(((x - x_hat) ** 2).sum() / (centred**2).sum(), **near)
    assert found.fvu_zero == pytest.approx((x**2).sum() / (centred**2).sum(), **near)
    assert found.shrinkage == pytest.approx((centred_hat**2).sum() / (centred_hat * centred).sum(), **near)
    assert found.l0 == pytest.approx((latents > 0).sum(1).mean())
    assert found.l1 == pytest.approx(latents.sum(1).mean(), **near)
    norms = np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    assert found.cosine == pytest.approx(((x * x_hat).sum(1) / norms[0] / norms[1]).mean(), abs=1e-6)
    assert found.norm_ratio == pytest.approx((norms[1] / norms[0]).mean(), rel=1e-5)
    density = (latents > 0).mean(0)
    np.testing.assert_allclose(found.density, density)
    assert found.dead_fraction == (density == 0).mean()
    assert sum(found.density_histogram()["counts"]) == (density > 0).sum()


def test_outputs_are_those_of_a_loop_over_texts(model, texts, topk):
    """One text at a time, unpadded, with the plain Hugging Face model."""
    ce = {name: [] for name in ("clean", "sae", "zero")}
    kl = []
    for text in texts:
        ids = model.tokenizer(text, return_tensors="pt")["input_ids"]
        special = torch.isin(ids, torch.tensor(sorted(model.special_ids)))
        keep = ~special

        def splice(act, value, keep=keep):
            return torch.where(keep[..., None], value(act), act)

        values = {"clean": lambda a: a, "sae": topk, "zero": torch.zeros_like}
        log_probs = {}
        for name, value in values.items():
            with model.hooks({SITE: lambda act, value=value: splice(act, value)}), torch.no_grad():
                log_probs[name] = model.model(ids).logits.log_softmax(-1)[0, :-1][keep[0, 1:]]
            targets = ids[0, 1:][keep[0, 1:]]
            ce[name] += F.nll_loss(log_probs[name], targets, reduction="none").tolist()
        kl += (log_probs["clean"].exp() * (log_probs["clean"] - log_probs["sae"])).sum(-1).tolist()
    found = evaluate(model, topk, texts, SITE)
    assert found.predicts == "next token"
    assert found.predicted == len(ce["clean"])
    assert found.ce_clean == pytest.approx(np.mean(ce["clean"]), abs=1e-5)
    assert found.ce_sae == pytest.approx(np.mean(ce["sae"]), abs=1e-5)
    assert found.ce_zero == pytest.approx(np.mean(ce["zero"]), abs=1e-5)
    assert found.kl == pytest.approx(np.mean(kl), abs=1e-5)
    assert found.delta_ce == pytest.approx(found.ce_sae - found.ce_clean)
    expected = (found.ce_zero - found.ce_sae) / (found.ce_zero - found.ce_clean)
    assert found.ce_recovered == pytest.approx(expected)


def values_of(evaluation):
    found = evaluation.to_dict()
    return {k: v for k, v in found.items() if isinstance(v, (int, float))}


def test_the_batch_size_changes_nothing(model, texts, topk):
    one = evaluate(model, topk, texts, SITE, batch_tokens=1)
    many = evaluate(model, topk, texts, SITE, batch_tokens=100_000)
    assert values_of(one) == pytest.approx(values_of(many), rel=1e-5, abs=1e-5)
    for name, interval in one.intervals.items():
        assert interval.to_dict() == pytest.approx(many.intervals[name].to_dict(), rel=1e-3)


def test_saes_are_evaluated_together_as_alone(model, texts, topk):
    both = evaluate_all(model, {"a": topk, "b": identity(torch.float32)}, texts, SITE)
    assert values_of(both["a"]) == pytest.approx(values_of(evaluate(model, topk, texts, SITE)))


def test_nothing_is_left_on_the_model(model, texts, topk):
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    clean = evaluate(model, topk, texts, SITE)
    assert all(not (m._forward_hooks or m._forward_pre_hooks) for m in model.model.modules())
    after = model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert values_of(evaluate(model, topk, texts, SITE)) == values_of(clean)


def test_only_so_many_tokens_are_used(model, texts, topk):
    found = evaluate(model, topk, texts, SITE, tokens=50)
    assert found.tokens == 50
    assert found.documents <= 2


def test_sinks_are_left_out_and_unspliced(model, texts, topk, acts):
    norms = acts.norm(dim=-1)
    threshold = float(norms.quantile(0.9))
    found = evaluate(model, topk, texts, SITE, sink_threshold=threshold)
    assert found.tokens == int((norms <= threshold).sum())
    assert found.sink_threshold == threshold
    kept = evaluate(
        model, topk, texts, SITE, sink_threshold=threshold, tokenization=Tokenization(drop_sinks=False)
    )
    assert kept.tokens == len(acts)
    assert found.predicted == kept.predicted


def test_intervals_hold_the_estimates(model, texts, topk):
    found = evaluate(model, topk, texts, SITE)
    for name in ("fvu", "delta_ce", "ce_recovered", "ce_recovered_mean", "kl", "l0", "final_cosine"):
        interval = found.intervals[name]
        assert interval.estimate == pytest.approx(getattr(found, name)), name
        assert interval.low <= interval.estimate <= interval.high
    assert evaluate(model, topk, texts[:1], SITE).intervals == {}


def test_an_encoder_without_a_head_has_final_cosines(texts):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_dropout_prob=0,
    )
    model = HookedModel.from_pretrained(BertModel(config).eval(), tokenizer=tokenizer)
    found = evaluate(model, identity(torch.float32), texts, SITE)
    assert found.final_cosine == pytest.approx(1, abs=1e-5)
    assert found.final_cosine_zero < 0.999
    assert found.final_cosine_mean < 0.999
    names = (
        "ce_clean",
        "ce_sae",
        "ce_zero",
        "ce_mean",
        "delta_ce",
        "ce_recovered",
        "ce_recovered_mean",
        "kl",
    )
    assert all(getattr(found, name) is None for name in names)
    assert "cross-entropy" not in repr(found)


def test_an_evaluation_is_saved_and_printed(model, texts, topk, tmp_path):
    found = evaluate(model, topk, texts, SITE)
    found.save(tmp_path / "evaluation.json")
    saved = json.loads((tmp_path / "evaluation.json").read_text())
    assert saved["fvu"] == found.fvu
    assert saved["intervals"]["fvu"]["low"] < found.fvu
    assert "FVU" in repr(found)


@pytest.mark.parametrize(
    "config",
    [TopK(64, k=4), L1(64, target_l0=5), SqrtL1(64, target_l0=5), Gated(64, target_l0=5)],
    ids=lambda c: c.name,
)
def test_the_random_sae_is_as_sparse_and_scaled_best(config, acts):
    like = some_sae(config, acts, seed=1)
    found = random_sae(like, acts, seed=2)
    assert type(found) is type(like)
    l0 = (like.encode(acts) > 0).sum(1).float().mean()
    assert float((found.encode(acts) > 0).sum(1).float().mean()) == pytest.approx(float(l0), rel=0.03)
    best = float((found(acts) - acts).square().sum())
    for factor in (0.98, 1.02):
        scaled = found.b_dec + factor * (found(acts) - found.b_dec)
        assert float((scaled - acts).square().sum()) > best
    again, other = random_sae(like, acts, seed=2), random_sae(like, acts, seed=3)
    assert torch.equal(again.W_dec, found.W_dec)
    assert not torch.equal(other.W_dec, found.W_dec)


def test_the_random_sae_of_a_pruned_one_is_as_sparse_as_that(acts):
    like = some_sae(TopK(64, k=8), acts)
    like.threshold = torch.full((64,), 1.8)
    wanted = float((like.encode(acts) > 0).sum(1).float().mean())
    assert 0.5 < wanted < 7
    assert float((random_sae(like, acts).encode(acts) > 0).sum(1).float().mean()) == pytest.approx(
        wanted, rel=0.05
    )


def test_the_table_of_nulls(model, texts, tmp_path):
    table = evaluate_nulls(model, identity(torch.float32), texts, SITE, random_model_sae=zeros(), tokens=500)
    assert table["trained"].fvu < 1e-6
    assert table["random SAE"].fvu > 0.1
    assert table["mean ablation"].fvu == 1
    zero, zeroed = table["zero"], table["SAE of the random model"]
    for name in ("fvu", "delta_ce", "kl", "final_cosine"):
        assert getattr(zero, name) == pytest.approx(getattr(zeroed, name), rel=1e-5)
    assert table["the same, on the random model"].l0 == 0
    mean = table["mean ablation"]
    assert mean.ce_recovered == pytest.approx((zero.delta_ce - mean.delta_ce) / zero.delta_ce)
    table.save(tmp_path / "nulls.json")
    assert json.loads((tmp_path / "nulls.json").read_text())[0]["name"] == "trained"
    assert "random SAE" in repr(table)


def test_bad_input_is_named(model, texts, topk):
    with pytest.raises(InputError, match="holds no text"):
        evaluate(model, topk, [], SITE)
    with pytest.raises(InputError, match="at least one document and one token"):
        evaluate(model, topk, texts, SITE, tokens=0)
    with pytest.raises(InputError, match="Not one held-out token"):
        evaluate(model, topk, texts, SITE, sink_threshold=1e-9)
    with pytest.raises(InputError, match=rf"width {D}, but .* width 48"):
        evaluate(model, topk, texts, "blocks.1.mlp.hook_post")
    broken = TopK(64, k=4).build(D)
    broken.load_state_dict(topk.state_dict())
    broken.W_dec.data[3] = torch.nan
    with pytest.raises(NumericsError, match=r"The SAE .* NaN or inf"):
        evaluate(model, broken, texts, SITE)
    with model.hooks({SITE: lambda act: act * torch.inf}), pytest.raises(NumericsError, match=SITE):
        evaluate(model, topk, texts, SITE)
