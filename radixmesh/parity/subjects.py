"""Who is compared: "jax", "torch:bfloat16", "jax:float32:tp=2", "hf"."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from backends import NAMES
from engine.config import DTYPES
from engine.errors import ConfigError
from engine.mesh import AXES, MeshSpec

ORACLE = "hf"
WHAT = f"{'|'.join((ORACLE, *NAMES))}[:dtype][:axis=size]"
FLOATS = tuple(d for d in DTYPES if d != "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A backend, or Hugging Face as "hf", in a dtype on a mesh. name: as it was written."""

    name: str
    backend: str
    dtype: str = "float32"
    mesh: MeshSpec = MeshSpec()  # noqa: RUF009 (frozen)

    @property
    def overrides(self) -> dict[str, Any]:
        """As keys of a configuration."""
        return {"backend": self.backend, "dtype": self.dtype, "mesh": str(self.mesh)}


def parse(text: str) -> Subject:
    """Read one subject. Raises ConfigError naming what is wrong."""
    backend, *parts = (part.strip() for part in text.strip().split(":"))
    if backend not in (*NAMES, ORACLE):
        raise ConfigError(
            f"backends: unknown name {backend!r}; there are {', '.join((*NAMES, ORACLE))}", field="backends"
        )
    dtypes = [p for p in parts if "=" not in p]
    mesh = MeshSpec.parse(",".join(p for p in parts if "=" in p))
    for dtype in dtypes:
        if dtype not in FLOATS:
            raise ConfigError(
                f"backends: {text}: {dtype!r} is neither a dtype ({', '.join(FLOATS)}) nor an axis of a mesh "
                f"({', '.join(f'{a}=2' for a in AXES)}); write {WHAT}",
                field="backends",
            )
    if len(dtypes) > 1:
        raise ConfigError(f"backends: {text}: has two dtypes; write {WHAT}", field="backends")
    if backend == ORACLE and mesh != MeshSpec():
        raise ConfigError(f"backends: {text}: Hugging Face runs on one device here", field="backends")
    return Subject(name=text.strip(), backend=backend, dtype=dtypes[0] if dtypes else "float32", mesh=mesh)


def choose(listed: str, a: str | None, others: list[str]) -> tuple[Subject, list[Subject]]:
    """(judge, subjects): `a` against `others` where they are given, else of a list: hf in float32, or the first.

    Raises ConfigError for fewer than two, or the same one twice.
    """
    if bool(a) != bool(others):
        raise ConfigError("a, b: give both, such as --a jax:float32 --b torch:bfloat16", field="a" if others else "b")
    if a:
        all_ = [parse(a), *map(parse, others)]
    else:
        all_ = [parse(name) for name in listed.split(",") if name.strip()]
    distinct = {(s.backend, s.dtype, s.mesh): s for s in all_}
    if len(distinct) < 2:
        raise ConfigError("backends: give at least two that differ, such as jax,hf", field="backends")
    found = list(distinct.values())
    judge = found[0] if a else next((s for s in found if (s.backend, s.dtype) == (ORACLE, "float32")), found[0])
    return judge, [s for s in found if s != judge]
