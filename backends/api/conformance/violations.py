"""Steps that break the contract, each in one thing. Every backend refuses them; tests of `check_step` use them too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api.limits import Limits
from backends.api.step import HIDDEN, POOLED, SCORES, TOKEN, PageTable, ScheduleStep, StateTable


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """A bad step. field, rows: what the refusal must name; rows None = not looked at."""

    step: ScheduleStep
    field: str
    what: str
    rows: tuple[int, ...] | None = None


def violations(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """Every way to break a good step of two or more rows that go on with one -1 each."""
    assert (good.tokens == -1).all()
    assert len(good.slots) > 1
    yield from _forms(good)
    yield from _rows(good, limits)
    yield from _tokens(good, limits)
    yield from _tables(good, limits)
    yield from _sampling(good)
    yield from _logprobs(good, limits)
    yield from _unbuilt(good, limits)


def put(array: NDArray[Any], index: Any, value: Any) -> NDArray[Any]:
    """A copy with one entry changed."""
    out = array.copy()
    out[index] = value
    return out


def change(good: ScheduleStep, **fields: Any) -> ScheduleStep:
    """A copy of a step; `sampling_x` changes field x of its sampling."""
    inner = {name.removeprefix("sampling_"): fields.pop(name) for name in list(fields) if name.startswith("sampling_")}
    return replace(good, **fields, sampling=replace(good.sampling, **inner))


def _forms(good: ScheduleStep) -> Iterator[Violation]:
    """dtypes and shapes."""
    rows = len(good.slots)
    for name in ("slots", "starts", "lens", "upper", "drafts", "next", "output", "masked", "adapters", "tokens"):
        value = getattr(good, name)
        yield Violation(step=change(good, **{name: value.astype(np.int64)}), field=name, what="int64")
        yield Violation(step=change(good, **{name: value.tolist()}), field=name, what="a list")
        if name not in ("slots", "tokens"):
            longer = np.concatenate([value, value[:1]])
            yield Violation(step=change(good, **{name: longer}), field=name, what="a row too many")
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "penalty", "logprobs", "prompt_logprobs"):
        value = getattr(good.sampling, name)
        field = f"sampling.{name}"
        yield Violation(
            step=change(good, **{f"sampling_{name}": value.astype(np.float64)}), field=field, what="float64"
        )
        yield Violation(step=change(good, **{f"sampling_{name}": value[: rows - 1]}), field=field, what="a row missing")
    for name in ("copies", "shared", "embeds"):
        yield Violation(step=change(good, **{name: np.zeros((1, 3), np.int32)}), field=name, what="3 columns")
    for name in ("bias", "history"):
        flat = np.zeros((1, 2), getattr(good.sampling, name).dtype)
        yield Violation(step=change(good, **{f"sampling_{name}": flat}), field=f"sampling.{name}", what="2 columns")
    nothing = {name: getattr(good, name)[:0] for name in ("slots", "starts", "lens", "upper", "drafts", "next")}
    yield Violation(step=change(good, **nothing), field="slots", what="no rows")
    yield Violation(step=change(good, step=-1), field="step", what="negative")


def _rows(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """Values of rows."""
    reach = limits.max_len + limits.max_draft
    for name, value, what in (
        ("slots", limits.slots, "out of range"),
        ("slots", -1, "negative"),
        ("starts", -2, "below -1"),
        ("starts", limits.max_len + 1, "past the last position"),
        ("lens", 0, "nothing fed"),
        ("upper", reach + 1, "past the last position"),
        ("upper", 0, "below lens"),
        ("drafts", 1, "not below lens"),
        ("drafts", -1, "negative"),
        ("drafts", limits.max_draft + 1, "too many"),
        ("next", limits.vocab, "past the vocabulary"),
        ("next", -2, "below -1"),
        ("output", 16, "an unknown bit"),
        ("adapters", limits.adapters + 1, "unknown"),
        ("adapters", -1, "negative"),
    ):
        step = change(good, **{name: put(getattr(good, name), 1, value)})
        yield Violation(step=step, field=name, what=what, rows=(1,))
    twice = change(good, slots=put(good.slots, 1, good.slots[0]))
    yield Violation(step=twice, field="slots", what="twice", rows=(0, 1))
    yield Violation(step=change(good, lens=put(good.lens, 1, 2)), field="lens", what="more than the tokens")
    short = replace(_longer(good, [-1, 0]), upper=put(good.upper, 1, 1))
    yield Violation(step=short, field="upper", what="below lens", rows=(1,))
    literal = put(good.tokens, 1, 0)
    seated = change(good, starts=put(good.starts, 1, 3), tokens=literal, upper=put(good.upper, 1, 5))
    yield Violation(step=seated, field="upper", what="not starts + lens", rows=(1,))
    if limits.max_draft:
        deep = _longer(change(good, output=put(good.output, 1, 0)), [-1, 0])
        yield Violation(step=replace(deep, drafts=put(good.drafts, 1, 1)), field="drafts", what="silent", rows=(1,))
    if limits.max_masks:
        silent = change(good, masked=put(good.masked, 1, True), output=put(good.output, 1, 0))
        yield Violation(step=silent, field="masked", what="a silent row", rows=(1,))
    many = np.arange(limits.max_rows + 1, dtype=np.int32)
    wide = {
        "slots": many,
        **{n: np.resize(getattr(good, n), len(many)) for n in ("starts", "lens", "upper", "drafts", "next", "output")},
        **{n: np.resize(getattr(good, n), len(many)) for n in ("masked", "adapters", "tokens")},
    }
    for n in ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs"):
        wide[f"sampling_{n}"] = np.resize(getattr(good.sampling, n), len(many))
    wide["sampling_penalty"] = np.resize(good.sampling.penalty, (len(many), 3))
    wide["sampling_prompt_logprobs"] = np.resize(good.sampling.prompt_logprobs, (len(many), 2))
    yield Violation(step=change(good, **wide), field="slots", what="too many rows")


def _longer(good: ScheduleStep, tokens: list[int]) -> ScheduleStep:
    """Row 1 feeds `tokens` in place of its one token."""
    fed = np.concatenate([good.tokens[:1], np.array(tokens, np.int32), good.tokens[2:]])
    return replace(
        good,
        tokens=fed,
        lens=put(good.lens, 1, len(tokens)),
        upper=put(good.upper, 1, max(int(good.upper[1]), len(tokens))),
    )


def _tokens(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """Values of tokens."""
    for value, what in ((limits.vocab, "past the vocabulary"), (-2, "a draft of the device"), (-(2**31), "the least")):
        yield Violation(step=replace(good, tokens=put(good.tokens, 1, value)), field="tokens", what=what, rows=(1,))
    seated = replace(good, starts=put(good.starts, 1, 0), upper=put(good.upper, 1, 1))
    yield Violation(step=seated, field="tokens", what="-1 on a seated row", rows=(1,))
    yield Violation(step=_longer(good, [0, -1]), field="tokens", what="-1 that is not first", rows=(1,))
    yield Violation(step=_longer(good, [-1, -1]), field="tokens", what="-1 twice", rows=(1,))
    yield Violation(step=_longer(good, [-1] + [0] * limits.max_tokens), field="tokens", what="too many")


def _table(good: ScheduleStep, g: int, table: PageTable | StateTable) -> ScheduleStep:
    """The step with group g's table replaced."""
    return replace(good, tables=(*good.tables[:g], table, *good.tables[g + 1 :]))


