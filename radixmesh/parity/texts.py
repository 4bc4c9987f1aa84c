"""What is fed: given texts, random ids, or the packaged prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.errors import InvalidRequest
from engine.run.start import Decided
from radixmesh.parity.report import Text

PROMPTS = Path(__file__).with_name("prompts")
"""short: a line of code; prose: sentences, other scripts, numbers; code: a module, long enough for several buckets."""
ORDER = ("short", "prose", "code")


def pick(decided: Decided, prompts: Sequence[str] | None, tokens: int, seed: int, count: int) -> list[Text]:
    """The texts to feed, each with room for `count` new tokens. A packaged one is cut to what fits, and says so.

    Raises InvalidRequest when a given one does not fit.
    """
    reach = decided.resolved.max_len
    if tokens:
        ids = np.random.default_rng(seed).integers(0, decided.spec.vocab, tokens).tolist()
        return [_whole("random", ids, reach, count)]
    from engine.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(decided.path)
    if prompts:
        names = [f"prompt {i}" for i in range(len(prompts))]
        return [_whole(n, tokenizer.encode(p), reach, count) for n, p in zip(names, prompts, strict=True)]
    out = []
    for name in ORDER:
        ids = tokenizer.encode((PROMPTS / f"{name}.txt").read_text(encoding="utf-8"))
        fits = _whole(name, ids[: max(1, reach - count)], reach, count)
        out.append(Text(name=name, ids=fits.ids, cut=len(ids) - len(fits.ids)))
    return out


def _whole(name: str, ids: Sequence[int], reach: int, count: int) -> Text:
    if not ids or len(ids) + count > reach:
        raise InvalidRequest(
            f"prompt: {len(ids)} tokens and {count} new ones must be at least 1 each and fit {reach}", field="prompt"
        )
    return Text(name=name, ids=tuple(ids))
