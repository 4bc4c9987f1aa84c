"""Deterministic mode: a backend that computes every token in a step of one shape.

What a token gets must not depend on what else is in the step. So a step is cut into tiles, steps of exactly `tile`
tokens for the backend within, the last ones padded by a row of their own: one shape for every matmul, for whatever
batch, chunk or cache. What is left to the backend is that a row's place in its tile changes nothing, and that attention
reduces over fixed absolute blocks of the cache. docs/decisions/0014-deterministic.md says what it costs.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from backends.api.check import check_step
from backends.api.limits import Limits
from backends.api.protocol import Backend, Status
from backends.api.step import (
    I32,
    U32,
    Logprobs,
    PageTable,
    Sampling,
    ScheduleStep,
    StateTable,
    StepResult,
    Ticket,
)
from backends.api.turns import may_collect, may_forward, may_sample
from engine.config import Resolved
from engine.errors import BackendLost, DeviceFailed, StepRefused
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource

TILE, LARGE = 8, 64
"""Tokens of a tile; large ones are torch's on a GPU, where few tokens take as long as many. No more, as one tile of a
product then has them all, and none is summed otherwise than its neighbour."""
FEATURES = (
    "max_draft",
    "device_draft",
    "run_ahead",
    "max_copies",
    "max_bias",
    "max_history",
    "max_logprobs",
    "adapters",
    "taps",
)
"""Limits of the backend within that are those of the whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Part of a row: `count` of its tokens from its `first` on. last: it ends the row."""

    row: int
    first: int
    count: int
    last: bool


@dataclass(slots=True, kw_only=True)
class Flight:
    """A step that is out: its tiles, the tickets of those that the backend within has, and whether all are sampled."""

    step: ScheduleStep
    tiles: list[list[Piece]]
    tickets: list[Ticket] = field(default_factory=list)
    sampled: int = 0


def size(config: Resolved) -> int:
    """Tokens of a tile; one row may have them all."""
    return min(LARGE if (config.backend, config.platform) == ("torch", "gpu") else TILE, config.max_len)


def within(spec: ModelSpec, config: Resolved) -> Resolved:
    """The configuration of the backend within: steps of a tile, a slot and pages for the row that pads, and the page
    edits of a whole step, which may all be of one tile."""
    tile = size(config)
    return replace(
        config,
        max_tokens=tile,
        max_rows=tile,
        token_buckets=(tile,),
        edits=Limits.of(spec, config).max_edits + spare(tile, config.page),
        slots=config.slots + 1,
        pages=tuple(n + spare(tile, config.page) for n in config.pages),
        depth=config.depth * (config.max_rows + -(-config.max_tokens // tile)),
    )


def spare(tile: int, page: int) -> int:
    """Pages of each group that the row that pads writes to."""
    return -(-tile // page)


def cut(step: ScheduleStep, tile: int = TILE) -> list[list[Piece]]:
    """Tiles of a step, in the order of its rows. A row's guesses stay together."""
    tiles: list[list[Piece]] = [[]]
    free = tile
    for row, (n, drafts) in enumerate(zip(step.lens.tolist(), step.drafts.tolist(), strict=True)):
        at, whole = 0, n - drafts - 1  # what may be cut anywhere
        while at < n:
            rest = n - at
            count = rest if rest <= free else min(free, whole - at)
            if count <= 0:
                tiles.append([])
                free = tile
                continue
            tiles[-1].append(Piece(row=row, first=at, count=count, last=count == rest))
            at, free = at + count, free - count
    return [pieces for pieces in tiles if pieces]


