"""Small steps captured once and replayed: CUDA graphs on NVIDIA, HIP graphs on AMD, through the same calls of torch.

A step is two pieces, forward (page tables, model, logits) and the choice of tokens, greedy, drawn from all of them or
from what top-k and top-p leave, so that a step whose rows ask for more replays the first and chooses call by call. All
captures share one pool of memory and one set of outputs: the device runs steps in order, and what a step leaves is
taken before the next one starts. What no capture can hold (attention over gathered pages, sums over devices, experts
that wait for their router) breaks a piece into several and runs between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from backends.api.limits import Limits
from backends.api.step import ScheduleStep
from backends.torch.branches import Layout
from backends.torch.buckets import Shape, fit
from backends.torch.caches import Caches
from backends.torch.inputs import Batch, Draws, Order, fill, spread
from backends.torch.step import Fed
from models_torch import ops

Play = Callable[[], object]
"""Runs a piece again, on what its inputs hold by then."""


class Recorder(Protocol):
    """Captures a part of a step, in one piece or, where something in it is `models_torch.ops.outside`, in several.
    taken: bytes that they hold."""

    def __call__(self, part: Play) -> Play: ...

    @property
    def taken(self) -> int: ...


def capture(part: Play, begin: Callable[[], Any], end: Callable[[], Play]) -> Play:
    """Capture a part of a step, in pieces around what is `outside`. begin, end: of a capture, which gives its
    replay; it computes nothing, and is replayed once before what stands behind it is called."""
    plays: list[Play] = []

    def outside(call: Callable[[], torch.Tensor]) -> torch.Tensor:
        plays.append(end())
        plays[-1]()
        made = call()

        def again() -> None:
            new = call()
            if new is not made:
                made.copy_(new)

        plays.append(again)
        begin()
        return made

    with ops.broken(outside):
        begin()
        part()
        plays.append(end())
    if len(plays) == 1:
        return plays[0]

    def play() -> None:
        for each in plays:
            each()

    return play


class Graph:
    """The Recorder of CUDA and HIP."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._before = _used()

    def __call__(self, part: Play) -> Play:
        """Run once, so that kernels are compiled and libraries loaded; then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            part()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graphs: list[torch.cuda.CUDAGraph] = []
        with ExitStack() as inside:

            def begin() -> None:
                graphs.append(torch.cuda.CUDAGraph())
                how = {"pool": self.pool, "capture_error_mode": "thread_local"}
                inside.enter_context(torch.cuda.graph(graphs[-1], **how))

            def end() -> Play:
                inside.close()
                return graphs[-1].replay

            return capture(part, begin, end)

    @property
    def taken(self) -> int:
        """Of the device's memory, what was taken since this was made."""
        return max(0, _used() - self._before)


def _used() -> int:
    """Bytes of the device that are in use; what torch keeps for later is given back first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info()
    return whole - free


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """A shape's pieces. buffer int64: its inputs. fed: what forward leaves. drawn: from all tokens; cut: from some."""

    buffer: torch.Tensor
    fed: Fed
    forward: Play
    greedy: Play
    drawn: Play
    cut: Play


