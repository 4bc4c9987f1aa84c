"""The reference backend: the contract in plain numpy, slow and strict. Everything runs when it is called.

It refuses what other backends can't see: a page table entry that was not sent since the slot was seated, a slot that
goes on without having been seated, a last token that doesn't exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.api.check import check_step
from backends.api.choice import score
from backends.api.limits import Limits, choosing
from backends.api.protocol import Status
from backends.api.seats import Asks, Seats, deal, scored
from backends.api.step import I32, NONFINITE, OK, TOKEN, U32, Logprobs, ScheduleStep, StepResult, Ticket
from backends.api.turns import may_collect, may_forward, may_sample
from backends.reference.caches import Caches, Row
from backends.reference.model import forward, logits
from backends.reference.sampler import Counts, sample
from engine.config import Resolved
from engine.errors import BackendLost, ConfigError, DeviceFailed, StepRefused
from engine.mesh import MeshSpec
from engine.model.groups import Place, places
from engine.model.params import params
from engine.model.quant import Dequantised
from engine.model.scales import calibrated
from engine.model.spec import EIGHT, Attention, ModelSpec, eight
from engine.model.weights import WeightSource, read_part

UNKNOWN = -1


@dataclass(slots=True, kw_only=True)
class Fed:
    """A step between forward and sample. tokens int32[T]: all literal. logits: of each row, float32[1 + drafts, V].
    prompts: as in StepResult."""

    step: ScheduleStep
    rows: list[Row]
    tokens: I32
    version: int
    doomed: bool
    logits: list[NDArray[Any]] = field(default_factory=list)
    taps: dict[str, NDArray[Any]] = field(default_factory=dict)
    prompts: tuple[Logprobs | None, ...] | None = None


class ReferenceBackend:
    """Backend in numpy. config.dtype: float32, or float64. config.options: max_draft.

    fails: asked at each forward; where it says True, that step's collect raises DeviceFailed, as a device would.
    """

    def __init__(self, spec: ModelSpec, config: Resolved) -> None:
        if config.dtype not in ("float32", "float64"):
            raise ConfigError(f"dtype: reference computes in float32 or float64, not {config.dtype}", field="dtype")
        if config.mesh.size * config.mesh.ep != 1:
            raise ConfigError(f"mesh: reference runs on one device, not {config.mesh}", field="mesh")
        for name in sorted(set(config.options) - {"max_draft"}):
            raise ConfigError(f"options.{name}: unknown to the reference backend; it knows max_draft", field=name)
        if config.cache_dtype not in ("float32", "float64", "bfloat16", *EIGHT):
            raise ConfigError(f"cache_dtype: reference has no cache of {config.cache_dtype}", field="cache_dtype")
        self.spec, self.config, self.places = eight(spec, config.cache_dtype), config, places(spec)
        self.fails: Callable[[ScheduleStep], bool] = lambda step: False
        self.weights: dict[str, NDArray[Any]] = {}
        self.version, self.closed = 0, False
        draft = int(config.options.get("max_draft", 0))
        self.limits = Limits.of(
            spec,
            config,
            max_draft=draft,
            run_ahead=config.depth if draft else 0,
            taps=True,
            sharing=(0, 0, 100),  # told of all, it looks whether it is so
            **choosing(config),
        )
        self._reset()

    def _reset(self) -> None:
        """A device with nothing on it: dirty caches, no slot seated, no ticket out."""
        slots = self.limits.slots
        self.caches = Caches(self.limits, self.config.cache_dtype)
        self.counts, self.seats = Counts(slots, self.limits.vocab), Seats(slots)
        self.length, self.last = np.full((2, slots), UNKNOWN, np.int32)
        self.fed: Fed | None = None
        self.out: dict[Ticket, StepResult | None] = {}

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights, converted to the type that is computed in."""
        self._open()
        loaded = {}
        if self.config.quantise != "none":
            weights = Dequantised(weights, self.spec, self.config.quantise)
        weights = calibrated(weights, self.spec, self.config.scales, self.config.cache_dtype)
        for name, p in params(self.spec).items():
            value = np.asarray(read_part(weights, p, MeshSpec(), {}))
            loaded[name] = value.astype(self.config.dtype)
        self.weights, self.version = loaded, version

    def warmup(self) -> None:
        """Nothing is compiled."""
        self._open()

    def forward(self, step: ScheduleStep) -> Ticket:
        """Run the model on a step; tokens are chosen in `sample`."""
        self._open()
        may_forward(step, bool(self.weights), self.fed and self.fed.step, self.out, self.limits)
        check_step(step, self.limits)
        self.seats.check_penalties(step, Asks.of(step))
        rows, tokens = self._rows(step)
        fed = Fed(step=step, rows=rows, tokens=tokens, version=self.version, doomed=self.fails(step))
        self._run(fed)
        self.fed = fed
        return step.step

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Choose and verify, and move the slots on."""
        self._open()
        fed = self.fed
        may_sample(ticket, fed and fed.step, masks, self.limits)
        assert fed is not None
        self.fed = None
        result = self._result(fed, masks)
        self.out[ticket] = None if fed.doomed else result

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """The oldest step's result."""
        self._open()
        may_collect(ticket, self.out)
        result = self.out.pop(ticket)
        if result is None:
            self._reset()
            raise DeviceFailed(f"step {ticket} failed")
        return result

    def status(self) -> Status:
        """Ready once weights are loaded."""
        weights = sum(value.nbytes for value in self.weights.values())
        cache = sum(paged.memory.nbytes for paged in self.caches.groups)
        return Status(
            ready=bool(self.weights) and not self.closed,
            version=self.version,
            programs=0,
            compiles_after_ready=0,
            device="numpy",
            memory={"weights": weights, "cache": cache},
        )

    def close(self) -> None:
        """Drop everything. Every later call raises BackendLost."""
        self.weights, self.closed = {}, True
        self._reset()

    def _open(self) -> None:
        if self.closed:
            raise BackendLost("the reference backend was closed")

    def _rows(self, step: ScheduleStep) -> tuple[list[Row], I32]:
        """Rows with their lengths, and literal tokens. Refuses rows that go on from nothing."""
        starts = np.where(step.starts < 0, self.length[step.slots], step.starts)
        _refuse(starts == UNKNOWN, "starts", "the slot was never seated")
        _refuse(starts + step.lens > step.upper, "upper", "below the slot's own length")
        row = np.repeat(np.arange(len(starts)), step.lens)
        tokens = np.where(step.tokens == -1, self.last[step.slots[row]], step.tokens)
        opening = tokens[np.cumsum(step.lens) - step.lens]
        _refuse(opening == UNKNOWN, "tokens", "the slot has no last token")
        ends = np.cumsum(step.lens).tolist()
        parts = zip(ends, step.lens.tolist(), step.slots.tolist(), starts.tolist(), strict=True)
        return [Row(slice(end - n, end), slot, start) for end, n, slot, start in parts], tokens

    def _run(self, fed: Fed) -> None:
        """The forward, from page tables to logits."""
        step, rows = fed.step, fed.rows
        cells = self.caches.prepare(step, rows)
        self.counts.seat(step)
        before = np.array([row.start for row in rows], np.int32)
        self.seats.take(step, before, Asks.of(step))
        asked = scored(step, before)
        for row in rows:
            self.length[row.slot] = row.end
            self.last[row.slot] = UNKNOWN

        def attend(place: Place, a: Attention, q: Any, k: Any, v: Any, sinks: Any, scales: Any) -> Any:
            return self.caches.attend(place, a, rows, cells, q, k, v, sinks, scales)

        positions = np.concatenate([np.arange(row.start, row.end) for row in rows])
        taps: dict[str, NDArray[Any]] = {}
        with np.errstate(all="ignore"):
            hidden = forward(self.spec, self.weights, fed.tokens, positions, attend, taps)
            for row, drafts in zip(rows, step.drafts.tolist(), strict=True):
                last = logits(self.spec, self.weights, hidden[row.at.stop - 1 - drafts : row.at.stop])
                fed.logits.append(last.astype(np.float32))
            if asked is not None:
                given = logits(self.spec, self.weights, hidden[asked.at]).astype(np.float32)
                found = score(given, asked.token, self.limits.max_logprobs)
                fed.prompts = deal(asked.asked, asked.counts, (found.own, found.ids, found.top))
            if "logits" in step.taps:
                taps["logits"] = logits(self.spec, self.weights, hidden)
        fed.taps.update({name: taps[name].astype(np.float32) for name in step.taps})

    def _result(self, fed: Fed, masks: U32 | None) -> StepResult:
        """Tokens of the rows that return one; their slots' lengths, last tokens and counts move on."""
        step, rows = fed.step, len(fed.rows)
        tokens = np.full((rows, 1 + self.limits.max_draft), -1, np.int32)
        counts, status = np.zeros(rows, np.int32), np.full(rows, OK, np.uint8)
        order = np.cumsum(step.masked) - 1
        for r, row in enumerate(fed.rows):
            if not step.output[r] & TOKEN:
                continue
            guesses = fed.tokens[row.at][len(fed.tokens[row.at]) - int(step.drafts[r]) :]
            mask = masks[order[r]] if masks is not None and step.masked[r] else None
            made = row.end - len(guesses)  # position of the first token made
            with np.errstate(all="ignore"):
                found = sample(step, r, fed.logits[r], guesses, made, self.counts, mask)
            if np.isfinite(fed.logits[r]).all():
                tokens[r, : len(found)], counts[r] = found, len(found)
            else:
                status[r] = NONFINITE
            self.length[row.slot], self.last[row.slot] = made + len(found) - 1, found[-1]
        return StepResult(
            step=step.step,
            version=fed.version,
            tokens=tokens,
            counts=counts,
            status=status,
            logprobs=_logprobs(fed, tokens, counts),
            prompt_logprobs=fed.prompts,
            taps=fed.taps,
        )


def _logprobs(fed: Fed, tokens: I32, counts: I32) -> tuple[Logprobs | None, ...] | None:
    """Of the tokens accepted, for the rows that ask."""
    asked = fed.step.sampling.logprobs
    if asked.max() < 0:
        return None
    return tuple(
        None if k < 0 else score(logits[:n], made[:n], k)
        for logits, made, n, k in zip(fed.logits, tokens, counts.tolist(), asked.tolist(), strict=True)
    )


def _refuse(bad: NDArray[np.bool_], field: str, what: str) -> None:
    if bad.any():
        raise StepRefused(f"{field}: {what}", rows=np.flatnonzero(bad).tolist(), field=field)
