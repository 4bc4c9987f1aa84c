"""Tokenizers of every common kind, built with the `tokenizers` library and read through transformers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "the quick brown fox can't jump over the lazy dog , or can he ? it 's what they 've said . "
    "naïve façade über straße 你好世界 привет мир 🙂👩‍👩‍👧 def f ( x ) : return x"
)
SPECIAL = ("<s>", "</s>", "<unk>")


def _texts() -> Iterator[str]:
    for i in range(20):
        yield TEXT[i:] + " " + TEXT[: len(TEXT) - i]


def _wrap(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    tokenizer.add_tokens([AddedToken("<|plain|>", special=False), AddedToken("ÿ added\u0120", special=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **more
    )


def byte_level(**more: Any) -> PreTrainedTokenizerFast:
    """GPT-2, Llama 3, Qwen: tokens of bytes, characters split across tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.train_from_iterator(
        _texts(),
        trainers.BpeTrainer(
            vocab_size=380,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return _wrap(made, **more)


def fallback(strip: bool) -> PreTrainedTokenizerFast:
    """Llama 2 and Mistral (strip) or Gemma: "▁" for a space, byte tokens for what is not in the vocabulary."""
    seed = Tokenizer(models.BPE())
    seed.pre_tokenizer = pre_tokenizers.Metaspace()
    seed.train_from_iterator(_texts(), trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = [t for t in seed.get_vocab() if t.isascii() or t.startswith("▁") or t == "é"]
    tokens = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), *sorted(learned), "▁", "▁▁", " ▁x", "<0x+A>", "<0xZZ>"]
    vocabulary = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space]) if strip else space
    parts: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if strip else parts)
    return _wrap(made)


def metaspace() -> PreTrainedTokenizerFast:
    """T5: the Metaspace decoder, which drops the mark of the first token."""
    made = Tokenizer(models.Unigram([*((t, -1.0) for t in SPECIAL), ("▁", -2.0), ("▁the", -3.0), ("x▁y", -3.0),
                                     *((c, -4.0) for c in "thequickbrown")], unk_id=2))  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    return _wrap(made)


def word_piece(cleanup: bool) -> PreTrainedTokenizerFast:
    """BERT: "##" joins, else a space; the decoder cleans up each token, transformers the whole text."""
    words = [*SPECIAL, "the", "##s", "do", "n", "n't", "'", "##'", "'m", "s", "##t", ".", "?", "!", ",", "##,", "##"]
    words += ["'ve", "'re", "ve", "re", "##e", "'s", "a", "##. n't"]
    made = Tokenizer(models.WordPiece(vocab={w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=cleanup)
    return _wrap(made, clean_up_tokenization_spaces=True)


def suffixed() -> PreTrainedTokenizerFast:
    """CLIP and GPT-1: a suffix ends each word."""
    words = [*SPECIAL, "the</w>", "qu", "ick</w>", ".</w>", "</w>", "a</w>b", "'", "n't</w>"]
    made = Tokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], end_of_word_suffix="</w>"))
    made.decoder = decoders.BPEDecoder()
    return _wrap(
        made,
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )


def words() -> PreTrainedTokenizerFast:
    """No decoder: words with a space between."""
    made = Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate([*SPECIAL, "a", "b", ",", "é"])}))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return _wrap(made)


def stripped() -> PreTrainedTokenizerFast:
    """Strip and a regular expression over each token, before they are joined."""
    made = Tokenizer(models.WordLevel(vocab={w: i for i, w in enumerate([*SPECIAL, "__", "_a_", "b_", "c1d22"])}))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("[0-9]+"), "#"),
            decoders.Strip("_", 1, 1),
            decoders.Fuse(),
            decoders.Replace("a#", "!"),
        ]
    )
    return _wrap(made)


KINDS = ("byte_level", "llama", "gemma", "metaspace", "word_piece", "word_piece_twice", "suffixed", "words", "stripped")


@cache
def made(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, built once."""
    return {
        "byte_level": byte_level,
        "llama": lambda: fallback(strip=True),
        "gemma": lambda: fallback(strip=False),
        "metaspace": metaspace,
        "word_piece": lambda: word_piece(cleanup=False),
        "word_piece_twice": lambda: word_piece(cleanup=True),
        "suffixed": suffixed,
        "words": words,
        "stripped": stripped,
    }[kind]()
