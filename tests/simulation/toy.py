"""A backend whose answers change when any cached cell that it should see is wrong.

Its "model" hashes all tokens (full), the last W (window) and a running state (state); memory starts dirty; guesses are
made on the "device". `Truth` computes the same with nothing cached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from backends.api.check import check_step
from backends.api.limits import Limits
from backends.api.protocol import Status
from backends.api.step import (
    NONFINITE,
    OK,
    TOKEN,
    U32,
    Logprobs,
    PageTable,
    ScheduleStep,
    StateTable,
    StepResult,
)
from engine.errors import DeviceFailed, StepRefused

VOCAB, ORDINARY = 97, 90
REFUSED, NAN, DEADLY = 94, 95, 96
"""Token ids that make a step be refused, a row's output not finite, and the device fail."""
M, K31 = (1 << 31) - 1, 31


def cell(token: int, position: int) -> int:
    return ((token + 7) * 2654435761 + (position + 1) * 40503) % M


def choose(full: int, window: int, state: int, seed: int, position: int) -> int:
    return (full * 3 + window * 5 + state * 7 + seed * 11 + position * 13) % M % ORDINARY


def score(picks: Sequence[int], tokens: Sequence[int], k: int) -> Logprobs:
    """A stand-in for logprobs: what the raw choice was, the token itself, and what follows from both."""
    own = np.array(picks, np.float32) - np.array(tokens, np.float32) / 128
    ids = (np.array(tokens, np.int32)[:, None] + np.arange(k, dtype=np.int32)) % VOCAB
    return Logprobs(own=own, ids=ids.reshape(len(own), k), top=own[:, None] - np.arange(k, dtype=np.float32))


def penalise(token: int, seen: Counter[int], made: Counter[int]) -> int:
    """A stand-in for penalties that depends on all of the history."""
    return (token + 17 * len(seen) + 5 * made.total() + 3 * made[token]) % ORDINARY


def biased(token: int, bias: Sequence[tuple[int, float]]) -> int:
    """A stand-in for a logit bias that depends on each entry."""
    return (token + sum((t + 1) * int(v) for t, v in bias)) % ORDINARY


