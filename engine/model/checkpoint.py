"""A folder of safetensors as a WeightSource. Every tensor fills parameters, every parameter is filled."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import ModelError
from engine.model.narrow import stored_as
from engine.model.pairs import Pairs
from engine.model.params import params
from engine.model.quant import SIDE
from engine.model.registry import FAMILIES
from engine.model.rules import Origin, origins
from engine.model.shards import DTYPES, FLOAT8, Tensor
from engine.model.spec import ModelSpec
from engine.model.stores import equal, map_file, open_tensors
from engine.model.weights import SCALES, check_scales

STORED = ("model.layers.{i}.self_attn.{side}_scale", "model.layers.{i}.self_attn.{side}_proj.output_scale")
"""Scales of a layer's cache, in checkpoints for caches of 8 bits: those of compressed-tensors, and older ones."""
BLOCK = 1 << 26
"""Bytes compared at once where a tied head stands beside its embedding."""


class Checkpoint:
    """The weights in a folder, of safetensors or of Orbax (engine.model.stores says where they lie).

    Reads headers when opened, and of the data only the bytes that `read` is asked for
    (and, where the head is tied and stored all the same, the embedding and the head, which must be equal)."""

    def __init__(self, path: str | Path, spec: ModelSpec) -> None:
        """Raises ModelError naming the file at fault, or the tensor: unused, missing, of a wrong shape or dtype."""
        family, layers = FAMILIES[spec.family], range(len(spec.layers))
        found = open_tensors(Path(path))
        self.path = Path(path)
        self._params = params(spec)
        self._files = {t.file: map_file(t.file) for t in found.values()}
        self._pairs = None if spec.narrow is None else Pairs(found, spec.narrow, self._files)
        self._kind = None if spec.narrow is None else stored_as(spec.narrow)
        if self._pairs is not None:
            found = self._pairs.tensors
        for pattern in family.BUFFERS:
            for i in layers:
                found.pop(pattern.replace("{i}", str(i)), None)
        wanted = origins(family.RULES, len(layers), self._params)
        self._scales = _take_scales(found, len(layers))
        if spec.tied:
            head, embed = (next(n for n, r in family.RULES.items() if r == name) for name in ("head", "embed"))
            if head in found and embed in found:
                self._check_tied(found.pop(head), found[embed])
        _check_names(Path(path), found, wanted)
        for name, origin in wanted.items():
            _check(found[name], origin)
        self._parts: dict[str, list[tuple[Tensor, Origin]]] = {name: [] for name in self._params}
        for name, origin in wanted.items():
            for param in origin.params:
                self._parts[param.name].append((found[name], origin))
        unfilled = next((name for name, parts in self._parts.items() if not parts), None)
        if unfilled is not None:
            raise ModelError(f"family {spec.family}: no rule fills parameter {unfilled!r}", field=unfilled)

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        """The slice `part` of a parameter, as a read-only view of the file where its bytes are aligned and in one
        tensor, or a copy."""
        if name.endswith(SCALES):
            return self._read_scales(int(name.split(".")[1]))[part]
        parts = self._parts.get(name)
        if parts is None:
            raise ModelError(f"no parameter is called {name!r}", field=name)
        if parts[0][1].expert is None:
            return np.require(self._whole(name, parts[0])[part], requirements="A")
        return np.stack([self._whole(name, one)[part[1:]] for one in parts[part[0]]])

    def _read_scales(self, layer: int) -> NDArray[np.float32]:
        """A layer's scales of a cache, float32[2, kv_heads]: the checkpoint's, one number a side, or ones."""
        heads = self._params[f"layers.{layer}.attention.k"].shape[0]
        out = np.ones((2, heads), np.float32)
        for side, tensor in enumerate(self._scales.get(layer, ())):
            number = np.array(tensor.view(self._files[tensor.file]), np.float32).reshape(1)
            out[side] = check_scales(number, f"{tensor.file}: tensor {tensor.name!r}")
        return out

    def has(self, name: str, kind: str) -> bool:
        """Whether a parameter's matrices are stored as `kind` (engine.model.quant), whole blocks of them."""
        pairs, parts = self._pairs, self._parts.get(name, [])
        if pairs is None or kind != self._kind:
            return False
        rows = [origin.rows(name) if tensor.name in pairs else None for tensor, origin in parts]
        step = SIDE if kind == "fp8" else 1
        return all(
            r is not None and r.start % step == 0 and (r.stop % step == 0 or r.stop == tensor.shape[0])
            for r, (tensor, _) in zip(rows, parts, strict=True)
        )

    def quantised(self, name: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Such a parameter, [*lead, out, in] and its scales, as engine.model.quant has them."""
        made = [self._stored(name, tensor, origin) for tensor, origin in self._parts[name]]
        if self._parts[name][0][1].expert is None:
            return made[0]
        return np.stack([body for body, _ in made]), np.stack([scale for _, scale in made])

    def _stored(self, name: str, tensor: Tensor, origin: Origin) -> tuple[NDArray[Any], NDArray[np.float32]]:
        rows = origin.rows(name)
        assert self._pairs is not None
        assert rows is not None
        body, scale = self._pairs.body(tensor.name)[rows], self._pairs.scale(tensor.name)
        if self._kind == "fp8":
            return body, scale[rows.start // SIDE : -(-rows.stop // SIDE)]
        return body, np.ascontiguousarray(scale[rows].T)

    def _whole(self, name: str, part: tuple[Tensor, Origin]) -> NDArray[Any]:
        """A view of what one tensor holds of a parameter."""
        tensor, origin = part
        return origin.cut(tensor.view(self._files[tensor.file]), name)

    def _check_tied(self, head: Tensor, embed: Tensor) -> None:
        """A head stored beside the embedding that it is tied to must equal it, bit for bit."""
        a, b = (t.view(self._files[t.file]) if t.dtype in DTYPES else None for t in (head, embed))
        same = (head.dtype, head.shape) == (embed.dtype, embed.shape)
        if not same or a is None or b is None or not equal(a, b, BLOCK):
            what = f"tie_word_embeddings is true, but tensor {head.name!r} differs from {embed.name!r}"
            raise ModelError(f"{head.file}: {what}; set it to false or remove the tensor", field=head.name)


def _take_scales(found: dict[str, Tensor], layers: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Layer -> the scales of its keys and values, which are taken out of the tensors found. They say how a cache of 8
    bits would hold what the weights make; a wider one needs none. Raises ModelError naming one that stands alone, or
    is no single number."""
    out = {}
    for i in range(layers):
        for pattern in STORED:
            names = [pattern.format(i=i, side=side) for side in "kv"]
            sides = [found.pop(name, None) for name in names]
            if sides == [None, None]:
                continue
            for tensor, name in zip(sides, names, strict=True):
                if tensor is None:
                    raise ModelError(f"tensor {name!r} is missing beside the other scale of layer {i}", field=name)
                if tensor.shape not in ((), (1,)) or tensor.dtype not in DTYPES:
                    what = f"{tensor.dtype} {list(tensor.shape)}, must be one float"
                    raise ModelError(f"{tensor.file}: tensor {name!r}, a scale of the cache, is {what}", field=name)
            key, value = sides
            assert key is not None
            assert value is not None
            out[i] = key, value
    return out


def _check_names(folder: Path, found: Collection[str], wanted: Collection[str]) -> None:
    """Refuse tensors that fill no parameter, and parameters that no tensor fills."""
    unused = [n for n in found if n not in wanted]
    missing = [n for n in wanted if n not in found]
    faults = [f"tensor {n!r} belongs to no parameter" for n in unused] + [f"tensor {n!r} is missing" for n in missing]
    if faults:
        more = f" (and {len(faults) - 3} more)" if len(faults) > 3 else ""
        what = "; ".join(faults[:3]) + more
        raise ModelError(f"{folder}: {what}; config.json and weights don't match", field=(unused + missing)[0])


def _check(tensor: Tensor, origin: Origin) -> None:
    """Refuse a tensor of another shape than its parameters ask for, or of a dtype that is not a plain float."""
    at = f"{tensor.file}: tensor {tensor.name!r}"
    if tensor.shape != origin.shape:
        what = f"{at} has shape {list(tensor.shape)}, config.json asks for {list(origin.shape)}"
        raise ModelError(f"{what}; they are not of one model", field=tensor.name)
    if tensor.dtype == FLOAT8:
        what = f"{at} has dtype {FLOAT8}, and config.json has no quantization_config to say how it is scaled"
        raise ModelError(what, field=tensor.name)
    if tensor.dtype not in DTYPES:
        raise ModelError(f"{at} has dtype {tensor.dtype}; {', '.join(DTYPES)} are supported", field=tensor.name)
