"""From a configuration to an engine that is ready: what was decided, and how long each stage took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from backends import open_backend, several
from backends.api.limits import Limits
from backends.api.protocol import Backend
from backends.probe import probe
from engine.config import Config, Resolved
from engine.errors import ConfigError, ModelError
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.model.scales import read_largest
from engine.model.spec import ModelSpec, fit
from engine.model.weights import RandomWeights, WeightSource
from engine.resolve import resolve
from engine.resolve.facts import Decision
from engine.run.messages import Info
from engine.run.sizes import SizeLog
from engine.sampling import SamplingParams
from engine.sched.admission import capacity
from engine.sched.scheduler import Scheduler
from engine.sched.stop import Stopper
from engine.text.detokenize import StopStrings
from engine.text.words import Words

if TYPE_CHECKING:
    from engine.run.events import Publisher


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A configuration and what came of it, before anything is allocated. weights: as model.weights has it."""

    path: Path
    spec: ModelSpec
    resolved: Resolved
    decisions: tuple[Decision, ...]
    weights: str = "checkpoint"

    def source(self) -> WeightSource:
        """Where the weights come from."""
        return RandomWeights(self.spec, seed=0) if self.weights == "dummy" else Checkpoint(self.path, self.spec)


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """An engine that is ready. stopper: makes what finds a request's stop strings; None where it has none. weights:
    opens others of the same model, in a folder (`other_weights`). publisher: tells of the cache. sizes: where the sizes
    of steps are logged."""

    scheduler: Scheduler
    backend: Backend
    info: Info
    stopper: Callable[[SamplingParams], Stopper | None]
    weights: Callable[[str], WeightSource]
    publisher: Publisher | None = None
    sizes: SizeLog | None = None


def decide(config: Config, default: Path) -> Decided:
    """Look at the model and the device and decide everything. default: folder of the model when none is named.

    Raises ModelError or ConfigError.
    """
    path = Path(config.model.path) if config.model.path is not None else default
    spec = read_spec(path)
    resolved, decisions = resolve(config, spec, probe(config.backend.name, config.backend.platform))
    if resolved.scales:  # what is wrong with the file is said before a device is opened
        read_largest(Path(resolved.scales), spec)
    return Decided(
        path=path,
        spec=fit(spec, resolved.max_len),
        resolved=resolved,
        decisions=tuple(decisions),
        weights=config.model.weights,
    )


def open_device(decided: Decided) -> Backend:
    """The backend that was decided: in this process, or one that is a process for each device of a mesh."""
    if not several(decided.resolved):
        return open_backend(decided.resolved.backend, decided.spec, decided.resolved)
    from engine.run.remote import RemoteBackend  # a mesh alone needs sockets

    return RemoteBackend(decided.spec, decided.resolved)


def start(
    decided: Decided,
    words: Callable[[], Words | None],
    *,
    queue: int | None = None,
    queue_tokens: int | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> Started:
    """Open the backend, load, warm up. Nothing of the backend is left when that fails.

    words: gives what stop strings are found with, as the last stage; queue, queue_tokens: bounds of what waits
    (Scheduler); stage: told as each begins.
    """
    took: list[tuple[str, float]] = []

    @contextmanager
    def staged(name: str) -> Iterator[None]:
        stage(name)
        begin = time.monotonic()
        yield
        took.append((name, time.monotonic() - begin))

    with staged("device"):
        backend = open_device(decided)
    limits = backend.limits  # warmup may leave them smaller for a while
    try:
        room = capacity(limits)
        sizes = SizeLog(decided.resolved.log, limits.token_buckets) if decided.resolved.log else None
        with staged("weights"):
            backend.load(decided.source())
        with staged("programs"):
            backend.warmup()
        took += [(f"programs.{name}", seconds) for name, seconds in backend.status().stages.items()]
        scheduler = _scheduler(decided.resolved, backend.limits, queue, queue_tokens)
        with staged("tokenizer"):
            known = words()
            if known is not None:
                known.stages()  # may import the tokenizers' library, for which no step is to wait
        publisher = _publisher(decided.resolved)
    except BaseException:
        backend.close()
        raise
    ids = decided.spec.eos if known is None or known.eos is None else (*decided.spec.eos, known.eos)
    info = Info(
        path=str(decided.path),
        architecture=decided.spec.family,
        backend=decided.resolved.backend,
        limits=limits,
        room=room,
        eos=tuple(sorted(set(ids))),
        status=backend.status(),
        stages=tuple(took),
        decisions=decided.decisions,
    )
    return Started(
        scheduler=scheduler,
        backend=backend,
        info=info,
        stopper=partial(_stopper, known),
        weights=partial(other_weights, decided),
        publisher=publisher,
        sizes=sizes,
    )


def _scheduler(resolved: Resolved, limits: Limits, queue: int | None, queue_tokens: int | None) -> Scheduler:
    return Scheduler(
        limits,
        policy=resolved.policy,
        priority_preemption=resolved.priority_preemption,
        ageing=resolved.ageing,
        radix=resolved.radix,
        queue=queue,
        queue_tokens=queue_tokens,
        eviction=resolved.eviction,
        events=bool(resolved.events),
    )


def _stopper(words: Words | None, params: SamplingParams) -> Stopper | None:
    """What finds the stop strings of a request, if it has any."""
    if words is None or not params.stop:
        return None
    return StopStrings(words, params.stop, params.skip_special_tokens, params.min_new_tokens)


def _publisher(resolved: Resolved) -> Publisher | None:
    """What tells of the cache, if anything does."""
    if not resolved.events:
        return None
    from engine.run.events import Publisher  # needs sockets

    return Publisher(resolved.events, resolved.replay)


def other_weights(decided: Decided, path: str) -> Checkpoint:
    """The weights in another folder, for the model that is served. Of its config.json, dtype, eos, max_len and what is
    in 8 bits may be others; what is served stays as it was. Raises ModelError naming what is not the same, or the
    tensor at fault."""
    try:
        return _same(decided.spec, Path(path))
    except ConfigError as error:
        raise ModelError(f"{path}: {error}", field=error.field) from error
    except (OSError, ValueError) as error:  # a path that is none, a file that may not be read
        raise ModelError(f"{path[:200]!r}: can't be read: {str(error)[:200]}") from error


def _same(served: ModelSpec, path: Path) -> Checkpoint:
    spec = fit(read_spec(path), served.max_len)
    for name in sorted({f.name for f in fields(ModelSpec)} - {"dtype", "eos", "max_len", "narrow"}):
        theirs, ours = getattr(spec, name), getattr(served, name)
        if theirs != ours:
            if name == "layers":
                at = next((i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), None)
                theirs, ours = (len(theirs), len(ours)) if at is None else (f"layer {at} of another shape", "as served")
            raise ModelError(f"{path}: another model: {name}: {theirs}, not {ours}", field=name)
    return Checkpoint(path, replace(served, narrow=spec.narrow))
