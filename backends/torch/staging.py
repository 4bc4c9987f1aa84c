"""Arrays of a source to a device, by several threads, through pinned memory of a fixed size."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

T = TypeVar("T")
THREADS, SIZE = 8, 16 << 20
"""Threads, and bytes of a buffer: each thread has two, one that it fills while the other is copied."""
BITS = {"bfloat16": (np.uint16, torch.bfloat16), "float8_e4m3fn": (np.uint8, torch.float8_e4m3fn)}
"""Dtypes of ml_dtypes that numpy and torch know by their bits alone."""


def bits(read: NDArray[Any]) -> tuple[NDArray[Any], torch.dtype | None]:
    """An array as torch can take it, and the dtype that its bits stand for; None: they stand for themselves."""
    if read.dtype.name not in BITS:
        return read, None
    kind, dtype = BITS[read.dtype.name]
    return read.view(kind), dtype


def as_tensor(read: NDArray[Any]) -> torch.Tensor:
    """A copy of an array on the CPU."""
    plain, dtype = bits(np.ascontiguousarray(read))
    out = torch.from_numpy(plain.copy())
    return out if dtype is None else out.view(dtype)


class Staging:
    """Sends arrays to one device. On a CPU there is nothing to send to: one thread copies."""

    def __init__(self, device: torch.device, threads: int = THREADS, size: int = SIZE) -> None:
        """size: bytes of a buffer. The host holds at most 2 * threads of them, whatever is sent."""
        self.device, self._size = device, size
        self._threads = 1 if device.type == "cpu" else threads
        self._own = threading.local()

    def each(self, make: Callable[[Any], T], given: Iterable[Any]) -> list[T]:
        """`make` of each, side by side, in their order. The first error, in their order, is raised, and nothing that
        had not begun begins. All that was sent is there when this returns."""
        if self._threads == 1:
            return [make(one) for one in given]
        with ThreadPoolExecutor(self._threads) as pool:
            waiting = [pool.submit(self._inside, make, one) for one in given]
            try:
                made = [one.result() for one in waiting]
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        torch.cuda.synchronize(self.device)
        return made

    def _inside(self, make: Callable[[Any], T], one: Any) -> T:
        """What a thread does: on its own stream, whose memory later steps use, after all is there."""
        with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(self._lane().stream):
            return make(one)

    def send(self, read: NDArray[Any]) -> torch.Tensor:
        """An array on the device, of its own dtype."""
        if self.device.type == "cpu":
            return as_tensor(read)
        plain, dtype = bits(read)
        out = torch.empty(plain.shape, dtype=torch.from_numpy(np.empty(0, plain.dtype)).dtype, device=self.device)
        if plain.ndim and plain.size:
            for to, part in pieces(out, plain, self._size):
                self._lane().send(to, part)
        elif plain.size:
            out.fill_(plain.item())
        return out if dtype is None else out.view(dtype)

    def _lane(self) -> Lane:
        """This thread's."""
        lane: Lane | None = getattr(self._own, "lane", None)
        if lane is None:
            lane = self._own.lane = Lane(self.device, self._size)
        return lane


class Lane:
    """A stream and two pinned buffers of a thread."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.stream = torch.cuda.Stream(device)
        self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._done: list[Any] = [None, None]
        self._turn = 0

    def send(self, out: torch.Tensor, part: NDArray[Any]) -> None:
        """Start the copy of an array to the device, once the buffer's last one is over."""
        turn, self._turn = self._turn, 1 - self._turn
        if self._done[turn] is not None:
            self._done[turn].synchronize()
        held = self._buffers[turn][: part.nbytes]
        np.copyto(held.numpy().view(part.dtype).reshape(part.shape), part)
        out.copy_(held.view(out.dtype).view(out.shape), non_blocking=True)
        self._done[turn] = torch.cuda.Event()
        self._done[turn].record()


def pieces(out: torch.Tensor, read: NDArray[Any], size: int) -> Iterator[tuple[torch.Tensor, NDArray[Any]]]:
    """An array cut into pieces of at most `size` bytes, and where each goes: whole rows, or parts of a row where one is
    larger."""
    row = math.prod(read.shape[1:]) * read.dtype.itemsize
    if row > size:
        for to, one in zip(out, read, strict=True):
            yield from pieces(to, one, size)
        return
    step = max(1, size // max(1, row))
    for at in range(0, len(read), step):
        yield out[at : at + step], read[at : at + step]
