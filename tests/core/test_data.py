"""Documents from every source, the held-out split, and the permutation that shuffles them."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkit import storyworld
from steerkit.data import Documents, Permutation, load_documents, split_held_out
from steerkit.errors import InputError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TEXTS = ["one, two", 'she said "hi"', "", "drei – vier", "five"]


def write(path: Path, suffix: str) -> Path:
    """TEXTS as a file of each kind, with a second column."""
    import pandas

    path = path / f"texts{suffix}"
    table = pandas.DataFrame({"label": range(len(TEXTS)), "sentence": TEXTS})
    if suffix == ".txt":
        path.write_text("\n".join(TEXTS) + "\n\n")
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in table.to_dict("records")))
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix == ".tsv":
        path.write_text("\n".join(["label\tsentence", *(f"{i}\t{text}" for i, text in enumerate(TEXTS))]))
    else:
        table.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path, suffix):
    documents = load_documents(write(tmp_path, suffix))
    expected = [text for text in TEXTS if text] if suffix == ".txt" else TEXTS
    assert list(documents) == expected
    assert documents[-1] == "five"
    assert len(documents.fingerprint()) == 64
    assert load_documents(tmp_path / f"texts{suffix}").fingerprint() == documents.fingerprint()


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_column_can_be_named_and_a_missing_one_names_those_there_are(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert list(load_documents(path, text_column="sentence")) == TEXTS
    with pytest.raises(InputError, match=r"no column 'sentense'.*label, sentence.*Did you mean 'sentence'"):
        load_documents(path, text_column="sentense")


def test_the_first_of_the_known_text_columns_is_taken(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("question,statement\nq,s\n")
    assert list(load_documents(path)) == ["s"]
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match=r"none of the text columns.*its columns are a, b"):
        load_documents(path)


BAD_FILES = {
    "a.txt": (b"ok\n\xff\xfe\n", "line 2: not UTF-8"),
    "b.jsonl": (b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
    "c.jsonl": (b'["x"]\n', "line 1: a list"),
    "d.jsonl": (b'{"text": "x"}\n{"label": 1}\n', "line 2 has no column 'text'"),
    "e.jsonl": (b'{"text": 3}\n', "holds a int, not text"),
    "f.parquet": (b"PAR1 no", "no readable Parquet"),
    "g.pdf": (b"%PDF", r"is a \.pdf file; text is read from"),
    "h.txt": (b"\n  \n", "holds no text"),
    "i.csv": (b"", "holds no text"),
    "j.csv": (b"text\n", "holds no text"),
    "k.jsonl": (b"", "holds no text"),
    "l.csv": (b"text\n\xff\n", r"no readable \.csv"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_named_in_one_line(tmp_path, name):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(load_documents(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.txt", "does not exist"),
        ("no/such/thing/at all", "neither a file nor the id"),
        ("storywrld", "Did you mean 'storyworld'"),
        ("storyworld:lairs", r"no variant 'lairs'\. Did you mean 'liars'"),
        ([], "holds no text"),
        (["", " "], "holds no text"),
        (["x", 3], "Document 1 is of type int"),
    ],
)
def test_bad_specifications_are_explained(spec, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=message):
        load_documents(spec)


def test_stories_are_deterministic_lazy_and_grammatical():
    documents = load_documents("storyworld")
    assert len(documents) == 50_000
    assert documents[49_999] == load_documents("storyworld")[49_999]
    assert len({documents[i] for i in range(100)}) == 100
    assert documents.fingerprint() != load_documents("storyworld:sad").fingerprint()
    assert storyworld.log_prob(documents[123]) > -1e4


def test_a_slice_is_documents_with_a_fingerprint_of_its_own():
    documents = load_documents([f"text {i}" for i in range(100)])
    part = documents[10:20]
    assert isinstance(part, Documents)
    assert list(part) == [f"text {i}" for i in range(10, 20)]
    assert part[2:4][1] == "text 13"
    assert len({documents.fingerprint(), part.fingerprint(), documents[10:21].fingerprint()}) == 3


@settings(deadline=None, max_examples=50)
@given(st.integers(40, 2000))
def test_the_held_out_documents_are_the_last_twentieth_and_at_least_twenty(n):
    documents = load_documents([str(i) for i in range(n)])
    train, held_out = split_held_out(documents)
    assert len(train) + len(held_out) == n
    assert held_out[-1] == str(n - 1)
    assert train[-1] == str(int(held_out[0]) - 1)
    assert len(held_out) == max(20, round(0.05 * n))


def test_too_few_documents_cannot_be_split():
    with pytest.raises(InputError, match="39 documents: at least 40"):
        split_held_out(load_documents(["x"] * 39))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000) | st.integers(65_000, 70_000), st.integers(0, 2**40), st.integers(0, 100))
def test_a_permutation_is_one_and_depends_on_its_seeds(n, seed, epoch):
    permutation = Permutation(n, seed, epoch)
    everything = permutation[np.arange(n)]
    assert sorted(everything.tolist()) == list(range(n))
    assert [permutation[i] for i in range(min(n, 5))] == everything[:5].tolist()
    if n > 100:
        assert (Permutation(n, seed, epoch + 1)[np.arange(n)] != everything).mean() > 0.5


@pytest.mark.parametrize("n", [5, 1000, 100_000])
def test_a_permutation_is_uniform(n):
    """Over seeds, an element and the distance of two images fall evenly into five bins, within 5 sigma."""
    n_seeds = 1000
    images = np.array([Permutation(n, seed)[np.array([0, n // 2])] for seed in range(n_seeds)])
    distances = (images[:, 1] - images[:, 0] - 1) % n
    for values, size, n_bins in ((images[:, 0], n, 5), (distances, n - 1, 4)):
        counts = np.bincount(values * n_bins // size, minlength=n_bins)
        share = 1 / n_bins
        assert np.abs(counts - n_seeds * share).max() < 5 * (n_seeds * share * (1 - share)) ** 0.5
    neighbours = Permutation(n, 1)[np.arange(n)]
    if n >= 1000:
        assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 5 / n**0.5


def test_a_permutation_of_a_billion_costs_nothing():
    permutation = Permutation(10**9, 3)
    some = permutation[np.arange(100_000)]
    assert len(np.unique(some)) == 100_000
    assert 0.45e9 < some.mean() < 0.55e9
    with pytest.raises(IndexError):
        permutation[10**9]


@pytest.mark.skipif(not SHARED.exists(), reason="the development data are not beside the repository")
def test_the_development_data_load():
    assert len(load_documents(SHARED / "sst2_train.tsv")) == 60_614
    assert len(load_documents(SHARED / "facts_true_false.csv")) == 612
    assert len(load_documents(SHARED / "axbench_concept10_train.parquet", text_column="input")) == 936
    assert len(load_documents(SHARED / "power_seeking_train.csv")) == 642
    assert len(load_documents(SHARED / "persona_agreeableness.jsonl")) == 1000
    assert all(text.strip() for text in load_documents(SHARED / "wikitext2_valid.txt"))
