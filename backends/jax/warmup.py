"""Every program that a backend runs: planned once, made before ready or behind it, never on the way of a request."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax

from backends.api.limits import Limits
from backends.api.protocol import Sources
from backends.jax import caches, choosing, step
from backends.jax.buckets import ladder, make_shape
from backends.jax.heard import Heard
from backends.jax.recipe import processor
from backends.jax.step import Plan
from engine.errors import StepRefused


class Program(NamedTuple):
    """Which program. kind: "step" of a bucket of `size` tokens; "choose" for `size` rows; ahead of a step "edit" (page
    tables), "copy" (pages) and "count" (histories); behind it "score" (prompts, of a step of `size` tokens; 0 is the
    largest bucket); "empty" (new caches and state)."""

    kind: str
    size: int = 0
    taps: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} of size {self.size}" + (f" with taps {', '.join(self.taps)}" if self.taps else "")


Executable: TypeAlias = Callable[..., Any]
EMPTY, EDIT, COPY, COUNT, SCORE = (Program(kind) for kind in ("empty", "edit", "copy", "count", "score"))
OPTIONS: dict[str, bool | int | str] = {
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_llvm_disable_expensive_passes": True,
}
"""Compiler options of CPUs. XLA splits a program over threads at a fifth more work; here whole programs are compiled
side by side. LLVM's expensive passes are a quarter of the time and make no step faster."""
SOON: dict[str, bool | int | str] = {
    "xla_cpu_use_fusion_emitters": False,
    "xla_backend_optimization_level": 1,
    "xla_disable_hlo_passes": "tree_reduction_rewriter",
}
"""More of them for small models: emitters save work only where layers are alike and listed, level 1 is enough for steps
as fast, and sums of one row would be unrolled kernel by kernel (docs/decisions/0018-programs-ahead.md)."""
GONE = ("xla_cpu_use_fusion_emitters",)
"""Options that jax 0.12 has no more."""
REFUSED = (NotImplementedError, ValueError)
"""What a kernel raises of shapes that it can't be made for."""
LARGE = 256
LIBRARY: dict[str, bool | int | str] = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_dot_merger_threshold_mb": 0}
"""From so many tokens, a GPU's matrix products are the library's, not XLA's own, and none are joined, for which their
weights would be laid side by side in each step (docs/decisions/0019)."""


