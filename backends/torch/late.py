"""Kernels that Triton compiles on the way of a step: none should be, once a backend is ready."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch


class Late:
    """Counts them. Triton tells whoever asks, in one place of the process: what asked before is told too."""

    def __init__(self) -> None:
        self.count, self._on, self._told = 0, False, False

    def listen(self, device: torch.device) -> None:
        """From now on, where the device has Triton's kernels."""
        if self._told or device.type != "cuda" or find_spec("triton") is None:
            return
        self._told = True
        from triton import knobs

        before = knobs.runtime.jit_post_compile_hook

        def told(**event: Any) -> Any:
            self.count += self._on
            return before(**event) if before is not None else None

        knobs.runtime.jit_post_compile_hook = told

    @contextmanager
    def inside(self, ready: bool) -> Iterator[None]:
        """Around a step of a backend."""
        self._on = ready
        try:
            yield
        finally:
            self._on = False