class Graphs:
    """Steps that were captured, by shape.

    forward, sample: of backends.torch.step, bound to a model: (batch, out) -> Fed, Fed -> int64[2, O]. memory: bytes
    that captures may take: what would not fit stays uncaptured, the smallest steps last. pieces: whether something of
    a step runs between its captures. agree: whether any process of a mesh says so.
    """

    def __init__(
        self,
        limits: Limits,
        device: torch.device,
        forward: Callable[[Batch, torch.Tensor], Fed],
        sample: Callable[[Fed], torch.Tensor],
        memory: int,
        layout: Layout | None = None,
        pieces: bool = False,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self.limits, self.device, self.memory, self.layout = limits, device, memory, layout
        self.pieces, self.agree = pieces, agree
        self._forward, self._sample = forward, sample
        self.shapes: tuple[Shape, ...] = ()
        self.captured: dict[Shape, Captured] = {}
        self.taken = 0
        rows = limits.max_rows
        self.logits = torch.zeros((rows, limits.vocab), dtype=torch.float32, device=device)
        self.after = torch.zeros(rows, dtype=torch.int64, device=device)
        self.made = torch.zeros(2 * rows, dtype=torch.int64, device=device)
        self.numbers = torch.arange(rows, device=device)

    @property
    def programs(self) -> int:
        """Pieces that were captured."""
        return 4 * len(self.captured)

    def record(self, recorder: Recorder, shapes: Sequence[Shape]) -> None:
        """Capture, the largest first, whose memory the others use again. Changes what the slot of padding has."""
        fits = []
        for shape in shapes:
            if self.agree(recorder.taken > self.memory):
                break
            self.captured[shape] = self._capture(shape, recorder)
            fits.append(shape)
        self.shapes, self.taken = tuple(fits), recorder.taken

    def _capture(self, shape: Shape, recorder: Recorder) -> Captured:
        buffer = torch.zeros(sum(shape.fields().values()), dtype=torch.int64, device=self.device)
        buffer.copy_(torch.from_numpy(empty(shape, self.limits)))
        batch = spread(buffer, self.limits, shape, self.numbers, self.pieces)
        rows, draws = shape.rows, batch.draws
        assert draws is not None
        fed = Fed(batch=batch, after=self.after[:rows], logits=self.logits[:rows], taps={}, prompts=None)

        def forward() -> None:
            self.after[:rows].copy_(self._forward(batch, self.logits[:rows]).after)

        def choose(draws: Draws | None) -> None:
            made = self._sample(replace(fed, batch=replace(batch, draws=draws)))
            self.made[: 2 * rows].view(2, rows).copy_(made)

        return Captured(
            buffer=buffer,
            fed=fed,
            forward=recorder(forward),
            greedy=recorder(lambda: choose(None)),
            drawn=recorder(lambda: choose(replace(draws, widest=0, nucleus=False))),
            cut=recorder(lambda: choose(draws)),
        )

    def fit(self, rows: int, tokens: int, branched: bool) -> Shape | None:
        """The shape that a step of so many rows and tokens is padded to; None where it is run call by call."""
        return fit(self.shapes, rows, tokens, branched)

    def start(self, step: ScheduleStep, shape: Shape, caches: Caches) -> tuple[Fed, Order]:
        """Enqueue the forward of a step: one copy and one replay. Doesn't wait."""
        one = self.captured[shape]
        host = torch.empty(len(one.buffer), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        order, more = fill(step, self.limits, shape, host.numpy(), self.layout, self.pieces)
        for table, edits in zip(caches.tables, more, strict=True):
            if len(edits):
                sent = torch.from_numpy(edits)
                sent = (sent.pin_memory() if self.device.type == "cuda" else sent).to(self.device, non_blocking=True)
                table.view(-1).index_copy_(0, sent[:, 0], sent[:, 1])
        one.buffer.copy_(host, non_blocking=True)
        if one.fed.batch.now is not None:
            one.fed.batch.now.tell(step, self.limits, order, shape.rows)
        one.forward()
        return one.fed, order

    def choose(self, shape: Shape, step: ScheduleStep) -> torch.Tensor:
        """Enqueue the choice; int64[2, rows], which the next step writes over."""
        one, s = self.captured[shape], step.sampling
        drawn = (s.temperature > 0) & (step.output != 0)
        cut = drawn & ((s.top_k > 0) | (s.top_p < 1))
        (one.cut if cut.any() else one.drawn if drawn.any() else one.greedy)()
        return self.made[: 2 * shape.rows].view(2, shape.rows)


def empty(shape: Shape, limits: Limits) -> Any:
    """The buffer of a step that is all padding."""
    from backends.api.build import build

    out = torch.empty(sum(shape.fields().values()), dtype=torch.int64).numpy()
    fill(build(limits, 0, []), limits, shape, out)
    return out
