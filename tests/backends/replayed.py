"""Captures on a CPU: operations are written down with the tensors that they read and made, and a replay runs them
again, in their order, each result brought to where it stood. As of a graph, nothing of Python is run again: what a step
is told by the host reaches a replay by the buffers that were captured, or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backends.torch.graphs import Play, capture


class Written(TorchDispatchMode):
    """Writes operations down while `lines` is a list."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Play] | None = None
        self.made: list[torch.Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        made = func(*args, **given)
        if self.lines is not None:
            assert func is not torch.ops.aten._local_scalar_dense.default, "waits for the device inside of a capture"
            if not (func.is_view and _stands(made, args)):
                self.lines.append(_line(func, args, given, made))
                self.made += _fresh(made, (*args, *given.values()))
        return made


def _stands(made: Any, args: Sequence[Any]) -> bool:
    """Whether what may be a view is one (`to` is where the dtype is the same)."""
    one = made if isinstance(made, torch.Tensor) else made[0]
    held = [x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)]
    return one.untyped_storage().data_ptr() in held


def _fresh(made: Any, args: Sequence[Any]) -> list[torch.Tensor]:
    """Results that stand nowhere else."""
    each = made if isinstance(made, tuple | list) else [made]
    return [x for x in each if isinstance(x, torch.Tensor) and not _stands(x, args)]


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

    def __call__(self, part: Play) -> Play:
        mode, pieces = Written(), 0

        def begin() -> None:
            nonlocal pieces
            pieces += 1
            mode.lines, mode.made = [], []

        def end() -> Play:
            lines, mode.lines = mode.lines or [], None
            for each in mode.made:  # a capture computes nothing
                each.fill_(77)
            return lambda: [line() for line in lines]

        part()
        if getattr(part, "__name__", "") != "forward":
            return part
        with mode:
            whole = capture(part, begin, end)
        self.pieces.append(pieces)

        def play() -> None:
            self.played += 1
            whole()

        return play
