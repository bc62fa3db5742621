"""`judge`: every baseline through the same code, on a small random model whose labels are exact."""

import json

import numpy as np
import pytest
import torch

from sae.architectures import Crosscoder, TopK, Transcoder
from sae.judging import LabelledTexts, judge
from sae.judging.judgement import _only_value, _Source
from steerkit import storyworld
from steerkit.activations import collect
from steerkit.errors import InputError

SITE = "blocks.1.hook_resid_post"
D = 24
SMALL = {"tokens": 16_000, "min_documents": 8, "max_values": 2}


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
def judgement(model, sae):
    return judge(model, sae, SITE, random_model_sae=sae, **SMALL)


def test_every_baseline_has_a_row_and_every_row_the_measures_that_it_can_have(judgement):
    names = [row.name for row in judgement.rows]
    assert names == [
        "SAE", "SAE, labels shuffled", "random SAE", "SAE of the random model",
        "PCA", "raw basis", "token identity", "supervised probes", "posterior",
    ]  # fmt: skip
    for row in judgement.rows:
        shuffled = row.name == "SAE, labels shuffled"
        assert (row.absorption is not None) == ("SAE" in row.name and not shuffled)
        assert (
            (row.scr is not None)
            == (row.tpp is not None)
            == (row.name not in ("token identity", "posterior") and not shuffled)
        )
    assert judgement["raw basis"].size == judgement["SAE"].size == 64


def test_the_posterior_is_the_ceiling(judgement):
    ceiling = judgement["posterior"]
    assert ceiling.probing.accuracy[1].estimate > 0.95
    for row in judgement.rows[:-1]:
        assert row.probing.accuracy[1].estimate < ceiling.probing.accuracy[1].estimate
        assert row.monosemanticity.score[1].estimate < ceiling.monosemanticity.score[1].estimate


def test_with_shuffled_labels_nothing_is_left(judgement):
    """Held-out figures do not pretend anything, however many latents there are to choose from; in-sample ones do."""
    shuffled = judgement["SAE, labels shuffled"]
    assert abs(shuffled.probing.accuracy[1].estimate - 0.5) < 0.04
    assert shuffled.probing.in_sample[1] > 0.55
    assert abs(shuffled.monosemanticity.accs_0.estimate - 0.5) < 0.04


def test_a_transcoder_is_judged_by_its_latents_alone(model):
    target = "blocks.1.hook_mlp_out"
    transcoder = Transcoder(64, k=4, target_site=target, d_out=D).build(D).requires_grad_(False)
    acts = collect(model, [s.text for s in storyworld.sample(5, seed=1)], SITE)[SITE]
    transcoder.initialise(acts, torch.zeros(D), torch.Generator().manual_seed(0))
    found = judge(model, transcoder, SITE, tokens=9_000, min_documents=8, max_values=1)
    row = found["SAE"]
    assert row.absorption is row.scr is row.tpp is None
    assert set(row.probing.accuracy) == {1, 2, 5}
    assert any("transcoder" in note for note in found.notes)


def test_a_crosscoder_is_refused(model):
    with pytest.raises(InputError, match="crosscoder cannot be judged"):
        judge(model, Crosscoder(8, k=2, widths=(D, D)).build(2 * D), f"{SITE},blocks.0.hook_resid_post")


def test_figures_are_saved_and_printed(judgement, tmp_path):
    judgement.save(tmp_path / "judgement.json")
    saved = json.loads((tmp_path / "judgement.json").read_text())
    assert saved["table"][0]["k=1"]["estimate"] == judgement["SAE"].probing.accuracy[1].estimate
    assert len({tuple(row) for row in saved["table"]}) == 1
    for name in (*judgement.columns(), "posterior", "chosen on"):
        assert name in repr(judgement)
    with pytest.raises(KeyError):
        judgement["nothing"]


def test_the_same_seed_gives_the_same_judgement(model, sae, judgement):
    again = judge(model, sae, SITE, random_model_sae=sae, **SMALL)
    assert again.to_dict() | {"seconds": 0} == judgement.to_dict() | {"seconds": 0}


