"""Latency of a workload's requests: at so many at once, or as they arrive at a rate. One engine in this process, whose
news is timed on its own thread: no network, no text."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from engine.config import load
from engine.errors import ConfigError
from engine.run.local import LocalClient
from engine.run.messages import Flush, News, Submit
from engine.run.start import decide, start
from engine.sampling import SamplingParams
from engine.sched.request import Request
from radixmesh.bench.load import spread
from radixmesh.bench.workloads import HIGH, Workload, workload

PATIENCE = 600.0
"""Seconds that a point of load may take beyond its arrivals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """concurrency: requests that are open at once, the next when one ends; or rate: arrivals a second, at random."""

    concurrency: int = 0
    rate: float = 0.0

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.concurrency} at once" if self.concurrency else f"{self.rate:g} a second"


@dataclass(slots=True)
class Trip:
    """A request under way. Times are of time.perf_counter; gaps: between tokens, seconds."""

    sent: float
    first: float = 0.0
    last: float = 0.0
    tokens: int = 0
    cached: int = 0
    gaps: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


def loads(concurrency: str, rate: str) -> list[Load]:
    """Points of load of two lists, such as "1,16" and "2.5". Raises ConfigError."""
    out = []
    for field_, text in (("concurrency", concurrency), ("rate", rate)):
        for part in filter(None, (p.strip() for p in text.split(","))):
            try:
                value = float(part)
            except ValueError:
                value = 0.0
            if not 0 < value < 1e6 or (field_ == "concurrency" and value != int(value)):
                raise ConfigError(f"{field_}: {part!r}: give numbers above 0, such as 1,16", field=field_)
            out.append(Load(concurrency=int(value)) if field_ == "concurrency" else Load(rate=value))
    if not out:
        raise ConfigError("concurrency, rate: give at least one", field="concurrency")
    return out


class Bench:
    """An engine, and the trips of its requests."""

    def __init__(self, path: Path, backend: str, settings: Mapping[str, Any]) -> None:
        decided = decide(load(None, {**settings, "model": str(path), "backend": backend}), path)
        self.client = LocalClient(partial(start, decided, lambda: None))
        self.vocab = decided.spec.vocab
        self.trips: dict[str, Trip] = {}
        self.lost: Exception | None = None
        self.client.listen(self._take)

    def _take(self, news: News) -> None:
        now = time.perf_counter()
        self.lost = news.lost or self.lost
        for output in news.outputs:
            trip, made = self.trips[output.rid], len(output.tokens)
            self.lost = output.error or self.lost
            if made and trip.tokens:
                trip.gaps += [(now - trip.last) / made] * made
            elif made:
                trip.first, trip.cached = now, output.cached_tokens
            if made:
                trip.last, trip.tokens = now, trip.tokens + made
            if output.finish is not None:
                trip.ended.set()

    def send(self, rid: str, prompt: Sequence[int], made: int) -> Trip:
        """Submit a greedy request."""
        params = SamplingParams.of({"temperature": 0, "max_new_tokens": made, "ignore_eos": True})
        self.trips[rid] = trip = Trip(time.perf_counter())
        self.client.say(Submit(request=Request(rid=rid, tokens=tuple(prompt), params=params, arrival=time.monotonic())))
        return trip

    def flush(self) -> None:
        """Forget all prefixes."""
        self.trips["flush"] = trip = Trip(time.perf_counter())
        self.client.say(Flush(rid="flush"))
        self.wait([trip])

    def wait(self, trips: Sequence[Trip]) -> None:
        """Until all have ended. Raises what an engine died of, and TimeoutError."""
        until = time.monotonic() + PATIENCE
        for trip in trips:
            while not trip.ended.wait(1.0):
                if time.monotonic() > until:
                    raise TimeoutError("latency: requests did not end")
                if self.lost is not None:
                    raise self.lost
        if self.lost is not None:
            raise self.lost


def measure(
    path: Path,
    backend: str,
    names: Sequence[str],
    points: Sequence[Load],
    requests: int,
    scale: float,
    settings: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """A record for each workload and point of load, each from an empty cache after a warm-up."""
    for name in names:
        workload(name, scale)  # refused before anything is opened
    bench = Bench(path, backend, settings)
    try:
        for name in names:
            w = workload(name, scale, min(HIGH, bench.vocab))
            bench.wait([bench.send("warm", w.prompts[0], min(8, w.made))])
            for point in points:
                bench.flush()
                yield {"workload": name, "subject": backend, "scale": scale} | run(bench, w, point, requests)
    finally:
        bench.client.shutdown()


def run(bench: Bench, w: Workload, point: Load, requests: int) -> dict[str, Any]:
    """Percentiles in seconds: ttft until the first token, itl between tokens, e2e until the last."""
    prompts = [w.prompts[i % len(w.prompts)] for i in range(requests)]
    bench.trips.clear()
    began = time.perf_counter()
    trips = (_closed if point.concurrency else _open)(bench, prompts, w.made, point)
    bench.wait(trips)
    seconds = time.perf_counter() - began
    values = {
        "ttft": [t.first - t.sent for t in trips],
        "itl": [gap for t in trips for gap in t.gaps],
        "e2e": [t.last - t.sent for t in trips],
    }
    return {
        "load": point.name,
        "concurrency": point.concurrency or None,
        "rate": point.rate or None,
        "requests": requests,
        "input_tokens": sum(map(len, prompts)),
        "cached": sum(t.cached for t in trips),
        "output_tokens": sum(t.tokens for t in trips),
        "seconds": seconds,
        "output_tokens_per_second": sum(t.tokens for t in trips) / seconds,
        "device": bench.client.info.status.device,
        **{name: {"mean": fmean(found), **spread(found)} for name, found in values.items() if found},
    }


def _closed(bench: Bench, prompts: Sequence[Sequence[int]], made: int, point: Load) -> list[Trip]:
    """As many threads as requests may be open; each sends its next when its last has ended."""
    trips: list[Trip] = []
    left = iter(enumerate(prompts))
    lock = threading.Lock()

    def client() -> None:
        while bench.lost is None:
            with lock:
                item = next(left, None)
            if item is None:
                return
            trip = bench.send(str(item[0]), item[1], made)
            trips.append(trip)
            while not trip.ended.wait(1.0) and bench.lost is None:
                pass

    threads = [threading.Thread(target=client) for _ in range(min(point.concurrency, len(prompts)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return trips


def _open(bench: Bench, prompts: Sequence[Sequence[int]], made: int, point: Load) -> list[Trip]:
    """Arrivals as of a Poisson process, whatever is still open."""
    gaps = np.random.default_rng(0).exponential(1 / point.rate, len(prompts))
    due, trips = time.perf_counter(), []
    for i, (prompt, gap) in enumerate(zip(prompts, gaps, strict=True)):
        time.sleep(max(0.0, due - time.perf_counter()))
        trips.append(bench.send(str(i), prompt, made))
        due += gap
    return trips
