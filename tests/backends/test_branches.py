"""Rows that read the same pages together: tokens are the same as when each reads by itself, whatever the order of rows,
and what is not worth it or can't be is not done."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.api.build import Row, build
from backends.api.conformance.bench import SPEC, config
from backends.torch import branches
from backends.torch.backend import TorchBackend
from backends.torch.branches import Layout, layout, pays, tell
from backends.torch.buckets import fit, ladder
from backends.torch.inputs import arrange
from engine.config import Resolved, load
from engine.errors import ConfigError
from engine.model.checkpoint import Checkpoint
from engine.model.groups import cache_groups
from engine.model.registry import read_spec
from engine.resolve import resolve
from engine.resolve.facts import Device
from engine.run.loop import Loop
from engine.run.messages import Submit
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from kernels_cuda import cascade
from tests.backends.replayed import Replayed
from tests.tiny import tiny

CPU = Device(backend="torch", why="asked", platform="cpu", kind="cpu", count=1, memory_bytes=1 << 34, bf16=True)
GPU = replace(CPU, platform="gpu", kind="NVIDIA H200", memory_bytes=140 << 30)
LAYOUT = Layout(group=4, kv_heads=2, heads=32, sms=1, least=100)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def requests(vocab: int) -> list[Request]:
    """Prompts of a tree, in no order, greedy and drawn; some are answers to one prompt."""
    rng = random.Random(5)
    trunk = [rng.randrange(vocab) for _ in range(24)]
    out = []
    for i in range(12):
        text = (*trunk[: rng.choice([8, 16, 24])], i % 3, *[rng.randrange(vocab) for _ in range(rng.randrange(1, 9))])
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.9]), max_new_tokens=rng.randrange(4, 14), ignore_eos=True
        )
        for j in range(rng.choice([1, 1, 3])):
            out.append(Request(rid=f"{i}.{j}", tokens=text, params=params, seed=i * 10 + j, group=f"{i}"))
    return out


def serve(path: Path, cascade_: str, recorder: Replayed | None = None) -> tuple[dict[str, list[int]], Counter[str]]:
    """All requests at once through one engine: their tokens, and how many calls read together for how many rows."""
    spec = read_spec(path)
    resolved = Resolved(
        backend="torch", platform="cpu", dtype="float32", cache_dtype="float32", max_len=64, pages=(200,) * 2, page=4,
        slots=20, max_rows=20, max_tokens=64, cascade=cascade_,
    )  # fmt: skip
    backend = TorchBackend(spec, replace(resolved, pages=resolved.pages[: len(cache_groups(spec, 4))]))
    backend.load(Checkpoint(path, spec))
    if recorder is not None:
        backend.capture(recorder, [s for s in ladder(backend.limits, backend.layout) if s.even and s.rows >= 16])
    got: dict[str, list[int]] = {}
    calls: Counter[str] = Counter()
    before = cascade.plain

    def count(q: Any, store: Any, out: Any, rows: Any, tiles: Any, shape: Any, **how: Any) -> None:
        calls.update(calls=1, rows=int((tiles.covered > 0).sum()), tiles=int((tiles.tiles[:, 1] > 0).sum()))
        before(q, store, out, rows, tiles, shape, **how)

    def emit(outputs: Sequence[Output]) -> None:
        for output in outputs:
            assert output.error is None, output
            got.setdefault(output.rid, []).extend(output.tokens)

    loop = Loop(Scheduler(backend.limits), backend, emit)
    loop.take([Submit(request=r) for r in requests(spec.vocab)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "plain", count)
        while loop.busy:
            loop.turn()
    return got, calls


@pytest.mark.parametrize("family", ["llama", "gpt_oss"], ids=["one group", "windows and sinks"])
def test_tokens_are_the_same(tmp_path: Path, family: str) -> None:
    values = {"hidden": 32, "q_heads": 4, "kv_heads": 2, "layers": 2, "vocab": 96}
    more = {"sliding_window": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "swiglu_limit": 2.0, "ffn": 48}
    path = tiny(tmp_path, family=family, **values, **(more if family == "gpt_oss" else {})).path
    alone, none = serve(path, "off")
    together, calls = serve(path, "on")
    assert together == alone
    assert not none
    assert calls["calls"] > 5
    assert calls["tiles"] > 2 * calls["calls"], calls
    assert calls["rows"] > 5 * calls["calls"], calls


def test_padded_steps_read_together_too(tmp_path: Path) -> None:
    path = tiny(tmp_path, hidden=32, q_heads=4, kv_heads=2, layers=2, vocab=96).path
    recorder = Replayed()
    padded, calls = serve(path, "on", recorder)
    assert recorder.played > 3
    assert calls["tiles"] > 0
    assert padded == serve(path, "off")[0]


def test_rows_are_in_the_order_of_the_device() -> None:
    """Rows of one token come first, groups keep their rows; a group that is torn is left to its rows."""
    limits = TorchBackend(SPEC, config("torch")).limits
    lens = [1, 1, 20, 1, 1, 1]
    rows = [Row(slot=i, tokens=[-1] + [5] * (n - 1), upper=40 + i) for i, n in enumerate(lens)]
    limits = replace(limits, max_tokens=64)
    step = build(limits, 1, rows)
    step = replace(step, shared=np.array([(0, 1, 0, 7), (3, 5, 0, 15), (3, 4, 16, 31)], np.int32))
    order = arrange(step, limits, together=True)
    assert order.rows.tolist() == [0, 1, 3, 4, 5, 2]
    made = tell(step, LAYOUT, order.rows, None)
    assert made.covered.tolist() == [8, 8, 32, 32, 16]
    assert sorted(tuple(t[:4]) for t in made.tiles.tolist()) == [(0, 2, 0, 8), (2, 2, 16, 32), (2, 3, 0, 16)]
    torn = replace(step, shared=np.array([(1, 3, 0, 7)], np.int32))  # the row of 20 tokens stands between
    assert not tell(torn, LAYOUT, order.rows, None).tiles.tolist() or order.rows.tolist()[1:3] == [1, 3]
    assert tell(replace(step, shared=np.array([(1, 2, 0, 7)], np.int32)), LAYOUT, order.rows, None).tiles.size == 0


def test_it_is_done_where_it_pays() -> None:
    limits = replace(TorchBackend(SPEC, config("torch")).limits, max_tokens=64)
    step = build(limits, 1, [Row(slot=i, tokens=[-1], upper=60) for i in range(5)])
    group = lambda last, end: replace(step, shared=np.array([(0, last, 0, end - 1)], np.int32))  # noqa: E731
    assert not pays(LAYOUT, step)
    assert not pays(LAYOUT, group(4, 24))
    assert pays(LAYOUT, group(4, 25))
    assert not pays(None, group(4, 25))
    short = [Row(slot=i, tokens=[-1] * (1 + 2 * (i == 4)), upper=60) for i in range(5)]
    assert not pays(LAYOUT, replace(build(limits, 1, short), shared=group(3, 50).shared)), "a row of three tokens"


def test_tiles_fit() -> None:
    """Whatever the groups, no more tiles and slots than there is room for; what is left out is left to the rows."""
    rng = random.Random(1)
    for _ in range(50):
        deep = [(i, 63, 16 * i, 16 * i + 15) for i in range(rng.randrange(1, 40))]
        wide = [(2 * i, 2 * i + 1, 0, 16 * rng.randrange(1, 90) - 1) for i in range(rng.randrange(1, 32))]
        long = [(0, 63, 0, 16 * rng.randrange(1, 9000) - 1)]
        for groups in (deep, wide, long):
            made = cascade.cut(groups, 64, group=4, kv_heads=2, heads=32, sms=132, tiles=24, slots=8)
            assert len(made.tiles) <= 24
            assert made.used.max() <= 8
            reach = np.zeros((64, 8), int)
            for first, size, low, high, slot in made.tiles.tolist():
                assert size <= made.wide
                assert (reach[first : first + size, slot] == 0).all(), "a slot twice"
                reach[first : first + size, slot] = high - low
            assert (reach.sum(1) == made.covered).all()
            assert made.covered.any() or groups is wide


def test_shapes_that_are_captured() -> None:
    limits = replace(TorchBackend(SPEC, config("torch")).limits, max_rows=64)
    shapes = ladder(limits, LAYOUT)
    for rows, branched, want in ((20, True, True), (20, False, False), (3, True, False), (64, True, True)):
        found = fit(shapes, rows, rows, branched)
        assert found is not None
        assert found.rows >= rows
        assert (found.branches is not None) == want
    assert all(s.branches is None for s in ladder(limits))


def test_decisions() -> None:
    def decide(device: Device, **asked: Any) -> tuple[str, str]:
        flags = {f"backend.{name.replace('__', '.')}": value for name, value in asked.items()}
        resolved, made = resolve(load(overrides=flags), SPEC, device)
        return resolved.cascade, next(d.why for d in made if d.field == "cascade")

    assert decide(GPU)[0] == "auto"
    assert decide(CPU) == ("off", "auto: a CPU gains nothing by it")
    assert decide(CPU, torch__cascade="on") == ("on", "backend.torch.cascade")
    assert decide(GPU, torch__cascade="off") == ("off", "backend.torch.cascade")
    assert decide(GPU, deterministic=True)[0] == "off"
    with pytest.raises(ConfigError, match=r"backend\.torch\.cascade.*deterministic"):
        decide(GPU, deterministic=True, torch__cascade="on")
    assert TorchBackend(SPEC, config("torch", cascade="on")).limits.sharing == (0, 0, 100)
    assert TorchBackend(SPEC, config("torch", cascade="auto")).limits.sharing is None, "no kernel on a CPU"
    assert layout(SPEC, config("torch", cascade="auto"), 132, True) is not None
    assert branches.FEWEST > 1