def test_stories_of_the_choice_and_of_the_score_are_different_ones():
    source = _Source.of_stories(16_000, 0)
    assert len(set(source.texts)) == len(source.texts)
    assert 0 < source.n_chosen < len(source.texts)


def test_a_word_says_what_it_alone_makes_certain():
    said = {}
    for story in storyworld.sample(200, seed=4):
        items = [item for sentence in story.sentences for item in sentence.template.items]
        for item, token in zip(items, story.tokens):
            for family in ("mood", "gender", "tense"):
                value = _only_value(item, token, family)
                assert value in ("", story.attributes[family])
                said.setdefault((family, token.strip()), set()).add(value)
    assert said["mood", "joyful"] == {"happy"}
    assert said["mood", "loudly"] == {""}
    assert said["gender", "she"] == {"female"}
    assert said["gender", "fox"] == {""}
    assert said["gender", "Tom"] == {"male"}
    assert said["tense", "walked"] == {"past"}


@pytest.fixture(scope="module")
def texts():
    stories = storyworld.sample(150, seed=9)
    labels = {name: [story.attributes[name] for story in stories] for name in ("mood", "gender", "tense")}
    return LabelledTexts([story.text for story in stories], labels)


def test_any_labelled_text_will_do(model, sae, texts):
    found = judge(model, sae, SITE, data=texts, min_documents=8)
    assert "posterior" not in [row.name for row in found.rows]
    assert found["SAE"].absorption is None
    assert found["SAE"].tpp is not None
    assert any("absorption: not measured" in note for note in found.notes)
    one = LabelledTexts(texts.texts, {"gender": texts.labels["gender"]})
    found = judge(model, sae, SITE, data=one, min_documents=8)
    assert found.concepts in (("gender=female",), ("gender=male",))
    assert found["SAE"].scr is None
    assert any(note.startswith("SCR: not measured") for note in found.notes)
    assert "FMS@5" in repr(found)


def test_sorted_files_are_shuffled(model, sae, texts):
    order = np.argsort(texts.labels["gender"])
    ordered = LabelledTexts(
        [texts.texts[i] for i in order], {"gender": [texts.labels["gender"][i] for i in order]}
    )
    assert judge(model, sae, SITE, data=ordered, min_documents=8).concepts


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_are_read(tmp_path, suffix):
    import pandas

    table = pandas.DataFrame({"text": ["one", "two", " "], "label": [1, 0, 1], "kind": ["a", None, "b"]})
    path = tmp_path / f"table.{suffix}"
    {
        "csv": lambda: table.to_csv(path, index=False),
        "tsv": lambda: table.to_csv(path, index=False, sep="\t"),
        "jsonl": lambda: table.to_json(path, orient="records", lines=True),
        "parquet": lambda: table.to_parquet(path),
    }[suffix]()
    found = LabelledTexts.read(path, label_columns=("label", "kind"))
    assert (list(found.texts), found.labels["label"], found.labels["kind"]) == (
        ["one", "two"],
        ["1", "0"],
        ["a", ""],
    )
    with pytest.raises(InputError, match=r"no column 'labell'.*label"):
        LabelledTexts.read(path, label_columns=("labell",))


def test_bad_input_is_named(model, sae, texts, tmp_path):
    with pytest.raises(InputError, match="width"):
        judge(model, TopK(64, k=4).build(D + 1), SITE, **SMALL)
    with pytest.raises(InputError, match="common enough"):
        judge(model, sae, SITE, tokens=500)
    with pytest.raises(InputError, match="149 labels 'a' for 150"):
        judge(model, sae, SITE, data=LabelledTexts(texts.texts, {"a": ["x"] * 149}))
    with pytest.raises(InputError, match="does not exist"):
        LabelledTexts.read(tmp_path / "none.csv")
    with pytest.raises(InputError, match="read from"):
        LabelledTexts.read(tmp_path / "none.txt")
    (tmp_path / "bad.jsonl").write_text("{nonsense")
    with pytest.raises(InputError, match="cannot be read"):
        LabelledTexts.read(tmp_path / "bad.jsonl")


def test_the_model_is_left_as_it_was(model, sae):
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    judge(model, sae, SITE, **SMALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
