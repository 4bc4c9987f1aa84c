"""A model's tokenizer, read by transformers. No code of a checkpoint is ever run, nothing is fetched from a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import InvalidRequest, ModelError
from engine.text.stages import MISSING, raw
from engine.text.words import Words

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")

GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names in tokenizer_config.json of the class that is its tokenizer.json and nothing else."""


class Tokenizer:
    """Strings to ids and back. Safe to read from several threads.

    inner: a transformers tokenizer that stands on the `tokenizers` library. Raises ModelError when it doesn't.
    """

    def __init__(self, inner: Any) -> None:
        backend = getattr(inner, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"tokenizer: {type(inner).__name__} has no fast form; add a tokenizer.json to the model's folder",
                field="tokenizer",
            )
        self.inner = inner
        # Clean-up would spoil byte-pair tokenizers, and transformers leaves it out there unless it is forced.
        cleanup = bool(inner.clean_up_tokenization_spaces) and (
            type(backend.model).__name__ != "BPE"
            or bool(inner.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output)
        )
        size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.words = Words(
            names=tuple(backend.id_to_token(i) for i in range(size)),
            special=frozenset(t.content for t in backend.get_added_tokens_decoder().values() if t.special),
            decoder="" if backend.decoder is None else backend.decoder.__getstate__().decode(),
            cleanup=cleanup,
            eos=None if inner.eos_token_id is None else int(inner.eos_token_id),
        )
        self.words.stages()  # a decoder that can't be streamed is told now
        self._pieces: dict[int, tuple[str, bytes]] = {}

    @classmethod
    def open(cls, path: str | Path) -> Tokenizer:
        """Read the tokenizer of a model's folder. Raises ModelError naming what is missing."""
        folder = Path(path)
        if not folder.is_dir():
            raise ModelError(f"tokenizer: no folder {folder}; give the folder of a model", field="tokenizer")
        if not any((folder / name).is_file() for name in FILES):
            raise ModelError(
                f"tokenizer: {folder} has no tokenizer.json; add one, or in Python use skip_tokenizer and token_ids",
                field="tokenizer",
            )
        try:
            return cls(_open(folder))
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            cause = " ".join(str(error).split())[:200]
            raise ModelError(f"tokenizer: {folder} can't be read: {cause}", field="tokenizer") from error

    @property
    def size(self) -> int:
        """Ids in use, added tokens included: one more than the largest."""
        return len(self.words.names)

    @property
    def eos(self) -> int | None:
        """The id that ends a text."""
        return self.words.eos

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a text. special: add the ids that the model wants around it, such as a begin-of-text id."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"prompt: not valid Unicode at character {error.start}", field="prompt") from error
        return [int(i) for i in self.inner.encode(text, add_special_tokens=special)]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, all at once."""
        return str(self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def piece(self, token: int) -> tuple[str, bytes]:
        """One token by itself: its text as it stands within a text, special or not, and its bytes, which are the true
        ones of a part of a character."""
        found = self._pieces.get(token)
        if found is None:
            name = self.words.name(token)
            items = [] if name is None else [name]
            for stage in self.words.stages():
                stage.follow()
                items = stage.feed(items) + stage.finish(False)
            text = "".join(items)
            data = raw(name) if name is not None and MISSING in text else text.encode("utf-8", "replace")
            found = self._pieces[token] = text, data
        return found

    def sequences(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """The ids that make each of these words, at the beginning of a text and after a space, as vLLM has it.

        Raises InvalidRequest naming bad_words.
        """
        out: dict[tuple[int, ...], None] = {}
        for word in words:
            bare = word.lstrip() or word
            try:
                found = [tuple(self.encode(text, special=False)) for text in (bare, " " + bare)]
            except InvalidRequest as error:
                raise InvalidRequest(str(error).replace("prompt", "bad_words", 1), field="bad_words") from error
            if not any(found):
                raise InvalidRequest(f"bad_words: {word[:64]!r} has no tokens", field="bad_words")
            out |= dict.fromkeys(filter(None, found))
        return tuple(out)


def _open(folder: Path) -> Any:
    """transformers' tokenizer of a folder. AutoTokenizer imports torch where it is installed, some 4 s, so that what
    needs no choice of a class goes past it."""
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_bytes()) if config.is_file() else {}
    plain = isinstance(said, dict) and said.get("tokenizer_class") in GENERIC and "auto_map" not in said
    if plain and (folder / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
