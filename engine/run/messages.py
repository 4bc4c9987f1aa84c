"""What is said to the loop, and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from backends.api.limits import Limits
from backends.api.protocol import Status
from engine.errors import RadixmeshError
from engine.resolve.facts import Decision
from engine.sched.request import Output, Request
from engine.sched.store import Account

MOST = 64
"""Messages that are taken before a step: the device may wait for it while they are read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Complete a prompt. The loop's side makes request.stopper from its stop strings."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """End a request now."""

    rid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Flush:
    """Empty the prefix cache. Answered by an Output of this rid, with an error while requests are open."""

    rid: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Take the weights in a folder, of the model that is served. Answered by an Output of this rid, with the version
    that they have from now on, or with why they were refused."""

    rid: str
    path: str


Message: TypeAlias = Submit | Abort | Flush | Load


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """How the loop stands. running, waiting: requests; waiting_tokens: of their prompts; accounts: pages of each cache
    group; held: pages that open requests hold, over all groups; status: the backend's. The rest counts since the start:
    steps, preemptions, repairs (of lost pages), prompt_tokens seated, cached_tokens of them, made_tokens committed,
    events_dropped (batches of the cache's)."""

    running: int
    waiting: int
    waiting_tokens: int
    steps: int
    preemptions: int
    repairs: int
    prompt_tokens: int
    cached_tokens: int
    made_tokens: int
    events_dropped: int
    accounts: tuple[Account, ...]
    status: Status

    @property
    def held(self) -> int:
        """Pages that open requests hold."""
        return sum(a.locked + a.owned for a in self.accounts)


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """What one turn of the loop made, for all requests at once. begun: ids of requests whose first row was sent to
    the device, with the seconds that each had waited since its arrival. stats: now and then, and whenever the loop
    becomes idle. lost: the loop is gone, and why; every open request has had its last Output."""

    outputs: tuple[Output, ...] = ()
    begun: tuple[tuple[str, float], ...] = ()
    stats: Stats | None = None
    lost: RadixmeshError | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What a client must know of an engine that is ready. path: folder of the model; limits, room: of a request
    (engine.sched.admission.check_request); eos: ids that end a text; max_len: positions; stages: what the start took,
    (name, seconds), "a.b" is a part of "a"; decisions: what was decided, and why."""

    path: str
    architecture: str
    backend: str
    limits: Limits
    room: int
    eos: tuple[int, ...]
    status: Status
    stages: tuple[tuple[str, float], ...]
    decisions: tuple[Decision, ...]
