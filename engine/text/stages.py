"""The decoders of the `tokenizers` library as streams: what each can say before it knows what follows.

A decoder is a chain over the list of tokens. Each stage here takes the next tokens and gives what can't change any
more; `finish` gives the rest. Up to the stage that joins the list (ByteLevel, Fuse) tokens are told apart, afterwards
the items are pieces of one text. `tokenizers.decoders.DecodeStream` won't do: it never gives bytes that stay invalid,
and it takes a text for settled that a byte token may still change.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Protocol

from engine.errors import ModelError

MISSING = "\ufffd"
"""What stands for bytes that are not UTF-8."""

BYTE = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")

CLEANUP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What `clean_up_tokenization_spaces` replaces, in order, each over the whole text."""


class Stage(Protocol):
    """One link of the chain. A `copy` of a stage is a stream of its own."""

    def follow(self) -> None:
        """What comes follows other text: nothing that is done to the first token is done."""
        ...

    def feed(self, items: Sequence[str]) -> list[str]:
        """What is settled after these tokens, or pieces of text."""
        ...

    def finish(self, cut: bool) -> list[str]:
        """The rest, when nothing follows. cut: leave out the bytes of a character that isn't complete yet."""
        ...


class Each:
    """A decoder that treats each token alone, the first perhaps in its own way."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        self._decoder, self._later, self._seen = _library(state), state["type"] in ("Metaspace", "WordPiece"), False
        self._known: dict[tuple[bool, str], str] = {}  # shared by all streams

    def follow(self) -> None:
        self._seen = True

    def feed(self, items: Sequence[str]) -> list[str]:
        out = []
        for item in items:
            key = (self._seen and self._later, item)
            text = self._known.get(key)
            if text is None:
                text = self._known[key] = self._decoder.decode(["", item] if key[0] else [item])
            out.append(text)
            self._seen = True
        return out

    def finish(self, cut: bool) -> list[str]:
        return []


class Spaced:
    """No decoder: tokens with a space between them."""

    def __init__(self) -> None:
        self._seen = False

    def follow(self) -> None:
        self._seen = True

    def feed(self, items: Sequence[str]) -> list[str]:
        out = [" " + item if i or self._seen else item for i, item in enumerate(items)]
        self._seen = self._seen or bool(items)
        return out

    def finish(self, cut: bool) -> list[str]:
        return []


class Suffix:
    """BPEDecoder: the suffix of a token is a space, or nothing in the last token. Keeps back a token that has one."""

    def __init__(self, suffix: str) -> None:
        self._suffix, self._held = suffix, ""

    def follow(self) -> None:
        pass

    def feed(self, items: Sequence[str]) -> list[str]:
        out = []
        for item in items:
            if self._held:
                out.append(self._held.replace(self._suffix, " "))
            self._held = item if self._suffix in item else ""
            if not self._held:
                out.append(item)
        return out

    def finish(self, cut: bool) -> list[str]:
        held, self._held = self._held, ""
        return [held.replace(self._suffix, "")] if held else []


class Fallback:
    """ByteFallback: a run of byte tokens is a text, or one mark per byte if any of it is invalid.

    So nothing of a run is settled before it ends.
    """

    def __init__(self) -> None:
        self._run = b""

    def follow(self) -> None:
        pass

    def feed(self, items: Sequence[str]) -> list[str]:
        out: list[str] = []
        for item in items:
            if BYTE.fullmatch(item):
                self._run += bytes([int(item[3:5], 16)])
            else:
                out += self.finish(False)
                out.append(item)
        return out

    def finish(self, cut: bool) -> list[str]:
        run, self._run = self._run, b""
        if not run:
            return []
        try:
            return [codecs.getincrementaldecoder("utf-8")().decode(run, final=not cut)]
        except UnicodeDecodeError:
            return [MISSING] * len(run)


class Bytes:
    """ByteLevel: each character of a token is a byte; a token with any other character stands for itself."""

    def __init__(self) -> None:
        self._state: tuple[bytes, int] = (b"", 0)

    def follow(self) -> None:
        pass

    def feed(self, items: Sequence[str]) -> list[str]:
        data = b""
        for item in items:
            try:
                data += bytes([BYTE_OF[c] for c in item])
            except KeyError:
                data += item.encode()
        return [self._decode(data, False)]

    def finish(self, cut: bool) -> list[str]:
        return [] if cut else [self._decode(b"", True)]

    def _decode(self, data: bytes, final: bool) -> str:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.setstate(self._state)
        text = decoder.decode(data, final)
        self._state = decoder.getstate()
        return text


class Replaced:
    """`str.replace` over the whole text: keeps back an end that may be the beginning of the pattern."""

    def __init__(self, pattern: str, content: str) -> None:
        self._pattern, self._content, self._held = pattern, content, ""

    def follow(self) -> None:
        pass

    def feed(self, items: Sequence[str]) -> list[str]:
        parts = (self._held + "".join(items)).split(self._pattern)
        keep = beginning(parts[-1], (self._pattern,))
        self._held = parts[-1][len(parts[-1]) - keep :]
        parts[-1] = parts[-1][: len(parts[-1]) - keep]
        return [self._content.join(parts)]

    def finish(self, cut: bool) -> list[str]:
        held, self._held = self._held, ""
        return [held]


class Stripped:
    """Strip over the whole text: drops up to `left` characters `content` from its start."""

    def __init__(self, content: str, left: int) -> None:
        self._content, self._left = content, left

    def follow(self) -> None:
        self._left = 0

    def feed(self, items: Sequence[str]) -> list[str]:
        text = "".join(items)
        start = 0
        while self._left and start < len(text):
            if text[start] == self._content:
                start, self._left = start + 1, self._left - 1
            else:
                self._left = 0
        return [text[start:]]

    def finish(self, cut: bool) -> list[str]:
        return []


def beginning(text: str, patterns: Sequence[str]) -> int:
    """Length of the longest end of the text that begins one of the patterns, without being all of it."""
    longest = max((len(p) for p in patterns), default=0) - 1
    for n in range(min(longest, len(text)), 0, -1):
        end = text[-n:]
        if any(len(p) > n and p.startswith(end) for p in patterns):
            return n
    return 0


def raw(token: str) -> bytes:
    """The bytes of a token that is a byte, or is spelled in the alphabet of byte-level tokenizers; else its text's."""
    if BYTE.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    if all(c in BYTE_OF for c in token):
        return bytes(BYTE_OF[c] for c in token)
    return token.encode("utf-8", "replace")


