"""What crosses between the processes of one backend: msgpack of plain values, arrays and our own data classes by name.

No pickle: a frame can only make numbers, strings, lists, mappings, arrays of numbers, errors of engine.errors and the
data classes of MODULES. A dataclass is {"": its name, field: value, ...}; tuples come back as tuples.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import ModuleType
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

import engine.config
import engine.mesh
from backends.api import limits, protocol, step
from backends.api.limits import Limits
from backends.api.protocol import Status
from backends.api.step import U32, ScheduleStep, StepResult
from engine.config import Resolved
from engine.errors import RadixmeshError, StepRefused
from engine.model import groups, spec
from engine.model.spec import ModelSpec
from engine.run.ipc import CLASSES, Malformed


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Open the backend. Answered by Opened."""

    spec: ModelSpec
    config: Resolved


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Take weights: of the checkpoint in a folder, or else as the other end reads them. Answered by Done."""

    folder: str | None
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """Warm up. Answered by Done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """A step. Not answered: what goes wrong is the answer to the Collect that follows."""

    step: ScheduleStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Choose tokens. Not answered either."""

    ticket: int
    masks: U32 | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collect:
    """Wait for a step. Answered by Collected."""

    ticket: int
    timeout: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """End."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The backend is open."""

    limits: Limits
    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """The slice `part`, (start, stop) of each dimension, of a parameter is wanted. Answered by an array or Raised."""

    name: str
    part: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """It is done."""

    status: Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """What came of a step. result: of rank 0 alone. digest: of the tokens, which all ranks must have alike."""

    result: StepResult | None
    digest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Raised:
    """It failed."""

    error: RadixmeshError


def digest(result: StepResult) -> int:
    """A number that is the same for results with the same tokens."""
    return zlib.crc32(b"".join(a.tobytes() for a in (result.tokens, result.counts, result.status)))


MODULES: tuple[ModuleType, ...] = (spec, groups, engine.mesh, engine.config, limits, protocol, step)
KINDS: Mapping[str, type] = {
    name: kind
    for space in (*map(vars, MODULES), globals())
    for name, kind in tuple(space.items())
    if inspect.isclass(kind) and is_dataclass(kind)
}
"""Data classes that cross."""
NUMBERS = {np.dtype(t).name: np.dtype(t) for t in ("?", *"bBhHiIqQefd", ml_dtypes.bfloat16)}
"""Types of arrays that cross."""
NAME = ""


def encode(value: Any) -> bytes:
    """A value as bytes. Raises TypeError for what has no form here."""
    return _ENCODER.encode(_plain(value))


def decode(frame: bytes) -> Any:
    """The reverse. Raises Malformed."""
    try:
        return _made(_DECODER.decode(frame))
    except (msgspec.MsgspecError, ValueError, TypeError, KeyError, RadixmeshError, RecursionError) as error:
        raise Malformed(f"a message of {len(frame)} bytes can't be read: {error}") from error


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, np.ndarray):
        if value.dtype.name not in NUMBERS:
            raise TypeError(f"an array of {value.dtype} has no form in a message")
        return {NAME: "array", "type": value.dtype.name, "shape": value.shape, "data": value.tobytes()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {NAME: "map", "of": {k: _plain(v) for k, v in value.items()}}
    if isinstance(value, RadixmeshError):
        rows = value.rows if isinstance(value, StepRefused) else ()
        return {NAME: "error", "kind": type(value).__name__, "text": str(value), "field": value.field, "rows": rows}
    name = type(value).__name__
    kind: Any = KINDS.get(name)
    if kind is not type(value):
        raise TypeError(f"{name} has no form in a message")
    return {NAME: name} | {f.name: _plain(getattr(value, f.name)) for f in fields(kind)}


def _made(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_made(v) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.pop(NAME)
    if name == "array":
        read = np.frombuffer(value["data"], NUMBERS[value["type"]])
        return read.reshape(value["shape"]).copy()
    if name == "map":
        return {k: _made(v) for k, v in value["of"].items()}
    if name == "error":
        kind = CLASSES.get(value["kind"], RadixmeshError)
        if issubclass(kind, StepRefused):
            return kind(value["text"], rows=value["rows"], field=value["field"])
        return kind(value["text"], field=value["field"])
    return KINDS[name](**{k: _made(v) for k, v in value.items()})


_ENCODER = msgspec.msgpack.Encoder()
_DECODER: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder()
