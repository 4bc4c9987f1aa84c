"""Compiled programs in a folder, to start from without compiling: a manifest, and a file for each executable.

The manifest says what the programs were made from (backends.jax.recipe), so that nothing need be traced to know that
they are the right ones. Files are named by content: sha256 of the program's StableHLO, versions, device and options.
An executable is machine code: a bundle is to be trusted like a program.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from backends.jax.frozen import Loaded, freeze, thaw
from backends.jax.recipe import first_difference, recipe
from backends.jax.step import Plan
from backends.jax.warmup import Program, options
from engine.errors import ConfigError

FORMAT = "radixmesh bundle 1"
MANIFEST = "manifest.json"
ABOVE = ("versions", "device", "mesh", "options")
"""Parts of the recipe that StableHLO doesn't show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle that fits. entries: what the manifest says of each program."""

    folder: Path
    plan: Plan
    made: dict[str, Any]
    entries: dict[Program, dict[str, Any]]

    def load(self, program: Program) -> Loaded:
        """The program. Raises ConfigError where the bundle lacks it or its file was changed."""
        entry = self.entries.get(program)
        if entry is None:
            raise _corrupt(self.folder, f"it has no {program}")
        try:
            file = self.folder / _file(entry["stablehlo"], self.made)
            held = file.read_bytes()
            if sha256(held).hexdigest() != entry["sha256"]:
                raise _corrupt(self.folder, f"{file.name} is not what was written")
            return thaw(entry["program"], held, self.plan.mesh)
        except OSError as error:
            raise _corrupt(self.folder, f"{error.filename}: {error.strerror}") from error
        except (KeyError, TypeError, ValueError, AttributeError, jax.errors.JaxRuntimeError) as error:
            raise _corrupt(self.folder, f"{program} can't be loaded: {' '.join(str(error).split())[:200]}") from error


class Writer:
    """A bundle in the making: `add` what was compiled, in any thread, then `close`. Without the latter it is none.

    Raises ConfigError where the folder has something else in it, or can't be written.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.folder, self.made = folder, recipe(plan, options(plan))
        self.entries: dict[Program, dict[str, Any]] = {}
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            there = sorted(file.name for file in folder.iterdir())
            if there and MANIFEST not in there:
                raise ConfigError(
                    f"bundle: {folder} has {there[0]} in it and is no bundle; give a new folder", field="bundle"
                )
            (folder / MANIFEST).unlink(missing_ok=True)

    def add(self, program: Program, lowered: jax.stages.Lowered, compiled: jax.stages.Compiled) -> None:
        """Write an executable. It must have been compiled `uncached`."""
        digest = sha256(lowered.as_text().encode()).hexdigest()
        with _writing(self.folder):
            self.entries[program] = _write(self.folder, self.made, program, digest, compiled)

    def close(self) -> int:
        """Write the manifest, and drop what an earlier bundle in the folder had. Gives the bytes of all programs."""
        entries = [self.entries[program] for program in sorted(self.entries)]
        manifest = {"format": FORMAT, "made": self.made, "programs": entries}
        text = json.dumps(manifest | {"check": _check(manifest)}, indent=1)
        with _writing(self.folder):
            for file in self.folder.glob("*.xla"):
                if file.name not in {_file(entry["stablehlo"], self.made) for entry in entries}:
                    file.unlink()
            partial = self.folder / f"{MANIFEST}.part"
            partial.write_text(text)
            partial.replace(self.folder / MANIFEST)
        return sum(int(entry["bytes"]) for entry in entries)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"bundle: {folder} can't be written: {error.strerror}", field="bundle") from error


@contextmanager
def uncached() -> Iterator[None]:
    """Compile everything anew: of an executable that jax's cache had, XLA for CPUs writes only a part."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def find(plan: Plan, options: Mapping[str, Any] | None) -> Bundle | None:
    """The bundle of a configuration, if it names one that fits; says on stderr in one line why one doesn't.

    Raises ConfigError where there is none, or it is corrupt.
    """
    if not plan.config.bundle:
        return None
    folder = Path(plan.config.bundle)
    manifest, made = _read(folder), recipe(plan, options)
    found = first_difference(manifest["made"], made)
    if found is not None:
        name, theirs, ours = found
        fix = "; set cache.tokens, so that it is the same on every start" if ".pages" in name else ""
        print(
            f"radixmesh: the bundle {folder} does not fit, so programs are compiled: {name} is {_short(theirs)} there, "
            f"{_short(ours)} here{fix}",
            file=sys.stderr,
            flush=True,
        )
        return None
    try:
        entries = {Program(e["kind"], e["size"], tuple(e["taps"])): e for e in manifest["programs"]}
    except (KeyError, TypeError) as error:
        raise _corrupt(folder, "its list of programs can't be read") from error
    return Bundle(folder=folder, plan=plan, made=made, entries=entries)


def _read(folder: Path) -> dict[str, Any]:
    """The manifest."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        raise _no_bundle(folder, f"{MANIFEST}: {error.strerror}") from error
    except ValueError as error:
        raise _no_bundle(folder, f"its {MANIFEST} is not JSON") from error
    kind = manifest.get("format") if isinstance(manifest, dict) else None
    if not isinstance(kind, str) or not kind.startswith("radixmesh bundle"):
        raise _no_bundle(folder, f"its {MANIFEST} is something else")
    if kind != FORMAT:
        raise _no_bundle(folder, f"it is of another version ({kind}), this one reads {FORMAT}")
    check = manifest.pop("check", None)
    if check != _check(manifest):
        raise _corrupt(folder, f"{MANIFEST} is not what was written")
    return dict(manifest)


def _write(
    folder: Path, made: Mapping[str, Any], program: Program, digest: str, compiled: jax.stages.Compiled
) -> dict[str, Any]:
    """One executable. Gives its entry."""
    data, held = freeze(compiled)
    (folder / _file(digest, made)).write_bytes(held)
    return {
        "kind": program.kind,
        "size": program.size,
        "taps": list(program.taps),
        "stablehlo": digest,
        "sha256": sha256(held).hexdigest(),
        "bytes": len(held),
        "program": data,
    }


def _file(digest: str, made: Mapping[str, Any]) -> str:
    """Name of the executable of a program, by content."""
    above = json.dumps([digest, *(made[name] for name in ABOVE)], sort_keys=True)
    return f"{sha256(above.encode()).hexdigest()[:32]}.xla"


def _check(manifest: Mapping[str, Any]) -> str:
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = "missing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _no_bundle(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"backend.jax.bundle: {folder} is no bundle: {why}; make one with radixmesh compile --bundle {folder}",
        field="backend.jax.bundle",
    )


def _corrupt(folder: Path, why: str) -> ConfigError:
    return ConfigError(
        f"backend.jax.bundle: {folder} is corrupt: {why}; make it anew with radixmesh compile --bundle {folder}",
        field="backend.jax.bundle",
    )
