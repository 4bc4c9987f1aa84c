"""Scales of caches of 8 bits, as a calibration keeps them: the largest key and value of each layer and head, in JSON.

    {"largest": [{"keys": [12.5, 9.0], "values": [3.1, 2.2]}, ...]}

one entry a layer, one number a kv head. A scale is that number divided by the largest of the cache's type, so that one
file serves int8 and fp8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from engine.errors import ConfigError
from engine.model.quant import MOST, Narrow
from engine.model.spec import ModelSpec
from engine.model.weights import LEAST, SCALES, WeightSource

FIELD = "cache.scales"
SIDES = ("keys", "values")


def read_largest(path: Path, spec: ModelSpec) -> dict[str, NDArray[np.float32]]:
    """Name of each layer's scales -> the largest magnitudes, float32[2, kv_heads], keys and values.

    Raises ConfigError naming the file and the entry: of another model, or no finite number above 0.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        _refuse(path, f"can't be read: {error.strerror}")
    except (ValueError, RecursionError) as error:
        _refuse(path, f"not valid JSON ({error})")
    layers = content.get("largest") if isinstance(content, dict) else None
    if not isinstance(layers, list) or set(content) != {"largest"}:
        _refuse(path, 'must hold {"largest": [...]} and nothing else')
    if len(layers) != len(spec.layers):
        _refuse(path, f"largest has {len(layers)} layers, the model {len(spec.layers)}")
    out = {}
    for i, (found, layer) in enumerate(zip(layers, spec.layers, strict=True)):
        if not isinstance(found, dict) or set(found) != set(SIDES):
            _refuse(path, f"largest[{i}] must hold keys and values")
        rows = [_numbers(path, f"largest[{i}].{side}", found[side], layer.mixer.kv_heads) for side in SIDES]
        out[f"layers.{i}.{SCALES}"] = np.array(rows, np.float32)
    return out


def _numbers(path: Path, name: str, value: Any, heads: int) -> list[float]:
    if not isinstance(value, list) or len(value) != heads:
        said = f"has {len(value)}" if isinstance(value, list) else f"is {value!r}"
        _refuse(path, f"{name} {said}; the layer has {heads} kv heads")
    for h, number in enumerate(value):
        plain = isinstance(number, int | float) and not isinstance(number, bool)
        if not plain or not LEAST < number / MOST["fp8"] < number < 1 / LEAST:
            _refuse(path, f"{name}[{h}] is {number!r}, must be a number above 0")
    return value


def _refuse(path: Path, what: str) -> NoReturn:
    raise ConfigError(f"{FIELD}: {path}: {what}; radixmesh calibrate makes one", field=FIELD)


def write_largest(path: Path, largest: Sequence[NDArray[np.float32]]) -> None:
    """The file of the largest magnitudes float32[2, kv_heads] of each layer. A head that is all 0 gets 1."""
    layers = []
    for one in largest:
        safe = np.where(one > 0, one, 1)
        layers.append({side: [float(f"{x:.6g}") for x in row] for side, row in zip(SIDES, safe, strict=True)})
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n ".join(json.dumps(layer) for layer in layers)
    path.write_text(f'{{"largest": [\n {lines}\n]}}\n')


class Scaled:
    """Weights whose cache's scales are those of a calibration."""

    def __init__(self, source: WeightSource, largest: Mapping[str, NDArray[np.float32]], cache_dtype: str) -> None:
        most = np.float32(MOST[cache_dtype])
        self._source, self._scales = source, {name: one / most for name, one in largest.items()}

    @property
    def plain(self) -> WeightSource:
        """The weights under it."""
        return self._source

    def has(self, name: str, kind: str) -> bool:
        """As engine.model.quant.Narrow has it."""
        return isinstance(self._source, Narrow) and self._source.has(name, kind)

    def quantised(self, name: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """As engine.model.quant.Narrow has it."""
        assert isinstance(self._source, Narrow)
        return self._source.quantised(name)

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """As WeightSource has it."""
        own = self._scales.get(name)
        return self._source.read(name, part) if own is None else own[part]


def calibrated(source: WeightSource, spec: ModelSpec, file: str, cache_dtype: str) -> WeightSource:
    """The weights, with the scales of a file where one is named. Raises ConfigError naming what is wrong with it."""
    return Scaled(source, read_largest(Path(file), spec), cache_dtype) if file else source
