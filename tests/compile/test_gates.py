"""Gates fail for what they are there for, and the roofline is what one reckons by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from engine.config import load
from engine.model.registry import read_spec
from engine.run.start import Decided
from engine.target import Target
from radixmesh.compile import gates, golden, plan, report, roofline
from radixmesh.compile.run import settle

MODELS = Path(__file__).parents[2] / "benchmarks" / "golden" / "models"
MEMORY = 32 << 30
HELD = {"weights": 2 << 30, "cache": 20 << 30, "state": 4 << 20, "counts": 64 << 20}


def decided(model: str = "llama-3.1-8b", tp: int = 8, target: str = "tpu:v6e:2x4", **asked: Any) -> Decided:
    path = MODELS / model
    return settle(load(None, {"mesh": f"tp={tp}"} | asked), read_spec(path), path, Target.parse(target))


def step(**changed: Any) -> dict[str, Any]:
    """A decode step of 8B on eight devices that passes."""
    return {
        "program": "step of size 128",
        "kind": "step",
        "size": 128,
        "tokens": 128,
        "rows": 128,
        "layers": 32,
        "holds": HELD,
        "alias": HELD["cache"] + HELD["state"],
        "temp": 190 << 20,
        "code": 7 << 20,
        "peak": 23 << 30,
        "collectives": {
            "all-reduce": {"count": 66, "bytes": 65 * 128 * 4096 * 2 + 128 * 2 * 4},
            "all-to-all": {"count": 1, "bytes": 128 // 8 * 128256 * 4},
        },
    } | changed


def failed(*programs: dict[str, Any], temp: int = gates.TEMP) -> list[str]:
    one = decided()
    return [g.name for g in gates.check(one.spec, one.resolved, HELD, programs, MEMORY, temp) if not g.ok]


def test_a_step_that_is_as_it_should_be_passes() -> None:
    assert failed(step()) == []


@pytest.mark.parametrize(
    ("changed", "gate"),
    [
        ({"alias": 0}, "alias"),  # the donation is lost
        ({"alias": HELD["cache"] + HELD["state"] - 1}, "alias"),
        ({"alias": HELD["cache"] + HELD["state"] + 4096}, "alias"),  # something is padded that was not planned
        ({"alias": HELD["cache"] * 2}, "alias"),
        ({"temp": (512 << 20) + 1}, "temporaries"),
        ({"peak": int(0.93 * MEMORY)}, "peak"),
        (
            {"holds": HELD | {"weights": 1 << 30}, "peak": int(0.9 * MEMORY)},
            "peak",
        ),  # few layers: the other weights come to it
        ({"code": 700 << 20}, "code"),
        ({"collectives": {}}, "collectives"),
        ({"collectives": step()["collectives"] | {"reduce-scatter": {"count": 1, "bytes": 8}}}, "collectives"),
        ({"collectives": step()["collectives"] | {"all-gather": {"count": 1, "bytes": 4}}}, "collectives"),
        ({"layers": 4}, "collectives"),
    ],
)
def test_a_fault_is_caught(changed: dict[str, Any], gate: str) -> None:
    assert failed(step(**changed)) == [gate]


def test_a_program_that_does_not_compile_fails() -> None:
    broken = {k: step()[k] for k in ("program", "kind", "size", "tokens", "rows", "layers")} | {
        "error": "out of memory"
    }
    assert failed(broken) == ["compiles"]


def test_the_limit_of_temporaries_is_the_user_s() -> None:
    assert failed(step(temp=600 << 20), temp=700 << 20) == []
    assert failed(step(), temp=100 << 20) == ["temporaries"]


def test_one_device_joins_nothing() -> None:
    one = decided(tp=1, target="tpu:v5p:2x2x2")
    found = gates.check(one.spec, one.resolved, HELD, [step()], 95 << 30)
    assert [g.name for g in found if not g.ok] == ["collectives"]


def test_the_roofline_of_8b_by_hand() -> None:
    """8.03e9 parameters, of which the embedding is looked up; 1,024 positions of 32 layers x 8 heads x 128 x 2."""
    one = decided()
    chip = Target.parse("tpu:v6e:2x4").chip
    assert chip is not None
    found = roofline.load(one.spec, one.resolved, chip, 128, 128, 1024)
    matrices = 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) + 4096 * 128256
    assert found.weights == pytest.approx(matrices * 2 / 8, rel=2e-3)
    assert found.cache == 128 * 1024 * 32 * 2 * 128 * 2
    assert found.flops == pytest.approx(128 * (2 * matrices + 4 * 32 * 1024 * 4096) / 8, rel=2e-3)
    moved = roofline.collectives(one.spec, one.resolved, 128, 128)
    assert sum(count * size for _, count, size in moved) == 65 * 128 * 4096 * 2 + 128 // 8 * 128256 * 4 + 128 * 2 * 4
    assert found.memory_s == pytest.approx((found.weights + found.cache) / 1638e9)
    assert found.seconds == max(found.memory_s, found.compute_s) + found.link_s


def test_the_roofline_of_experts_and_windows() -> None:
    """One token reads 8 of 128 experts; many read all. A window bounds what is read of a cache."""
    chip = Target.parse("tpu:v6e:2x4").chip
    assert chip is not None
    sparse = decided("qwen3-30b-a3b")
    one, many = (roofline.load(sparse.spec, sparse.resolved, chip, n, n, 1) for n in (1, 128))
    experts = 48 * 128 * 3 * 2048 * 768 * 2 / 8
    assert many.weights - one.weights == pytest.approx(experts * 120 / 128, rel=0.02)
    assert many.flops == 128 * one.flops
    windows = decided("gemma-3-27b")
    near, far = (roofline.load(windows.spec, windows.resolved, chip, 1, 1, n) for n in (1024, 2048))
    full = sum(layer.mixer.window is None for layer in windows.spec.layers)
    assert far.cache - near.cache == full * 1024 * 2 * 2 * 128 * 2


COST = {"cycles": 7_000_000, "dearest": 9_000_000, "turning": 3_000_000, "loops": 1, "kernels": 0}


def test_a_step_s_time_follows_the_context() -> None:
    """Blocks of 128 positions of attention's loop, at 1.75 GHz, and what goes over the links."""
    one, chip = decided(), Target.parse("tpu:v6e:2x4").chip
    assert chip is not None
    for context, turns in {1: 1, 128: 1, 129: 2, 1024: 8}.items():
        found = report.estimate(one, chip, step(**COST), context)
        cycles = 7_000_000 + turns * 3_000_000
        assert found["cycles"] == cycles
        assert found["ms"] - found["link_ms"] == pytest.approx(cycles / 1.751e6, rel=1e-3)
        assert found["sampled_ms"] - found["ms"] == pytest.approx(2_000_000 / 1.751e6, rel=1e-3)
    assert report.estimate(one, chip, step(**COST | {"loops": 0}), 1024)["cycles"] == 7_000_000


