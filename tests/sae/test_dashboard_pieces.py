"""Token texts for display, against what tokenizers of the three conventions decode."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sae.dashboard.pieces import INCOMPLETE, context_texts, readable_tokens, token_style

TEXT = "The naïve café sells\ntea — 東京 🦊 and  two spaces."


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(["the cat and the tea and the sells"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def sentencepiece() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁the", "▁a", "▁on", "▁", *"abcdehlnost."]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def joined(texts: list[str]) -> str:
    data = b"".join(
        bytes.fromhex(text[1:]) if text.startswith(INCOMPLETE) else text.encode() for text in texts
    )
    return data.decode()


def test_byte_level_pieces_join_to_the_text():
    tokenizer = byte_level()
    assert token_style(tokenizer) == "byte-level"
    texts = readable_tokens(tokenizer, tokenizer(TEXT)["input_ids"])
    assert joined(texts) == TEXT
    assert any(text.startswith(INCOMPLETE) for text in texts)


def test_special_tokens_stay_as_they_are():
    tokenizer = byte_level()
    assert readable_tokens(tokenizer, [tokenizer.eos_token_id]) == ["<|end|>"]


def test_ids_beyond_the_vocabulary_have_a_name():
    assert readable_tokens(byte_level(), [99_999]) == ["[99999]"]


def test_sentencepiece():
    tokenizer = sentencepiece()
    assert token_style(tokenizer) == "sentencepiece"
    ids = [tokenizer.get_vocab()[piece] for piece in ("▁the", "s", "<0xE2>", "<0x0A>")]
    assert readable_tokens(tokenizer, ids) == [" the", "s", INCOMPLETE + "e2", "\n"]


@pytest.mark.parametrize(("piece", "text"), [("##ing", "ing"), ("king", " king"), ("##", " ##")])
def test_wordpiece(piece, text):
    vocabulary = {"[UNK]": 0, "##ing": 1, "king": 2, "##": 3, "##s": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    assert token_style(fast) == "wordpiece"
    assert readable_tokens(fast, [vocabulary[piece]]) == [text]


def test_in_context_characters_are_put_together_and_nothing_is_invisible():
    tokenizer = byte_level()
    ids = tokenizer(TEXT)["input_ids"]
    shown = context_texts(tokenizer, ids)
    assert len(shown) == len(ids)
    assert "".join(shown).replace("‧", "") == TEXT.replace("\n", "↵")
    fox = [i for i in ids if readable_tokens(tokenizer, [i])[0].startswith(INCOMPLETE)]
    assert context_texts(tokenizer, fox[:1]) == [f"‹{readable_tokens(tokenizer, fox[:1])[0][1:]}›"]
    plain = sentencepiece()
    control = [plain.get_vocab()[f"<0x{byte:02X}>"] for byte in (0x1B, 0x00, 0x09, 0xE2)]
    assert context_texts(plain, control) == ["␛", "␀", "⇥", "‹e2›"]