def _tables(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """Page tables, copies, shared prefixes."""
    yield Violation(step=replace(good, tables=good.tables[:-1]), field="tables", what="one missing")
    for g, group in enumerate(limits.groups):
        table, name = good.tables[g], f"tables.{g}"
        assert isinstance(table, PageTable)
        state = StateTable(read=table.base, write=table.base)
        yield Violation(step=_table(good, g, state), field=name, what="the wrong kind")
        short = _table(good, g, replace(table, base=table.base[1:]))
        yield Violation(step=short, field=name + ".base", what="a row missing")
        page, width, slot = limits.pages[g], limits.max_row_pages[g], int(good.slots[0])
        for edits, what in (
            ([(limits.slots, 0, 0)], "slot"),
            ([(-1, 0, 0)], "negative slot"),
            ([(slot, width, 0)], "index"),
            ([(slot, -1, 0)], "negative index"),
            ([(slot, 0, page)], "page"),
            ([(slot, 0, -1)], "negative page"),
            ([(slot, 1, 0), (slot, 1, 2)], "an entry twice"),
            ([(slot, 0, 0)] * (limits.max_edits + 1), "too many"),
        ):
            bad = _table(good, g, replace(table, edits=np.array(edits, np.int32)))
            yield Violation(step=bad, field=name + ".edits", what=what)
        flat = _table(good, g, replace(table, edits=np.zeros((1, 2), np.int32)))
        yield Violation(step=flat, field=name + ".edits", what="2 columns")
        bases = [(group.page, "not 0")] if group.kind == "full" else [(group.page // 2, "inside a page"), (400, "far")]
        for base, what in (*bases, (-group.page, "negative")):
            bad = _table(good, g, replace(table, base=put(table.base, 1, base)))
            yield Violation(step=bad, field=name + ".base", what=what, rows=(1,))
    rows = len(good.slots)
    for shared, what in (((0, rows, 0, 1), "row"), ((1, 0, 0, 1), "order"), ((0, 1, 0, limits.max_len), "position")):
        yield Violation(step=replace(good, shared=np.array([shared], np.int32)), field="shared", what=what)
    full = next((g for g, group in enumerate(limits.groups) if group.kind == "full"), None)
    if full is not None:
        p = limits.groups[full].page
        for groups, what in (
            ([(0, 1, 0, limits.max_len // p * p - 1)], "not cached"),
            ([(0, 1, 0, p)], "not whole pages"),
            ([(0, 1, p, 2 * p - 1)], "not from the beginning"),
            ([(0, 1, 0, 2 * p - 1), (0, 0, p, 2 * p - 1)], "an overlap"),
            ([(0, 1, 0, p - 1), (0, 0, 2 * p, 3 * p - 1)], "a gap"),
            ([(0, 0, 0, p - 1), (0, 1, 0, p - 1)], "the inner one first"),
            *([([(0, 1, 0, p - 1), (1, 2, 0, p - 1)], "neither nested nor apart")] if rows > 2 else []),
        ):
            yield Violation(step=replace(good, shared=np.array(groups, np.int32)), field="shared", what=what)
        two = np.array([(slot, 0, i) for i, slot in enumerate(good.slots[:2])], np.int32)
        apart = _table(good, full, PageTable(edits=two, base=np.zeros(rows, np.int32)))
        step = replace(apart, shared=np.array([[0, 1, 0, p - 1]], np.int32))
        yield Violation(step=step, field="shared", what="other pages")
    if limits.max_copies:
        for copy in (
            (len(limits.groups), 0, 0, 1),
            (0, limits.shards, 0, 1),
            (0, 0, limits.pages[0], 1),
            (0, 0, 0, -1),
        ):
            yield Violation(step=replace(good, copies=np.array([copy], np.int32)), field="copies", what="out of range")
        many = np.tile(np.array([[0, 0, 0, 1]], np.int32), (limits.max_copies + 1, 1))
        yield Violation(step=replace(good, copies=many), field="copies", what="too many")


def _sampling(good: ScheduleStep) -> Iterator[Violation]:
    """Values that are not numbers or out of range."""
    nan, inf = float("nan"), float("inf")
    for name, values in {
        "temperature": (nan, inf, -0.5),
        "top_p": (nan, inf, 0.0, -0.1, 1.0001),
        "min_p": (nan, inf, -0.1, 1.0001),
        "top_k": (-1,),
        "logprobs": (-2,),
    }.items():
        for value in values:
            step = change(good, **{f"sampling_{name}": put(getattr(good.sampling, name), 1, value)})
            yield Violation(step=step, field=f"sampling.{name}", what=str(value), rows=(1,))
    for column in range(3):
        for value in (nan, inf, -inf):
            step = change(good, sampling_penalty=put(good.sampling.penalty, (1, column), value))
            yield Violation(step=step, field="sampling.penalty", what=f"{column}: {value}", rows=(1,))


def _logprobs(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """More alternatives than there may be; prompts whose first position no row can score."""
    s, most = good.sampling, limits.max_logprobs
    if not most:
        return
    yield Violation(
        step=change(good, sampling_logprobs=put(s.logprobs, 1, most + 1)), field="sampling.logprobs", what="too many"
    )
    for pair, what in (
        ((0, 1), "position 0"),
        ((-1, 0), "no position"),
        ((3, -1), "no alternatives"),
        ((-2, -2), "below -1"),
        ((limits.max_len, 0), "past the last position"),
        ((1, most + 1), "too many"),
    ):
        step = change(good, sampling_prompt_logprobs=put(s.prompt_logprobs, 1, pair))
        yield Violation(step=step, field="sampling.prompt_logprobs", what=what, rows=(1,))
    tokens, upper = put(good.tokens, 1, 0), put(good.upper, 1, 6)
    seated = change(good, starts=put(good.starts, 1, 5), tokens=tokens, upper=upper)
    late = change(seated, sampling_prompt_logprobs=put(s.prompt_logprobs, 1, (5, 0)))
    yield Violation(step=late, field="sampling.prompt_logprobs", what="seated behind it", rows=(1,))


def _unbuilt(good: ScheduleStep, limits: Limits) -> Iterator[Violation]:
    """Features that these limits leave out, each by its name."""
    s, tokens, label = good.sampling, len(good.tokens), np.zeros(1, np.int32)
    entry = np.zeros((1, 3), np.int32)
    always: list[tuple[str, ScheduleStep]] = [
        ("parents", replace(good, parents=np.full(tokens, -1, np.int32))),
        ("embeds", replace(good, embeds=np.zeros((1, 4), np.int32))),
        ("positions", replace(good, positions=np.zeros((tokens, 3), np.int32))),
        ("sampling.label_ids", change(good, sampling_label_ids=label)),
        *(("output", replace(good, output=put(good.output, 1, TOKEN | bit))) for bit in (POOLED, HIDDEN, SCORES)),
        ("taps", replace(good, taps=("layers.99",) if limits.taps else ("logits",))),
    ]
    if not limits.max_draft:
        always.append(("drafts", replace(_longer(good, [-1, 0]), drafts=put(good.drafts, 1, 1))))
    if not limits.max_masks:
        always.append(("masked", replace(good, masked=put(good.masked, 1, True))))
    if not limits.max_copies:
        always.append(("copies", replace(good, copies=np.array([[0, 0, 0, 1]], np.int32))))
    if not limits.max_bias:
        always.append(("sampling.bias", change(good, sampling_bias=entry.astype(np.float32))))
    if not limits.max_history:
        always.append(("sampling.history", change(good, sampling_history=entry)))
        for column in range(3):
            penalty = put(good.sampling.penalty, (1, column), 0.5)
            always.append(("sampling.penalty", change(good, sampling_penalty=penalty)))
    if not limits.max_logprobs:
        always.append(("sampling.logprobs", change(good, sampling_logprobs=put(s.logprobs, 1, 0))))
        scores = change(good, sampling_prompt_logprobs=put(s.prompt_logprobs, 1, (1, 0)))
        always.append(("sampling.prompt_logprobs", scores))
    for field, step in always:
        yield Violation(step=step, field=field, what="a feature that is not built")
