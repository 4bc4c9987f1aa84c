"""Texts as an engine serves them: many at once, from shared pages, each decoded through the cache in steps that are
captured where a backend captures. Every text is given, so that subjects that part go on with the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from backends.api.build import Host, Placed, Row, Text
from backends.api.protocol import Backend
from backends.api.step import F32, I32, StepResult
from backends.probe import probe
from engine.config import load
from engine.errors import ConfigError
from engine.model.scales import write_largest
from engine.run.start import Decided, decide, open_device
from radixmesh.parity.metrics import KS, OVERLAP, Summary, log_softmax, measure, summarise
from radixmesh.parity.report import Check, checks
from radixmesh.parity.thresholds import FILE, kept, thresholds

ROWS, GROUPS = 24, ((16, 512), (8, 256))
"""Texts, and the nested groups that begin alike: rows of each, and tokens that those share beyond the group around."""
BEGIN, STAGGER, OWN = 768, 5, 64
"""Tokens before a text is decoded, by how many each text has more than the one before, and tokens decoded."""
SPAN = BEGIN + STAGGER * (ROWS - 1) + OWN
"""Tokens of the longest text."""
STEPS: Mapping[str, Any] = {"sched.slots": 32, "sched.max_tokens": 1024, "cache.tokens": 2 * ROWS * SPAN}

JUDGE: Mapping[str, Any] = {"backend": "torch", "backend.platform": "cpu", "model.dtype": "float32"}
PLAIN = {"backend.torch.graphs": "off", "backend.torch.cascade": "off"}
FULL = {"backend.torch.graphs": "auto", "backend.torch.cascade": "on"}
BF16 = {"model.dtype": "bfloat16"}
CASES: Mapping[str, Mapping[str, Any]] = {
    "float32": FULL | {"model.dtype": "float32"},
    "bf16": PLAIN | BF16,
    "bf16 graphs": PLAIN | BF16 | {"backend.torch.graphs": "auto"},
    "bf16 cascade": PLAIN | BF16 | {"backend.torch.cascade": "on"},
    "bf16 graphs cascade": FULL | BF16,
    "fp8 cache": FULL | BF16 | {"cache.dtype": "fp8"},
    "int8 cache": FULL | BF16 | {"cache.dtype": "int8"},
    "int8 weights": FULL | BF16 | {"model.quantise": "int8"},
    "fp8 weights, wide": FULL | BF16 | {"model.quantise": "fp8", "model.activations": "wide"},
    "fp8 weights, e4m3": FULL | BF16 | {"model.quantise": "fp8", "model.activations": "fp8"},
    "fp8-row weights, wide": FULL | BF16 | {"model.quantise": "fp8-row", "model.activations": "wide"},
    "fp8-row weights, e4m3": FULL | BF16 | {"model.quantise": "fp8-row", "model.activations": "fp8"},
}
"""What torch is set to, by name. Weights in 8 bits are compared with a judge that has the same."""
GPU = ("fp8 weights, e4m3", "fp8-row weights, e4m3")
"""Those that a CPU refuses."""
TEN = KS.index(OVERLAP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """path: its folder. dummy: weights are random."""

    path: Path
    dummy: bool = False

    def decide(self, given: Mapping[str, Any]) -> Decided:
        """What is decided for a configuration. Raises ConfigError or ModelError."""
        more = {"model.weights": "dummy"} if self.dummy else {}
        return decide(load(None, {**STEPS, **given, **more, "model": str(self.path)}), self.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A case against its judge. summary: of all positions that were decoded. device, ran: as Status has them. asked:
    whether steps ran as they were asked to."""

    case: str
    summary: Summary
    checks: tuple[Check, ...]
    device: str
    ran: dict[str, int] = field(default_factory=dict)
    asked: bool = True

    @property
    def ok(self) -> bool:
        return self.asked and all(c.ok for c in self.checks)


def here() -> list[str]:
    """The cases of the device that is here."""
    gpu = probe("torch", "auto").platform == "gpu"
    return [name for name in CASES if gpu or name not in GPU]


def scripts(decided: Decided) -> list[tuple[int, ...]]:
    """The texts: of the packaged prompts, or of random ids where weights are random. Raises ConfigError for a model
    that reaches less far."""
    if decided.resolved.max_len < SPAN:
        raise ConfigError(f"model: reaches {decided.resolved.max_len} positions, {SPAN} are needed", field="model")
    if decided.weights == "dummy":
        given = np.random.default_rng(0).integers(0, decided.spec.vocab, 4 * SPAN)
    else:
        from radixmesh.parity.texts import pick

        given = np.concatenate([t.ids for t in reversed(pick(decided, None, 0, 0, 1))])
    out = []
    for row in range(ROWS):
        alike = sum(n for rows, n in GROUPS if row < rows)
        rest = np.roll(given, -(701 + 97 * row))
        text = np.concatenate([given[:alike], np.resize(rest, SPAN)])
        out.append(tuple(text[: BEGIN + STAGGER * row + OWN].tolist()))
    return out


