"""Planting faults: a process of its own loads one module with one line changed, and something must notice."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What is broken, in which module, and how: `old` must stand there exactly once."""

    name: str
    module: str
    old: str
    new: str


def faults(module: str, *rows: tuple[str, str, str]) -> list[Fault]:
    """Faults of one module: (name, old, new) each."""
    return [Fault(name=name, module=module, old=old, new=new) for name, old, new in rows]


class Planter(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module with one line changed."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.path = ROOT / (fault.module.replace(".", "/") + ".py")

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.fault.module else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        source = self.path.read_text()
        assert source.count(self.fault.old) == 1, f"{self.fault.name}: stands {source.count(self.fault.old)} times"
        exec(compile(source.replace(self.fault.old, self.fault.new), str(self.path), "exec"), module.__dict__)


def plant(fault: Fault, open_trials: Callable[[], Iterable[tuple[str, Callable[[], object]]]]) -> int:
    """Exit code: 1 when a trial fails with the fault planted (good), 0 when none does, 2 when it can't be planted.
    open_trials: imports what is tried, and gives it by name."""
    sys.meta_path.insert(0, Planter(fault))
    try:
        trials = open_trials()
    except AssertionError as error:
        print(error)
        return 2
    for name, trial in trials:
        try:
            trial()
        except Exception as error:  # noqa: BLE001 whatever breaks, the fault was noticed
            print(f"noticed: {name}: {type(error).__name__}: {str(error)[:100]}")
            return 1
    return 0


def check_noticed(module: str, known: Sequence[Fault], number: int, seconds: float) -> None:
    """Run `python -m module number`, which plants that fault, and see that it is noticed."""
    command = [sys.executable, "-m", module, str(number)]
    same = os.environ | {"PYTHONHASHSEED": "0"}  # trials are the same each time
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False, env=same)
    assert done.returncode == 1, f"{known[number].name}: {done.stdout}{done.stderr}"
    assert done.stdout.startswith("noticed: "), done.stdout + done.stderr
