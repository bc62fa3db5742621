"""Fine-tuning: the losses are what they should be, so are the steps, and nothing else of the model is touched."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, build
from finetune_cases import (
    CASES,
    classification,
    decoder,
    encoder,
    exactly,
    labelled,
    modelling,
    pairs,
    preference,
    texts,
    weights,
)

from steerkit.data import load_documents
from steerkit.errors import InputError, NumericsError
from steerkit.finetuning import FinetuneConfig, everything, finetune, layers, matching, trainable
from steerkit.models import HookedModel
from steerkit.objectives import Classification, LanguageModelling, Preference

QUICK = FinetuneConfig(lr=1e-2, batch_size=8, epochs=2)
EACH = pytest.mark.parametrize("case", CASES)


def made(case, **options):
    build, make = CASES[case]
    model = build(**options)
    return model, make(model)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def nothing(model):
    return ()


# -- what is minimised -----------------------------------------------------------------------------------------------


def test_the_loss_of_language_modelling_is_transformers_own():
    model = decoder(dtype=torch.float64)
    rows = [model.tokenizer(text)["input_ids"] for text in texts(12, 50)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    with torch.no_grad():
        theirs = model.model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    found = modelling(model).evaluate(model)
    assert found.mean("loss") == pytest.approx(float(theirs), rel=1e-6)  # theirs is in float32
    assert found.score == pytest.approx(math.exp(theirs), rel=1e-5)


def test_the_loss_of_preferences_is_its_formula():
    model = decoder(dtype=torch.float64)
    objective = preference(model, beta=0.3)
    untouched = objective.evaluate(model)
    assert untouched["loss"] == pytest.approx(math.log(2))
    assert untouched.score == 0.5

    def log_prob(text):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            log_probs = model.model(input_ids=ids).logits.log_softmax(-1)
        return float(log_probs[0, :-1].gather(1, ids[0, 1:, None]).sum())

    before = [log_prob(chosen) - log_prob(rejected) for chosen, rejected in pairs(12, 50)]
    finetune(model, objective, QUICK)
    after = [log_prob(chosen) - log_prob(rejected) for chosen, rejected in pairs(12, 50)]
    margins = np.array(after) - np.array(before)
    found = objective.evaluate(model)
    np.testing.assert_allclose(found["margin"], margins, atol=1e-9)
    np.testing.assert_allclose(found["loss"], np.log1p(np.exp(-0.3 * margins)), atol=1e-9)
    assert found.score == (margins > 0).mean() > 0.9


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_classes_are_read_from_the_pooled_final_state(pooling):
    model = encoder(dtype=torch.float64)
    objective = classification(model, pooling=pooling)
    losses = []
    for text, label in labelled(12, 50):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state[0]
            pooled = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
            logits = objective.head(pooled)
        losses.append(float(logits.logsumexp(0) - logits[("no", "yes").index(label)]))
    np.testing.assert_allclose(objective.evaluate(model)["loss"], losses, atol=1e-9)


def test_a_head_on_frozen_features_reaches_the_optimum_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    model = encoder(dropout=0.0, dtype=torch.float64)
    labels = np.random.default_rng(0).integers(0, 3, 40)
    objective = Classification(model, [(text, str(label)) for text, label in zip(texts(40), labels)])
    with torch.no_grad():
        states = objective.pooled(model, objective.examples("train")).numpy()
    found = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(states, labels)
    optimum = -np.log(found.predict_proba(states)[np.arange(40), labels]).mean()
    before = weights(model, objective)
    config = FinetuneConfig(
        lr=0.1, optimiser="Adam", weight_decay=1 / 40, batch_size=40, epochs=300, schedule="cosine"
    )
    with trainable(model, nothing):
        finetune(model, objective, config)
    assert optimum < 0.95 * math.log(3)
    assert objective.evaluate(model, "train").mean("loss") == pytest.approx(optimum, abs=1e-4)
    np.testing.assert_allclose(objective.head.weight.detach(), found.coef_, atol=1e-3)
    after = weights(model, objective)
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        "head.weight",
        "head.bias",
    ]


# -- steps -----------------------------------------------------------------------------------------------------------


@EACH
def test_training_lowers_the_loss_on_all_splits(case):
    model, objective = made(case)
    before = [objective.evaluate(model, split).mean("loss") for split in ("train", "validation", "test")]
    finetune(model, objective, replace(QUICK, epochs=6))
    after = [objective.evaluate(model, split).mean("loss") for split in ("train", "validation", "test")]
    assert all(now < 0.95 * then for now, then in zip(after, before))


@EACH
def test_the_first_loss_is_the_mean_over_the_batch(case):
    model, objective = made(case, dropout=0.0)
    objective.reset(model, 0)
    before = objective.evaluate(model, "train").mean("loss")
    outcome = finetune(model, objective, replace(QUICK, batch_size=30))
    assert outcome.losses[0] == pytest.approx(before, rel=1e-5)


@EACH
@pytest.mark.parametrize("settings", [{}, {"tau": 0.3, "gamma": 0.7}], ids=["mean", "drrho"])
def test_accumulated_gradients_are_those_of_the_large_batch(case, settings):
    whole, outcome = exactly(case, **settings)
    parts, in_parts = exactly(case, accumulation=5, **settings)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-9)
    np.testing.assert_allclose(in_parts.losses, outcome.losses, atol=1e-9)


@EACH
def test_drrho_at_a_high_temperature_is_the_mean(case):
    plain, _ = exactly(case)
    reweighed, _ = exactly(case, tau=1e9)
    strongly, _ = exactly(case, tau=0.1)
    for name, value in plain.items():
        torch.testing.assert_close(reweighed[name], value, rtol=0, atol=1e-5)
    assert any((strongly[name] - value).abs().max() > 1e-3 for name, value in plain.items())


def test_a_step_of_sgd_with_drrho_by_hand():
    model = decoder(dropout=0.0, dtype=torch.float64)
    objective = modelling(model)
    reference = np.linspace(2, 8, 30)
    now = objective.evaluate(model, "train")
    excess = np.exp((now["loss"] - reference) / 2.0)
    tokens = now.weight / now.weight.sum()
    share = torch.tensor(tokens * excess / (tokens * excess).sum())
    losses = objective.outcomes(model, objective.examples("train"))["loss"]
    parameters = list(model.model.parameters())
    gradients = torch.autograd.grad((share * losses).sum(), parameters)
    expected = [p.detach() - 0.1 * gradient for p, gradient in zip(parameters, gradients)]
    config = FinetuneConfig(
        lr=0.1, optimiser="SGD", schedule="constant", warmup=0.0, clip=1e9, batch_size=30, tau=2.0
    )
    outcome = finetune(model, objective, config, reference=reference)
    assert outcome.losses == [pytest.approx(float((share * losses).sum()))]
    for parameter, value in zip(parameters, expected):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=1e-8)


def test_groups_have_their_own_rates_and_biases_do_not_decay():
    def moved(groups=None, **settings):
        model = decoder(dropout=0.0, dtype=torch.float64)
        before = weights(model, objective := modelling(model))
        finetune(
            model, objective, replace(QUICK, optimiser="SGD", clip=1e9, epochs=0.1, **settings), groups=groups
        )
        return {name: value - before[name] for name, value in weights(model, objective).items()}, before

    def fast_embeddings(model):
        named = dict(model.model.named_parameters())
        fast = named.pop("transformer.wte.weight")
        return [{"params": named.values()}, {"params": [fast], "lr": 0.16}]

    plain, before = moved()
    fast, _ = moved(fast_embeddings)
    decayed, _ = moved(weight_decay=0.5)
    for name, step in plain.items():
        factor = 16 if "wte" in name else 1
        torch.testing.assert_close(fast[name], factor * step, rtol=1e-7, atol=1e-12)
        shrunk = 0.01 * 0.5 * before[name] if before[name].dim() > 1 else 0.0
        torch.testing.assert_close(decayed[name], step - shrunk, rtol=1e-7, atol=1e-12)
    with pytest.raises(InputError, match=r"wte\.weight takes gradients and is in 0 groups"):
        moved(lambda model: fast_embeddings(model)[:1])
    with pytest.raises(InputError, match=r"is in 2 groups"):
        moved(lambda model: fast_embeddings(model) * 2)


def test_gradient_checkpointing_changes_nothing_but_memory():
    found = []
    for wanted in (False, True):
        model, objective = made("classification")
        finetune(model, objective, replace(QUICK, gradient_checkpointing=wanted))
        assert not model.model.is_gradient_checkpointing
        found.append(weights(model, objective))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6)


def test_products_in_bfloat16_leave_the_weights_in_float32():
    model, objective = made("language modelling")
    plain, _ = made("language modelling")
    finetune(plain, objective, QUICK)
    finetune(model, objective, replace(QUICK, dtype="bf16"))
    exact, rough = weights(plain, objective), weights(model, objective)
    assert {value.dtype for value in rough.values()} == {torch.float32}
    gap = max(float((rough[name] - value).abs().max()) for name, value in exact.items())
    assert 0 < gap < 0.05


def test_hooks_come_in_their_places():
    model, objective = made("language modelling")
    calls = []

    def after_backward(model, step):
        weight = model.model.transformer.wte.weight
        assert weight.grad.abs().max() > 0
        calls.append(("backward", step, weight.detach().clone()))

    def after_step(model, step, n_steps):
        weight = model.model.transformer.wte.weight
        assert weight.grad is not None
        assert not torch.equal(weight, calls[-1][2])
        calls.append(("step", step, n_steps))

    outcome = finetune(model, objective, QUICK, after_backward=after_backward, after_step=after_step)
    assert [call[:2] for call in calls] == [
        (k, s) for s in range(outcome.steps) for k in ("backward", "step")
    ]
    assert {call[2] for call in calls if call[0] == "step"} == {outcome.steps} == {8}


def test_a_seed_says_all_and_the_callers_random_numbers_go_on():
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        model, objective = made("classification")
        finetune(model, objective, replace(QUICK, seed=seed))
        found.append((weights(model, objective), torch.rand(1)))
    torch.manual_seed(5)
    assert found[0][1] == torch.rand(1)
    assert same(found[0][0], found[1][0])
    assert not same(found[0][0], found[2][0])
    assert found[0][1] == found[1][1] == found[2][1]


def test_seeds_share_the_examples_and_not_the_head():
    model = encoder()
    objective = classification(model)
    examples = objective.examples("train")
    heads = []
    with trainable(model, nothing):
        for seed in (0, 1, 0):
            finetune(model, objective, replace(QUICK, seed=seed))
            heads.append(objective.head.weight.detach().clone())
    assert objective.examples("train") is examples
    assert torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], heads[1])


# -- validation ------------------------------------------------------------------------------------------------------


def test_early_stopping_puts_the_best_weights_back():
    model, objective = made("language modelling", dropout=0.0)
    seen = {}

    def remember(model, step, n_steps):
        seen[step + 1] = weights(model, objective)

    config = FinetuneConfig(lr=0.05, batch_size=8, epochs=60, schedule="constant", eval_every=2, patience=3)
    outcome = finetune(model, objective, config, after_step=remember)
    perplexities = {step: metrics["perplexity"] for step, metrics in outcome.validation}
    step, metrics = outcome.best
    assert metrics["perplexity"] == min(perplexities.values())
    assert outcome.steps == step + 3 * 2 < config.steps(30)
    assert same(weights(model, objective), seen[step])
    assert objective.evaluate(model, "validation").score == pytest.approx(metrics["perplexity"])


def test_of_equal_scores_the_lower_loss_is_best():
    model, objective = made("preference", dropout=0.0)
    outcome = finetune(model, objective, replace(QUICK, epochs=8, schedule="constant", eval_every=4))
    best = [metrics for _, metrics in outcome.validation if metrics["accuracy"] == 1.0]
    assert len(best) > 2
    assert outcome.best[1] == min(best, key=lambda metrics: metrics["loss"])


def test_without_validation_the_last_weights_stay():
    model = decoder()
    objective = LanguageModelling(model, texts(30))
    last = {}
    outcome = finetune(
        model, objective, QUICK, after_step=lambda model, step, n: last.update(weights(model, objective))
    )
    assert outcome.best is None
    assert outcome.validation == []
    assert same(weights(model, objective), last)
    with pytest.raises(InputError, match="no test split"):
        objective.evaluate(model, "test")


def test_an_interval_is_over_documents_or_groups_of_them():
    model, objective = made("classification")
    found = objective.evaluate(model)
    correct = found["correct"]
    expected = correct.std(ddof=1) / math.sqrt(len(correct))
    assert found.interval().estimate == found.score == correct.mean()
    assert found.interval().standard_error == pytest.approx(expected)
    halves = found.interval(groups=np.arange(12) // 6)
    means = correct.reshape(2, 6).mean(1)
    assert halves.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(2))
    rows = LanguageModelling(decoder(), texts(5), test=[" ".join(texts(30)), *texts(5)], context=32)
    spread = rows.evaluate(decoder())
    assert len(spread["loss"]) > 6  # the first document is several examples
    assert set(spread.document) == set(range(6))
    s, w = (
        np.bincount(spread.document, weights=spread.weight * v)
        for v in (spread["loss"], np.ones_like(spread["loss"]))
    )
    assert spread.score == pytest.approx(math.exp(s.sum() / w.sum()))
    left_out = np.exp((s.sum() - s) / (w.sum() - w))
    se = math.sqrt(5 / 6 * np.square(left_out - left_out.mean()).sum())
    assert spread.interval().standard_error == pytest.approx(se)


# -- what is left behind ---------------------------------------------------------------------------------------------


def state_of(model):
    return [(name, p.requires_grad, p.grad) for name, p in model.model.named_parameters()] + [
        (name, module.training) for name, module in model.model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_flags_and_modes_are_as_they_were(fails):
    model, objective = made("classification")
    model.model.encoder.layer[0].train()
    model.model.embeddings.requires_grad_(False)
    before = state_of(model)
    frozen = model.model.embeddings.word_embeddings.weight.clone()

    def after_step(model, step, n_steps):
        assert model.model.training
        assert model.model.is_gradient_checkpointing
        if fails:
            raise RuntimeError("the hook gave up")

    config = replace(QUICK, gradient_checkpointing=True)
    if fails:
        with pytest.raises(RuntimeError, match="gave up"):
            finetune(model, objective, config, after_step=after_step)
    else:
        finetune(model, objective, config, after_step=after_step)
    assert state_of(model) == before
    assert not model.model.is_gradient_checkpointing
    assert torch.equal(model.model.embeddings.word_embeddings.weight, frozen)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_layers_are_the_parameters_of_their_blocks(family):
    model = HookedModel.from_pretrained(build(family))
    of_layer = [set(layers(i)(model)) for i in range(model.n_layers)]
    assert all(of_layer)
    assert not set.intersection(*of_layer)
    assert set(layers(*range(model.n_layers))(model)) == set.union(*of_layer)
    assert set(layers(-1)(model)) == of_layer[-1]
    block = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) >= 3)
    own = {id(p) for p in block[0].parameters()}
    assert own <= {id(p) for name, p in model.model.named_parameters() if name in of_layer[0]}
    with trainable(model, layers(0)):
        assert {n for n, p in model.model.named_parameters() if p.requires_grad} == of_layer[0]
    assert all(p.requires_grad for p in model.model.parameters())


def test_parameters_are_chosen_by_name():
    model = decoder()
    assert len(everything(model)) == len(list(model.model.parameters()))
    assert matching(r"attn\.c_attn\.weight$")(model) == [
        f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)
    ]
    with pytest.raises(InputError, match=r"No parameter of .* matches 'q_proj'"):
        matching("q_proj")(model)
    with pytest.raises(InputError, match="Did you mean 'c_attn'"):
        matching("c_atn")(model)
    with (
        pytest.raises(InputError, match=r"has no parameter 'wte\.weight'"),
        trainable(model, lambda m: ["wte.weight"]),
    ):
        pass
    with pytest.raises(InputError, match=r"Layer 2 does not exist: .* has layers 0–1"):
        layers(2)(model)


def test_an_adapter_is_trained_through_its_own_flags():
    import peft

    model = decoder(dropout=0.0)
    objective = modelling(model)
    base = weights(model, objective)
    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = HookedModel.from_pretrained(
        peft.get_peft_model(model.model, lora), tokenizer=model.tokenizer, device="cpu"
    )
    outcome = finetune(adapted, objective, QUICK)
    assert outcome.n_trained == 2 * 2 * (16 + 48)
    assert outcome.best[1]["perplexity"] < 0.99 * float(objective.evaluate(decoder(), "validation").score)
    with adapted.model.disable_adapter():
        assert objective.evaluate(adapted).score == objective.evaluate(decoder()).score
    assert same(
        weights(HookedModel.from_pretrained(adapted.model.unload(), tokenizer=model.tokenizer), objective),
        base,
    )


# -- what cannot be done ---------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_the_best_weights_stay(tmp_path):
    model, objective = made("language modelling", dropout=0.0)
    seen = {}

    def spoil(model, step, n_steps):
        seen[step + 1] = weights(model, objective)
        if step == 6:
            model.model.transformer.wte.weight.fill_(math.inf)

    with pytest.raises(NumericsError, match=r"loss is nan at step 7: .* best on validation, of step 4"):
        finetune(
            model, objective, replace(QUICK, epochs=4, eval_every=4), after_step=spoil, out=tmp_path / "r"
        )
    assert same(weights(model, objective), seen[4])
    model, objective = made("classification", dropout=0.0)
    objective.reset(model, 0)
    before = weights(model, objective)
    with pytest.raises(NumericsError, match=r"now those it began with"):
        finetune(model, objective, replace(QUICK, lr=1e30, clip=1e30, warmup=0.0, optimiser="SGD"))
    assert same(weights(model, objective), before)


def test_a_run_that_is_refused_leaves_no_directory(tmp_path):
    model, objective = made("language modelling")
    with trainable(model, nothing), pytest.raises(InputError, match="takes gradients"):
        finetune(model, objective, QUICK, out=tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_bad_settings_and_data_are_refused():
    gpt, bert = decoder(), encoder()
    with pytest.raises(InputError, match="All training labels are 'yes'"):
        Classification(bert, [("a b", "yes"), ("c d", "yes")])
    with pytest.raises(InputError, match="validation split has the label 'maybe'"):
        Classification(bert, labelled(8), [("a b", "maybe")])
    with pytest.raises(InputError, match=r"Document 1 .* has no label"):
        Classification(bert, [("a b", "yes"), ("c d", "")])
    with pytest.raises(InputError, match="holds no text"):
        Classification(bert, [])
    with pytest.raises(InputError, match="train split has no examples"):
        Preference(gpt, [])
    with pytest.raises(InputError, match="sees no other"):
        Classification(gpt, labelled(8), pooling="cls")
    with pytest.raises(InputError, match="pooling is 'max'"):
        Classification(gpt, labelled(8), pooling="max")
    with pytest.raises(InputError, match="does not predict the next token"):
        LanguageModelling(bert, texts(8))
    with pytest.raises(InputError, match="does not predict the next token"):
        Preference(bert, pairs(8))
    with pytest.raises(InputError, match="same tokens"):
        Preference(gpt, [("a", "a")])
    with pytest.raises(InputError, match="cannot be learned from"):
        Preference(gpt, [("a " * 70, "b")])
    with trainable(gpt, nothing), pytest.raises(InputError, match=r"Nothing of .* takes gradients"):
        finetune(gpt, modelling(gpt), QUICK)
    with pytest.raises(InputError, match="tau asks for"):
        finetune(gpt, modelling(gpt), replace(QUICK, tau=1.0))
    with pytest.raises(InputError, match="3 losses for 30 examples"):
        finetune(gpt, modelling(gpt), replace(QUICK, tau=1.0), reference=np.zeros(3))
    half = decoder(dtype=torch.float16)
    with pytest.raises(InputError, match="is in float16"):
        finetune(half, modelling(gpt), QUICK)
    for settings, message in (
        ({"optimiser": "AdamX"}, "Did you mean 'Adam"),
        ({"dtype": "fp16"}, "dtype is 'fp16'"),
        ({"accumulation": 0}, "accumulation is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"tau": -1.0}, "tau is -1.0"),
    ):
        with pytest.raises(InputError, match=message):
            FinetuneConfig(**settings)


def test_long_texts_are_cut_for_classes_and_spread_over_examples_for_the_next_token():
    long = "The fox took the red ball. " * 30
    for model in (encoder(), decoder()):
        objective = Classification(model, [(long, "a"), ("The cat", "b")], context=20)
        assert [len(example) for example in objective.examples("train")] == [
            20,
            len(model.tokenizer("The cat")["input_ids"]),
        ]
    model = decoder()
    ids = model.tokenizer(long)["input_ids"]
    for packing in (False, True):
        objective = LanguageModelling(model, [long], packing=packing, context=20)
        prefix = list(ids[:1]) if ids[0] == model.bos_id else []
        joined = [i for example in objective.examples("train") for i in example.ids[len(prefix) :]]
        assert joined[: len(ids) - len(prefix)] == ids[len(prefix) :]
        assert max(map(len, objective.examples("train"))) == 20


def test_packed_rows_hold_several_documents():
    model = decoder()
    packed = LanguageModelling(model, texts(30), packing=True, context=64)
    single = LanguageModelling(model, texts(30))
    assert {len(example) for example in packed.examples("train")[:-1]} == {64}
    assert len(packed.examples("train")) < len(single.examples("train")) == 30


def test_labels_come_from_a_column_or_an_attribute(tmp_path):
    import csv

    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "verdict"), *labelled(20)])
    model = encoder()
    from_file = Classification(model, path, label_column="verdict")
    given = Classification(model, labelled(20))
    assert from_file.examples("train") == given.examples("train")
    assert from_file.fingerprint() == given.fingerprint() != Classification(model, labelled(21)).fingerprint()
    stories = load_documents("storyworld")[:20]
    by_mood = Classification(model, stories, label_column="mood", context=32)
    mood = stories.column("mood")
    assert [by_mood.classes[e.label] for e in by_mood.examples("train")] == [mood(i) for i in range(20)]
    with pytest.raises(InputError, match="label of tokens"):
        Classification(model, stories, label_column="voice")