def judge(model: Model, texts: Sequence[Sequence[int]], quantise: str) -> list[F32]:
    """Log-probabilities float32[OWN, V] of each text by torch on a CPU in float32, each text fed alone and whole."""
    decided = model.decide(JUDGE | {"model.quantise": quantise})
    out = []
    with closing(open_device(decided)) as backend:
        backend.load(decided.source())
        host = Host(backend, taps=("logits",))
        for ids in texts:
            text, parts = host.open(), []
            for part, last in _chunks(ids[:-1], backend.limits.max_tokens):
                parts.append(host.run([(text, host.row(text, part, output=int(last)))]).taps["logits"])
            host.close(text)
            out.append(log_softmax(np.concatenate(parts)[-OWN:].astype(np.float64)).astype(np.float32))
    return out


def serve(backend: Backend, texts: Sequence[Sequence[int]]) -> list[F32]:
    """The same by a backend that is warm, all texts at once: what is shared is fed once, then each step decodes a token
    of every text."""
    host, vocab = Host(backend), backend.limits.vocab
    rows: list[Text] = []
    made: list[list[F32]] = []
    for i, ids in enumerate(texts):
        cached = sum(n for members, n in GROUPS if 0 < i < members)
        rows.append(host.open(rows[0] if cached else None, cached))
        for part, last in _chunks(ids[cached:-OWN], backend.limits.max_tokens):
            row = host.row(rows[i], part, output=int(last), logprobs=vocab if last else -1)
            result = host.run([(rows[i], row)])
        made.append([_whole(result, 0, vocab)])
    groups, begin = [], 0
    for members, n in GROUPS:
        groups.append((0, members - 1, begin, begin + n - 1))
        begin += n
    alike = np.array(groups, np.int32) if backend.limits.sharing is not None else np.zeros((0, 4), np.int32)
    for j in range(OWN - 1):
        fed: list[tuple[Text, Row]] = [
            (row, host.row(row, [ids[j - OWN]], logprobs=vocab)) for row, ids in zip(rows, texts, strict=True)
        ]
        result = _run(host, fed, alike)
        for i in range(len(texts)):
            made[i].append(_whole(result, i, vocab))
    return [np.stack(parts) for parts in made]


def _run(host: Host, fed: Sequence[Placed], alike: I32) -> StepResult:
    step = replace(host.step(fed), shared=alike)
    host.backend.forward(step)
    host.backend.sample(step.step)
    return host.backend.collect(step.step)


def _chunks(ids: Sequence[int], size: int) -> Iterator[tuple[Sequence[int], bool]]:
    """Parts of a text, and whether each is the last."""
    for i in range(0, len(ids), size):
        yield ids[i : i + size], i + size >= len(ids)


def _whole(result: StepResult, row: int, vocab: int) -> F32:
    """Log-probabilities of every token, float32[V]; NaN where the row has none."""
    out = np.full(vocab, np.nan, np.float32)
    told = None if result.logprobs is None else result.logprobs[row]
    if told is not None:
        out[told.ids[0]] = told.top[0]
    return out


def compare(
    model: Model, names: Sequence[str], settings: Mapping[str, Any], limits: Path = FILE
) -> Iterator[tuple[str, Served]]:
    """Each case on the device that is here, against the judge of its weights. Raises ConfigError."""
    judged: dict[str, list[F32]] = {}
    texts = scripts(model.decide({"backend": "torch"}))
    with TemporaryDirectory() as folder:
        for name in names:
            given: dict[str, Any] = {"backend": "torch", **CASES[name], **settings}
            quantise = given.get("model.quantise", "none")
            if quantise not in judged:
                judged[quantise] = judge(model, texts, quantise)
            if given.get("cache.dtype") == "int8" and not model.dummy and "cache.scales" not in given:
                given["cache.scales"] = str(_calibrate(model, Path(folder) / "scales.json"))
            yield name, assess(model, name, given, texts, judged[quantise], limits)


def _calibrate(model: Model, path: Path) -> Path:
    """Scales of a cache in int8, from the packaged prompts."""
    from radixmesh.commands.calibrate import measure as largest
    from radixmesh.parity.texts import pick

    decided = model.decide(JUDGE)
    write_largest(path, largest(decided, pick(decided, None, 0, 0, 1)))
    return path


def assess(
    model: Model,
    name: str,
    given: Mapping[str, Any],
    texts: Sequence[Sequence[int]],
    judged: Sequence[F32],
    limits: Path = FILE,
) -> Served:
    """One case."""
    decided = model.decide(given)
    resolved = replace(decided.resolved, max_logprobs=decided.spec.vocab)
    with closing(open_device(replace(decided, resolved=resolved))) as backend:
        backend.load(decided.source())
        backend.warmup()
        found = serve(backend, texts)
        status = backend.status()
    positions = [measure(a, b, ids[-OWN - 1 : -1]) for a, b, ids in zip(judged, found, texts, strict=True)]
    summary = summarise(positions)
    assert summary is not None
    side = kept(resolved.dtype + "+fp8" * (resolved.activations == "fp8"), resolved.cache_dtype)
    ran, decoded = status.ran, OWN - 1
    asked = (ran.get("replayed", 0) >= decoded) == bool(resolved.graphs)
    asked &= (ran.get("together", 0) >= decoded) == (resolved.cascade != "off")
    asked &= not (resolved.graphs and status.compiles_after_ready)
    return Served(
        case=name,
        summary=summary,
        checks=checks(summary, thresholds("float32", side, limits)),
        device=status.device,
        ran=ran,
        asked=asked,
    )