def test_few_layers_stand_for_all() -> None:
    """From 2 and 4 layers to 32: a layer of 1,000,000 cycles on 500,000 beside them."""
    one, target = decided(), Target.parse("tpu:v6e:2x4")
    few = [
        step(layers=n, seconds=1.0, kernels=0, loops=n, dearest=n, turning=2000 * n, cycles=500_000 + 1_000_000 * n)
        for n in (2, 4)
    ]
    made = report.make(one, target, [{"held": HELD, "device": "TPU v6 lite"}, *few], context=128)
    assert made["unrolled"]["cycles"] == 500_000 + 32 * 1_002_000
    assert made["unrolled"]["layers"] == 32
    alone = report.make(one, target, [{"held": HELD, "device": "TPU v6 lite"}, few[0]], context=128)
    assert alone["unrolled"] is None


def test_plans_come_the_smallest_first_and_get_faster() -> None:
    path = MODELS / "llama-3.1-8b"
    found = plan.options(load(), read_spec(path), Target.parse("tpu:v6e"), 1024, compiled=False)
    fit = [o for o in found if not o.refused]
    assert [o.mesh for o in fit] == ["tp=1", "tp=2", "tp=4", "tp=8", "tp=16", "tp=32"]
    for a, b in pairwise(fit[:4]):
        assert a.weights > b.weights
        assert a.many_ms > b.many_ms
        assert a.kv_tokens < b.kv_tokens
    assert "does not divide q_heads=32" in found[-1].refused
    assert plan.best(found, None, None) == fit[0]
    chosen = plan.best(found, fit[2].one_ms, None)
    assert chosen == fit[2], "the smallest that is fast enough"
    assert plan.best(found, 1e-6, None) is None
    assert plan.best(found, None, fit[1].rate) == fit[1]


def test_what_moves_is_told() -> None:
    was: dict[str, Any] = {
        "target": "tpu:v6e:2x4",
        "held": HELD,
        "programs": {"step 128, 32 layers": {"temp": 190 << 20, "cycles": 7_000_000, "collectives": {}}},
        "versions": {"jax": "0.10.2"},
    }

    def now(**changed: Any) -> dict[str, Any]:
        programs = {name: p | changed for name, p in was["programs"].items()}
        return was | {"programs": programs, "versions": {"jax": "0.11"}}

    assert golden.moved(was, now()) == []
    assert golden.moved(was, now(temp=195 << 20, cycles=7_300_000)) == []
    assert golden.moved(was, now(temp=205 << 20)) == ["step 128, 32 layers: temp: 205.00 MiB, was 190.00 MiB"]
    assert golden.moved(was, now(temp=175 << 20)), "better moves too"
    assert golden.moved(was, now(cycles=7_400_000)) == ["step 128, 32 layers: cycles: 7400000, was 7000000"]
    assert golden.moved(was, now(collectives={"all-to-all": {"count": 1}}))
    assert golden.moved(was, now(error="out of memory"))
    assert golden.moved(was, was | {"held": HELD | {"cache": 1}})
    assert golden.moved(was, was | {"programs": {}})
    missing = {"step 128, 32 layers": {"temp": 190 << 20}}
    assert golden.moved(was, was | {"programs": missing})


def test_a_plan_of_a_cpu_is_refused() -> None:
    with pytest.raises(Exception, match="plan knows chips of TPUs"):
        plan.options(load(), read_spec(MODELS / "llama-3.1-8b"), replace(Target.parse("cpu")), 1, compiled=False)
