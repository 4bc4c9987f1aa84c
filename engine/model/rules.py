"""Which tensors of a checkpoint fill which parameters, and how: renamed, transposed, split, interleaved, stacked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engine.model.params import Param


class Rule:
    """A tensor that is more than a parameter renamed.

    params: names of the parameters that it holds, one after the other along dimension `dim`; interleaved: of n, the
    k-th has every n-th index from k on. transposed: in the file the last two dimensions stand the other way round;
    `dim` counts them as the parameters have them.
    """

    __slots__ = ("dim", "interleaved", "params", "transposed")

    def __init__(self, *params: str, dim: int = 0, interleaved: bool = False, transposed: bool = False) -> None:
        self.params, self.dim = params, dim
        self.interleaved, self.transposed = interleaved, transposed


Rules: TypeAlias = Mapping[str, str | Rule]
"""Name of a checkpoint's tensor -> the parameter that it is, or a Rule. In names of both, {i} stands for each layer's
index; in a tensor's name {e} for each index along its parameter's first dimension: one expert of a stack."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One tensor of a checkpoint. expert: which index of the parameters' first dimension it holds; None = the whole."""

    name: str
    rule: Rule
    params: tuple[Param, ...]
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's, in the file."""
        shapes = [stored_shape(p, self.expert is not None) for p in self.params]
        out = list(shapes[0])
        out[self.rule.dim] = sum(shape[self.rule.dim] for shape in shapes)
        if self.rule.transposed:
            out[-2:] = out[:-3:-1]
        return tuple(out)

    def cut(self, tensor: NDArray[Any], name: str) -> NDArray[Any]:
        """The view of a tensor of `shape` that is the parameter `name`, or one expert of it."""
        at = tensor.swapaxes(-1, -2) if self.rule.transposed else tensor
        for param, part in self._parts():
            if param.name == name:
                return at[part].reshape(param.shape[0 if self.expert is None else 1 :])
        raise KeyError(name)

    def rows(self, name: str) -> slice | None:
        """Which rows of the tensor, a matrix, are the parameter `name`, or one expert of it; None where they are no
        run, or its columns are rows here."""
        if self.rule.dim or self.rule.interleaved or self.rule.transposed:
            return None
        return next(part[0] for param, part in self._parts() if param.name == name)

    def join(self, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """The tensor of the parameters' values, in the order of `params`: the inverse of `cut`."""
        turned = self.shape[:-2] + self.shape[:-3:-1] if self.rule.transposed else self.shape
        out = np.empty(turned, values[0].dtype)
        for (_, part), value in zip(self._parts(), values, strict=True):
            out[part] = value.reshape(out[part].shape)
        return np.ascontiguousarray(out.swapaxes(-1, -2) if self.rule.transposed else out)

    def _parts(self) -> Iterator[tuple[Param, tuple[slice, ...]]]:
        """Each parameter and its slice of the tensor, turned as the parameters are."""
        start, before = 0, (slice(None),) * self.rule.dim
        for k, param in enumerate(self.params):
            stop = start + stored_shape(param, self.expert is not None)[self.rule.dim]
            mine = slice(k, None, len(self.params)) if self.rule.interleaved else slice(start, stop)
            yield param, (*before, mine)
            start = stop


def origins(rules: Rules, layers: int, params: Mapping[str, Param]) -> dict[str, Origin]:
    """name of a tensor -> Origin, for all that the parameters of a model of so many layers are read from."""
    out: dict[str, Origin] = {}
    for pattern, given in rules.items():
        rule = Rule(given) if isinstance(given, str) else given
        for i in range(layers if "{i}" in pattern else 1):
            name = pattern.replace("{i}", str(i))
            names = [p.replace("{i}", str(i)) for p in rule.params]
            held = tuple(params[n] for n in names if n in params)
            if len(held) != len(names):  # a part that this model, or this layer, doesn't have
                continue
            if "{e}" not in name:
                out[name] = Origin(name=name, rule=rule, params=held, expert=None)
                continue
            for e in range(held[0].shape[0]):
                one = name.replace("{e}", str(e))
                out[one] = Origin(name=one, rule=rule, params=held, expert=e)
    return out


def stored_shape(param: Param, one: bool = False) -> tuple[int, ...]:
    """A parameter's shape in the file, where heads and their dimensions are one: [q_heads * head, hidden] for q.

    one: of a single index of its first dimension.
    """
    out: list[int] = []
    for i, (size, axis) in enumerate(zip(param.shape, param.axes, strict=True)):
        if axis == "head" and i and param.axes[i - 1] in ("q_heads", "kv_heads"):
            out[-1] *= size
        else:
            out.append(size)
    return tuple(out[1:] if one else out)