def chain(decoder: str, cleanup: bool) -> tuple[Stage, ...]:
    """The stages of a decoder of the `tokenizers` library, as JSON ("" = it has none), then those of the clean-up.

    Raises ModelError naming a decoder that can't be streamed exactly.
    """
    states = list(_flat(json.loads(decoder))) if decoder else []
    stages: list[Stage] = [] if states else [Spaced()]
    joined = not states
    for state in states:
        stage = _stage(state, joined)
        joined = joined or state["type"] in ("ByteLevel", "Fuse")
        if stage is not None:
            stages.append(stage)
    return (*stages, *(Replaced(a, b) for a, b in CLEANUP)) if cleanup else tuple(stages)


def fresh(stages: Sequence[Stage]) -> list[Stage]:
    """Copies, for a stream of its own."""
    return [copy(s) for s in stages]


def _flat(state: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [leaf for child in state["decoders"] for leaf in _flat(child)]


def _stage(state: Mapping[str, Any], joined: bool) -> Stage | None:
    kind = state["type"]
    if kind == "Fuse":
        return None
    if not joined:
        if kind in ("Metaspace", "WordPiece", "Replace", "Strip"):
            return Each(state)
        if kind == "BPEDecoder" and state["suffix"]:
            return Suffix(state["suffix"])
        if kind in ("ByteLevel", "ByteFallback"):
            return Bytes() if kind == "ByteLevel" else Fallback()
    elif kind == "Replace" and state["pattern"].get("String"):
        return Replaced(state["pattern"]["String"], state["content"])
    elif kind == "Strip" and not state["stop"]:
        return Stripped(state["content"], state["start"])
    raise ModelError(
        f"tokenizer: its decoder {kind} can't be streamed exactly{' after its tokens are joined' if joined else ''}; "
        "use another tokenizer.json, or in Python skip_tokenizer",
        field="tokenizer",
    )


def _library(state: Mapping[str, Any]) -> Any:
    """One decoder of a chain, as the library runs it."""
    from tokenizers import decoders

    decoder = decoders.Fuse()  # any decoder takes the state of any other
    decoder.__setstate__(json.dumps(state).encode())
    return decoder


def _byte_of() -> dict[str, int]:
    """The alphabet of byte-level tokenizers: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_of()
