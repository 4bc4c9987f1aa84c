"""What a backend can do. Forwards, loads and copies happen in the order they are called."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from backends.api.limits import Limits
from backends.api.step import U32, ScheduleStep, StepResult, Ticket
from engine.model.weights import WeightSource


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where a backend's programs came from. planned: all that steps may need; bundle, cache, compiler: how many were
    loaded from a bundle, found in a cache of earlier starts, compiled; seconds: what all that took."""

    planned: int = 0
    bundle: int = 0
    cache: int = 0
    compiler: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a backend stands. programs: that exist; compiles_after_ready: on the way of a step, must stay 0; memory:
    bytes by use ("weights", "cache"), per device; sources: where the programs came from; buckets: (size, steps padded
    to it, tokens that they had), rising, of backends that pad. ran: steps since the start by how they ran, of backends
    that have several ways: "replayed" or "called", and of them "together", whose rows read shared pages once. stages:
    seconds of what warm-up did, in order."""

    ready: bool
    version: int
    programs: int
    compiles_after_ready: int
    device: str
    memory: dict[str, int] = field(default_factory=dict)
    sources: Sources = field(default_factory=Sources)
    buckets: tuple[tuple[int, int, int], ...] = ()
    ran: dict[str, int] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One of `size` processes that are one backend together: each opens its own with its own rank. folder: private to
    them; they find each other there."""

    rank: int
    size: int
    folder: str


class Backend(Protocol):
    """One engine's device side, on one host.

    forward raises StepRefused before anything is enqueued, touching only its rows. Any call may raise DeviceFailed: all
    tickets out are void, the caches are empty and the backend accepts the next forward; or BackendLost: it is gone.
    Adapters, encoders and the transfer of cache pages join the protocol with the work that builds them.
    """

    @property
    def limits(self) -> Limits:
        """What a step may hold. With `ready_early` max_tokens and token_buckets are small after warmup and grow, never
        shrink, between calls: the loop tells the scheduler."""
        ...

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights; again later for new ones. Ordered like a forward."""
        ...

    def warmup(self) -> None:
        """Build every program that a step within `limits` may need. Compiling on the way of a step afterwards is an
        error, counted in status()."""
        ...

    def forward(self, step: ScheduleStep) -> Ticket:
        """Enqueue a step; never waits for the device. Refused when limits.depth tickets are out."""
        ...

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Choose tokens; called once per forward and before the next one.

        masks uint32[M, 1+K, ceil(V/32)]: one for each masked row, in row order; bit v % 32 of word v // 32 allows v.
        """
        ...

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for a step, oldest ticket first. timeout: seconds; past it DeviceFailed."""
        ...

    def status(self) -> Status: ...

    def close(self) -> None:
        """Free the device. The backend can't be used afterwards."""
        ...
