"""The word-level tokenizer of StoryWorld, a plain Hugging Face fast tokenizer.

Words carry the space before them (` fox`), the first word of a text too: the space is added when a text is
encoded and taken away when it is decoded, so that `decode(encode(text)) == text` for every text of the
language.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from steerkit.storyworld.language import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
CONTEXT = 256


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, made from the grammar's vocabulary: special tokens first, then the words in
    alphabetical order."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: index for index, token in enumerate([*SPECIAL.values(), *vocabulary()])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=SPECIAL["unk_token"]))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(" "), normalizers.Replace("  ", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r' ?[A-Za-z]+| ?"|[.,?!]"?'), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, vocab[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **SPECIAL,
    )
