"""Every text through one subject, in this process or in one of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from backends.api.step import I32
from engine.config import load
from engine.model.checkpoint import Checkpoint
from engine.run.start import Decided, decide, open_device
from radixmesh.engine import DEMO
from radixmesh.parity.readings import ORACLE, Reading, ask_oracle, open_oracle, read_backend
from radixmesh.parity.subjects import Subject

STEPS: Mapping[str, Any] = {"sched.slots": 1, "sched.max_tokens": 256, "sched.token_buckets": [1, 256]}
"""One text at a time, and two sizes of a step: what compiles, compiles twice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Which model, configured how, and how many greedy tokens. path: None is the demo model."""

    path: str | None
    count: int
    file: Path | None = None
    pairs: Mapping[str, Any] = field(default_factory=dict)

    def decide(self, subject: Subject) -> Decided:
        """What is decided for a backend. Raises ModelError or ConfigError."""
        given = {**STEPS, **self.pairs, **subject.overrides} | ({"model": self.path} if self.path else {})
        return decide(load(self.file, given), DEMO)


def read_texts(
    subject: Subject,
    settings: Settings,
    texts: Sequence[Sequence[int]],
    pinned: Sequence[Mapping[str, I32]] | None = None,
) -> list[Reading]:
    """A reading of each text; inner values are kept of the first, logits of all. pinned: experts to take, for "hf".

    A mesh gets a process of its own: how many devices a library sees is settled when it starts.
    """
    if subject.mesh.size == 1:
        return _read(subject, settings, texts, pinned)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as alone:
        return alone.submit(_read, subject, settings, texts, pinned).result()


def _read(
    subject: Subject,
    settings: Settings,
    texts: Sequence[Sequence[int]],
    pinned: Sequence[Mapping[str, I32]] | None,
) -> list[Reading]:
    if subject.backend == ORACLE:
        decided = settings.decide(Subject(name="reference", backend="reference"))
        spec, model = decided.spec, open_oracle(decided.path, subject.dtype)
        pins = pinned or [None] * len(texts)
        return [
            _keep(i, ask_oracle(model, spec, text, settings.count, name=subject.name, pinned=pin))
            for i, (text, pin) in enumerate(zip(texts, pins, strict=True))
        ]
    decided = settings.decide(subject)
    backend = open_device(decided)
    try:
        backend.load(Checkpoint(decided.path, decided.spec))
        return [
            _keep(i, read_backend(subject.name, backend, decided.spec, text, settings.count))
            for i, text in enumerate(texts)
        ]
    finally:
        backend.close()


def _keep(number: int, reading: Reading) -> Reading:
    return reading if number == 0 else replace(reading, values={"logits": reading.values["logits"]})
