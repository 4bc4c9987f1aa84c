"""What two readings may differ by, as data: thresholds.toml, by the pair of their dtypes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from engine.config import read
from engine.errors import ConfigError
from engine.model.spec import EIGHT

FILE = Path(__file__).with_name("thresholds.toml")


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """value, peak: a value may be off by value * max(1, its standard deviation) + peak * its largest magnitude. top1,
    overlap: at least; the others: at most. The file says what each is."""

    value: float
    peak: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    top1: float
    overlap: float
    flips: float
    perplexity: float
    near: float


def kept(dtype: str, cache: str) -> str:
    """The name of one side: its dtype, and where its keys and values are in 8 bits also theirs, "float32/fp8"."""
    return f"{dtype}/{cache}" if cache in EIGHT else dtype


def pair(a: str, b: str) -> str:
    """The name of a pair of dtypes, each as `kept` has it; their order doesn't matter."""
    return ":".join(sorted((a, b)))


def thresholds(a: str, b: str, file: Path = FILE) -> Thresholds:
    """Of a pair of dtypes. Raises ConfigError: no such pair, an unknown or a missing key, no number from 0."""
    tables = read(file)
    table = tables.get(pair(a, b))
    if not isinstance(table, Mapping):
        raise ConfigError(
            f'thresholds: {file.name} has no table ["{pair(a, b)}"], only {", ".join(tables)}; add one',
            field="thresholds",
        )
    names = [f.name for f in fields(Thresholds)]
    wrong = [*(n for n in table if n not in names), *(n for n in names if n not in table)]
    if wrong:
        raise ConfigError(f"thresholds: {pair(a, b)}.{wrong[0]}: the keys are {', '.join(names)}", field="thresholds")
    return Thresholds(**{name: _number(f"{pair(a, b)}.{name}", value) for name, value in table.items()})


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ConfigError(f"thresholds: {key}: must be a number from 0, not {value!r}", field="thresholds")
    return float(value)
