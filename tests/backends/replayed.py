"""Captures on a CPU: operations are written down with the tensors that they read and made, and a replay runs them
again, in their order, each result brought to where it stood. As of a graph, nothing of Python is run again: what a step
is told by the host reaches a replay by the buffers that were captured, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.torch.graphs import Play, again
from models_torch import ops


class Written(TorchDispatchMode):
    """Writes operations down while `lines` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Play] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        made = func(*args, **given)
        if self.lines is not None:
            assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device inside of a capture"
            if not (func.is_view and _stands(made, args)):
                self.lines.append(_line(func, args, given, made))
        return made


def _stands(made: Any, args: Sequence[Any]) -> bool:
    """Whether what may be a view is one (`to` is where the dtype is the same)."""
    one = made if isinstance(made, torch.Tensor) else made[0]
    held = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
    return one.untyped_storage().data_ptr() in held


def _line(func: Any, args: Sequence[Any], kwargs: dict[str, Any], made: Any) -> Play:
    def play() -> None:
        _bring(func(*args, **kwargs), made)

    return play


def _bring(new: Any, made: Any) -> None:
    """Results to where those of the capture stand."""
    if isinstance(made, torch.Tensor):
        if new.data_ptr() != made.data_ptr():
            assert new.shape == made.shape, "a capture has one shape"
            made.copy_(new)
    elif isinstance(made, tuple | list):
        for a, b in zip(new, made, strict=True):
            _bring(a, b)


class Replayed:
    """A backends.torch.graphs.Recorder of forwards; the choice of tokens, which has shapes that numbers decide where no
    kernel does it, is called. played: forwards that were replayed; pieces: how many each that was captured is in."""

    def __init__(self) -> None:
        self.played = 0
        self.pieces: list[int] = []

    @property
    def taken(self) -> int:
        return 0

    def __call__(self, piece: Play) -> Play:
        plays: list[Play] = []
        mode = Written()

        def begin() -> None:
            lines: list[Play] = []
            plays.append(lambda: [line() for line in lines])
            mode.lines = lines

        def outside(call: Callable[[], torch.Tensor]) -> torch.Tensor:
            mode.lines = None
            made = call()
            plays.append(again(call, made))
            begin()
            return made

        piece()
        if getattr(piece, "__name__", "") != "forward":
            return piece
        with mode, ops.broken(outside):
            begin()
            piece()
        self.pieces.append((len(plays) + 1) // 2)

        def play() -> None:
            self.played += 1
            for each in plays:
                each()

        return play
