"""Every program that a backend runs: planned once, compiled before ready, never after."""

from __future__ import annotations

import os
import platform as machine
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import jax

from backends.jax import caches, choosing, step
from backends.jax.buckets import ladder, make_shape
from backends.jax.step import Plan
from engine.errors import StepRefused


class Program(NamedTuple):
    """Which program. kind: "step" of a bucket of `size` tokens; "choose" for `size` rows; ahead of a step "edit" (page
    tables), "copy" (pages) and "count" (histories); behind it "score" (prompts); "empty" (new caches and state)."""

    kind: str
    size: int = 0
    taps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} of size {self.size}" + (f" with taps {', '.join(self.taps)}" if self.taps else "")


EMPTY, EDIT, COPY, COUNT, SCORE = (Program(kind) for kind in ("empty", "edit", "copy", "count", "score"))
OPTIONS: dict[str, dict[str, bool | int | str]] = {"cpu": {"xla_cpu_parallel_codegen_split_count": 1}}
"""Compiler options of a platform. XLA splits a CPU program over threads at a fifth more work; here whole programs are
compiled side by side."""
LARGE, LIBRARY = 256, {"xla_gpu_enable_triton_gemm": False}
"""From so many tokens, a GPU's matrix products are the library's, not XLA's own (docs/decisions/0019)."""


def keep(folder: str) -> None:
    """Let jax keep executables in a folder, by content, versions and compiler options. What it finds there must have
    been made on a processor like this one, which jax does not look at, so that its name stands in the folder's.

    jax has one such folder for a process: one that its user chose stays.
    """
    if not folder or jax.config.jax_compilation_cache_dir is not None:
        return
    cpu, facts = Path("/proc/cpuinfo"), set[str]()
    if cpu.is_file():
        facts = {x for x in cpu.read_text().splitlines() if x.startswith(("flags", "Features", "model name"))}
    named = sha256(f"{machine.machine()} {sorted(facts)}".encode()).hexdigest()[:12]
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / named))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


class Programs:
    """The table of executables. All compiling of the backend happens here, ahead of time, so that it can be counted.

    late: programs compiled after `ready`.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.ready = False
        self.late = 0
        self.made: dict[Program, jax.stages.Compiled] = {}

    def planned(self) -> list[Program]:
        """What steps without taps may need."""
        limits = self.plan.limits
        shapes = [make_shape(tokens, limits) for tokens in ladder(limits)]
        some = [EMPTY, EDIT, COPY]
        some += [COUNT] if limits.max_history else []
        some += [SCORE] if limits.max_logprobs else []
        some += [Program("choose", rows) for rows in sorted({shape.rows for shape in shapes})]
        return [*(Program("step", shape.tokens) for shape in reversed(shapes)), *some]

    def take(self, program: Program) -> jax.stages.Compiled:
        """The executable; compiled now if it is new. Raises StepRefused where that would be after ready."""
        if program not in self.made:
            if self.ready:
                field = "taps" if program.taps else "tokens"
                raise StepRefused(f"{field}: no program for a {program}: nothing compiles after warmup", field=field)
            self._keep(program, self._lower(program).compile(self._options(program)))
        return self.made[program]

    def warm(self) -> None:
        """Compile all that is planned, or load what an earlier start kept: traced one after the other, compiled side
        by side."""
        keep(self.plan.config.programs)
        missing = [program for program in self.planned() if program not in self.made]
        with ThreadPoolExecutor(max(1, min(len(missing), os.cpu_count() or 1))) as pool:
            running = [
                (program, pool.submit(self._lower(program).compile, self._options(program))) for program in missing
            ]
            for program, future in running:
                self._keep(program, future.result())
        self.ready = True

    def _options(self, program: Program) -> dict[str, bool | int | str] | None:
        platform = self.plan.config.platform
        if platform == "gpu" and program.kind == "step" and program.size >= LARGE:
            return dict(LIBRARY)
        return OPTIONS.get(platform)

    def _keep(self, program: Program, executable: jax.stages.Compiled) -> None:
        self.made[program] = executable
        self.late += self.ready

    def _lower(self, program: Program) -> jax.stages.Lowered:
        plan = self.plan
        match program.kind:
            case "empty":
                return caches.lower_empty(plan.limits, plan.config, plan.mesh)
            case "copy":
                return caches.lower_copy(plan.limits, plan.config, plan.mesh)
            case "edit":
                return step.lower_edit(plan)
            case "count":
                return choosing.lower_count(plan)
            case "score":
                return choosing.lower_score(plan)
            case "choose":
                return choosing.lower_choose(plan, program.size)
        return step.lower_step(plan, program.size, program.taps)
