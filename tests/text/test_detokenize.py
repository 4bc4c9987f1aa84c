"""Text made piece by piece equals decoding at once, for any ids and any split."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Raw
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engine.errors import ModelError
from engine.text.detokenize import Detokenizer, StopStrings, TextStream
from engine.text.stages import BYTE_OF
from engine.text.tokenizer import Tokenizer
from tests.text.made import KINDS, TEXT, made


@cache
def tokenizer(kind: str) -> Tokenizer:
    return Tokenizer(made(kind))


def numbers(kind: str, text: str) -> list[int]:
    """Ids of a text without what the model wants around it."""
    return tokenizer(kind).encode(text, special=False)


@st.composite
def streams(draw: st.DrawFn, kind: str) -> list[list[int]]:
    """Random ids, some beyond the vocabulary, in random chunks, some of them empty."""
    size = tokenizer(kind).size
    ids = st.integers(0, size + 3)
    if kind in ("llama", "gemma"):  # byte tokens stand at 3 to 258; make runs of them, valid and not
        utf8 = st.sampled_from("é世🙂\u0301a").map(lambda c: [3 + b for b in c.encode()])
        runs = st.one_of(ids.map(lambda i: [i]), utf8, st.integers(3, 258).map(lambda i: [i]))
    else:
        runs = st.one_of(ids.map(lambda i: [i]), st.sampled_from(TEXT.split()).map(lambda w: numbers(kind, w)))
    flat = [i for run in draw(st.lists(runs, max_size=24)) for i in run]
    cuts = sorted(draw(st.lists(st.integers(0, len(flat)), max_size=8)))
    return [flat[a:b] for a, b in zip([0, *cuts], [*cuts, len(flat)], strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_join_to_the_text_decoded_at_once(kind: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(streams(kind), st.booleans())
    def check(chunks: list[list[int]], skip: bool) -> None:
        ids = [i for chunk in chunks for i in chunk]
        stream = Detokenizer(tokenizer(kind).words, skip)
        text = "".join(stream.feed(chunk) for chunk in chunks)
        whole = made(kind).decode(ids, skip_special_tokens=skip)
        if kind not in ("llama", "gemma"):  # there an unfinished character takes its whole run with it
            assert (text + stream.peek()).rstrip("\ufffd") == whole.rstrip("\ufffd")
        assert text + stream.finish() == whole

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_first_later_and_twice(kind: str) -> None:
    every = range(tokenizer(kind).size + 2)
    text = numbers(kind, TEXT)
    for ids in (text, list(every), list(reversed(every)), *([i] for i in every), *([i, i, text[0]] for i in every)):
        stream = Detokenizer(tokenizer(kind).words, False)
        assert "".join(stream.feed([i]) for i in ids) + stream.finish() == made(kind).decode(ids)


def test_characters_split_across_tokens_come_whole() -> None:
    ids = numbers("byte_level", "🙂é")
    stream = Detokenizer(tokenizer("byte_level").words)
    pieces = [stream.feed([i]) for i in ids]
    assert len(ids) >= 4
    assert [p for p in pieces if p] == ["🙂", "é"]


def test_bytes_that_stay_invalid_are_given_as_soon_as_that_is_sure() -> None:
    half, letter = numbers("byte_level", "鬼")[:1], numbers("byte_level", "a")
    stream = Detokenizer(tokenizer("byte_level").words)
    assert stream.feed(half) == ""
    assert stream.feed(letter) == "\ufffda"
    assert stream.feed(half) == ""
    assert stream.peek() == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize(("kind", "expected"), [("llama", " the"), ("gemma", " the"), ("metaspace", " the")])
def test_an_answer_keeps_the_space_before_its_first_word(kind: str, expected: str) -> None:
    ids = numbers(kind, "the")
    both = numbers(kind, "the the")
    answer = TextStream(tokenizer(kind).words)
    text = answer.feed(both[len(ids) :]) + answer.finish()
    assert made(kind).decode(ids) + text == made(kind).decode(both) == "the the"
    assert text == expected


@pytest.mark.parametrize("kind", ["byte_level", "llama", "word_piece"])
def test_the_cost_of_a_token_does_not_grow(kind: str) -> None:
    """Twenty times the tokens may take a hundred times as long, on a busy machine; quadratic is four hundred times."""
    ids = numbers(kind, "the quick dog can't ")

    def seconds(count: int) -> float:
        stream, started = Detokenizer(tokenizer(kind).words), time.perf_counter()
        for i in range(count):
            stream.feed((ids[i % len(ids)],))
        return time.perf_counter() - started

    few = min(seconds(500) for _ in range(5))
    assert min(seconds(10_000) for _ in range(2)) < 100 * few


def test_a_decoder_that_cannot_be_streamed_is_refused_by_name() -> None:
    raw = Raw(models.WordLevel(vocab={"a": 0}))
    for decoder, name in (
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]), "WordPiece"),
    ):
        raw.decoder = decoder
        with pytest.raises(ModelError, match=f"decoder {name} can't be streamed") as caught:
            Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))
        assert caught.value.field == "tokenizer"


def first_stop(kind: str, ids: list[int], stops: tuple[str, ...], skip: bool) -> tuple[int | None, str | None, str]:
    """Brute force: the first prefix whose text, decoded at once, holds a stop string; which; the text before it."""
    before = numbers(kind, "a")
    plain = made(kind).decode(before, skip_special_tokens=skip)
    for n in range(len(ids) + 1):
        text = made(kind).decode([*before, *ids[:n]], skip_special_tokens=skip)[len(plain) :]
        found = [(text.index(s), i) for i, s in enumerate(stops) if s in text]
        if found:
            return n, stops[min(found)[1]], text[: min(found)[0]]
    return None, None, text


@pytest.mark.parametrize("kind", ["byte_level", "llama", "gemma", "metaspace", "words"])
def test_stop_strings_end_the_text_at_the_first_token_that_shows_one(kind: str) -> None:
    @settings(max_examples=80, deadline=None)
    @given(streams(kind), st.data())
    def check(chunks: list[list[int]], data: st.DataObject) -> None:
        ids = [i for chunk in chunks for i in chunk]
        whole = TEXT + made(kind).decode(ids)
        spots = st.integers(0, len(whole) - 1).flatmap(lambda a: st.integers(1, 6).map(lambda n: whole[a : a + n]))
        texts = spots.filter(lambda s: "\ufffd" not in s)
        stops = tuple(data.draw(st.lists(texts, min_size=1, max_size=3)))
        end, matched, text = first_stop(kind, ids, stops, True)
        stopper, stream, out, fed = (
            StopStrings(tokenizer(kind).words, stops),
            TextStream(tokenizer(kind).words, stops),
            "",
            0,
        )
        for chunk in chunks:
            keep = stopper.feed(chunk)
            out += stream.feed(chunk[:keep])
            assert text.startswith(out), "text was taken back"
            if keep is not None:
                fed += keep
                break
            fed += len(chunk)
        assert stopper.matched == matched
        assert fed == (len(ids) if end is None else end)
        assert out + stream.finish(stopper.matched) == text

    check()


def test_text_that_may_become_a_stop_string_is_kept_back() -> None:
    stream = TextStream(tokenizer("byte_level").words, ("dog</end>", "END"))
    pieces = [stream.feed(numbers("byte_level", piece)) for piece in ("the dog", "</e", "x E", "N", "D of")]
    assert pieces == ["the ", "", "dog</ex ", "", ""]
    assert stream.finish("END") == ""


def test_the_alphabet_of_bytes_is_the_librarys() -> None:
    for char, byte in BYTE_OF.items():
        for before in (b"", b"\xc3", b"\xf0\x9f\x99"):  # so that every byte completes some character
            token = "".join(next(c for c, b in BYTE_OF.items() if b == x) for x in before) + char
            assert decoders.ByteLevel().decode([token]) == (before + bytes([byte])).decode(errors="replace")
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet())
