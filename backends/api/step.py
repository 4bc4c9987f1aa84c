"""One step of the engine as data: numpy arrays and nothing else. R rows, T fed tokens, K = limits.max_draft.

Every feature is a value of these types, never a second loop. docs/contract.md tells the rules in prose.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

I32: TypeAlias = NDArray[np.int32]
U8: TypeAlias = NDArray[np.uint8]
U32: TypeAlias = NDArray[np.uint32]
U64: TypeAlias = NDArray[np.uint64]
F32: TypeAlias = NDArray[np.float32]
Bool: TypeAlias = NDArray[np.bool_]
Ticket: TypeAlias = int

TOKEN, POOLED, HIDDEN, SCORES = 1, 2, 4, 8
"""Bits of ScheduleStep.output: what a row returns. 0 for a chunk that does not end the prompt."""

OK, NONFINITE = 0, 1
"""Values of StepResult.status."""


def empty(*shape: int) -> I32:
    """An int32 array of the given shape that holds nothing."""
    return np.zeros(shape, np.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """What changed in the page tables of a full or window group since the last step.

    edits int32[E, 3]: (slot, index, page); the backend keeps each slot's table. A slot that is seated starts from
    stale entries: the step that seats it sends every entry that it will read or write.
    base int32[R]: position of index 0 of the row's table; entry i holds positions base + i*page and on.
    """

    edits: I32
    base: I32


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTable:
    """Recurrent state. read int32[R]: page to start from, -1 = zeros; write int32[R]: page that gets 1+K versions.

    A seated row reads version 0 of `read`; a continuing row reads the version that its last verify accepted.
    """

    read: I32
    write: I32


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How each row chooses (DESIGN: sampling is normative). Arrays have one entry a row unless said otherwise.

    temperature float32: 0 = greedy. top_k int32: 0 = off. top_p float32: 1 = off. min_p float32: 0 = off. seed uint64.
    penalty float32[R, 3]: repetition, presence, frequency; neutral (1, 0, 0). A slot has them from its seat on, or not
    at all: for others nothing is counted.
    logprobs int32: alternatives beside the token's own logprob, -1 = none. prompt_logprobs int32[R, 2]: (first position
    whose token is scored, alternatives), (-1, -1) = none: each token of the prompt from there on is scored by the row
    that feeds the one before it, the last of a chunk through ScheduleStep.next; so the slot is seated before that
    position. bias float32[B, 3]: (row, token, added value).
    history int32[H, 3]: (row, token, is_output), whole when a slot is seated. label_ids int32: tokens to be scored.
    """

    temperature: F32
    top_k: I32
    top_p: F32
    min_p: F32
    seed: U64
    penalty: F32
    logprobs: I32
    prompt_logprobs: I32
    bias: F32 = field(default_factory=lambda: np.zeros((0, 3), np.float32))
    history: I32 = field(default_factory=lambda: empty(0, 3))
    label_ids: I32 = field(default_factory=lambda: empty(0))

    @classmethod
    def greedy(cls, rows: int) -> Sampling:
        """Neutral sampling for `rows` rows."""
        return cls(
            temperature=np.zeros(rows, np.float32),
            top_k=empty(rows),
            top_p=np.ones(rows, np.float32),
            min_p=np.zeros(rows, np.float32),
            seed=np.zeros(rows, np.uint64),
            penalty=np.tile(np.array([1, 0, 0], np.float32), (rows, 1)),
            logprobs=np.full(rows, -1, np.int32),
            prompt_logprobs=np.full((rows, 2), -1, np.int32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleStep:
    """What the device does next.

    step: its number, and its ticket. slots int32[R]: a row's device slot, at most once per step.
    starts int32[R]: >= 0 seats the slot at this cached length; -1 goes on from the device's own length.
    lens int32[R]: tokens fed, >= 1. upper int32[R]: the host's upper bound of the length afterwards, for planning only.
    drafts int32[R]: how many trailing tokens are guesses to verify. parents: None = the guesses are a chain; int32[T]:
    of a guess the token that it follows, by its place among those that its row feeds; -1: the one before.
    tokens int32[T]: >= 0 literal; -1 the slot's last accepted token; -2-j its j-th device-made draft.
    next int32[R]: the literal that follows this chunk in the prompt, -1 = none. output uint8[R]: bits above.
    masked bool[R]: this row's vocabulary mask arrives in sample(). adapters int32[R]: LoRA index, 0 = none.
    tables: one per cache group. copies int32[C, 4]: (group, shard, src, dst), done before the forward, in order.
    shared int32[G, 4]: (first row, last row, first position, last position), all inclusive, of rows that read the same
    whole pages there in every full group, cached before the step. Nested, outermost first; those of a row lie end to
    end from position 0. Empty is always right. embeds int32[N, 4]: (first token, handle, first row, count). positions:
    None or int32[T, 3]. taps: named inner values to return; () compiles to nothing.
    """

    step: int
    slots: I32
    starts: I32
    lens: I32
    upper: I32
    drafts: I32
    tokens: I32
    next: I32
    output: U8
    masked: Bool
    adapters: I32
    tables: tuple[PageTable | StateTable, ...]
    sampling: Sampling
    parents: I32 | None = None
    copies: I32 = field(default_factory=lambda: empty(0, 4))
    shared: I32 = field(default_factory=lambda: empty(0, 4))
    embeds: I32 = field(default_factory=lambda: empty(0, 4))
    positions: I32 | None = None
    taps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Of N tokens of one row, from the log-softmax of the raw logits, in float32: before penalties, bias, masks and
    temperature. own float32[N]: of the tokens themselves. ids int32[N, k], top float32[N, k]: the k likeliest tokens,
    likeliest first, ties to the lowest id.
    """

    own: F32
    ids: I32
    top: F32


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What came of a step. version: of the weights.

    tokens int32[R, 1+K], -1 padded. counts int32[R]: tokens accepted by each row, 0 where output has no TOKEN bit or
    status uint8[R] is not OK. logprobs: of each row's counts[r] tokens, None for a row that asked for none; None: no
    row asked. prompt_logprobs: likewise, of the prompt's tokens that the row scored. taps: name -> float32[T, ...] in
    the order of the step's tokens. device_us: device time where it is known, else 0.
    """

    step: int
    version: int
    tokens: I32
    counts: I32
    status: U8
    logprobs: tuple[Logprobs | None, ...] | None = None
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    vectors: F32 | None = None
    taps: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    device_us: int = 0
