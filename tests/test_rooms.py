"""The order of the rooms: who may import whom. Reads the source; runs none of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOP = ("radixmesh", "engine", "backends", "models_jax", "models_torch", "kernels_pallas", "kernels_cuda")

ORDER: tuple[tuple[str, ...], ...] = (
    (
        "engine.errors",
        "engine.installed",
        "engine.checks",
        "engine.config",
        "engine.resolve",
        "engine.target",
        "engine.mesh",
        "engine.sampling",
        "engine.model",
    ),
    ("backends.api", "kernels_pallas", "kernels_cuda"),
    ("models_jax", "models_torch"),
    ("backends.reference", "backends.jax", "backends.torch", "engine.cache"),
    ("backends", "engine.sched"),
    ("engine.text",),
    ("engine.run",),
    ("engine.serve", "engine.router", "engine.lang"),
    ("radixmesh",),
)
"""Bottom first. A room imports itself and earlier lines; "backends" is what lies beside those that it names."""

TOGETHER = ORDER[0]
"""Rooms that are one: plain data, which may look at each other."""

NAMED = ("backends.jax", "backends.torch", "backends.reference", "models_jax", "models_torch")
JAX, TORCH = ("jax", "jaxlib", "flax", "optax"), ("torch", "triton", "flashinfer")
CLOCKS = ("threading", "asyncio", "socket", "time", "datetime", "multiprocessing", "queue", "select", "concurrent")
OURS = TOP

NEVER: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("engine", (*JAX, *TORCH), "engine is hardware-neutral"),
    ("engine", NAMED, "only open_backend names a backend"),
    ("radixmesh", NAMED, "only open_backend names a backend"),
    ("backends.api", (*JAX, *TORCH), "the contract is numpy only"),
    ("backends.reference", (*JAX, *TORCH, *NAMED[:2], *NAMED[3:]), "the reference is numpy only"),
    ("backends.jax", (*TORCH, "backends.torch", "models_torch", "kernels_cuda"), "the jax side never imports torch's"),
    (
        "models_jax",
        (*TORCH, "models_torch", "kernels_cuda", "backends"),
        "it knows jax and kernels_pallas only",
    ),
    ("kernels_pallas", (*TORCH, *OURS), "kernels import nothing of ours"),
    ("backends.torch", (*JAX, "backends.jax", "models_jax", "kernels_pallas"), "the torch side never imports jax's"),
    (
        "models_torch",
        (*JAX, "models_jax", "kernels_pallas", "backends"),
        "it knows torch and kernels_cuda only",
    ),
    ("kernels_cuda", (*JAX, *OURS), "kernels import nothing of ours"),
    ("engine.cache", CLOCKS, "the cache has no threads, no I/O, no clock"),
    ("engine.sched", CLOCKS, "the scheduler has no threads, no I/O, no clock"),
)
"""(who, whom, why), whatever the order says."""


def inside(module: str, names: tuple[str, ...]) -> bool:
    return any(module == n or module.startswith(n + ".") for n in names)


def room(module: str) -> str | None:
    """The room of a module of ours: the longest name in ORDER that holds it."""
    held = [r for line in ORDER for r in line if inside(module, (r,))]
    return max(held, key=len, default=None)


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, wherever it stands."""
    parts = file.relative_to(root).with_suffix("").parts
    package = parts if file.name == "__init__.py" else parts[:-1]
    package = package[:-1] if file.name == "__init__.py" else package
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                full = f"{source}.{alias.name}"
                path = root.joinpath(*full.split("."))
                yield node.lineno, full if path.is_dir() or path.with_suffix(".py").is_file() else source


def violations(root: Path) -> list[str]:
    """Each forbidden import, with its arrow."""
    out = []
    for top in TOP:
        for file in sorted((root / top).rglob("*.py")):
            module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            mine = room(module)
            for line, target in imports(file, root):
                why = _forbidden(module, mine, target)
                if why:
                    out.append(f"{file.relative_to(root)}:{line}  {mine or module} --> {target}   {why}")
    return out


def _forbidden(module: str, mine: str | None, target: str) -> str | None:
    theirs = room(target)
    for who, whom, why in NEVER:
        if inside(module, (who,)) and inside(target, whom) and not (mine and mine == theirs):
            return why
    if not inside(target, TOP) or target == "engine" or mine == theirs or module == "engine":
        return None
    if mine is None or theirs is None:
        return f"{module if mine is None else target} is in no room of the order"
    if mine in TOGETHER and theirs in TOGETHER:
        return None
    rank = {r: i for i, line in enumerate(ORDER) for r in line}
    if rank[theirs] < rank[mine]:
        return None
    return f"{theirs} does not stand below {mine}"


def test_every_import_goes_down() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_the_rooms_are_there() -> None:
    read = [f for top in TOP for f in (ROOT / top).rglob("*.py")]
    assert len(read) > 50
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts) for f in read}
    assert {room(m) for m in modules} >= {"engine.sched", "backends.jax", "models_torch", "radixmesh", "backends"}


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("engine/cache/radix.py", "import torch", "engine.cache --> torch"),
        ("engine/cache/radix.py", "from engine.sched import policy", "engine.cache --> engine.sched.policy"),
        ("engine/sched/policy.py", "def f():\n    from time import monotonic", "engine.sched --> time"),
        ("engine/sched/policy.py", "import asyncio.events", "engine.sched --> asyncio.events"),
        ("engine/model/spec.py", "from backends.api import step", "engine.model --> backends.api.step"),
        ("engine/run/loop.py", "import backends.jax.step", "engine.run --> backends.jax.step"),
        ("engine/run/loop.py", "import jax.numpy as jnp", "engine.run --> jax.numpy"),
        ("engine/text/chat.py", "from ..run import loop", "engine.text --> engine.run.loop"),
        ("engine/thing.py", "import engine.errors", "engine.thing is in no room"),
        ("backends/jax/step.py", "import torch", "backends.jax --> torch"),
        ("backends/jax/step.py", "import models_torch.stack", "backends.jax --> models_torch.stack"),
        ("backends/torch/step.py", "from jax import numpy", "backends.torch --> jax"),
        ("backends/reference/model.py", "import models_jax", "backends.reference --> models_jax"),
        ("backends/api/step.py", "from engine.cache import pages", "backends.api --> engine.cache.pages"),
        ("models_jax/mlp.py", "from backends.api.step import I32", "models_jax --> backends.api.step"),
        ("models_torch/mlp.py", "import models_jax.mlp", "models_torch --> models_jax.mlp"),
        ("kernels_pallas/a.py", "from engine.errors import ConfigError", "kernels_pallas --> engine.errors"),
        ("radixmesh/engine.py", "import backends.torch.backend", "radixmesh --> backends.torch.backend"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, arrow: str) -> None:
    known = ("engine/sched/policy.py", "engine/run/loop.py", "engine/cache/pages.py", "backends/api/step.py")
    for name in (*known, "engine/errors.py", "models_torch/stack.py", "models_jax/mlp.py", file):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import numpy as np\nfrom engine.errors import ConfigError\n" if "kernels" not in name else "")
    allowed = {f for f in violations(tmp_path) if "no room" not in f}
    (tmp_path / file).write_text(line + "\n")
    found = violations(tmp_path)
    assert not allowed
    assert len(found) == 1, found
    assert arrow in found[0]
    assert found[0].startswith(file)
