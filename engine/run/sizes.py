"""Sizes of steps: how many tokens they had, as a server logs it, and the ladder of buckets that pads them least.

The log is JSON, one object a line: {"ladder": [1, 8, 64], "sizes": {"1": 250, "17": 3}}, the sizes that steps were
padded to and how many steps had so many tokens since the line before. Logs of several servers may stand one after the
other. Steps that score prompts are left out: they are padded to the largest size whatever the ladder.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from backends.api.step import ScheduleStep
from engine.checks import MOST_BUCKETS
from engine.errors import ConfigError


class SizeLog:
    """Appends the sizes of steps to a file. Raises ConfigError where it can't be opened."""

    def __init__(self, path: str, ladder: Sequence[int]) -> None:
        self._ladder = list(ladder)
        self._sizes: Counter[int] = Counter()
        try:
            self._file: IO[str] | None = open(path, "a")  # noqa: SIM115  (as long as the engine)
        except OSError as error:
            raise ConfigError(f"sched.log: {path} can't be written: {error.strerror}", field="sched.log") from error

    def add(self, step: ScheduleStep) -> None:
        """One more step."""
        if step.sampling.prompt_logprobs[:, 0].max() < 0:
            self._sizes[len(step.tokens)] += 1

    def flush(self) -> None:
        """Write what came since the last time. A disk that is full ends the log, not the engine."""
        if self._file is None or not self._sizes:
            return
        line = {"ladder": self._ladder, "sizes": {str(size): self._sizes[size] for size in sorted(self._sizes)}}
        self._sizes.clear()
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            print(f"radixmesh: sched.log ends here: {error}", file=sys.stderr, flush=True)
            self._file = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What logs say. ladder: of the last line; sizes: tokens of a step -> how many steps had so many."""

    ladder: tuple[int, ...]
    sizes: Mapping[int, int]

    @property
    def steps(self) -> int:
        return sum(self.sizes.values())

    @property
    def tokens(self) -> int:
        """That were asked for."""
        return sum(size * count for size, count in self.sizes.items())

    def padding(self, ladder: Sequence[int]) -> int:
        """Tokens that a ladder adds. Raises ValueError where a step is larger than its last size."""
        out = 0
        for size, count in self.sizes.items():
            bucket = next((b for b in ladder if b >= size), None)
            if bucket is None:
                raise ValueError(f"a step of {size} tokens is larger than {ladder[-1]}")
            out += (bucket - size) * count
        return out

    def waste(self, ladder: Sequence[int]) -> float:
        """Share of all computed tokens that are padding."""
        added = self.padding(ladder)
        return added / (added + self.tokens) if self.sizes else 0.0


def read(files: Iterable[Path]) -> Traffic:
    """Logs, added up. Raises ConfigError naming file and line."""
    sizes: Counter[int] = Counter()
    ladder: tuple[int, ...] = ()
    for file in files:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"log: {file} can't be read: {error}", field="log") from error
        for number, line in enumerate(lines, 1):
            try:
                said = json.loads(line)
                ladder = tuple(int(size) for size in said["ladder"])
                found = {int(size): int(count) for size, count in said["sizes"].items()}
                if not ladder or min(*found, *found.values(), *ladder) < 1 or max(found) > max(ladder):
                    raise ValueError("sizes that are none")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"log: {file}, line {number} is no line of sched.log: {error}", field="log"
                ) from error
            sizes.update(found)
    if not sizes:
        raise ConfigError("log: there are no steps in it; serve with sched.log set, and send requests", field="log")
    return Traffic(ladder=ladder, sizes=dict(sizes))


def suggest(traffic: Traffic, most: int = MOST_BUCKETS) -> list[tuple[int, ...]]:
    """The ladders of 1, 2, ... sizes, at most `most`, that add the fewest tokens; each adds fewer than the one before.
    All end with the largest size of the traffic's own ladder, which a step may have.

    Exact: a best ladder has only sizes that steps have, so best[k][j], the padding of all steps up to size j in k
    buckets of which the last is j, is the least over i < j of best[k-1][i] + what padding i+1 .. j to j adds.
    """
    end = max(traffic.ladder[-1], *traffic.sizes)
    at = np.array(sorted({*traffic.sizes, end}), np.int64)
    count = np.array([traffic.sizes.get(int(size), 0) for size in at], np.int64)
    steps = np.concatenate([[0], np.cumsum(count)])
    tokens = np.concatenate([[0], np.cumsum(count * at)])
    n = len(at)
    best = at * steps[1:] - tokens[1:]  # one bucket
    back: list[np.ndarray] = []
    out: list[tuple[int, ...]] = [(end,)]
    least = best[-1]
    for _ in range(1, min(most, n)):
        new, came = best.copy(), np.full(n, -1)
        for j in range(1, n):
            whole = best[:j] + at[j] * (steps[j + 1] - steps[1 : j + 1]) - (tokens[j + 1] - tokens[1 : j + 1])
            i = int(whole.argmin())
            if whole[i] < new[j]:
                new[j], came[j] = whole[i], i
        back.append(came)
        best = new
        if best[-1] >= least:
            break
        least = best[-1]
        out.append(_walk(at, back))
    return out


def _walk(at: np.ndarray, back: Sequence[np.ndarray]) -> tuple[int, ...]:
    """The ladder that ends at the last size."""
    j, ladder = len(at) - 1, [int(at[-1])]
    for came in reversed(back):
        if came[j] >= 0:
            j = int(came[j])
            ladder.append(int(at[j]))
    return tuple(reversed(ladder))
