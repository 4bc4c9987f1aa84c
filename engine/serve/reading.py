"""From the bytes of a body to a typed Struct. What is wrong is named by its field; what nobody knows is told about."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import msgspec

from engine.errors import InvalidRequest

T = TypeVar("T")

HARMLESS = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
     "parallel_tool_calls", "separate_reasoning", "stream_reasoning", "spaces_between_special_tokens", "log_metrics"}
)  # fmt: skip
"""Fields that are known and ask for nothing that an answer would show."""

_WHERE = re.compile(r" - at `(?:key in )?\$([^`]*)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")
_BYTE = re.compile(r"\(byte (\d+)\)")
_RANGE = re.compile(rb'"([\w.-]{1,64})"\s*:[\s\[]*-?(?:\d++(?:\.\d*+)?[eE]\+?\d{3,}|\d{300,})')
_KEY = re.compile(rb'"([\w.-]{1,64})"\s*:[\s\[-]*$')
_INDEX = re.compile(r"\[\d+\]")


def read(
    body: bytes,
    form: type[T],
    unbuilt: Mapping[str, tuple[str, tuple[Any, ...]]],
    unknown: Callable[[str], None],
) -> T:
    """The body of a request. unbuilt: fields that are refused; unknown: told the names that nothing here knows.

    Raises InvalidRequest naming the field.
    """
    if not body.strip():
        raise InvalidRequest("body: is empty; give a JSON object", field="body")
    try:
        tree = msgspec.json.decode(body)
    except RecursionError as error:
        raise InvalidRequest("body: is nested too deeply", field="body") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"body: is not valid UTF-8: {error.reason}", field="body") from error
    except msgspec.DecodeError as error:
        raise _malformed(body, str(error)) from error
    if not isinstance(tree, dict):
        raise InvalidRequest(f"body: must be a JSON object, not {kind(tree)}", field="body")
    return convert(tree, form, "", unbuilt, unknown)


def convert(
    tree: Any,
    form: type[T],
    where: str,
    unbuilt: Mapping[str, tuple[str, tuple[Any, ...]]],
    unknown: Callable[[str], None],
) -> T:
    """A part of a body as the Struct that it must be. where: its place, such as messages[0]. Raises InvalidRequest."""
    if not isinstance(tree, dict):
        raise InvalidRequest(f"{where}: must be an object, not {kind(tree)}", field=where)
    dot = f"{where}." if where else ""
    check(tree, form.__struct_fields__, dot, unbuilt, unknown)  # type: ignore[attr-defined]
    try:
        return msgspec.convert(tree, form)
    except (msgspec.ValidationError, OverflowError) as error:
        text = str(error)
        missing, place = _MISSING.search(text), _WHERE.search(text)
        inner = (place.group(1) if place else "").replace("[...]", "").lstrip(".")
        says = "is missing" if missing else _WHERE.sub("", text).replace("`", "")
        name = dot + ".".join(filter(None, (inner, missing.group(1) if missing else "")))
        name = name.rstrip(".") or "body"
        raise InvalidRequest(f"{name}: {says[:1].lower()}{says[1:]}", field=name) from error


def check(
    tree: Mapping[str, Any],
    known: tuple[str, ...],
    dot: str,
    unbuilt: Mapping[str, tuple[str, tuple[Any, ...]]],
    unknown: Callable[[str], None],
) -> None:
    """Refuse what is not built, tell about what is unknown. dot: what stands before a name. Raises InvalidRequest."""
    for name, value in tree.items():
        if name in known or name in HARMLESS:
            continue
        if name not in unbuilt:
            unknown(f"{_INDEX.sub('[]', dot)}{name}")
            continue
        says, nothing = unbuilt[name]
        if value is not None and not any(value == v and type(value) is type(v) for v in nothing):
            raise InvalidRequest(f"{dot}{name}: {says}; leave it out", field=f"{dot}{name}")


@contextmanager
def renamed(names: Mapping[str, str]) -> Iterator[None]:
    """InvalidRequest inside names parameters as a face calls them. names: the engine's name -> the face's."""
    try:
        yield
    except InvalidRequest as error:
        name = names.get(error.field or "")
        if name is None or name == error.field:
            raise
        raise type(error)(f"{name}{str(error).removeprefix(error.field or '')}", field=name) from error


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _malformed(body: bytes, text: str) -> InvalidRequest:
    """What is wrong with a body that is not JSON. NaN and the like have a key before them."""
    at = _BYTE.search(text)
    key = _KEY.search(body[: int(at.group(1))][-200:]) if at else None
    if "out of range" in text:
        key, text = _RANGE.search(body), "a number is out of range"
    name = key.group(1).decode() if key else "body"
    return InvalidRequest(f"{name}: is not valid JSON: {text}", field=name)
