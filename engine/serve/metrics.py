"""What Prometheus reads: under SGLang's names where they exist, else under radixmesh's."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from backends.api.protocol import Status
from engine.serve.call import Record
from engine.serve.service import Service

LOGGER = logging.getLogger("radixmesh.http")
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
BETWEEN = (
    0.001,
    0.002,
    0.004,
    0.006,
    0.008,
    0.01,
    0.015,
    0.02,
    0.025,
    0.03,
    0.04,
    0.06,
    0.08,
    0.1,
    0.2,
    0.4,
    0.8,
    1,
    2,
)
MAX_NAMES = 64
"""Unknown fields that are counted by name; further ones, and odd ones, count as "other"."""


class Histogram:
    """Counts of values up to each bound. name: with its unit, as Prometheus has it."""

    def __init__(self, name: str, what: str, bounds: Sequence[float]) -> None:
        self.name, self.what, self.bounds = name, what, bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """One value, so many times."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def family(self, model: str) -> HistogramMetricFamily:
        """As it is now."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self.bounds)), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, total))
        out = HistogramMetricFamily(self.name, self.what, labels=("model_name",))
        out.add_metric((model,), buckets, self.sum)
        return out


class Metrics(Collector):
    """Of one app: what its service recorded and how its engine stands. One event loop writes and reads it."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.reasons: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.fields: Counter[str] = Counter()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.first = Histogram("sglang:time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.whole = Histogram("sglang:e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self.between = Histogram(
            "sglang:inter_token_latency_seconds", "Between tokens: the mean of a request, once per token.", BETWEEN
        )
        self.queue = Histogram("sglang:queue_time_seconds", "From arrival to the first row on the device.", SECONDS)
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def record(self, record: Record) -> None:
        """A request that ended."""
        self.reasons[record.reason] += 1
        self.tokens["prompt"] += record.prompt_tokens
        self.tokens["cached"] += record.cached_tokens
        self.tokens["made"] += record.made_tokens
        self.whole.add(record.total)
        self.queue.add(record.queue)
        if record.made_tokens:
            self.first.add(record.queue + record.prefill)
        if record.made_tokens > 1:
            times = record.made_tokens - 1
            self.between.add(record.decode / times, times)

    def answered(self, route: str, status: int) -> None:
        """An HTTP request that ended."""
        self.answers[route, status] += 1

    def unknown(self, name: str) -> None:
        """A field that nobody knows: it is passed over, and said once."""
        plain = len(name) <= 64 and name.isascii() and name.isprintable()
        known = name if plain and (name in self.fields or len(self.fields) < MAX_NAMES) else "other"
        if known not in self.fields:
            LOGGER.warning("unknown field %s in a request: it is passed over", known)
        self.fields[known] += 1

    def text(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its media type, by what the scraper accepts."""
        encode, kind = choose_encoder(accept)
        return encode(self.registry), kind

    def describe(self) -> Iterator[Metric]:
        """Nothing, so that registering collects nothing."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """All of it, as it is now."""
        model = self.service.name
        counts = (
            ("sglang:prompt_tokens", "Prompt tokens of requests that ended.", self.tokens["prompt"]),
            ("sglang:cached_tokens", "Prompt tokens of them that came from the prefix cache.", self.tokens["cached"]),
            ("sglang:generation_tokens", "Tokens made for requests that ended.", self.tokens["made"]),
            ("sglang:num_requests", "Requests that ended.", self.reasons.total()),
            ("sglang:num_aborted_requests", "Requests that were aborted.", self.reasons["abort"]),
        )
        for name, what, value in counts:
            yield _counter(name, what, ("model_name",), {(model,): value})
        yield from (h.family(model) for h in (self.first, self.whole, self.between, self.queue))
        yield _counter(
            "radixmesh:requests",
            "Requests that ended, by how.",
            ("model_name", "reason"),
            {(model, reason): n for reason, n in self.reasons.items()},
        )
        yield _counter(
            "radixmesh:http_requests",
            "HTTP requests, by route and status; 499 is a client that went away before its answer began.",
            ("route", "status"),
            {(route, str(status)): n for (route, status), n in self.answers.items()},
        )
        yield _counter(
            "radixmesh:unknown_fields",
            "Fields of bodies that nobody knows.",
            ("field",),
            {(name,): n for name, n in self.fields.items()},
        )
        yield from self._engine(model)

    def _engine(self, model: str) -> Iterator[Metric]:
        """How the engine stood when it last told: twice a second while it is busy, and when it becomes idle."""
        yield _gauge("radixmesh:ready", "Whether a request would be taken.", model, float(self.service.ready))
        yield _gauge("radixmesh:open_requests", "Requests that have not ended.", model, self.service.open_requests)
        stats = self.service.stats
        if stats is None:
            return
        pages = [g.page for g in self.service.info.limits.groups]
        total = sum(a.total * p for a, p in zip(stats.accounts, pages, strict=True))
        used = sum((a.locked + a.owned) * p for a, p in zip(stats.accounts, pages, strict=True))
        share = max(((a.locked + a.owned) / a.total for a in stats.accounts if a.total), default=0.0)
        rate = stats.cached_tokens / stats.prompt_tokens if stats.prompt_tokens else 0.0
        yield _gauge("sglang:num_running_reqs", "Requests on the device.", model, stats.running)
        yield _gauge("sglang:num_queue_reqs", "Requests that wait for a slot.", model, stats.waiting)
        yield _gauge("sglang:token_usage", "Share of the cache that open requests hold.", model, share)
        yield _gauge("sglang:num_used_tokens", "Positions of the cache that open requests hold.", model, used)
        yield _gauge("sglang:max_total_num_tokens", "Positions of the cache.", model, total)
        yield _gauge("sglang:cache_hit_rate", "Share of prompt tokens that came from the prefix cache.", model, rate)
        yield _gauge("radixmesh:queue_tokens", "Prompt tokens of requests that wait.", model, stats.waiting_tokens)
        one, late = ("model_name",), stats.status.compiles_after_ready
        yield _counter("radixmesh:steps", "Steps sent to the device.", one, {(model,): stats.steps})
        yield _counter("radixmesh:preemptions", "Requests that lost their slot.", one, {(model,): stats.preemptions})
        yield _counter("radixmesh:repairs", "Times that pages were found lost.", one, {(model,): stats.repairs})
        lost, says = stats.events_dropped, "Batches of cache events that were not sent."
        yield _counter("radixmesh:cache_events_dropped", says, one, {(model,): lost})
        yield _counter(
            "radixmesh:compiles_after_ready", "Programs compiled after the start: must stay 0.", one, {(model,): late}
        )
        yield from describe(model, stats.status)
        states = GaugeMetricFamily("radixmesh:pages", "Pages of the cache.", labels=("model_name", "group", "state"))
        for i, account in enumerate(stats.accounts):
            for state in ("free", "evictable", "locked", "owned"):
                states.add_metric((model, str(i), state), getattr(account, state))
        yield states


def describe(model: str, status: Status) -> Iterator[Metric]:
    """Where the programs came from, and how much of the steps that they ran was padding."""
    sources, one = status.sources, ("model_name",)
    made = {"bundle": sources.bundle, "cache": sources.cache, "compiler": sources.compiler}
    yield _gauge("radixmesh:programs_planned", "Programs that steps may need.", model, sources.planned)
    told: dict[tuple[str, ...], float] = {(model, source): count for source, count in made.items()}
    yield _counter(
        "radixmesh:programs", "Programs that exist, by where they came from.", ("model_name", "source"), told
    )
    yield _counter(
        "radixmesh:program_seconds", "Seconds that loading and compiling them took.", one, {(model,): sources.seconds}
    )
    for name, what, values in (
        ("steps", "Steps padded to this many tokens.", {size: steps for size, steps, _ in status.buckets}),
        ("tokens", "Tokens that these steps had.", {size: tokens for size, _, tokens in status.buckets}),
        ("padding", "Tokens that were added.", {size: size * steps - tokens for size, steps, tokens in status.buckets}),
    ):
        labelled: dict[tuple[str, ...], float] = {(model, str(size)): value for size, value in values.items()}
        yield _counter(f"radixmesh:bucket_{name}", what, ("model_name", "bucket"), labelled)


def _counter(name: str, what: str, labels: Sequence[str], values: Mapping[tuple[str, ...], float]) -> Metric:
    out = CounterMetricFamily(name, what, labels=labels)
    for key, value in values.items():
        out.add_metric(key, value)
    return out


def _gauge(name: str, what: str, model: str, value: float) -> Metric:
    out = GaugeMetricFamily(name, what, labels=("model_name",))
    out.add_metric((model,), value)
    return out