class Tiled:
    """backends.api.protocol.Backend over one whose steps are all of one shape."""

    def __init__(self, spec: ModelSpec, config: Resolved, make: Callable[[ModelSpec, Resolved], Backend]) -> None:
        """make: opens the backend within."""
        self.tile = size(config)
        self.inner = make(spec, within(spec, config))
        built: dict[str, Any] = {name: getattr(self.inner.limits, name) for name in FEATURES}
        self.limits = replace(
            Limits.of(spec, config, **built),
            max_masks=config.max_rows if self.inner.limits.max_masks else 0,
            token_buckets=(),
            max_edits=self.inner.limits.max_edits - spare(self.tile, config.page),
        )
        self.flights: OrderedDict[Ticket, Flight] = OrderedDict()
        self._waiting: ScheduleStep | None = None
        self.number = 0

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights."""
        self.inner.load(weights, version)

    def warmup(self) -> None:
        """Build the programs of the one shape."""
        self.inner.warmup()

    def forward(self, step: ScheduleStep) -> Ticket:
        """Enqueue the tiles of a step, up to the first that waits for a mask."""
        may_forward(step, True, self._waiting, self.flights, self.limits)
        check_step(step, self.limits)
        flight = Flight(step=step, tiles=cut(step, self.tile))
        self._go(flight, None)
        self.flights[step.step], self._waiting = flight, step
        return step.step

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Sample the tile that waits, and enqueue the rest."""
        may_sample(ticket, self._waiting, masks, self.limits)
        self._waiting = None
        if masks is not None:
            self._go(self.flights[ticket], masks)

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for all tiles of the oldest step. timeout: seconds."""
        may_collect(ticket, self.flights, self._waiting)
        flight, end = self.flights[ticket], time.monotonic() + timeout
        try:
            found = [self.inner.collect(t, max(0.0, end - time.monotonic())) for t in flight.tickets]
        except DeviceFailed:
            self.flights.clear()
            self._waiting = None
            raise
        del self.flights[ticket]
        return self._join(flight, found)

    def status(self) -> Status:
        """How the backend within stands."""
        return self.inner.status()

    def close(self) -> None:
        """Free the device."""
        self.flights.clear()
        self._waiting = None
        self.inner.close()

    def _go(self, flight: Flight, masks: U32 | None) -> None:
        """Enqueue the tiles that are left; without masks, up to the first that needs one."""
        rank = np.cumsum(flight.step.masked) - 1
        try:
            while flight.sampled < len(flight.tiles):
                tile = flight.tiles[flight.sampled]
                asked = [int(rank[p.row]) for p in tile if p.last and flight.step.masked[p.row]]
                if len(flight.tickets) == flight.sampled:
                    flight.tickets.append(self.inner.forward(self._tile(flight, tile)))
                if asked and masks is None:
                    return
                self.inner.sample(flight.tickets[-1], masks[asked] if asked and masks is not None else None)
                flight.sampled += 1
        except DeviceFailed:
            self.flights.clear()
            self._waiting = None
            raise
        except StepRefused as refusal:
            rows = [tile[r].row for r in refusal.rows if r < len(tile)]
            if flight.sampled:  # some of it is on its way already, and can't be taken back
                raise BackendLost(f"the backend refused a part of a step: {refusal}") from refusal
            raise StepRefused(str(refusal), rows=rows, field=refusal.field) from refusal

    def _tile(self, flight: Flight, tile: Sequence[Piece]) -> ScheduleStep:
        """The step of a tile, with the row that pads it."""
        step, first = flight.step, not flight.tickets
        s, pad = step.sampling, self.tile - sum(p.count for p in tile)
        begins, ends = np.cumsum(step.lens) - step.lens, step.lens
        rows = np.array([p.row for p in tile], np.int32)
        opening, closing = np.array([p.first == 0 for p in tile]), np.array([p.last for p in tile])
        fed = [step.tokens[begins[p.row] + p.first :][: p.count] for p in tile]
        after = [p.first + p.count for p in tile]
        following = [
            step.next[p.row] if p.last else max(-1, int(step.tokens[begins[p.row] + a]))
            for p, a in zip(tile, after, strict=True)
        ]
        row_of = {int(r): i for i, r in enumerate(rows)}
        self.number += 1

        def padded(values: Any, value: int, dtype: Any = np.int32) -> Any:
            return np.array([*values, value] if pad else values, dtype)

        def mine(entries: Any, which: Any) -> Any:
            """Entries (row, ...) of the rows of which `which` is true, with their places in the tile."""
            kept = [(row_of[int(e[0])], *e[1:]) for e in entries if int(e[0]) in row_of and which[row_of[int(e[0])]]]
            return np.array(kept, entries.dtype).reshape(-1, 3)

        neutral = Sampling.greedy(1)
        per_row = ("temperature", "top_k", "top_p", "min_p", "seed", "penalty", "prompt_logprobs")
        chosen = {n: np.concatenate([getattr(s, n)[rows], getattr(neutral, n)[: bool(pad)]]) for n in per_row}
        return ScheduleStep(
            step=self.number,
            slots=padded(step.slots[rows], self.limits.slots),
            starts=padded(np.where(opening, step.starts[rows], -1), 0),
            lens=padded([p.count for p in tile], pad),
            upper=padded(step.upper[rows] - ends[rows] + after, pad),
            drafts=padded(np.where(closing, step.drafts[rows], 0), 0),
            tokens=np.concatenate([*fed, np.zeros(pad, np.int32)]),
            next=padded(following, -1),
            output=padded(np.where(closing, step.output[rows], 0), 0, np.uint8),
            masked=padded(closing & step.masked[rows], 0, np.bool_),
            adapters=padded(step.adapters[rows], 0),
            tables=tuple(self._table(g, step, rows, opening, pad, first) for g in range(len(step.tables))),
            copies=step.copies if first else step.copies[:0],
            sampling=Sampling(
                **chosen,
                logprobs=padded(np.where(closing, s.logprobs[rows], -1), -1),
                bias=mine(s.bias, closing),
                history=mine(s.history, opening),
            ),
            taps=step.taps,
        )

    def _table(
        self, g: int, step: ScheduleStep, rows: I32, opening: Any, pad: int, first: bool
    ) -> PageTable | StateTable:
        """One group's table for a tile. Entries of slots without a row in the step come with its first tile."""
        table, page = step.tables[g], self.limits.groups[g].page or self.tile
        spares = self.limits.pages[g] + np.arange(spare(self.tile, page))
        if isinstance(table, StateTable):
            read = np.where(opening, table.read[rows], table.write[rows])
            return StateTable(
                read=np.append(read, [-1][: bool(pad)]).astype(np.int32),
                write=np.append(table.write[rows], spares[: bool(pad)]).astype(np.int32),
            )
        slots = step.slots[rows[opening]]
        kept = np.isin(table.edits[:, 0], slots)
        if first:
            kept |= ~np.isin(table.edits[:, 0], step.slots)
        padding = [(self.limits.slots, i, page) for i, page in enumerate(spares.tolist())] if pad else []
        return PageTable(
            edits=np.concatenate([table.edits[kept], np.array(padding, np.int32).reshape(-1, 3)]),
            base=np.append(table.base[rows], [0][: bool(pad)]).astype(np.int32),
        )

    def _join(self, flight: Flight, found: Sequence[StepResult]) -> StepResult:
        """The result of a step from those of its tiles."""
        step, rows = flight.step, len(flight.step.slots)
        tokens = np.full((rows, 1 + self.limits.max_draft), -1, np.int32)
        counts, status = np.zeros(rows, np.int32), np.zeros(rows, np.uint8)
        made: dict[int, Logprobs] = {}
        scored: dict[int, list[Logprobs]] = {}
        taps: dict[str, list[Any]] = {name: [] for name in step.taps}
        for tile, result in zip(flight.tiles, found, strict=True):
            for i, piece in enumerate(tile):
                if piece.last:
                    tokens[piece.row], counts[piece.row] = result.tokens[i], result.counts[i]
                    status[piece.row] = result.status[i]
                own = result.logprobs[i] if result.logprobs is not None else None
                if own is not None:
                    made[piece.row] = own
                prompt = result.prompt_logprobs[i] if result.prompt_logprobs is not None else None
                if prompt is not None:
                    scored.setdefault(piece.row, []).append(prompt)
            fed = sum(p.count for p in tile)
            for name, parts in taps.items():
                parts.append(result.taps[name][:fed])
        return StepResult(
            step=step.step,
            version=found[-1].version,
            tokens=tokens,
            counts=counts,
            status=status,
            logprobs=tuple(made.get(r) for r in range(rows)) if made else None,
            prompt_logprobs=tuple(_joined(scored.get(r)) for r in range(rows)) if scored else None,
            taps={name: np.concatenate(parts) for name, parts in taps.items()},
            device_us=sum(r.device_us for r in found),
        )


def _joined(parts: Sequence[Logprobs] | None) -> Logprobs | None:
    """Logprobs of a row whose pieces stood in several tiles."""
    if not parts:
        return None
    return Logprobs(**{n: np.concatenate([getattr(p, n) for p in parts]) for n in ("own", "ids", "top")})
