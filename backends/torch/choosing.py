"""What few steps ask of the device: penalties, bias, vocabulary masks, logprobs, scores of prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from backends.api.seats import Asks, Scored, tally
from backends.api.step import U32, ScheduleStep

Array: TypeAlias = torch.Tensor
I64: TypeAlias = NDArray[np.int64]
BLOCK = 64
"""Positions of prompts whose logits stand side by side."""


class Scores(NamedTuple):
    """Logprobs of N tokens. own float32[N]; ids int64[N, K], top float32[N, K]: the likeliest."""

    own: Array
    ids: Array
    top: Array


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a step asks beyond a plain choice, as device tensors; places are those among the rows that return a token.

    cleared [C]: slots whose counts begin anew; entries, values [N]: counts to be set, flat in [slots, V], as
    backends.api.seats.tally has them. counted [P]: places with penalties; slots [P]; penalty float32[P, 3]. biased [B]:
    flat in [O, V]; bias float32[B]. masked [M]: places, in the order of the masks. told [L]: places whose token gets
    logprobs. at, token [S]: fed tokens, in the device's order, whose logits score a prompt's next token.
    """

    cleared: Array
    entries: Array
    values: Array
    counted: Array
    slots: Array
    penalty: Array
    biased: Array
    bias: Array
    masked: Array
    told: Array
    at: Array
    token: Array


def lay_out(
    step: ScheduleStep, asks: Asks, rows: I64, order: I64, vocab: int, asked: Scored | None
) -> list[NDArray[Any]] | None:
    """The host's side of Wishes, integers and bits of float64; None where a step asks for none of it.

    rows int64[O]: row of the step at each place; order int64[T]: fed token at each place of the device.
    """
    if asked is None and not asks.any:
        return None
    s, fed = step.sampling, np.zeros(len(step.slots), np.bool_) if asks.counted is None else asks.counted
    place = np.full(len(step.slots), -1, np.int64)
    place[rows] = np.arange(len(rows))
    known = tally(step).astype(np.int64) if fed.any() else np.zeros((0, 3), np.int64)
    counted = np.flatnonzero(fed[rows])
    bits = lambda x: np.ascontiguousarray(x, np.float64).view(np.int64)  # noqa: E731
    at = place[s.bias[:, 0].astype(np.int64)]
    bias = s.bias[at >= 0]
    back = np.argsort(order)
    none = np.zeros(0, np.int64)
    return [
        step.slots[(step.starts >= 0) & fed],
        known[:, 0] * vocab + known[:, 1],
        known[:, 2],
        counted,
        step.slots[rows][counted],
        *bits(s.penalty[rows][counted].T),
        at[at >= 0] * vocab + bias[:, 1].astype(np.int64),
        bits(bias[:, 2]),
        place[np.flatnonzero(step.masked)],
        np.flatnonzero(s.logprobs[rows] >= 0),
        none if asked is None else back[asked.at],
        none if asked is None else asked.token,
    ]


def read(parts: Sequence[Array]) -> Wishes:
    """The parts of `lay_out` on the device."""
    cleared, entries, values, counted, slots, *penalty, biased, bias, masked, told, at, token = parts
    real = lambda x: x.view(torch.float64).float()  # noqa: E731
    return Wishes(
        cleared=cleared,
        entries=entries,
        values=values.int(),
        counted=counted,
        slots=slots,
        penalty=torch.stack([real(x) for x in penalty], 1),
        biased=biased,
        bias=real(bias),
        masked=masked,
        told=told,
        at=at,
        token=token,
    )


def wishes(step: ScheduleStep, asks: Asks, rows: I64, vocab: int, device: torch.device) -> Wishes:
    """What a step asks whose rows all return a token, and none of whose prompts are scored; rows int64[R]: row of the
    step at each place. Doesn't wait."""
    parts = lay_out(step, asks, rows, np.zeros(0, np.int64), vocab, None)
    assert parts is not None
    return read(send(parts, device))


