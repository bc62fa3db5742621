"""Concept scores: exact areas, an independent computation, and the order that must hold."""

import json
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.metrics import roc_auc_score

from sae.architectures import TopK
from sae.concepts import STORY_SEED, column_aurocs, concept_scores, latent_aurocs
from steerkit import storyworld
from steerkit.activations import collect
from steerkit.errors import InputError

SITE = "blocks.1.hook_resid_post"
D = 24
SMALL = {"tokens": 6000, "min_stories": 3}


@pytest.fixture(scope="module")
def model(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def sae(model):
    acts = collect(model, [s.text for s in storyworld.sample(5, seed=1)], SITE)[SITE]
    sae = TopK(64, k=4).build(D).requires_grad_(False)
    sae.initialise(acts, acts.mean(0), torch.Generator().manual_seed(0))
    return sae


@pytest.fixture(scope="module")
def scores(model, sae):
    return concept_scores(model, sae, SITE, random_model_sae=sae, **SMALL)


def sklearn_areas(columns, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            [roc_auc_score(y, column) if 0 < y.sum() < len(y) else np.nan for y in labels.T]
            for column in columns.T
        ]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 60), st.sampled_from([0.05, 0.5, 1.0]))
def test_areas_are_scikit_learns(seed, n, density):
    """With ties among the active tokens, silent latents, always active ones, and labels of one class."""
    generator = np.random.default_rng(seed)
    latents = generator.integers(1, 5, (n, 6)) * (generator.random((n, 6)) < density)
    labels = generator.random((n, 4)) < [0.1, 0.3, 0.5, 0.9]
    expected = sklearn_areas(latents, labels)
    np.testing.assert_allclose(latent_aurocs(csr_array(latents.astype(float)), labels), expected, atol=1e-12)
    np.testing.assert_allclose(column_aurocs(latents - 2.0, labels), expected, atol=1e-12)


def test_scores_are_those_of_a_plain_computation(model, sae, scores):
    stories, n = [], 0
    for story in storyworld.stream(STORY_SEED):
        if n >= SMALL["tokens"]:
            break
        stories.append(story)
        n += len(story.tokens)
    half = int(0.6 * len(stories))
    acts = collect(model, [s.text for s in stories], SITE)
    latents, document = sae.encode(acts[SITE]).numpy(), acts.document.numpy()
    chosen = document < half
    assert scores.tokens == (~chosen).sum()
    assert scores.stories == len(stories) - half
    for row in scores.rows[::12]:
        flat = [story.token_labels(row.attribute) for story in stories]
        labels = np.array([flat[d][p] == row.value for d, p in zip(document, acts.position.numpy())])
        areas = [roc_auc_score(labels[chosen], latent[chosen]) for latent in latents.T]
        best = int(np.argmax(areas))
        assert row.latent == best
        assert row.auroc == pytest.approx(roc_auc_score(labels[~chosen], latents[~chosen, best]))
        assert row.ci.estimate == pytest.approx(row.auroc)
        beliefs = [
            storyworld.posterior(s.tokens, attributes=[row.attribute])[row.attribute] for s in stories[half:]
        ]
        column = storyworld.ATTRIBUTES[row.attribute].index(row.value)
        ceiling = roc_auc_score(labels[~chosen], np.concatenate(beliefs)[:, column])
        assert row.posterior == pytest.approx(ceiling)


def known(story, attribute):
    """The exact belief once the story has been read."""
    return storyworld.posterior(story.tokens, attributes=[attribute])[attribute][-1]


