"""One inference engine for large language models: one configuration, the same tokens, on TPUs and GPUs.

import radixmesh

with radixmesh.Engine() as engine:
    print(engine.generate("def fibonacci(n):", sampling_params={"temperature": 0})["text"])
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.sampling import SamplingParams
    from radixmesh.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "SamplingParams"]

_ROOMS = ("engine", "backends", "models_jax", "models_torch")


def _check_rooms(home: Path) -> None:
    """Raise ImportError when a package of ours is not the one that lies beside this one.

    Their names are common words: a folder called `engine` where python was started hides ours.
    """
    for room in _ROOMS:
        found = find_spec(room)
        origin = found.origin if found is not None else None
        if origin is None or Path(origin).resolve().parent.parent != home:
            places = [] if found is None else [origin or "", *(found.submodule_search_locations or [])]
            where = f"python finds {next(filter(None, places))}" if any(places) else "there is none"
            raise ImportError(
                f"radixmesh needs its own package {room!r} in {home}, but {where}; rename what hides it, or start "
                "python in another folder",
                name=room,
            )


_check_rooms(Path(__file__).resolve().parent.parent)


def __getattr__(name: str) -> Any:
    """Load the public names when they are asked for, so that `import radixmesh` is quick."""
    if name == "Engine":
        from radixmesh.engine import Engine

        return Engine
    if name == "SamplingParams":
        from engine.sampling import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
