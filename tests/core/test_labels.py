"""Labels stand beside the tokens that they are of, through shuffling, resuming and caching."""

import json

import numpy as np
import pytest
import torch

from steerkit.activation_cache import cache
from steerkit.activations import ActivationStream, collect
from steerkit.data import load_documents, split_held_out
from steerkit.errors import CheckpointError, InputError
from steerkit.labels import TokenLabels
from steerkit.models import HookedModel
from steerkit.storyworld import ATTRIBUTES

SITE = "blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def model():
    return HookedModel.from_pretrained("storyworld", device="cpu")


@pytest.fixture(scope="module")
def documents():
    return load_documents("storyworld")[:60]


def stream(model, documents, labels, **options):
    options = {"batch_size": 256, "block_tokens": 1500, **options}
    return ActivationStream(model, documents, SITE, columns=labels, **options)


def numbers(text):
    """A label that tells every text from the others."""
    return [0.5 * (hash_of(text) % 997) / 997]


def hash_of(text):
    return sum(i * ord(c) for i, c in enumerate(text, 1))


def test_each_row_has_the_label_of_its_own_token(model, documents):
    # The embedding of a token tells which token it is; the label is a function of it.
    ids = {tuple(row.tolist()): i for i, row in enumerate(model.model.get_input_embeddings().weight.detach())}

    def by_token(text):
        tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return np.array(tokens)[:, None] / model.d_vocab

    labels = TokenLabels.of(documents, ["id"], by_token)
    source = stream(model, documents, labels, prefetch=True)
    for _ in range(30):
        batch = next(source)
        found = [ids.get(tuple(row.tolist())) for row in batch[SITE]]
        assert torch.equal((batch["id"] * model.d_vocab).round().long(), torch.tensor(found))
    assert source.passes > 0
    source.close()


def test_a_resumed_stream_goes_on_with_the_same_labels(model, documents):
    labels = TokenLabels.of(documents, ["mood=happy", "voice=speech"])
    whole = stream(model, documents, labels)
    before = [next(whole) for _ in range(4)]
    state = json.loads(json.dumps(whole.state_dict()))
    expected = [next(whole) for _ in range(9)]
    again = stream(model, documents, labels)
    again.load_state_dict(state)
    for batch in expected:
        for name, values in next(again).items():
            assert torch.equal(values, batch[name])
    assert 0 < sum(float(batch["voice=speech"].mean()) for batch in before) < 4
    with pytest.raises(CheckpointError, match="another columns"):
        stream(model, documents, TokenLabels.of(documents, ["mood=sad"])).load_state_dict(state)


def test_labels_do_not_change_the_batches(model, documents):
    plain, labelled = (
        stream(model, documents, labels) for labels in (None, TokenLabels.of(documents, ["a"], numbers))
    )
    for _ in range(8):
        assert torch.equal(next(plain)[SITE], next(labelled)[SITE])


def test_attributes_of_stories_are_those_of_the_generator(model):
    documents = split_held_out(load_documents("storyworld"))[1][:30]
    labels = TokenLabels.of(documents, [f"mood={mood}" for mood in ATTRIBUTES["mood"]])
    acts = collect(model, documents, SITE)
    found = torch.stack(list(labels(acts.document.numpy(), acts.position.numpy()).values()), 1)
    assert torch.equal(found.sum(1), torch.ones(len(found)))
    mood = documents.column("mood")
    for index in range(len(documents)):
        name = ATTRIBUTES["mood"][int(found[acts.document == index][0].argmax())]
        assert name == mood(index)
    assert any(mood(i) in documents[i] for i in range(len(documents)))


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_labels_from_a_column_of_a_table(model, suffix, tmp_path):
    import pandas

    table = pandas.DataFrame(
        {"text": [f"The fox sleeps {i}." for i in range(50)], "label": [i % 3 for i in range(50)]}
    )
    path = tmp_path / f"table.{suffix}"
    if suffix == "csv":
        table.to_csv(path, index=False)
    elif suffix == "jsonl":
        table.to_json(path, orient="records", lines=True)
    else:
        table.to_parquet(path)
    train, held_out = split_held_out(load_documents(path))
    for part, first in ((train, 0), (held_out, 30)):
        labels = TokenLabels.of(part, ["label=2"])
        found = labels(np.array([4, 0, 4, 1]), np.array([0, 3, 1, -1]))["label=2"]
        assert found.tolist() == [float((first + i) % 3 == 2) for i in (4, 0, 4, 1)]
    with pytest.raises(InputError, match=r"No document of .* has label=7\. label is 0, 1, 2"):
        TokenLabels.of(train, ["label=7"])
    with pytest.raises(InputError, match=r"no column 'lable'.*Did you mean 'label'"):
        TokenLabels.of(train, ["lable=2"])


def test_an_empty_value_is_unknown(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"text": "a", "label": "x"}\n{"text": "b", "label": null}\n{"text": "c", "label": "y"}\n'
    )
    labels = TokenLabels.of(load_documents(path), ["label=x"])
    assert labels(np.arange(3), np.zeros(3, int))["label=x"].tolist() == pytest.approx(
        [1, np.nan, 0], nan_ok=True
    )


def test_a_cache_gives_the_labels_of_its_tokens(model, tmp_path):
    made = cache(
        model, load_documents("storyworld")[:60], SITE, tmp_path / "c", tokens=2000, shard_tokens=700
    )
    labels = TokenLabels.of(made.train, ["a"], numbers)
    expected = {}
    for shard in made.shards():
        for row, document in zip(shard[SITE], shard.document.tolist()):
            expected.setdefault(tuple(row.tolist()), set()).add(round(numbers(made.train[document])[0], 5))
    batch = next(made.stream(batch_size=512, columns=labels))
    assert all(
        round(float(label), 5) in expected[tuple(row.tolist())] for row, label in zip(batch[SITE], batch["a"])
    )
    assert len(batch["a"].unique()) > 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: TokenLabels.of(d, ["mood"]), "column=value"),
        (lambda d: TokenLabels.of(d, ["mod=happy"]), "Did you mean 'mood'"),
        (lambda d: TokenLabels.of(d, ["mood=hapy"]), "Did you mean 'happy'"),
        (lambda d: TokenLabels.of(load_documents(["a", "b"]), ["x=y"]), "text alone"),
        (lambda d: TokenLabels.of(d, ["a"], lambda text: [2.0]).of_document(0), "between 0 and 1"),
        (lambda d: TokenLabels.of(d, ["a"], lambda text: [1, 0]).of_document(0), r"must be \(1,\)"),
        (
            lambda d: TokenLabels.of(d, ["a"], lambda text: [[1.0]])(np.array([0, 0]), np.array([0, 1])),
            "labels of tokens must be of the same tokens",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(documents, make, message):
    with pytest.raises(InputError, match=message) as raised:
        make(documents)
    assert "\n" not in str(raised.value)