def allowed(token: int, mask: U32 | None) -> int:
    while mask is not None and not (int(mask[token // 32]) >> (token % 32)) & 1:
        token = (token + 1) % ORDINARY
    return token


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Sequential decoding with nothing cached. kinds: of the cache groups; window: positions seen."""

    kinds: tuple[str, ...]
    window: int

    def next(
        self,
        tokens: Sequence[int],
        prompt: int,
        seed: int,
        penalised: bool,
        mask: U32 | None,
        bias: Sequence[tuple[int, float]] = (),
    ) -> int:
        token = biased(self.raw(tokens, seed), bias)
        if penalised:
            token = penalise(token, Counter(tokens), Counter(tokens[prompt:]))
        return allowed(token, mask)

    def raw(self, tokens: Sequence[int], seed: int) -> int:
        """Before all that a request asks for."""
        cells = [cell(t, i) for i, t in enumerate(tokens)]
        state = 0
        for t in tokens:
            state = (state * K31 + t + 1) % M
        full = sum(cells) % M if "full" in self.kinds else 0
        window = sum(cells[-self.window :]) % M if "window" in self.kinds else 0
        return choose(full, window, state if "state" in self.kinds else 0, seed, len(tokens))


@dataclass
class Slot:
    """What the device knows of a slot."""

    length: int = 0
    last: int = -1
    version: int = 0
    drafts: list[int] = field(default_factory=list)
    seen: Counter[int] = field(default_factory=Counter)
    made: Counter[int] = field(default_factory=Counter)


@dataclass
class Fed:
    """A row between forward and sample."""

    slot: int
    start: int
    tokens: list[int]
    drafts: int
    picks: list[int]
    makes: bool
    prompt: Logprobs | None = None


class Toy:
    """The whole contract but device arrays. guess: (slot, position) -> the drafter's next tokens. flaky: called
    with the tickets out, says whether the device fails now for no reason. copied: pages, by kind; fed: tokens;
    shared: groups of ScheduleStep.shared, those within others, their rows, and what they save: positions."""

    def __init__(self, limits: Limits, seed: int, guess: Callable[[int, int], list[int]], flaky: Callable[[int], bool]):
        self.limits, self.guess, self.flaky = limits, guess, flaky
        self.rng = np.random.default_rng(seed)
        self.failures = 0
        self.copied: Counter[str] = Counter()
        self.shared: Counter[str] = Counter()
        self.fed = 0
        self._reset()

    def _reset(self) -> None:
        """Dirty memory, dirty tables, nothing out."""
        lim, r = self.limits, self.rng
        self.mem = [
            r.integers(0, M, (n, 1 + lim.max_draft if g.kind == "state" else g.page))
            for g, n in zip(lim.groups, lim.pages, strict=True)
        ]
        self.table = [r.integers(0, n, (lim.slots, w)) for n, w in zip(lim.pages, lim.max_row_pages, strict=True)]
        self.slots = [Slot(length=int(r.integers(50)), last=int(r.integers(ORDINARY))) for _ in range(lim.slots)]
        self.out: dict[int, tuple[ScheduleStep, StepResult | None]] = {}
        self.pending: tuple[ScheduleStep, list[Fed], np.ndarray] | None = None

    def _fail(self, why: str) -> None:
        self.failures += 1
        self._reset()
        raise DeviceFailed(why)

    def forward(self, step: ScheduleStep) -> int:
        check_step(step, self.limits)
        assert self.pending is None, "sample() comes before the next forward()"
        assert len(self.out) < self.limits.depth, "too many steps out"
        ends = np.cumsum(step.lens)
        bad = [r for r, e in enumerate(ends) if REFUSED in step.tokens[e - step.lens[r] : e]]
        if bad:
            raise StepRefused("a token that this device refuses", rows=bad)
        if DEADLY in step.tokens or self.flaky(len(self.out)):
            self._fail("planted")
        for g, _, src, dst in step.copies:
            self.mem[g][dst] = self.mem[g][src]
            self.copied[self.limits.groups[g].kind] += 1
        for g, table in enumerate(step.tables):
            if isinstance(table, PageTable):
                for slot, index, page in table.edits:
                    self.table[g][slot, index] = page
        self._look_at_shared(step)
        self.fed += len(step.tokens)
        status = np.full(len(step.slots), OK, np.uint8)
        fed = []
        for r in range(len(step.slots)):
            row = self._row(step, r, [int(t) for t in step.tokens[ends[r] - step.lens[r] : ends[r]]])
            status[r] = NONFINITE if NAN in row.tokens else OK
            fed.append(row)
        self.pending = step, fed, status
        self.out[step.step] = step, None
        return step.step

    def _look_at_shared(self, step: ScheduleStep) -> None:
        """Rows that are said to read the same pages do, and these were written before the step."""
        reach = [0] * len(step.slots)
        for first, last, begin, end in step.shared.tolist():
            self.shared.update(
                groups=1, inner=begin > 0, rows=last + 1 - first, saved=(last - first) * (end + 1 - begin)
            )
            reach[first : last + 1] = [end + 1] * (last + 1 - first)
            for g, group in enumerate(self.limits.groups):
                if group.kind == "full":
                    pages = self.table[g][step.slots[first : last + 1], begin // group.page : end // group.page + 1]
                    assert (pages == pages[0]).all(), f"rows {first} to {last} read different pages: {pages}"
        for slot, start, shared in zip(step.slots, step.starts, reach, strict=True):
            length = start if start >= 0 else self.slots[slot].length
            assert shared <= length, f"slot {slot} has {length} positions and reads {shared} with others"

    def _row(self, step: ScheduleStep, r: int, raw: list[int]) -> Fed:
        number = int(step.slots[r])
        slot = self.slots[number]
        seated = step.starts[r] >= 0
        if seated:
            past = [(int(t), int(m)) for i, t, m in step.sampling.history if i == r]
            slot.length, slot.version = int(step.starts[r]), 0
            slot.seen, slot.made = Counter(t for t, _ in past), Counter(t for t, m in past if m)
        tokens = [t if t >= 0 else slot.last if t == -1 else slot.drafts[-2 - t] for t in raw]
        sums = [self._group(step, r, g, slot, seated, tokens, int(step.drafts[r])) for g in range(len(step.tables))]
        kinds = [g.kind for g in self.limits.groups]
        picks, plain = [], []
        for i in range(len(tokens)):
            by = {kind: s[i] for kind, s in zip(kinds, sums, strict=True)}
            seed, position = int(step.sampling.seed[r]), slot.length + i + 1
            picks.append(choose(by.get("full", 0), by.get("window", 0), by.get("state", 0), seed, position))
            plain.append(choose(by.get("full", 0), by.get("window", 0), by.get("state", 0), 0, position))
        makes = bool(step.output[r] & TOKEN)
        prompt = self._prompt(step, r, slot, plain, tokens)
        return Fed(number, slot.length, tokens, int(step.drafts[r]), picks, makes, prompt)

    def _prompt(
        self, step: ScheduleStep, r: int, slot: Slot, picks: Sequence[int], tokens: Sequence[int]
    ) -> Logprobs | None:
        """What a row scores of its prompt, whatever its seed."""
        first, k = step.sampling.prompt_logprobs[r].tolist()
        if first < 0:
            return None
        assert slot.length < first <= slot.length + len(tokens), "a row that can't score what it is asked for"
        fed = [*tokens[1:], *([int(step.next[r])] if step.next[r] >= 0 else [])]
        skip = first - slot.length - 1
        return score(picks[skip : len(fed)], fed[skip:], k)

    def _group(
        self, step: ScheduleStep, r: int, g: int, slot: Slot, seated: bool, tokens: list[int], drafts: int
    ) -> list[int]:
        """Write this row's cells to one group and read what each of its queries sees."""
        group, table, mem, out = self.limits.groups[g], step.tables[g], self.mem[g], []
        if isinstance(table, StateTable):
            read = int(table.read[r])
            state = 0 if read < 0 else int(mem[read, 0 if seated else slot.version])
            for i, t in enumerate(tokens):
                state = (state * K31 + t + 1) % M
                mem[table.write[r], max(0, i - (len(tokens) - 1 - drafts))] = state
                out.append(state)
            return out
        number, base = int(step.slots[r]), int(table.base[r])

        def at(position: int) -> tuple[int, int]:
            assert position >= base, "a position before the table was read"
            return self.table[g][number, (position - base) // group.page], (position - base) % group.page

        for i, t in enumerate(tokens):
            position = slot.length + i
            mem[at(position)] = cell(t, position) if NAN not in tokens else M
            low = 0 if group.kind == "full" else max(0, position - group.window + 1)
            out.append(sum(int(mem[at(q)]) for q in range(low, position + 1)) % M)
        return out

    def sample(self, ticket: int, masks: U32 | None = None) -> None:
        assert self.pending is not None
        step, fed, status = self.pending
        assert step.step == ticket
        self.pending = None
        k = self.limits.max_draft
        tokens, counts = np.full((len(fed), 1 + k), -1, np.int32), np.zeros(len(fed), np.int32)
        scores: list[Logprobs | None] = [None] * len(fed)
        masked = iter(masks) if masks is not None else iter(())
        for r, row in enumerate(fed):
            mask = next(masked) if step.masked[r] else None
            slot, n = self.slots[row.slot], len(row.tokens)
            if not row.makes:
                slot.length, slot.version = row.start + n, 0
                continue
            got: list[int] = []
            for j in range(row.drafts + 1):
                got.append(
                    self._pick(step, r, slot, row.picks[n - 1 - row.drafts + j], None if mask is None else mask[j])
                )
                if j < row.drafts and row.tokens[n - row.drafts + j] != got[-1]:
                    break
            tokens[r, : len(got)], counts[r] = got, len(got)
            if step.sampling.logprobs[r] >= 0:
                raw = row.picks[n - 1 - row.drafts :][: len(got)]
                scores[r] = score(raw, got, int(step.sampling.logprobs[r]))
            slot.length, slot.version = row.start + n - row.drafts + len(got) - 1, len(got) - 1
            slot.last = got[-1]
            slot.drafts = self.guess(row.slot, slot.length) if k else []
        result = StepResult(step=ticket, version=0, tokens=tokens, counts=counts, status=status, logprobs=tuple(scores),
                            prompt_logprobs=tuple(row.prompt for row in fed))  # fmt: skip
        self.out[ticket] = step, result

    def _pick(self, step: ScheduleStep, r: int, slot: Slot, token: int, mask: U32 | None) -> int:
        token = biased(token, [(int(t), v) for i, t, v in step.sampling.bias if i == r])
        if (step.sampling.penalty[r] != (1, 0, 0)).any():
            token = penalise(token, slot.seen, slot.made)
        token = allowed(token, mask)
        slot.seen[token] += 1
        slot.made[token] += 1
        return token

    def collect(self, ticket: int, timeout: float = 60.0) -> StepResult:
        assert next(iter(self.out)) == ticket, "tickets are collected in order"
        _, result = self.out.pop(ticket)
        assert result is not None, "collect() before sample()"
        return result

    def load(self, weights: object, version: int = 0) -> None:
        return

    def warmup(self) -> None:
        return

    def status(self) -> Status:
        return Status(ready=True, version=0, programs=0, compiles_after_ready=0, device="toy")

    def close(self) -> None:
        return