def test_scores_per_story_are_those_of_a_plain_computation(model, sae):
    found = concept_scores(model, sae, SITE, per="story", random_model_sae=sae, **SMALL)
    assert (found.per, "voice" in {row.attribute for row in found.rows}) == ("story", False)
    stories, n = [], 0
    for story in storyworld.stream(STORY_SEED):
        if n >= SMALL["tokens"]:
            break
        stories.append(story)
        n += len(story.tokens)
    half = int(0.6 * len(stories))
    each = [collect(model, [story.text], SITE)[SITE] for story in stories]
    latents = np.stack([sae.encode(acts).amax(0).numpy() for acts in each])
    coordinates = np.stack([torch.cat([acts, -acts], 1).amax(0).numpy() for acts in each])
    for row in found.rows[::25]:
        labels = np.array([story.attributes[row.attribute] == row.value for story in stories])
        areas = [roc_auc_score(labels[:half], column) for column in latents[:half].T]
        assert areas[row.latent] == pytest.approx(max(areas))
        assert row.auroc == pytest.approx(roc_auc_score(labels[half:], latents[half:, row.latent]))
        assert row.stories == labels[half:].sum()
        areas = np.array([roc_auc_score(labels[:half], column) - 0.5 for column in coordinates[:half].T])
        assert row.residual in [
            pytest.approx(
                0.5 + np.sign(areas[best]) * (roc_auc_score(labels[half:], coordinates[half:, best]) - 0.5)
            )
            for best in np.flatnonzero(np.isclose(np.abs(areas), np.abs(areas).max()))
        ]
        column = storyworld.ATTRIBUTES[row.attribute].index(row.value)
        beliefs = [known(s, row.attribute)[column] for s in stories[half:]]
        assert row.posterior == pytest.approx(roc_auc_score(labels[half:], beliefs))
    assert found.mean("posterior") > 0.9


def test_nothing_beats_the_exact_posterior(scores):
    ceiling = scores.mean("posterior")
    assert ceiling > 0.8
    assert all(
        scores.mean(name) < ceiling for name in ("auroc", "random_sae", "random_model", "token", "residual")
    )


def test_the_voice_of_a_word_is_in_the_word(scores):
    assert scores["voice", "speech"].token > 0.9


def test_only_populated_values_are_scored(scores):
    assert {row.attribute for row in scores.rows} <= set(storyworld.ATTRIBUTES)
    assert all(row.stories >= SMALL["min_stories"] for row in scores.rows)
    assert len(scores.rows) > 20


def test_each_latent_has_its_best_concept(scores):
    assert scores.selection.shape == (64, len(scores.rows))
    attribute, value, area = scores.best_concept(7)
    assert area == pytest.approx(float(scores.selection[7].max()))
    assert (attribute, value) in {(row.attribute, row.value) for row in scores.rows}


def test_fewer_attributes_give_the_same_scores(model, sae, scores):
    fewer = concept_scores(model, sae, SITE, attributes=["mood"], posterior=False, **SMALL)
    assert {row.attribute for row in fewer.rows} == {"mood"}
    for row in fewer.rows:
        same = scores[row.attribute, row.value]
        assert (row.latent, row.auroc, row.ci) == (same.latent, same.auroc, same.ci)
        assert row.posterior is None
        assert row.random_model is None


def test_scores_are_saved_and_printed(scores, tmp_path):
    scores.save(tmp_path / "concepts.json")
    saved = json.loads((tmp_path / "concepts.json").read_text())
    assert saved["rows"][0]["auroc"] == scores.rows[0].auroc
    assert saved["mean"]["token"] == pytest.approx(scores.mean("token"))
    assert "mood=happy" in repr(scores)
    with pytest.raises(KeyError):
        scores["mood", "purple"]


def test_bad_input_is_named(model, sae):
    with pytest.raises(InputError, match="attribute 'smell'"):
        concept_scores(model, sae, SITE, attributes=["smell"], **SMALL)
    with pytest.raises(InputError, match="Score it per token"):
        concept_scores(model, sae, SITE, per="story", attributes=["voice"], **SMALL)
    with pytest.raises(InputError, match="per token or per story"):
        concept_scores(model, sae, SITE, per="word", **SMALL)
    with pytest.raises(InputError, match="too few"):
        concept_scores(model, sae, SITE, tokens=500, attributes=["mood"])
    with pytest.raises(InputError, match="width"):
        concept_scores(model, TopK(64, k=4).build(D + 1), SITE, **SMALL)
