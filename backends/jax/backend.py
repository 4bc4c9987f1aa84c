"""The JAX backend: one compiled program a step, on CPU, GPU and TPU."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import jax
import numpy as np

from backends.api.check import check_step
from backends.api.limits import Limits, choosing
from backends.api.protocol import Status
from backends.api.seats import Asks, Scored, Seats, deal, scored
from backends.api.step import I32, NONFINITE, TOKEN, U8, U32, ScheduleStep, StepResult, Ticket
from backends.api.turns import may_collect, may_forward, may_sample, until
from backends.jax import bundle, params
from backends.jax.buckets import ladder, make_shape
from backends.jax.choosing import (
    Scores,
    pack_bias,
    pack_counts,
    pack_masks,
    pack_scored,
    pack_wishes,
)
from backends.jax.inputs import Packed, pack, pack_copies
from backends.jax.mesh import Spread, open_mesh
from backends.jax.step import Plan
from backends.jax.warmup import COPY, COUNT, EDIT, EMPTY, Program, Programs, options, score
from engine.config import Resolved
from engine.errors import BackendLost, ConfigError, DeviceFailed
from engine.model.scales import calibrated
from engine.model.spec import ModelSpec, eight
from engine.model.weights import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that is out. made: int32[R, 2] on the device, on its way to the host; taps likewise.

    logits float32[R, V], dealt out over the devices: kept until `sample` chooses from them, for steps whose own program
    doesn't choose. asked int32[R]: logprobs of the tokens; scores: theirs. wanted: what is scored of prompts; prompts:
    how.
    """

    version: int
    output: U8
    tokens: int
    made: jax.Array
    taps: dict[str, jax.Array]
    asked: I32
    logits: jax.Array | None = None
    scores: Scores | None = None
    wanted: Scored | None = None
    prompts: Scores | None = None

    @property
    def arrays(self) -> list[jax.Array]:
        """What comes back to the host."""
        return [self.made, *self.taps.values(), *(self.scores or ()), *(self.prompts or ())]


