"""What crosses between an engine's process and its client: typed msgpack, no pickle. One frame is one message.

What crosses as it is: Words, Abort, Flush, Load, News, Info, Config. An error crosses as (class in engine.errors,
message, field, rows) and comes back as that class. Of a Request neither stopper nor grammar crosses: the engine's side
makes the one, and the other is refused until it has a form of its own here; its namespace is a tuple of strings and
integers.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeAlias

import msgspec

import engine.errors
from engine.config import Config
from engine.errors import InvalidRequest, RadixmeshError, StepRefused
from engine.mesh import MeshSpec
from engine.resolve.facts import Decision
from engine.run.messages import Abort, Flush, Info, Load, Message, News, Submit
from engine.sched.request import Request
from engine.text.words import Words

ORDERS, REPORTS = "orders", "reports"
"""Names of the two sockets, in a folder that both ends know."""

CLASSES: Mapping[str, type[RadixmeshError]] = {
    name: kind
    for name, kind in vars(engine.errors).items()
    if inspect.isclass(kind) and issubclass(kind, RadixmeshError)
}
"""Errors that come back as what they were."""

Value: TypeAlias = bool | int | float | str | tuple[int, ...] | MeshSpec | None
"""What a Decision may have decided."""


class Malformed(ValueError):
    """Bytes that are no message, and why."""


class Begin(msgspec.Struct, frozen=True, kw_only=True, array_like=True, tag="begin"):
    """Open an engine. default: folder of the model when the configuration names none. words: whether Words follow.
    began: when the client began, on the monotonic clock, which processes of one machine share."""

    config: Config
    default: str
    words: bool
    began: float


class Shutdown(msgspec.Struct, frozen=True, array_like=True, tag="shutdown"):
    """Stop the loop after the step it is in."""


class Stage(msgspec.Struct, frozen=True, array_like=True, tag="stage"):
    """A stage of the start begins."""

    name: str


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The engine takes requests."""

    info: Info


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine could not be opened."""

    error: RadixmeshError


Order: TypeAlias = Begin | Words | Message | Shutdown
"""To the engine."""
Report: TypeAlias = Stage | Ready | Failed | News
"""From the engine."""


class _Submit(msgspec.Struct, frozen=True, array_like=True, tag="submit"):
    said: Submit


class _Abort(msgspec.Struct, frozen=True, array_like=True, tag="abort"):
    said: Abort


class _Flush(msgspec.Struct, frozen=True, array_like=True, tag="flush"):
    said: Flush


class _Load(msgspec.Struct, frozen=True, array_like=True, tag="load"):
    said: Load


class _Words(msgspec.Struct, frozen=True, array_like=True, tag="words"):
    said: Words


class _News(msgspec.Struct, frozen=True, array_like=True, tag="news"):
    said: News


class _Decision(msgspec.Struct, frozen=True, array_like=True):
    field: str
    value: Value
    why: str


class _Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """info has no decisions; they have a type of their own."""

    info: Info
    decisions: tuple[_Decision, ...]


class _Error(msgspec.Struct, frozen=True, array_like=True):
    kind: str
    message: str
    field: str | None
    rows: tuple[int, ...] = ()


_WRAPS: Mapping[type, Any] = {Words: _Words, Submit: _Submit, Abort: _Abort, Flush: _Flush, Load: _Load, News: _News}


def encode_order(order: Order) -> bytes:
    """A message to the engine as bytes. Raises InvalidRequest naming the field of a Request that can't cross."""
    try:
        return _pack(replace(order, request=_bare(order)) if isinstance(order, Submit) else order)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        field = _culprit(order.request) if isinstance(order, Submit) else "rid"
        raise InvalidRequest(f"{field}: can't be sent to the engine: {error}", field=field) from error


def decode_order(frame: bytes) -> Order:
    """Raises Malformed."""
    order: Order = _unpack(_ORDERS, frame)
    return order


def encode_report(report: Report) -> bytes:
    """A message of the engine as bytes."""
    if isinstance(report, Ready):
        decisions = tuple(_Decision(d.field, d.value, d.why) for d in report.info.decisions)
        return _ENCODER.encode(_Ready(replace(report.info, decisions=()), decisions))
    return _pack(report)


def decode_report(frame: bytes) -> Report:
    """Raises Malformed."""
    report = _unpack(_REPORTS, frame)
    if isinstance(report, _Ready):
        made = tuple(Decision(field=d.field, value=d.value, why=d.why) for d in report.decisions)
        return Ready(replace(report.info, decisions=made))
    known: Report = report
    return known


def _pack(message: Any) -> bytes:
    wrap = _WRAPS.get(type(message))
    return _ENCODER.encode(message if wrap is None else wrap(message))


def _unpack(decoder: msgspec.msgpack.Decoder[Any], frame: bytes) -> Any:
    try:
        message = decoder.decode(frame)
    except (msgspec.MsgspecError, RadixmeshError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise Malformed(f"a message of {len(frame)} bytes can't be read: {error}") from error
    return message.said if isinstance(message, (_Words, _Submit, _Abort, _Flush, _Load, _News)) else message


def _bare(submit: Submit) -> Request:
    """The request without what never crosses."""
    request = submit.request
    if request.grammar is not None:
        raise InvalidRequest("grammar: can't be sent to an engine in another process yet", field="grammar")
    space = request.namespace
    if not isinstance(space, tuple) or not all(type(s) in (str, int) for s in space):
        raise InvalidRequest(f"namespace: must be a tuple of strings and integers, not {space!r}", field="namespace")
    return replace(request, stopper=None)


def _culprit(request: Request) -> str:
    """The first field of a request that can't be encoded."""
    values: dict[str, Any] = {f.name: getattr(request.params, f.name) for f in fields(request.params)}
    values |= {
        name: getattr(request, name)
        for name in ("rid", "tokens", "seed", "eos", "deadline", "priority", "namespace", "group", "bad_words")
    }
    for name, value in values.items():
        try:
            _ENCODER.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError):
            return name
    return "request"


def _plain(value: Any) -> Any:
    """What msgpack has no form for: our errors, and numpy's numbers, which parameters may be."""
    if isinstance(value, RadixmeshError):
        rows = value.rows if isinstance(value, StepRefused) else ()
        # Whatever its text quotes, an error must cross.
        text = str(value).encode("utf-8", "backslashreplace").decode()
        return _Error(type(value).__name__, text, value.field, rows)
    if hasattr(value, "__index__"):
        return int(value)
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{type(value).__name__} has no form in a message")


def _made(kind: Any, value: Any) -> Any:
    """The reverse of _plain."""
    if kind is RadixmeshError:
        error = msgspec.convert(value, _Error)
        known = CLASSES.get(error.kind, RadixmeshError)
        if issubclass(known, StepRefused):
            return known(error.message, rows=error.rows, field=error.field)
        return known(error.message, field=error.field)
    if kind is Hashable:
        return msgspec.convert(value, tuple[str | int, ...])
    raise TypeError(f"{getattr(kind, '__name__', kind)} never crosses")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_ORDERS: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(
    Begin | Shutdown | _Words | _Submit | _Abort | _Flush | _Load, dec_hook=_made
)
_REPORTS: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(Stage | _Ready | Failed | _News, dec_hook=_made)
