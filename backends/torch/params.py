"""Weights from a source to the device: one tensor a parameter, in the tree that the model code reads."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from backends.torch.quantising import draw, quantise
from backends.torch.staging import Staging, as_tensor
from engine.config import Resolved
from engine.mesh import shard_shape
from engine.model import quant
from engine.model.checkpoint import Checkpoint
from engine.model.params import Param, params
from engine.model.scales import Scaled
from engine.model.spec import ModelSpec
from engine.model.weights import RandomWeights, WeightSource, read_part
from models_torch.packed import pack
from models_torch.quantised import How, Quantised

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INNER = {"q": 1, "k": 1, "v": 1, "out": 2, "gate": 1, "up": 1, "down": 1, "head": 1}
"""Last part of a matrix's name -> how many trailing dimensions a product sums over."""


def upload(
    spec: ModelSpec, config: Resolved, source: WeightSource, device: torch.device, rank: int = 0
) -> dict[str, Any]:
    """Read this rank's part of every parameter: {"embed": ..., "layers": [{"attention": {"q": ...}}], ...}, on
    `device`: in the dtype of activations, but for what is quantised (engine.model.quant).

    On a CPU the matrices of a 16-bit checkpoint are packed where that is possible (models_torch.packed). On a GPU
    several threads send what they read through a few buffers, random weights are made there, and matrices quantised.
    Raises ModelError naming the tensor.
    """
    plain = source.plain if isinstance(source, Scaled) else source
    several = isinstance(plain, Checkpoint | RandomWeights)  # others may not be made for several threads
    staging = Staging(device) if several else Staging(device, threads=1)
    reading = Reading(spec, config, source, staging, rank)
    given = params(spec)
    tree: dict[str, Any] = {"layers": [{} for _ in spec.layers]}
    for name, value in zip(given, staging.each(reading.value, given.values()), strict=True):
        *path, leaf = name.split(".")
        at: Any = tree
        for part in path:
            at = at[int(part)] if isinstance(at, list) else at.setdefault(part, {})
        at[leaf] = value
    return tree


class Reading:
    """How one rank reads parameters, one after the other or side by side."""

    def __init__(self, spec: ModelSpec, config: Resolved, source: WeightSource, staging: Staging, rank: int) -> None:
        self._config, self._source, self._staging = config, source, staging
        self._device, self._at, self._tied = staging.device, {"tp": rank}, spec.tied
        self._dtype, self._how = DTYPES[config.dtype], how(config, staging.device)
        alone = config.mesh.size == 1 and self._device.type != "cpu"
        plain = source.plain if isinstance(source, Scaled) else source
        self._drawn = plain if alone and isinstance(plain, RandomWeights) else None
        self._tapes: dict[int, torch.Tensor] = {}

    def value(self, p: Param) -> Any:
        """A parameter as the model code takes it."""
        made = quant.form(p, self._config.quantise)
        if made is not None:
            return self._quantised(made)
        if p.exact:
            return self._staging.send(self._part(p)).float()
        if self._device.type != "cpu":
            drawn = self._drawn
            value = self._draw(drawn, p) if drawn else self._staging.send(self._part(p))
            return value.to(self._dtype)
        value = as_tensor(self._part(p))
        embed = p.name == "embed"
        inner = 1 if embed and self._tied else INNER.get(p.name.rpartition(".")[2])
        if p.axes[0] == "experts" and inner:
            return [_packed(one, inner, self._dtype) for one in value]
        return _packed(value, inner, self._dtype, embed)

    def _part(self, p: Param) -> Any:
        return read_part(self._source, p, self._config.mesh, self._at)

    def _draw(self, source: RandomWeights, p: Param) -> torch.Tensor:
        tape = source.tape(p)
        if id(tape) not in self._tapes:  # sent twice at worst; the source keeps it, so its id stays its own
            sent = self._staging.send(tape)
            torch.cuda.current_stream(self._device).synchronize()  # other threads read it on other streams
            self._tapes[id(tape)] = sent
        return draw(source, p, self._tapes[id(tape)])

    def _quantised(self, made: quant.Form) -> Quantised:
        """This rank's part of a quantised matrix."""
        p, config = made.param, self._config
        if self._device.type == "cpu" or quant.has(self._source, made):
            body, scale = made.cut(*quant.read_quantised(self._source, made), config.mesh, self._at)
            body, scale = self._staging.send(body), self._staging.send(scale)
        else:
            whole = self._draw(self._drawn, p) if self._drawn else self._staging.send(quant.read_whole(self._source, p))
            numbers, scales = quantise(whole.reshape(made.flat(p.shape)), made.kind)
            if not scales.isfinite().all():
                raise quant.not_finite(made)
            body, scale = (x.contiguous() for x in made.cut(numbers, scales, config.mesh, self._at))
        return Quantised(
            shape=shard_shape(p.shape, p.axes, config.mesh),
            body=body,
            scale=scale,
            by=quant.BY[made.kind],
            how=self._how,
        )


def how(config: Resolved, device: torch.device) -> How:
    """How products with quantised matrices are made: in deterministic mode plainly; on a GPU that has float8_e4m3fn by
    what it does with it itself."""
    if device.type == "cpu" or config.deterministic or config.dtype != "bfloat16" or find_spec("triton") is None:
        return "plain"
    version, toolkit = torch.cuda.get_device_capability(device), torch.version.cuda or ""
    return choose_how(version, toolkit, config.activations)


def choose_how(version: tuple[int, int], toolkit: str, activations: str) -> How:
    """version: the device's capability. toolkit: version of CUDA, "" on AMD, whose gfx942 has another float8."""
    if version < ((8, 9) if toolkit else (9, 5)):
        return "bits"
    if activations != "fp8":
        return "native"
    blocks = toolkit and tuple(map(int, toolkit.split(".")[:2])) >= (12, 9)
    return "library" if version == (9, 0) and blocks else "narrow"


def _packed(value: torch.Tensor, inner: int | None, dtype: torch.dtype, embed: bool = False) -> Any:
    """A parameter on a CPU, packed where that is possible. inner: as INNER has it, None for no matrix."""
    packed = pack(value, inner, dtype, embed) if inner else None
    return value.to(dtype) if packed is None else packed


def held(tree: Any) -> int:
    """Bytes of a tree of parameters."""
    if isinstance(tree, dict):
        return sum(held(part) for part in tree.values())
    if isinstance(tree, list):
        return sum(held(part) for part in tree)
    return int(tree.nbytes)
