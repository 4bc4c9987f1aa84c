"""Targets: how they are written, what is refused, and that a start on the chip decides what is compiled for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jax.experimental.pallas import tpu as pltpu

from backends.probe import described
from backends.target import check, check_pair, wanted
from engine.config import load
from engine.errors import ConfigError
from engine.model.registry import read_spec
from engine.resolve import resolve
from engine.target import CHIPS, GIB, Target, known, smallest
from radixmesh.compile.run import settle

GOLDEN = Path(__file__).parents[2] / "benchmarks" / "golden" / "models"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tpu:v6f:2x4", "unknown chip 'v6f'; did you mean v6e?"),
        ("tpu:7x:2x2x1", "unknown chip '7x'; did you mean tpu7x?"),
        ("tpx:v6e:2x4", "unknown platform 'tpx'; did you mean tpu?"),
        ("tpu:v6e:2x2x2", "give 2 sides, such as v6e:2x4"),
        ("tpu:v5p:2x4", "give 3 sides, such as v5p:2x2x2"),
        ("tpu:v6e:2xfour", "topology '2xfour' of v6e"),
        ("tpu:v6e:0x4", "topology '0x4' of v6e"),
        ("tpu:v6e:3x4", "whole hosts of 2x2 chips"),
        ("cuda:sm_90:h20", "unknown card of sm_90 'h20'; did you mean h200?"),
        ("rocm:gfx950:mi300x", "unknown card of gfx950 'mi300x'; did you mean mi355x?"),
        ("cuda:sm_91", "unknown architecture 'sm_91'; did you mean sm_90?"),
        ("cpu:2", "unknown platform 'cpu'"),
    ],
)
def test_what_is_no_target_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        Target.parse(text)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.field == "target"


@pytest.mark.parametrize(
    "text", ["cpu", "tpu:v6e:2x4", "tpu:v5p:4x4x4", "tpu:tpu7x:2x2x1", "cuda:sm_90", "cuda:sm_90:h200", "rocm:gfx942"]
)
def test_a_target_is_written_as_it_is_read(text: str) -> None:
    assert str(Target.parse(text)) == text


def test_devices() -> None:
    """A chip of 7x is two devices."""
    for text, devices in {"tpu:v6e:2x4": 8, "tpu:v5p:4x4x4": 64, "tpu:tpu7x:2x2x1": 8, "tpu:v6e:16x16": 256}.items():
        assert Target.parse(text).devices == devices
    for chip in CHIPS.values():
        for devices in (1, 8, 16, 64):
            found = smallest(chip, devices)
            assert found.devices >= devices
            assert Target.parse(str(found)) == found


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_as_jax_knows_them(name: str) -> None:
    """Against jax's own table, which is rounded, and counts decimal bytes."""
    chip = CHIPS[name]
    version = pltpu.ChipVersion(name.removeprefix("tpu"))
    cores = 2 if version.supports_megacore else 1
    facts = pltpu.get_tpu_info_for_chip(version, cores)
    assert chip.memory == pytest.approx(facts.hbm_capacity_bytes * cores, rel=0.1)
    assert chip.memory < facts.hbm_capacity_bytes * cores * 1.002
    assert chip.bandwidth == pytest.approx(facts.mem_bw_bytes_per_second * cores, rel=0.13)
    assert chip.flops["bfloat16"] == pytest.approx(facts.bf16_ops_per_second * cores, rel=0.01)
    assert chip.vmem == facts.vmem_capacity_bytes
    assert 1.4e9 < chip.clock < 2.3e9


def test_the_pair_that_works_is_said() -> None:
    goes = wanted(["jaxlib<=0.10.2", 'libtpu==0.0.42.*; extra == "tpu"'])
    assert goes == "0.0.42.*"
    check_pair("0.10.2", "0.0.42.1", goes)
    check_pair("0.10.2", "0.0.42", "0.0.42")
    for libtpu, says in {"": "libtpu is not installed", "0.0.52": "libtpu 0.0.52 is the wrong version"}.items():
        with pytest.raises(ConfigError, match=says) as error:
            check_pair("0.10.2", libtpu, goes)
        assert "jax 0.10.2 goes with libtpu 0.0.42.*: pip install 'jax[tpu]==0.10.2'" in str(error.value)
    with pytest.raises(ConfigError, match="wrong version"):
        check_pair("0.10.2", "0.0.421", goes)