def send(parts: Sequence[NDArray[Any]], device: torch.device) -> tuple[Array, ...]:
    """Integer arrays as int64 views of one device buffer. torch keeps pinned memory until it is copied."""
    sizes = [len(p) for p in parts]
    host = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    np.concatenate(parts, out=host.numpy(), casting="same_kind")
    return host.to(device, non_blocking=True).split(sizes)


def seat(counts: Array, w: Wishes) -> None:
    """Counts int32[slots, V] of slots that are seated."""
    if len(w.cleared):
        counts.index_fill_(0, w.cleared, 0)
    if len(w.entries):
        counts.view(-1).index_copy_(0, w.entries, w.values)


def count(counts: Array, w: Wishes, tokens: Array) -> None:
    """Count tokens int64[O] that were made."""
    if len(w.counted):
        at = w.slots * counts.shape[1] + tokens.index_select(0, w.counted)
        counts.view(-1).index_add_(0, at, torch.full_like(at, 2, dtype=torch.int32))


def adjust(logits: Array, w: Wishes, counts: Array, masks: Array | None) -> Array:
    """Logits float32[O, V] after penalties, bias and masks int32[M, W]."""
    x = logits.clone()
    if len(w.counted):
        some = penalise(x.index_select(0, w.counted), counts.index_select(0, w.slots), w.penalty)
        x.index_copy_(0, w.counted, some)
    if len(w.biased):
        x.view(-1).index_add_(0, w.biased, w.bias)
    if masks is not None:
        some = x.index_select(0, w.masked).masked_fill_(~allowed(masks, x.shape[1]), -torch.inf)
        x.index_copy_(0, w.masked, some)
    return x


def penalise(x: Array, counts: Array, penalty: Array) -> Array:
    """Logits float32[P, V] of rows with penalties float32[P, 3]. counts int32[P, V] of their slots."""
    repetition, presence, frequency = penalty[:, :, None].unbind(1)
    made = counts >> 1
    x = torch.where(counts > 0, torch.where(x > 0, x / repetition, x * repetition), x)
    return x - presence * (made > 0) - frequency * made


def send_masks(masks: U32, device: torch.device) -> Array:
    """Masks uint32[M, 1, W] -> int32[M, W] on the device; doesn't wait."""
    host = torch.empty((len(masks), masks.shape[2]), dtype=torch.int32, pin_memory=device.type == "cuda")
    host.numpy()[:] = masks[:, 0].view(np.int32)
    return host.to(device, non_blocking=True)


def allowed(masks: Array, vocab: int) -> Array:
    """bool[M, vocab] of packed masks int32[M, W]."""
    spread = (masks[:, :, None] >> torch.arange(32, device=masks.device, dtype=torch.int32)) & 1
    return spread.view(masks.shape[0], -1)[:, :vocab] > 0


def score(logits: Array, tokens: Array, alternatives: int) -> Scores:
    """By the log-softmax of raw logits float32[N, V]; tokens int64[N]."""
    whole = logits.logsumexp(-1, keepdim=True)
    own = logits.gather(1, tokens[:, None]) - whole
    ids = likeliest(logits, alternatives)
    return Scores(own[:, 0], ids, logits.gather(1, ids) - whole)


def likeliest(x: Array, k: int) -> Array:
    """Ids int64[N, k] of the largest of x float32[N, V], ties to the lowest id, which torch.topk doesn't promise: so it
    is given keys that are never equal, the float's bits in its order above those of the id."""
    bits = (x + 0.0).view(torch.int32)  # -0 becomes 0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    last = x.shape[1] - 1
    keys = (order.long() << 32) + (last - torch.arange(x.shape[1], device=x.device))
    return last - (keys.topk(k, -1).values & 0xFFFFFFFF)


def score_prompts(hidden: Array, w: Wishes, alternatives: int, head: Callable[[Array], Array]) -> Scores:
    """Logprobs of prompts' tokens, block by block, so that no more than a block's logits stand in memory.

    hidden [T, hidden]: normed; head: hidden states -> logits float32.
    """
    parts = [
        score(head(hidden.index_select(0, at)), token, alternatives)
        for at, token in zip(w.at.split(BLOCK), w.token.split(BLOCK), strict=True)
    ]
    return Scores(*(torch.cat(each) for each in zip(*parts, strict=True)))
