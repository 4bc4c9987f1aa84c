"""The numbers of a backend: all that the scheduler knows of the hardware. Every number is per shard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config import Resolved
from engine.model.groups import CacheGroup, cache_groups
from engine.model.spec import ModelSpec

MOST_BIAS, MOST_COPIES, MOST_HISTORY = 4096, 256, 1 << 16
"""Entries of a step. What has a length of its own is padded to it, or cut into calls, only in steps that have any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one step may hold. A feature that a backend has not built stands at 0 and `check_step` refuses it by name.

    groups, pages, max_row_pages: cache groups, pages in each, entries of one slot's table in each.
    slots: device slots; shard of a slot = slot * shards // slots. stages: pipeline stages.
    depth: steps that may be out (forward called, not collected). run_ahead: uncollected verify rows a slot may have.
    max_rows, max_tokens: rows and fed tokens of a step. token_buckets: the ladder that steps are padded to.
    max_len: positions a row may reach.
    max_draft: guesses a row may carry. device_draft: the backend makes guesses itself (tokens -2-j).
    max_edits: page-table edits of a step in each group; at least one whole table and the growth of every row.
    max_masks: rows of a step that may be masked. max_copies, max_bias, max_history: entries of a step.
    max_logprobs: alternatives per token. adapters: LoRA indices. whole_rows: a prompt may not be chunked.
    taps: named inner values may be asked for. sharing: what it costs to read a prefix once for a group of rows
    (ScheduleStep.shared), in positions that are read: (of the group, of each row, how many of 100 that rows read by
    themselves it counts as read); None = of no use here.
    """

    groups: tuple[CacheGroup, ...]
    pages: tuple[int, ...]
    max_row_pages: tuple[int, ...]
    slots: int
    max_rows: int
    max_tokens: int
    max_len: int
    vocab: int
    max_edits: int
    token_buckets: tuple[int, ...] = ()
    shards: int = 1
    stages: int = 1
    depth: int = 2
    run_ahead: int = 0
    max_draft: int = 0
    device_draft: bool = False
    max_masks: int = 0
    max_copies: int = 0
    max_bias: int = 0
    max_history: int = 0
    max_logprobs: int = 0
    adapters: int = 0
    whole_rows: bool = False
    taps: bool = False
    sharing: tuple[int, int, int] | None = None

    @classmethod
    def of(cls, spec: ModelSpec, config: Resolved, **built: Any) -> Limits:
        """The limits that a configuration asks of a backend; `built`: the features that the backend has."""
        groups = cache_groups(spec, config.page)
        reach = config.max_len + built.get("max_draft", 0)
        tables = tuple(-(-reach // g.page) for g in groups)
        growth = config.max_tokens // config.page + 2 * config.max_rows
        return cls(
            groups=groups,
            pages=config.pages,
            max_row_pages=tables,
            max_edits=config.edits or max(tables) + growth,
            slots=config.slots,
            max_rows=config.max_rows,
            max_tokens=config.max_tokens,
            max_len=config.max_len,
            vocab=spec.vocab,
            token_buckets=config.token_buckets,
            depth=config.depth,
            **built,
        )


def choosing(config: Resolved) -> dict[str, int]:
    """The limits of a backend that has all of sampling: what was configured, and at least one whole request."""
    return {
        "max_masks": config.max_rows,
        "max_bias": MOST_BIAS,
        "max_history": max(MOST_HISTORY, config.max_len) if config.penalties else 0,
        "max_copies": MOST_COPIES,
        "max_logprobs": config.max_logprobs,
    }
