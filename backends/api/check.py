"""What a step must obey, checked before anything is enqueued. Features that a backend hasn't built are refused by name.

Runs before every step, so fields are laid side by side and compared with their bounds at once; which one is at fault is
found afterwards.
"""

from __future__ import annotations

from dataclasses import fields
from functools import lru_cache
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.shared import wrong
from backends.api.step import TOKEN, U32, PageTable, ScheduleStep, StateTable
from engine.errors import StepRefused
from engine.model.groups import CacheGroup

INT, FLOAT = np.dtype(np.int32), np.dtype(np.float32)
ROWS: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("slots", "starts", "lens", "upper", "drafts", "next", "adapters"), INT),
    "output": np.dtype(np.uint8),
    "masked": np.dtype(np.bool_),
}
"""Fields of a step with one entry a row."""
SAMPLING: dict[str, np.dtype[Any]] = {
    **dict.fromkeys(("top_k", "logprobs"), INT),
    **dict.fromkeys(("temperature", "top_p", "min_p"), FLOAT),
    "seed": np.dtype(np.uint64),
}
"""Fields of Sampling with one entry a row."""
ABSENT = {
    "drafts": "drafts are not built in this backend",
    "adapters": "adapters are not built in this backend",
    "masked": "vocabulary masks are not built in this backend",
    "sampling.logprobs": "logprobs are not built in this backend",
    "sampling.prompt_logprobs": "prompt logprobs are not built in this backend",
}
"""What to say where the bounds leave a field no value but the neutral one."""
BITS = {2: "pooled", 4: "hidden", 8: "scores"}
LARGEST, SMALLEST = np.finfo(np.float32).max, np.nextafter(np.float32(0), np.float32(1))
NEUTRAL = np.array([1, 0, 0], FLOAT)
PENALTIES = np.array([[SMALLEST, -LARGEST, -LARGEST], [LARGEST, LARGEST, LARGEST]], FLOAT)
CHOICES = np.array([[0, SMALLEST, 0], [LARGEST, 1, 1]], FLOAT)[:, :, None]
"""Lowest and highest temperature, top_p, min_p."""


SAME = tuple(f.name for f in fields(ScheduleStep) if f.name not in ("step", "upper", "tables", "copies"))
"""What steps share, as objects, while the same runs decode and none comes or goes (engine.sched.rows.build)."""


def check_step(step: ScheduleStep, limits: Limits, last: ScheduleStep | None = None) -> bool:
    """Refuse a step that breaks the contract, as far as it shows from the step and the limits.

    last: a step that passed with these limits or smaller ones; what this one shares with it is not checked again. Gives
    whether that is all that `shares` looks at.

    Raises StepRefused with the field (a name of ScheduleStep, "sampling.x" or "tables.g.x") and, where it can be told,
    the rows. What depends on the backend's state (depth, order of calls, a slot never seated) the backend refuses.
    """
    known = last is not None and shares(step, last)
    if not (known and _plain(step, limits)):
        _shapes(step, limits)
        _features(step, limits)
        _ranges(step, limits)
        _rows(step, limits)
        _choices(step, limits)
        _tokens(step, limits)
        for g, group in enumerate(limits.groups):
            _table(step, limits, g, group)
        _ragged(step, limits)
    elif last is not None and len(step.shared):
        edited = any(len(table.edits) for table in step.tables if isinstance(table, PageTable))
        if edited or np.count_nonzero(step.upper < last.upper):
            _shared(step, limits)
    return known


def shares(step: ScheduleStep, last: ScheduleStep) -> bool:
    """Whether all but its number, upper, tables and copies are the objects of another step."""
    return all(getattr(step, name) is getattr(last, name) for name in SAME)