class JaxBackend:
    """backends.api.protocol.Backend on jax. Not thread-safe: one thread calls it, as one loop plans the steps."""

    def __init__(self, spec: ModelSpec, config: Resolved) -> None:
        for key in config.options:
            raise ConfigError(f"backend.jax.{key}: unknown key; the jax backend has none", field=f"backend.jax.{key}")
        self.plan = make_plan(spec, config)
        mesh, made = self.plan.mesh, bundle.find(self.plan, options(self.plan))
        self.programs = Programs(self.plan, None if made is None else made.load)
        self.buckets = dict.fromkeys(ladder(self.plan.limits), (0, 0))
        self.shapes = {size: make_shape(size, self.plan.limits) for size in self.buckets}
        self._put = Spread(mesh)
        self.serial = config.platform == "cpu" and mesh.size > 1
        self.weights: Any = None
        self.caches: Any = None
        self.state: Any = None
        self.counts: Any = None
        self.seats = Seats(self.plan.limits.slots)
        self.neutral: dict[int, tuple[jax.Array, jax.Array]] = {}
        self.memory = {"weights": 0, "cache": 0}
        self.packed: Packed | None = None
        self.asks = Asks(counted=None, any=False, draws=False)
        self.version = 0
        self.closed = False
        self.flights: OrderedDict[Ticket, Flight] = OrderedDict()
        self.unsampled: ScheduleStep | None = None

    @property
    def limits(self) -> Limits:
        """Of the steps whose programs exist."""
        return self.programs.limits

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights; steps that are out keep the old ones. The new stand beside the old until they are whole, so
        that a ModelError (which names the tensor) changes nothing."""
        self._open()
        config = self.plan.config
        weights = calibrated(weights, self.plan.spec, config.scales, config.cache_dtype)
        try:
            self.weights = params.upload(self.plan.leaves, self.plan.config, self.plan.mesh, weights)
        except jax.errors.JaxRuntimeError as error:  # no room for both
            self._fail(error)
        self.version = version
        self.memory["weights"] = _held(self.weights)
        if self.caches is None:
            self._empty()

    def warmup(self) -> None:
        """Build every program that a step without taps may need, or with `ready_early` the first of them."""
        self._open()
        self.programs.warm()

    def forward(self, step: ScheduleStep) -> Ticket:
        """Enqueue the whole step, sampling included: one program, unless a row asks for what `choose` does."""
        with self.programs.served:
            return self._forward(step)

    def _forward(self, step: ScheduleStep) -> Ticket:
        self._open()
        may_forward(step, self.weights is not None, self.unsampled, self.flights, self.limits)
        limits = self.limits  # a thread may raise them meanwhile
        last = self.packed
        if not check_step(step, limits, last and last.step):
            last = None
        asks = Asks.of(step) if last is None else self.asks
        late = asks.any or (self.plan.greedy and asks.draws)
        before = self.seats.before(step, asks, last and last.step)
        wanted = scored(step, before)
        scores = wanted is not None and len(wanted.at) > 0
        tokens = limits.max_tokens if scores else len(step.tokens)
        shape = next(shape for size, shape in self.shapes.items() if size >= tokens)
        program = self.programs.take(Program("step", shape.tokens, tuple(sorted(step.taps))))
        packed = self.packed = pack(step, shape, limits, chosen=not late, last=last)
        self.asks = asks
        ahead = [(EDIT, part) for part in packed.ahead] + [(COUNT, part) for part in pack_counts(step, asks, limits)]
        if len(step.copies):
            ahead.append((COPY, pack_copies(step, limits)))
        scorer = score(limits.max_tokens, self.plan.limits)
        beside = {name: self.programs.take(name) for name in [name for name, _ in ahead] + [scorer] * scores}
        try:
            if self.serial:
                self._finish()
            for name, part in ahead:
                self._ahead(name, beside[name], self._put(part))
            given = self._put(packed.buffer)
            self.caches, self.state, made, kept, taps = program(self.weights, self.caches, self.state, given)
            flight = Flight(
                version=self.version,
                output=step.output.copy(),
                tokens=len(step.tokens),
                made=made,
                taps=taps,
                asked=step.sampling.logprobs.copy(),
                logits=kept.logits if late else None,
                wanted=wanted,
            )
            if wanted is not None and scores:
                places = self._put(pack_scored(wanted, limits))
                flight = replace(flight, prompts=beside[scorer](self.weights, kept.hidden, places))
            if not late:
                self._send(flight)
        except jax.errors.JaxRuntimeError as error:
            self._fail(error)
        self._count(shape.tokens, len(step.tokens))
        self.seats.take(step, before, asks)
        self.flights[step.step], self.unsampled = flight, step
        return step.step

    def _count(self, size: int, tokens: int) -> None:
        """One more step of a bucket."""
        steps, asked = self.buckets[size]
        self.buckets[size] = steps + 1, asked + tokens

    def _ahead(self, name: Program, program: Any, given: jax.Array) -> None:
        """Run a program that changes what the step's program finds."""
        if name == EDIT:
            self.state = program(self.state, given)
        elif name == COPY:
            self.caches = program(self.caches, given)
        else:
            self.counts = program(self.counts, given)

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Choose, where the step's own program could not; otherwise nothing but to keep the order."""
        with self.programs.served:
            self._sample(ticket, masks)

    def _sample(self, ticket: Ticket, masks: U32 | None) -> None:
        self._open()
        step = may_sample(ticket, self.unsampled, masks, self.limits)
        if self.flights[ticket].logits is not None:
            try:
                self.flights[ticket] = self._choose(step, self.flights[ticket], masks)
                self._send(self.flights[ticket])
            except jax.errors.JaxRuntimeError as error:
                self._fail(error)
        self.unsampled = None

    def _choose(self, step: ScheduleStep, flight: Flight, masks: U32 | None) -> Flight:
        """Run the program that chooses from the logits of a step."""
        rows = flight.made.shape[0]
        free, unbiased = self._neutral(rows)
        self.state, self.counts, made, scores = self.programs.take(Program("choose", rows))(
            self.state,
            self.counts,
            flight.logits,
            flight.made,
            self._put(pack_wishes(step, Asks.of(step), rows, self.limits)),
            free if masks is None else self._put(pack_masks(masks, step, rows, self.limits)),
            self._put(pack_bias(step, self.limits)) if len(step.sampling.bias) else unbiased,
        )
        return replace(flight, logits=None, made=made, scores=scores if flight.asked.max() >= 0 else None)

    def _neutral(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """Masks that allow everything and no bias, which stay on the device."""
        if rows not in self.neutral:
            self.neutral[rows] = (
                self._put(pack_masks(None, None, rows, self.limits)),
                self._put(pack_bias(None, self.limits)),
            )
        return self.neutral[rows]

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for the oldest step. timeout: seconds."""
        self._open()
        may_collect(ticket, self.flights, self.unsampled)
        flight = self.flights[ticket]
        try:
            if not until(lambda: all(array.is_ready() for array in flight.arrays), timeout):
                raise TimeoutError(f"no result after {timeout:g} s")
            with self.programs.served:
                result = _result(ticket, flight)
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            self._fail(error)
        del self.flights[ticket]
        return result

    def status(self) -> Status:
        """How the backend stands; bytes are of the first device. Any thread may ask: a step donates none of this."""
        device = self.plan.mesh.devices.flat[0]
        return Status(
            ready=self.programs.ready and self.weights is not None and not self.closed,
            version=self.version,
            programs=len(self.programs.made),
            compiles_after_ready=self.programs.late,
            device=f"{device.platform}:{device.device_kind}",
            memory=dict(self.memory),
            sources=self.programs.sources(),
            buckets=tuple((size, *counts) for size, counts in self.buckets.items()),
        )

    def close(self) -> None:
        """Free the device."""
        self.closed = True
        self.flights.clear()
        self.unsampled = None
        self.weights = self.caches = self.state = self.counts = None
        self.neutral.clear()
        self.memory = {"weights": 0, "cache": 0}
        self.programs.close()

    def _open(self) -> None:
        if self.closed:
            raise BackendLost("the jax backend is closed")

    def _send(self, flight: Flight) -> None:
        """Start the copies to the host, where the device is another."""
        if self.plan.config.platform != "cpu":
            for array in flight.arrays:
                array.copy_to_host_async()

    def _finish(self) -> None:
        """Wait for the steps that are out, where a CPU was cut into devices: they wait for each other in collectives on
        the threads of one pool, and a queue of steps can stop them all (docs/decisions/0012)."""
        for flight in self.flights.values():
            flight.made.block_until_ready()

    def _empty(self) -> None:
        """New caches, state and counts; no slot is seated."""
        self.caches = self.state = self.counts = None
        self.neutral.clear()
        self.seats.clear()
        self.caches, self.state, self.counts = self.programs.take(EMPTY)()
        self.memory["cache"] = _held(self.caches)

    def _fail(self, error: Exception) -> NoReturn:
        """Void all tickets and start from empty caches. The caches were donated to the step that failed."""
        self.flights.clear()
        self.unsampled = None
        try:
            self._empty()
        except jax.errors.JaxRuntimeError as again:
            self.closed = True
            raise BackendLost(f"the device failed and could not be used again: {again}") from error
        raise DeviceFailed(f"the device failed: {error}") from error


def make_plan(spec: ModelSpec, config: Resolved) -> Plan:
    """What the programs of a configuration are made from."""
    limits, spec = Limits.of(spec, config, taps=True, **choosing(config)), eight(spec, config.cache_dtype)
    return Plan(spec=spec, config=config, limits=limits, mesh=open_mesh(config))


def _result(ticket: Ticket, flight: Flight) -> StepResult:
    """What came of a step, all of it on the host."""
    rows, made = len(flight.output), np.asarray(flight.made)
    status = made[:rows, 1].astype(np.uint8)
    asked = (flight.output & TOKEN) > 0
    given = asked & (status != NONFINITE)
    logprobs = prompts = None
    if flight.scores is not None:
        own, ids, top = (np.asarray(array)[:rows][given] for array in flight.scores)
        logprobs = deal(flight.asked, given, (own, ids, top))
    if flight.wanted is not None:
        found = None if flight.prompts is None else tuple(np.asarray(array) for array in flight.prompts)
        prompts = deal(flight.wanted.asked, flight.wanted.counts, found)
    return StepResult(
        step=ticket,
        version=flight.version,
        tokens=np.where(given, made[:rows, 0], -1).astype(np.int32)[:, None],
        counts=given.astype(np.int32),
        status=np.where(asked, status, 0).astype(np.uint8),
        logprobs=logprobs,
        prompt_logprobs=prompts,
        taps={name: np.asarray(value)[: flight.tokens] for name, value in flight.taps.items()},
    )


def _held(tree: Any) -> int:
    """Bytes that the first device holds of a tree of arrays."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))