def test_this_environment_has_the_pair() -> None:
    check(Target.parse("tpu:v6e:2x4"))


def test_what_does_not_fit_says_by_how_much_and_where_it_would() -> None:
    """70B: 131.4 GiB in bfloat16, 16.43 on each of eight, and 0.85 of 15.75 is 13.39."""
    path = GOLDEN / "llama-3.1-70b"
    with pytest.raises(ConfigError) as error:
        settle(load(None, {"mesh": "tp=8"}), read_spec(path), path, Target.parse("tpu:v5e:2x4"))
    said = str(error.value)
    assert "16.43 GiB of weights" in said
    assert "3.04 GiB more than the 13.39 GiB" in said
    assert said.endswith("the smallest mesh that holds it: tp=16 on tpu:v5e:4x4")
    settle(load(None, {"mesh": "tp=16"}), read_spec(path), path, Target.parse("tpu:v5e:4x4"))


def test_windows_that_leave_no_room_say_so_too() -> None:
    """Gemma-3-27B fits four devices, but not with what 128 slots need of its windows."""
    path = GOLDEN / "gemma-3-27b"
    with pytest.raises(ConfigError) as error:
        settle(load(None, {"mesh": "tp=4"}), read_spec(path), path, Target.parse("tpu:v6e:2x2"))
    assert "nothing is left for the cache" in str(error.value)
    assert str(error.value).endswith("the smallest mesh that holds it: tp=8 on tpu:v6e:2x4")


def test_a_mesh_that_does_not_go_into_the_topology() -> None:
    path = GOLDEN / "llama-3.1-8b"
    with pytest.raises(ConfigError, match="8 devices of tpu:v6e:2x4 are not divided by tp=3"):
        settle(load(None, {"mesh": "tp=3"}), read_spec(path), path, Target.parse("tpu:v6e:2x4"))


@pytest.mark.parametrize("free", [1.0, 0.93])
def test_a_start_on_the_chip_decides_the_same(free: float) -> None:
    """A real device has a little less free than it has; the plan is the same, so that programs are."""
    target, path = Target.parse("tpu:v6e:2x4"), GOLDEN / "llama-3.1-8b"
    config, spec = load(None, {"mesh": "tp=8"}), read_spec(path)
    assert target.chip is not None
    memory = described("TPU v6 lite", int(target.chip.memory * free))
    resolved, _ = resolve(config, spec, replace(target.device(), memory_bytes=memory))
    assert resolved == settle(config, spec, path, target).resolved


def test_a_device_in_use_is_planned_with_what_is_free() -> None:
    assert described("TPU v6 lite", 20 * GIB) == 20 * GIB
    assert described("TPU v9", 20 * GIB) == 20 * GIB


@pytest.mark.parametrize(
    ("target", "dtype", "stack"),
    [
        ("tpu:tpu7x:2x2x1", "bfloat16", "list"),
        ("tpu:tpu7x:2x2x1", "float32", "scan"),
        ("tpu:v6e:2x4", "bfloat16", "scan"),
        ("tpu:v5p:2x2x2", "bfloat16", "scan"),
    ],
)
def test_a_chip_that_punishes_the_scan_is_unrolled(target: str, dtype: str, stack: str) -> None:
    path = GOLDEN / "llama-3.1-8b"
    decided = settle(load(None, {"mesh": "tp=8", "dtype": dtype}), read_spec(path), path, Target.parse(target))
    said = next(d for d in decided.decisions if d.field == "stack")
    assert said.value == stack
    if stack == "list":
        assert said.why == "on a TPU7x a scan copies stacked bfloat16 weights in each step"
    forced = settle(load(None, {"mesh": "tp=8", "stack": "scan"}), read_spec(path), path, Target.parse(target))
    assert forced.resolved.stack == "scan"


def test_kinds() -> None:
    assert known("TPU7x") is CHIPS["tpu7x"]
    assert known("NVIDIA H200") is None
