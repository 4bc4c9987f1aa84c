"""Templates that would not end, or make too much."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import engine.text.chat as chat
from engine.errors import InvalidRequest
from engine.text.chat import render
from engine.text.deadline import TICK, WATCH, Deadline
from engine.text.tokenizer import Tokenizer
from tests.text.made import byte_level

MANY = "{% for a in range(99999) %}{% for b in range(99999) %}"
ENDLESS = MANY + "{% set c = a %}{% endfor %}{% endfor %}"
HUGE = MANY + "abcdefgh{% endfor %}{% endfor %}"
MACRO = "{% macro m() %}" + HUGE + "{% endmacro %}{{ m() | length }}"
CAPTURED = "{% set x %}" + HUGE + "{% endset %}done"
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "the dog"}]


def tokenizer(template: str) -> Tokenizer:
    return Tokenizer(byte_level(chat_template=template))


def refused(template: str, says: str, messages: list[dict[str, Any]] = ASKED) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        render(tokenizer(template), messages)
    assert caught.value.field == "messages"


def test_a_template_that_loops_is_ended_and_its_thread_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.2)
    refused(ENDLESS, "is not done with them after 0.2 s")
    assert render(tokenizer(PLAIN), ASKED)
    assert not WATCH._open


def test_a_template_that_makes_too_much_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARS", 1 << 16)
    refused(HUGE, "makes over 65536 characters")


@pytest.mark.parametrize("template", [MACRO, CAPTURED])
def test_what_a_template_keeps_to_itself_is_bounded_by_time(monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(chat, "MAX_SECONDS", 0.1)
    refused(template, "is not done with them")


def test_what_a_client_sends_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "MAX_CHARS", 99)
    refused(PLAIN, "makes over 99", [{"role": "user", "content": "x" * 100}])
    assert render(tokenizer(PLAIN), [{"role": "user", "content": "x" * 99}])


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ 1 // 0 }}",
    "{{ 'x' + 1 }}",
])  # fmt: skip
def test_what_a_template_may_not_do_is_refused(template: str) -> None:
    refused(template, "refuses them")


def late(seconds: float, work: Callable[[], object]) -> bool:
    try:
        with Deadline(seconds):
            work()
    except TimeoutError:
        return True
    return False


def spin() -> None:
    while True:
        try:
            while True:
                pass
        except Exception:  # noqa: BLE001  (as a template's code might)
            pass


def test_deadlines_of_many_threads_end_only_what_is_late() -> None:
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(late, 0.1, spin) for _ in range(4)]
        quick = [pool.submit(late, 5.0, lambda: time.sleep(0.01)) for _ in range(100)]
        assert all(f.result() for f in slow)
        assert not any(f.result() for f in quick)
        assert not any(pool.map(lambda _: late(5.0, lambda: None), range(100)))
    assert not WATCH._open
    assert sum(t.name == "radixmesh-deadlines" for t in threading.enumerate()) == 1


def test_a_deadline_that_passes_at_the_end_leaves_nothing_behind() -> None:
    """Work of about the deadline's length: late or not, no exception comes afterwards."""
    for i in range(6):
        late(TICK / 2, lambda: time.sleep(TICK * (0.4 + 0.1 * i)))  # noqa: B023
        sum(range(20_000))
