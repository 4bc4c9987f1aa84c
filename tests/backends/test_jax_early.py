"""Ready early: small steps run while the programs of larger ones are made behind them; none is late. What is late is
counted."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from backends.api.build import Host
from backends.api.conformance.bench import FULL, SPEC, Ask, Weights, config, one, prompt, refused
from backends.jax.backend import JaxBackend, make_plan
from backends.jax.warmup import Program, Programs
from backends.reference.backend import ReferenceBackend
from engine.config import load
from engine.resolve import resolve
from engine.resolve.facts import Device
from radixmesh import Engine
from tests.plain import ids as ids_of
from tests.plain import plain

SIZES = {"max_rows": 2, "slots": 2, "max_tokens": 16, "token_buckets": (1, 4, 16), "pages": (64,)}
FLAT = replace(SPEC, layers=SPEC.layers[:1])


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Semaphore]:
    """Each release lets one more size of step be made behind."""
    gate, grow = threading.Semaphore(0), Programs._grow

    def waits(self: Programs, rooms: Any) -> None:
        for room in rooms:
            gate.acquire()
            grow(self, [room])

    monkeypatch.setattr(Programs, "_grow", waits)
    yield gate
    gate.release(9)


def grown(backend: JaxBackend, tokens: int) -> None:
    for _ in range(6000):
        if backend.limits.max_tokens == tokens:
            return
        threading.Event().wait(0.02)
    raise AssertionError(f"steps of {tokens} tokens never came: {backend.status()}")


def test_limits_rise_as_programs_come_and_nothing_is_late(gate: threading.Semaphore) -> None:
    """On the backend: what is larger is refused until it exists; tokens and scores are the same throughout."""
    given = config("jax", **SIZES, ready_early=True)
    early = JaxBackend(FLAT, given)
    whole = early.limits
    early.load(Weights(spec=FLAT))
    early.warmup()
    host, asks = Host(early), [replace(ask, chunk=4) for ask in (Ask(prompt=prompt(9), make=4), *FULL)]
    with closing(ReferenceBackend(FLAT, replace(given, backend="reference"))) as reference:
        reference.load(Weights(spec=FLAT))
        want = [one(Host(reference), ask).tokens for ask in asks]
    for tokens, buckets in ((4, (1, 4)), (16, (1, 4, 16))):
        grown(early, tokens)
        assert early.limits == replace(whole, max_tokens=tokens, token_buckets=buckets)
        assert [one(host, ask).tokens for ask in asks] == want
        text = host.open()
        refused(partial(early.forward, host.step([(text, host.row(text, prompt(tokens + 1)))])), "tokens")
        host.close(text)
        one(host, Ask(prompt=prompt(tokens), make=1, chunk=tokens))
        status = early.status()
        assert (status.ready, status.compiles_after_ready) == (True, 0)
        assert (status.programs == status.sources.planned) == (tokens == 16)
        gate.release()
    assert {size for size, steps, _ in status.buckets if steps} == {1, 4, 16}
    early.warmup()
    assert early.limits == whole, "limits never shrink"
    early.close()


def test_with_a_bundle_nothing_is_left_for_later() -> None:
    """It has what steps of the largest size need, and not what smaller ones would."""
    plan, taken = make_plan(FLAT, config("jax", **SIZES, ready_early=True)), set[Program]()

    def found(program: Program) -> Any:
        taken.add(program)

    programs = Programs(plan, found)
    programs.warm()
    assert taken == set(programs.planned())
    assert (programs.limits, programs.sources().bundle) == (plan.limits, programs.sources().planned)


def test_whatever_a_larger_program_fails_of_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As a kernel that is for no such shape, which says ValueError."""
    programs = Programs(make_plan(FLAT, config("jax", **SIZES, ready_early=True)))

    def make(self: Programs, wanted: Sequence[Program], workers: int = 1) -> None:
        if any(program.size == 16 for program in wanted):
            raise ValueError("no such\nshape")

    monkeypatch.setattr(Programs, "_make", make)
    programs.warm()
    programs.close()
    assert programs.limits.max_tokens == 4
    assert "a program of 16 tokens can't be made; steps stay at 4 tokens: no such shape" in capfd.readouterr().err


def test_an_engine_that_is_ready_early_feeds_in_small_steps_first(
    gate: threading.Semaphore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Through the scheduler, in one engine's life: the same tokens before and after."""
    model = plain(tmp_path_factory.mktemp("model"))
    small = {"sched.token_buckets": [4, 32], "sched.max_tokens": 32, "sched.slots": 4, "cache.tokens": 1024}
    with Engine(str(model), "jax", skip_tokenizer=True, ready_early=True, **small, radix=False) as engine:
        asked = {"token_ids": [ids_of(n, n) for n in (40, 3, 17)], "return_logprob": True}
        asked["logprob_start_len"] = 0
        asked["sampling_params"] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
        first = engine.generate(**asked)
        backend: Any = engine._client.carrier.loop.backend
        before = engine.status()
        assert engine._client.info.limits.max_tokens == 32
        assert backend.limits.max_tokens == 4
        assert [steps > 0 for _, steps, _ in before.buckets] == [True, False]
        gate.release()
        grown(backend, 32)
        second = engine.generate(**asked)
        after = engine.status()
    for one_, other in zip(first, second, strict=True):
        assert one_["output_ids"] == other["output_ids"]
        scores = [[s for s, *_ in r["meta_info"]["input_token_logprobs"][1:]] for r in (one_, other)]
        np.testing.assert_allclose(*scores, atol=1e-4)
    assert after.buckets[1][1] > 0
    assert before.programs < after.programs == after.sources.planned
    assert after.compiles_after_ready == 0


def test_a_backend_that_is_closed_makes_no_more(gate: threading.Semaphore) -> None:
    early = JaxBackend(FLAT, config("jax", **SIZES, ready_early=True))
    early.load(Weights(spec=FLAT))
    early.warmup()
    threading.Timer(0.2, lambda: gate.release(9)).start()
    early.close()
    assert early.programs._behind is not None
    assert not early.programs._behind.is_alive()
    assert early.limits.max_tokens == 4


def test_what_compiles_on_the_way_of_a_step_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = JaxBackend(FLAT, config("jax", max_tokens=8, token_buckets=(8,), pages=(64,)))
    backend.load(Weights(spec=FLAT))
    backend.warmup()
    host, ask = Host(backend), Ask(prompt=prompt(5), make=2)
    want = one(host, ask).tokens
    jax.jit(lambda x: x * 3)(np.ones(3)).block_until_ready()  # of somebody else
    assert backend.status().compiles_after_ready == 0
    put = backend._put
    monkeypatch.setattr(backend, "_put", lambda value: jax.jit(lambda x: x + 0)(put(value)))
    assert one(host, ask).tokens == want
    assert backend.status().compiles_after_ready >= 1
    backend.close()


def test_only_jax_is_ready_early() -> None:
    for name, early in (("jax", True), ("torch", False), ("reference", False)):
        device = Device(backend=name, why="", platform="cpu", kind="cpu", count=1, memory_bytes=1 << 33, bf16=True)
        resolved, decisions = resolve(load(None, {"sched.ready_early": True}), SPEC, device)
        assert resolved.ready_early is early
        why = next(d.why for d in decisions if d.field == "ready_early")
        assert why == ("sched.ready_early" if early else f"{name} compiles no programs ahead")