def keep(folder: str) -> None:
    """Let jax keep executables in a folder, by content, versions and compiler options. What it finds there must have
    been made on a processor like this one, which jax does not look at, so that its name stands in the folder's.

    jax has one such folder for a process: one that its user chose stays.
    """
    if not folder or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(Path(folder) / processor()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def options(plan: Plan, program: Program | None = None) -> dict[str, bool | int | str]:
    """What the compiler is told of a program, or of most."""
    platform = plan.config.platform
    if platform == "gpu" and program is not None and program.kind == "step" and program.size >= LARGE:
        return dict(LIBRARY)
    if platform != "cpu":
        return {}
    return OPTIONS | (SOON if plan.soon else {})


def known(options: dict[str, bool | int | str]) -> dict[str, bool | int | str]:
    """Of a compiler's options those that this jax knows: some are gone in newer ones."""
    return {name: value for name, value in options.items() if name not in GONE or _known(name, value)}


@cache
def _known(name: str, value: bool | int | str) -> bool:
    try:
        jax.jit(lambda: 0).lower().compile({name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True


class Programs:
    """The table of executables. All compiling of the backend happens here, ahead of time, so that it can be counted.

    found: loads a program from a bundle. limits: of the steps whose programs exist: with `ready_early` max_tokens and
    token_buckets grow as larger programs come.
    """

    def __init__(self, plan: Plan, found: Callable[[Program], Executable] | None = None) -> None:
        self.plan, self.found = plan, found
        self.limits = plan.limits
        self.ready = False
        self.made: dict[Program, Executable] = {}
        self.served = Heard()
        self._from = {"bundle": 0, "cache": 0, "compiler": 0}
        self._seconds = 0.0
        self._behind: threading.Thread | None = None
        self._closed = False

    def planned(self, tokens: int = 0) -> list[Program]:
        """What steps without taps may need, the largest first; tokens: where they have no more than these."""
        limits, most = self.plan.limits, tokens or self.plan.limits.max_tokens
        shapes = [make_shape(size, limits) for size in ladder(limits) if size <= most]
        some = [EMPTY, EDIT, COPY]
        some += [COUNT] if limits.max_history else []
        some += [score(most, limits)] if limits.max_logprobs else []
        some += [Program("choose", rows) for rows in sorted({shape.rows for shape in shapes})]
        return [*(Program("step", shape.tokens) for shape in reversed(shapes)), *some]

    def rooms(self) -> list[int]:
        """The largest steps that there are programs for, one after the other: one, unless ready early."""
        limits = self.plan.limits
        if not self.plan.config.ready_early or self.found is not None:  # a bundle has all of the largest steps
            return [limits.max_tokens]
        return [size for size in ladder(limits) if size >= limits.max_rows]

    def take(self, program: Program) -> Executable:
        """The executable; made now if it is new. Raises StepRefused where that would be after ready."""
        if program not in self.made:
            if self.ready:
                field = "taps" if program.taps else "tokens"
                raise StepRefused(f"{field}: no program for a {program}: nothing compiles after warmup", field=field)
            keep(self.plan.config.programs)
            self._make([program])
        return self.made[program]

    def warm(self) -> None:
        """Make all that is planned: load it from a bundle or what an earlier start kept, or compile it. Ready early,
        only what the smallest steps need, which hold a row for each slot; the rest comes on a thread behind."""
        if self.ready:
            return
        keep(self.plan.config.programs)
        first, *rest = self.rooms()
        self._make(self.planned(first), os.cpu_count() or 1)
        self.limits = cut(self.plan.limits, first)
        self.served.compiles = 0
        self.ready = True
        if rest:
            self._behind = threading.Thread(target=self._grow, args=(rest,), name="radixmesh-programs", daemon=True)
            self._behind.start()

    def sources(self) -> Sources:
        """Where the programs came from. Any thread may ask."""
        planned = {program for room in self.rooms() for program in self.planned(room)}
        return Sources(planned=len(planned), seconds=self._seconds, **self._from)

    @property
    def late(self) -> int:
        """Programs compiled after ready while a step was served (inside of `served`)."""
        return self.served.compiles if self.ready else 0

    def close(self) -> None:
        """Let go of all; waits for the program that is being made."""
        self._closed = True
        if self._behind is not None:
            self._behind.join()
        self.made.clear()

    def _grow(self, rooms: Sequence[int]) -> None:
        """Make larger programs and then raise the limits, until all are there."""
        for room in rooms:
            try:
                for program in reversed(self.planned(room)):  # one at a time: the device's steps want a core too
                    if self._closed:
                        return
                    self._make([program])
            except (jax.errors.JaxRuntimeError, MemoryError, *REFUSED) as error:
                what = f"steps stay at {self.limits.max_tokens} tokens: {' '.join(str(error).split())[:200]}"
                print(f"radixmesh: a program of {room} tokens can't be made; {what}", file=sys.stderr, flush=True)
                return
            self.limits = cut(self.plan.limits, room)

    def _make(self, programs: Sequence[Program], workers: int = 1) -> None:
        """Make those that are new: traced one after the other, loaded or compiled side by side."""
        began, missing = time.monotonic(), [program for program in programs if program not in self.made]
        with ThreadPoolExecutor(max(1, min(len(missing), workers))) as pool:
            running = [
                pool.submit(_compile, self.lower(program), options(self.plan, program))
                if self.found is None
                else pool.submit(self.found, program)
                for program in missing
            ]
            for program, future in zip(missing, running, strict=True):
                made = future.result()
                executable, source = made if isinstance(made, tuple) else (made, "bundle")
                self.made[program] = executable
                self._from[source] += 1
        self._seconds += time.monotonic() - began

    def lower(self, program: Program) -> jax.stages.Lowered:
        """The program, traced."""
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
                return choosing.lower_score(plan, program.size or plan.limits.max_tokens)
            case "choose":
                return choosing.lower_choose(plan, program.size)
        return step.lower_step(plan, program.size, program.taps)


def score(tokens: int, limits: Limits) -> Program:
    """The program that scores prompts of a step of `tokens` tokens. limits: of the largest steps."""
    return SCORE if tokens == limits.max_tokens else Program("score", tokens)


def cut(limits: Limits, tokens: int) -> Limits:
    """The same limits for steps of at most `tokens` tokens."""
    if tokens == limits.max_tokens:
        return limits
    return replace(limits, max_tokens=tokens, token_buckets=tuple(b for b in limits.token_buckets if b <= tokens))


def _compile(lowered: jax.stages.Lowered, options: Any) -> tuple[Executable, str]:
    """The executable, and whether jax's cache had it."""
    chosen = known(options)  # may compile
    with Heard() as heard:
        executable = lowered.compile(chosen)
    return executable, "cache" if heard.hits else "compiler"
