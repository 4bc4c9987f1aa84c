"""The scheduled HLO is read right: turns of loops, branches, collectives, what can't be known."""

from __future__ import annotations

from backends.jax import hlo

TEXT = """HloModule jit_step, is_scheduled=true

%body (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %p = (s32[], bf16[8,64]{1,0}) parameter(0)
  %mul = bf16[8,64]{1,0} fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
  %w.1 = (s32[], bf16[8,64]{1,0}) while(%p), condition=%open, body=%inner, metadata={op_name="x"}
  %psum = bf16[8,64]{1,0:T(8,128)} all-reduce(%mul), channel_id=1, to_apply=%add
  ROOT %out = (s32[], bf16[8,64]{1,0}) tuple(%mul)
}

%inner (p: (s32[], bf16[8,64])) -> (s32[], bf16[8,64]) {
  %k = bf16[8,64]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"
  ROOT %o = (s32[]) fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"7"}
}

%open (p: (s32[], bf16[8,64])) -> pred[] {
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%closed (p: (s32[], bf16[8,64])) -> pred[] {
  %other = s32[]{:T(128)} constant(999)
  %bound = s32[]{:T(128)} constant(32), metadata={op_name="x"}
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT, metadata={op_name="x"}
}

%cheap (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"5"}
}

%dear (p: f32[8]) -> f32[8] {
  ROOT %c = f32[8]{0} sort(%p), backend_config={"estimated_cycles":"5000"}
}

%sparse (p: bf16[8,64]) -> bf16[8,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  ROOT %all-to-all.5 = bf16[8,64]{1,0} all-to-all(%p), channel_id=1, backend_config={"estimated_cycles":"900"}
}

ENTRY %main (a: bf16[8,64]) -> f32[8] {
  %a = bf16[8,64]{1,0} parameter(0)
  %w = (s32[], bf16[8,64]{1,0}) while(%a), condition=%closed, body=%body
  %g = (f32[4,64]{1,0}, f32[8,64]{1,0}) all-gather-start(%w), dimensions={0}
  %all-to-all.4.call-start = ((bf16[8,64]{1,0}, token[]), bf16[8,64]{1,0}) call-start(%a), to_apply=%sparse
  %gd = f32[8,64]{1,0} all-gather-done(%g)
  %t = (f32[1,64]{1,0}, f32[1,64]{1,0}) all-to-all(%a, %a), replica_groups={{0,1}}
  %cond = f32[8]{0} conditional(%x, %y, %z), branch_computations={%cheap, %dear}
  %kernel = f32[8]{0} custom-call(%gd), custom_call_target="tpu_custom_call", backend_config={"estimated_cycles":"40"}
  ROOT %end = f32[8]{0} add(%cond, %cond), backend_config={"estimated_cycles":1}
}
"""

STARTED = {"all-to-all": (2, 8 * 64 * 2 + 2 * 64 * 4)}
"""On 7x collectives are computations that another core runs; their cycles are not this core's. On a CPU one part
comes from each device."""


def test_a_scan_counts_each_of_its_turns() -> None:
    found = hlo.read(TEXT)
    assert found.cycles == 32 * 100 + 5 + 40 + 1
    assert found.dearest == found.cycles - 5 + 5000


def test_a_loop_of_unknown_length_is_told_apart() -> None:
    found = hlo.read(TEXT)
    assert (found.turning, found.loops) == (32 * 7, 1)
    assert found.kernels == 32, "a kernel that says nothing is counted, the one with an estimate is not"


def test_collectives_have_what_one_device_receives() -> None:
    found = hlo.read(TEXT)
    assert found.collectives == {"all-reduce": (32, 32 * 8 * 64 * 2), "all-gather": (1, 8 * 64 * 4), **STARTED}


def test_the_bound_is_the_one_that_is_compared() -> None:
    parts, _ = hlo._split(TEXT)
    assert hlo.turns(parts["closed"]) == 32
    assert hlo.turns(parts["open"]) is None
    assert hlo.turns([line.replace("LT", "GT") for line in parts["closed"]]) is None