def check_masks(masks: U32 | None, step: ScheduleStep, limits: Limits) -> None:
    """Refuse masks in `sample` that are not uint32[masked rows, 1 + max_draft, ceil(V/32)], or that allow nothing."""
    count = int(np.count_nonzero(step.masked))
    if not count:
        if masks is not None:
            _refuse("masks", "no row of the step is masked")
        return
    _array("masks", masks, np.dtype(np.uint32), (count, 1 + limits.max_draft, -(-limits.vocab // 32)))
    assert masks is not None
    words = masks.copy()
    if limits.vocab % 32:
        words[:, :, -1] &= np.uint32(2 ** (limits.vocab % 32) - 1)
    rows = np.flatnonzero(step.masked)
    used = np.arange(1 + limits.max_draft) <= step.drafts[rows][:, None]
    bad = (used & ~words.any(axis=2)).any(axis=1)
    if bad.any():
        _refuse("masks", "a mask allows no token", rows[bad])


def _refuse(field: str, what: str, rows: Any = ()) -> NoReturn:
    raise StepRefused(f"{field}: {what}", rows=[int(r) for r in rows], field=field)


def _unless(good: NDArray[np.bool_], field: str, what: str) -> None:
    """Refuse the rows where good bool[R] is false."""
    if np.count_nonzero(good) != len(good):
        _refuse(field, what, np.flatnonzero(~good))


def _array(field: str, value: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    """Refuse what is not an array of this dtype and shape."""
    if type(value) is not np.ndarray or value.dtype != dtype:
        _refuse(field, f"must be an array of {dtype}, not {getattr(value, 'dtype', type(value).__name__)}")
    if value.shape != shape:
        _refuse(field, f"must have shape {list(shape)}, not {list(value.shape)}")


def _list(field: str, value: Any, dtype: np.dtype[Any], tail: tuple[int, ...], most: int | None = None) -> None:
    """Refuse what is not an array [N, *tail] of this dtype, or is longer than `most`."""
    if type(value) is not np.ndarray or value.dtype != dtype:
        _refuse(field, f"must be an array of {dtype}, not {getattr(value, 'dtype', type(value).__name__)}")
    if value.ndim != 1 + len(tail) or value.shape[1:] != tail:
        _refuse(field, f"must have shape {['N', *tail]}, not {list(value.shape)}")
    if most is not None and len(value) > most:
        _refuse(field, f"{len(value)} entries, the limit is {most}")


def _shapes(step: ScheduleStep, limits: Limits) -> None:
    """dtypes and shapes of every field, and the sizes of the step."""
    if type(step.slots) is not np.ndarray or step.slots.ndim != 1 or not len(step.slots):
        _refuse("slots", "must be an array with at least one row")
    if step.step < 0:
        _refuse("step", "must not be negative")
    shape, s = step.slots.shape, step.sampling
    for name, dtype in ROWS.items():
        value = getattr(step, name)
        if type(value) is not np.ndarray or value.dtype != dtype or value.shape != shape:
            _array(name, value, dtype, shape)
    for name, dtype in SAMPLING.items():
        value = getattr(s, name)
        if type(value) is not np.ndarray or value.dtype != dtype or value.shape != shape:
            _array("sampling." + name, value, dtype, shape)
    rows = shape[0]
    _array("sampling.penalty", s.penalty, FLOAT, (rows, 3))
    _array("sampling.prompt_logprobs", s.prompt_logprobs, INT, (rows, 2))
    _list("tokens", step.tokens, INT, (), limits.max_tokens)
    _list("copies", step.copies, INT, (4,), limits.max_copies or None)
    _list("shared", step.shared, INT, (4,))
    _list("embeds", step.embeds, INT, (4,))
    _list("sampling.bias", s.bias, FLOAT, (3,), limits.max_bias or None)
    _list("sampling.history", s.history, INT, (3,), limits.max_history or None)
    _list("sampling.label_ids", s.label_ids, INT, ())
    if rows > limits.max_rows:
        _refuse("slots", f"{rows} rows, the limit is {limits.max_rows}")
    _tables(step, limits)


def _tables(step: ScheduleStep, limits: Limits) -> None:
    """dtypes and shapes of the tables."""
    shape = step.slots.shape
    if len(step.tables) != len(limits.groups):
        _refuse("tables", f"{len(step.tables)} tables for {len(limits.groups)} cache groups")
    for g, (group, table) in enumerate(zip(limits.groups, step.tables, strict=True)):
        if type(table) is not (StateTable if group.kind == "state" else PageTable):
            _refuse(f"tables.{g}", f"the wrong kind of table for a {group.kind} group")
        if type(table) is PageTable:
            _list(f"tables.{g}.edits", table.edits, INT, (3,), limits.max_edits)
            _array(f"tables.{g}.base", table.base, INT, shape)
        elif type(table) is StateTable:
            _array(f"tables.{g}.read", table.read, INT, shape)
            _array(f"tables.{g}.write", table.write, INT, shape)


def _plain(step: ScheduleStep, limits: Limits) -> bool:
    """Whether what is new in a step that shares the rest with one that passed is right at a glance: no row is seated,
    nothing is copied, and every table is of pages. That is most steps, and few operations."""
    shape, upper, copies = step.slots.shape, step.upper, step.copies
    if step.step < 0 or len(step.tables) != len(limits.groups):
        return False
    for value in (upper, copies):
        if type(value) is not np.ndarray or value.dtype != INT:
            return False
    if upper.shape != shape or copies.shape != (0, 4) or np.count_nonzero(step.starts >= 0):
        return False
    if np.count_nonzero((upper < step.lens) | (upper > limits.max_len + limits.max_draft)):
        return False
    for g, (table, group) in enumerate(zip(step.tables, limits.groups, strict=True)):
        if type(table) is not PageTable or group.kind == "state":
            return False
        edits, base = table.edits, table.base
        for value in (edits, base):
            if type(value) is not np.ndarray or value.dtype != INT:
                return False
        if base.shape != shape or edits.ndim != 2 or edits.shape[1] != 3 or len(edits) > limits.max_edits:
            return False
        if np.count_nonzero(base):
            bad = group.kind == "full" or (base < 0) | (base >= upper) | (base % group.page != 0)
            if np.count_nonzero(bad):
                return False
        if not _edited(edits, limits, g):
            return False
    return True


def _edited(edits: NDArray[np.int32], limits: Limits, g: int) -> bool:
    """Whether edits int32[N, 3] are in range, each entry of a table once."""
    if not len(edits):
        return True
    slots, index, page = edits.T.tolist()
    bounds = limits.slots, limits.max_row_pages[g], limits.pages[g]
    inside = all(min(v) >= 0 and max(v) < bound for v, bound in zip((slots, index, page), bounds, strict=True))
    return inside and len(set(zip(slots, index, strict=True))) == len(slots)


def _features(step: ScheduleStep, limits: Limits) -> None:
    """Refuse by name what this backend hasn't built and no bound of a row shows."""
    s = step.sampling
    if step.parents is not None:
        _refuse("parents", "drafts as trees are not built in this backend")
    if len(step.embeds):
        _refuse("embeds", "embeddings from an encoder are not built in this backend")
    if step.positions is not None:
        _refuse("positions", "positions of their own (M-RoPE) are not built in this backend")
    if len(s.label_ids):
        _refuse("sampling.label_ids", "scores are not built in this backend")
    if len(step.copies) and not limits.max_copies:
        _refuse("copies", "page copies are not built in this backend")
    if len(s.bias) and not limits.max_bias:
        _refuse("sampling.bias", "logit bias is not built in this backend")
    if len(s.history) and not limits.max_history:
        _refuse("sampling.history", "penalties are not built in this backend")
    if step.taps:
        if not limits.taps:
            _refuse("taps", "taps are not built in this backend, or were not asked for when it was opened")
        unknown = set(step.taps) - tap_names(sum(len(g.layers) for g in limits.groups if g.role == "target"))
        if unknown:
            _refuse("taps", f"unknown: {', '.join(sorted(unknown))}")


@lru_cache
def tap_names(layers: int, experts: bool = True) -> frozenset[str]:
    """The inner values that a model of `layers` layers can return; experts: ".routing" too, which layers of experts
    have."""
    parts = (".attention", ".mlp", "", *((".routing",) if experts else ()))
    inner = [f"layers.{i}{part}" for i in range(layers) for part in parts]
    return frozenset(["embed", *inner, "final_norm", "logits"])


FIELDS = ("slots", "starts", "lens", "upper", "drafts", "next", "output", "masked", "adapters")
CHOSEN = ("sampling.top_k", "sampling.logprobs", "sampling.prompt_logprobs", "sampling.prompt_logprobs")


@lru_cache
def _bounds(limits: Limits) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
    """Lowest value and span of FIELDS and CHOSEN, [fields, 1]; a feature that isn't built has a span of 0."""
    bounds = (
        (0, limits.slots - 1),
        (-1, limits.max_len),
        (1, limits.max_tokens),
        (1, limits.max_len + limits.max_draft),
        (0, limits.max_draft),
        (-1, limits.vocab - 1),
        (int(limits.whole_rows), TOKEN),
        (0, min(limits.max_masks, 1)),
        (0, limits.adapters),
        (0, 2**31 - 1),
        (-1, limits.max_logprobs or -1),
        (-1, limits.max_len - 1 if limits.max_logprobs else -1),
        (-1, limits.max_logprobs or -1),
    )
    low, high = np.array(bounds, np.int64).T[:, :, None]
    return low.astype(np.int32), (high - low).astype(np.uint32)


def _ranges(step: ScheduleStep, limits: Limits) -> None:
    """Each integer of a row lies between its bounds; one comparison, as what is too low wraps to a large number."""
    s, (low, span) = step.sampling, _bounds(limits)
    fields = [*(getattr(step, name) for name in FIELDS), s.top_k, s.logprobs, *s.prompt_logprobs.T]
    values = np.concatenate(fields, dtype=INT, casting="unsafe").reshape(len(fields), -1)
    bad = (values - low).view(np.uint32) > span
    if not np.count_nonzero(bad):
        return
    at = int(np.argmax(bad.any(axis=1)))
    field, lowest, width = (*FIELDS, *CHOSEN)[at], int(low[at, 0]), int(span[at, 0])
    what = f"not in {lowest} .. {lowest + width}"
    if not width:
        what = ABSENT.get(field, what)
    if field == "output":
        found = [name for bit, name in BITS.items() if (step.output & bit).any()]
        what = f"{', '.join(found)} not built in this backend" if found else what
    _refuse(field, what, np.flatnonzero(bad[at]))


def _rows(step: ScheduleStep, limits: Limits) -> None:
    """The rules between the fields of a row, and between rows."""
    starts, lens, drafts = step.starts, step.lens, step.drafts
    if sum(lens.tolist()) != len(step.tokens):
        _refuse("lens", f"sum to {int(lens.sum())}, but {len(step.tokens)} tokens are fed")
    if len(set(step.slots.tolist())) != len(lens):
        found, count = np.unique(step.slots, return_counts=True)
        _refuse("slots", "a slot twice in a step", np.flatnonzero(np.isin(step.slots, found[count > 1])))
    _ends(step)
    if np.count_nonzero(drafts):
        _unless(drafts < lens, "drafts", "not below lens")
        _unless((drafts == 0) | (step.output != 0), "drafts", "are verified by rows that return a token")
    if masked := np.count_nonzero(step.masked):
        _unless(~step.masked | (step.output != 0), "masked", "a mask needs a row that returns a token")
        if masked > limits.max_masks:
            _refuse("masked", f"{masked} rows, the limit is {limits.max_masks}", np.flatnonzero(step.masked))
    if np.count_nonzero(step.sampling.prompt_logprobs != -1):
        first, count = step.sampling.prompt_logprobs.T
        field = "sampling.prompt_logprobs"
        _unless((first < 0) == (count < 0), field, "a first position and how many alternatives, or neither")
        _unless(first != 0, field, "nothing comes before position 0 that could score it")
        _unless((first < 0) | (starts < first), field, "the slot is seated behind what scores the first position")


def _ends(step: ScheduleStep) -> None:
    """The bounds of the lengths afterwards."""
    _unless((step.starts < 0) | (step.upper == step.starts + step.lens), "upper", "a seated row ends at starts + lens")
    _unless(step.upper >= step.lens, "upper", "below lens")


def _choices(step: ScheduleStep, limits: Limits) -> None:
    """Finite and in range. A NaN fails each comparison, so the good values are looked for."""
    s = step.sampling
    values = np.concatenate((s.temperature, s.top_p, s.min_p)).reshape(3, -1)
    good = (values >= CHOICES[0]) & (values <= CHOICES[1])
    if np.count_nonzero(good) != good.size:
        _unless(good[0], "sampling.temperature", "must be finite and at least 0")
        _unless(good[1], "sampling.top_p", "must be above 0 and at most 1")
        _unless(good[2], "sampling.min_p", "must be between 0 and 1")
    good = s.penalty == NEUTRAL
    what = "penalties are not built in this backend"
    if limits.max_history and np.count_nonzero(good) != good.size:
        good = (s.penalty >= PENALTIES[0]) & (s.penalty <= PENALTIES[1])
        what = "must be finite, repetition above 0"
    if np.count_nonzero(good) != good.size:
        _unless(good.all(axis=1), "sampling.penalty", what)


def _outside(values: NDArray[np.int32], bound: Any) -> NDArray[np.bool_]:
    """Where values are not in 0 .. bound - 1; one comparison, as a negative number read as uint32 is a large one."""
    outside: NDArray[np.bool_] = values.view(np.uint32) >= bound
    return outside


def _tokens(step: ScheduleStep, limits: Limits) -> None:
    """Literals are in the vocabulary; -1 opens a continuing row; -2-j is a draft that the device made."""
    tokens, lens = step.tokens, step.lens
    outside = _outside(tokens, np.uint32(limits.vocab))
    count = np.count_nonzero(outside)
    if not count:
        return
    opening = tokens if len(tokens) == len(lens) else tokens[np.cumsum(lens) - lens]
    if np.count_nonzero((opening == -1) & (step.starts < 0)) == count:
        return
    at, ends = np.flatnonzero(outside), np.cumsum(lens)
    value, row = tokens[at], np.searchsorted(ends, at, side="right")
    offset = at - (ends - lens)[row]
    made = value < -1
    rules = [
        (f"not below the vocabulary of {limits.vocab}", value >= 0),
        ("a seated row feeds literal tokens", step.starts[row] >= 0),
        ("-1 is the last accepted token, and stands first in its row", (value == -1) & (offset != 0)),
        ("drafts made by the device are not built in this backend", made & (not limits.device_draft)),
        ("the device makes fewer drafts", value < -1 - limits.max_draft),
        ("a draft made by the device stands among the row's drafts", made & (offset < (lens - step.drafts)[row])),
    ]
    for what, bad in rules:
        if np.count_nonzero(bad):
            _refuse("tokens", what, np.unique(row[bad]))


def _table(step: ScheduleStep, limits: Limits, g: int, group: CacheGroup) -> None:
    """One cache group's table: pages in range, and where its first entry stands."""
    table, pages, at = step.tables[g], limits.pages[g], f"tables.{g}"
    if isinstance(table, StateTable):
        _unless(~_outside(table.read + np.int32(1), pages + 1), at + ".read", f"not a page below {pages} or -1")
        _unless(~_outside(table.write, pages), at + ".write", f"not a page below {pages}")
        return
    if len(table.edits):
        width = limits.max_row_pages[g]
        _entries(at + ".edits", table.edits, (limits.slots, width, pages), "slot, index or page")
        slots, index, _ = table.edits.T.tolist()
        if len(set(zip(slots, index, strict=True))) != len(slots):
            _refuse(at + ".edits", "an entry is set twice")
    if np.count_nonzero(table.base):
        base, starts = table.base, step.starts
        if group.kind == "full":
            _refuse(at + ".base", "a full group keeps every position, from 0", np.flatnonzero(base))
        _unless((base % group.page == 0) & (base >= 0), at + ".base", f"not a multiple of {group.page}")
        _unless(base < step.upper, at + ".base", "not below upper")
        seen = np.maximum(starts - (group.window - 1), 0)
        _unless((starts < 0) | (base <= seen), at + ".base", "past the first position that the row sees")


def _ragged(step: ScheduleStep, limits: Limits) -> None:
    """The fields that have a length of their own: copies, shared prefixes, bias, history."""
    rows, s = len(step.slots), step.sampling
    if len(step.copies):
        _entries("copies", step.copies[:, :2], (len(limits.groups), limits.shards), "group or shard")
        pages = np.array(limits.pages)[step.copies[:, 0], None]
        if np.count_nonzero((step.copies[:, 2:] < 0) | (step.copies[:, 2:] >= pages)):
            _refuse("copies", "a page is out of range")
    if len(step.shared):
        _entries("shared", step.shared, (rows, rows, limits.max_len, limits.max_len), "row or position")
        _shared(step, limits)
    if len(s.bias):
        whole = s.bias[:, :2]
        if not ((whole >= 0) & (whole < np.array([rows, limits.vocab])) & (whole == np.floor(whole))).all():
            _refuse("sampling.bias", "row or token out of range")
        infinite = ~(np.abs(s.bias[:, 2]) <= LARGEST)
        if infinite.any():
            _refuse("sampling.bias", "a value is not finite", np.unique(s.bias[infinite, 0]))
    if len(s.history):
        _entries("sampling.history", s.history, (rows, limits.vocab, 2), "row, token or is_output")
        going = s.history[step.starts[s.history[:, 0]] < 0, 0]
        if len(going):
            _refuse("sampling.history", "is sent when a slot is seated", np.unique(going))


def _shared(step: ScheduleStep, limits: Limits) -> None:
    """Groups of rows, whose entries are in range."""
    if (found := wrong(step, limits)) is not None:
        _refuse("shared", *found)


def _entries(field: str, entries: NDArray[np.int32], bounds: tuple[int, ...], what: str) -> None:
    """Refuse entries int32[N, C] that are not in 0 .. bounds - 1."""
    if np.count_nonzero((entries < 0) | (entries >= np.array(bounds))):
        _refuse(field, f"{what} out of range")
