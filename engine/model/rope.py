"""The rotary position embedding, as data: six kinds of frequencies, all fixed once an engine's length is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
KINDS: tuple[Kind, ...] = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding, rotate-half form: the pair of dimension i is i + dim/2.

    dim: rotated dimensions of a head, the first; theta: base. magnitude: multiplies cos and sin.
    kind: "linear" divides frequencies by factor. "llama3" and "yarn" divide by factor those that turn fewer than
    low_freq times in original_max positions, leave those that turn more than high_freq times, and blend between: over
    the frequency (Llama 3.1), or over the index of the pair (YaRN, whose bounds are whole pairs where truncate).
    "dynamic" raises the base so that original_max * factor positions fit; "longrope" divides each frequency by its own
    number, of `long` where reach is past original_max, else of `short`.
    reach: positions that the engine goes to; it decides what dynamic and longrope are, for every sequence alike, so
    that a cache stays right whatever shares it (docs/decisions/0007-what-fixes-a-rope.md).
    """

    dim: int
    theta: float
    kind: Kind = "default"
    factor: float = 1.0
    low_freq: float = 1.0
    high_freq: float = 4.0
    original_max: int = 8192
    truncate: bool = True
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()
    magnitude: float = 1.0
    reach: int = 0

    def frequencies(self) -> NDArray[np.float32]:
        """Angle per position of each pair: float32[dim/2]. Computed in float32, as Hugging Face does."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        power = np.power(np.float32(self._base()), exponent)
        freq: NDArray[np.float32] = (1 / power).astype(np.float32)
        if self.kind == "linear":
            freq = (freq / np.float32(self.factor)).astype(np.float32)
        if self.kind == "llama3":
            length = (2 * math.pi / freq).astype(np.float32)
            smooth = (self.original_max / length - self.low_freq) / (self.high_freq - self.low_freq)
            blended = (1 - smooth) * freq / self.factor + smooth * freq
            long = length > self.original_max / self.low_freq
            short = length < self.original_max / self.high_freq
            freq = np.where(long, freq / self.factor, np.where(short, freq, blended)).astype(np.float32)
        if self.kind == "yarn":
            stretched = self._ramp()
            inner = (1 / (np.float32(self.factor) * power)).astype(np.float32)
            freq = (inner * stretched + freq * (1 - stretched)).astype(np.float32)
        if self.kind == "longrope":
            own = np.array(self.long if self.reach > self.original_max else self.short, np.float32)
            freq = (1 / (own * power)).astype(np.float32)
        return freq

    def _base(self) -> float:
        if self.kind != "dynamic":
            return self.theta
        stretch = self.factor * max(self.reach, self.original_max) / self.original_max - (self.factor - 1)
        return float(self.theta * stretch ** (self.dim / (self.dim - 2)))

    def _ramp(self) -> NDArray[np.float32]:
        """YaRN: 0 where a pair keeps its frequency, 1 where it is divided by factor."""

        def pair(turns: float) -> float:
            """The index, in dimensions, of a pair that turns so often in original_max positions."""
            return self.dim * math.log(self.original_max / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        first, last = pair(self.high_freq), pair(self.low_freq)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, self.dim - 1)
        if first == last:
            last += 0.001
        ramp = (np.arange(self.dim // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
        clipped: NDArray[np.float32] = np.clip(ramp, 0, 1).astype(np.float32)
        return clipped
