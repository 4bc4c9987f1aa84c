"""The JAX backend: one compiled program a step, on CPU, GPU and TPU."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np

from backends.api.check import check_masks, check_step
from backends.api.limits import Limits
from backends.api.protocol import Status
from backends.api.step import NONFINITE, TOKEN, U8, U32, ScheduleStep, StepResult, Ticket
from backends.jax import params
from backends.jax.buckets import make_shape, pick
from backends.jax.inputs import pack
from backends.jax.mesh import open_mesh, replicated
from backends.jax.step import Plan
from backends.jax.warmup import EDIT, EMPTY, Program, Programs
from engine.config import Resolved
from engine.errors import BackendLost, ConfigError, DeviceFailed, StepRefused
from engine.model.spec import ModelSpec
from engine.model.weights import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that is out. made: int32[R, 2] on the device, on its way to the host; taps likewise."""

    version: int
    output: U8
    tokens: int
    made: jax.Array
    taps: dict[str, jax.Array]


class JaxBackend:
    """backends.api.protocol.Backend on jax. Not thread-safe: one thread calls it, as one loop plans the steps."""

    def __init__(self, spec: ModelSpec, config: Resolved) -> None:
        for key in config.options:
            raise ConfigError(f"backend.jax.{key}: unknown key; the jax backend has none", field=f"backend.jax.{key}")
        mesh = open_mesh(config)
        self.limits = Limits.of(spec, config, taps=True)
        self.plan = Plan(spec=spec, config=config, limits=self.limits, mesh=mesh)
        self.programs = Programs(self.plan)
        self.sharding = replicated(mesh)
        self.weights: Any = None
        self.caches: Any = None
        self.state: Any = None
        self.memory = {"weights": 0, "cache": 0}
        self.version = 0
        self.closed = False
        self.flights: OrderedDict[Ticket, Flight] = OrderedDict()
        self.unsampled: ScheduleStep | None = None

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights; steps that are out keep the old ones. The new stand beside the old until they are whole, so
        that a ModelError (which names the tensor) changes nothing."""
        self._open()
        self.weights = params.upload(self.plan.leaves, self.plan.config, self.plan.mesh, weights)
        self.version = version
        self.memory["weights"] = _held(self.weights)
        if self.caches is None:
            self._empty()

    def warmup(self) -> None:
        """Compile every program that a step without taps may need."""
        self._open()
        self.programs.warm()

    def forward(self, step: ScheduleStep) -> Ticket:
        """Enqueue the whole step, sampling included: where no row is masked they are one program."""
        self._open()
        if self.weights is None:
            raise StepRefused("step: no weights are loaded", field="step")
        if self.unsampled is not None:
            raise StepRefused(f"step: step {self.unsampled.step} was not sampled yet", field="step")
        if len(self.flights) >= self.limits.depth:
            raise StepRefused(f"step: {self.limits.depth} steps are out, collect one first", field="step")
        if step.step in self.flights:
            raise StepRefused(f"step: step {step.step} is out already", field="step")
        check_step(step, self.limits)
        shape = make_shape(pick(len(step.tokens), self.limits), self.limits)
        program = self.programs.take(Program("step", shape.tokens, tuple(sorted(step.taps))))
        packed, ahead = pack(step, shape, self.limits)
        edit = self.programs.take(EDIT) if ahead else None
        try:
            for edits in ahead:
                assert edit is not None
                self.state = edit(self.state, jax.device_put(edits, self.sharding))
            buffer = jax.device_put(packed, self.sharding)
            self.caches, self.state, made, taps = program(self.weights, self.caches, self.state, buffer)
            for array in (made, *taps.values()):
                array.copy_to_host_async()
        except jax.errors.JaxRuntimeError as error:
            self._fail(error)
        self.flights[step.step] = Flight(
            version=self.version, output=step.output.copy(), tokens=len(step.tokens), made=made, taps=taps
        )
        self.unsampled = step
        return step.step

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Nothing to do but to keep the order: the step's program sampled."""
        self._open()
        if self.unsampled is None or self.unsampled.step != ticket:
            raise StepRefused(f"ticket: {ticket} is not the last forward, or was sampled already", field="ticket")
        check_masks(masks, self.unsampled, self.limits)
        self.unsampled = None

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for the oldest step. timeout: seconds."""
        self._open()
        if not self.flights or next(iter(self.flights)) != ticket:
            raise StepRefused(f"ticket: {ticket} is not the oldest step out", field="ticket")
        if self.unsampled is not None and self.unsampled.step == ticket:
            raise StepRefused(f"ticket: {ticket} was not sampled yet", field="ticket")
        flight = self.flights[ticket]
        arrays = [flight.made, *flight.taps.values()]
        try:
            _wait(arrays, timeout)
            made, *taps = (np.asarray(array) for array in arrays)
        except (jax.errors.JaxRuntimeError, TimeoutError) as error:
            self._fail(error)
        del self.flights[ticket]
        rows = len(flight.output)
        status = made[:rows, 1].astype(np.uint8)
        asked = (flight.output & TOKEN) > 0
        given = asked & (status != NONFINITE)
        return StepResult(
            step=ticket,
            version=flight.version,
            tokens=np.where(given, made[:rows, 0], -1).astype(np.int32)[:, None],
            counts=given.astype(np.int32),
            status=np.where(asked, status, 0).astype(np.uint8),
            taps={name: value[: flight.tokens] for name, value in zip(flight.taps, taps, strict=True)},
        )

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
        )

    def close(self) -> None:
        """Free the device."""
        self.closed = True
        self.flights.clear()
        self.unsampled = None
        self.weights = self.caches = self.state = None
        self.memory = {"weights": 0, "cache": 0}
        self.programs.made.clear()

    def _open(self) -> None:
        if self.closed:
            raise BackendLost("the jax backend is closed")

    def _empty(self) -> None:
        """New caches and state."""
        self.caches = self.state = None
        self.caches, self.state = self.programs.take(EMPTY)()
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


def _wait(arrays: list[jax.Array], timeout: float) -> None:
    """Until all are ready. jax can't wait with a deadline, so this looks again after a part of the time waited."""
    start = time.monotonic()
    while not all(array.is_ready() for array in arrays):
        waited = time.monotonic() - start
        if waited > timeout:
            raise TimeoutError(f"no result after {timeout:g} s")
        time.sleep(min(2e-5 + waited / 32, 1e-3))


def _held(tree: Any) -> int:
    """Bytes that the first device holds of a tree of arrays."""
    return sum(array.addressable_shards[0].data.nbytes for array in jax.tree.leaves(tree))
