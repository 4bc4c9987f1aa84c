"""The torch backend: steps on a CPU, or on an NVIDIA or AMD GPU, where small ones are replayed (graphs.py)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from backends.api.check import check_step
from backends.api.limits import Limits, choosing
from backends.api.protocol import Member, Status
from backends.api.seats import Asks, Scored, Seats, scored
from backends.api.step import TOKEN, U32, ScheduleStep, StepResult, Ticket
from backends.api.turns import may_collect, may_forward, may_sample, until
from backends.torch import attend, caches, joined, mesh, params, step, warmup
from backends.torch.branches import Layout, layout, pays
from backends.torch.buckets import Shape, ladder, one
from backends.torch.choosing import Scores, seat, send_masks, wishes
from backends.torch.comm import Comm
from backends.torch.flight import Flight, mark, result
from backends.torch.graphs import Graph, Graphs, Recorder
from backends.torch.inputs import Batch, Order, pack
from backends.torch.late import Late
from engine.config import Resolved
from engine.errors import BackendLost, ConfigError, DeviceFailed
from engine.model.scales import calibrated
from engine.model.spec import Experts, ModelSpec, eight
from engine.model.weights import WeightSource
from engine.resolve.memory import graph_bytes
from kernels_cuda.cascade import COST
from models_torch import experts
from models_torch.ops import over


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A step between forward and sample."""

    step: ScheduleStep
    fed: step.Fed
    asked: Scored | None
    version: int
    started: Any
    order: Order
    shape: Shape | None = None


class TorchBackend:
    """backends.api.protocol.Backend on torch. Not thread-safe: one thread calls it, as one loop plans the steps.

    On a CPU everything runs when it is called. member: which process of a mesh this is; all of them get the same calls,
    compute the same logits and choose the same tokens.
    """

    def __init__(self, spec: ModelSpec, config: Resolved, member: Member | None = None) -> None:
        for key in config.options:
            raise ConfigError(f"backend.torch.{key}: unknown key; torch has none", field=f"backend.torch.{key}")
        for field, known in (("dtype", params.DTYPES), ("cache_dtype", caches.DTYPES)):
            if getattr(config, field) not in known:
                names = ", ".join(known)
                raise ConfigError(f"{field}: torch knows {names}, not {getattr(config, field)}", field=field)
        self.spec, self.config = eight(spec, config.cache_dtype), config
        self.device = mesh.open_device(config, member)
        self.rank = 0 if member is None else member.rank
        self.comm = None if member is None else Comm(config.mesh, member, self.device)
        self.layout = self._layout()
        sharing = None if self.layout is None else (0, 0, 100) if config.cascade == "on" else COST
        limits = Limits.of(spec, config, taps=True, sharing=sharing, **choosing(config))
        most = max(limits.max_edits, max(limits.max_row_pages) * limits.slots)  # whatever all slots need
        self.limits = replace(limits, max_edits=most)
        self.weights: dict[str, Any] = {}
        self.version, self.ready, self.closed = 0, False, False
        self.graphs: Graphs | None = None
        self.late = Late()
        self.ran = {"called": 0, "replayed": 0, "together": 0}
        self.stages: dict[str, float] = {}
        self.caches: Any = None
        self.seats = Seats(self.limits.slots)
        self.waiting: Waiting | None = None
        self.flights: OrderedDict[Ticket, Flight] = OrderedDict()
        self._empty()

    def load(self, weights: WeightSource, version: int = 0) -> None:
        """Take weights; steps that are out keep the old ones. The new stand beside the old until they are whole, so
        that a ModelError (which names the tensor) changes nothing."""
        with self._device():
            weights = calibrated(weights, self.spec, self.config.scales, self.config.cache_dtype)
            tree = params.upload(self.spec, self.config, weights, self.device, self.rank)
            if self.device.type != "cpu":
                joined.join(tree)
            if self.graphs is None:
                self.weights = tree
            else:  # in order with the steps, whose captures read this memory
                joined.renew(self.weights, tree)
            if self.device.type != "cpu":
                del tree
                torch.cuda.empty_cache()  # what other streams made is not theirs to use again while steps read it
        self.version = version

    def warmup(self) -> None:
        """On a GPU steps of all kinds make its libraries load and reserve memory; then small ones are captured. On a
        CPU there is nothing to do."""
        self._open()
        began = time.monotonic()
        if self.device.type != "cpu" and self.weights and not self.flights:
            warmup.steps(self)
            with self._device():
                self._empty()
                dtype = params.DTYPES[self.config.dtype]
                warmup.experts(self.spec, self.weights, self.limits.max_tokens, dtype, self.device)
                if not self.config.deterministic:
                    warmup.attend(self.spec, self.config, self.caches, dtype, self.layout)
                    warmup.products(self.weights, self.limits.max_tokens)
            self.stages["kernels"] = time.monotonic() - began
            whole = self._paged() and not self._waits()
            if self.graphs is None and (self.config.graphs == "pieces" or (self.config.graphs and whole)):
                began = time.monotonic()
                self.capture(Graph())
                self.stages["captures"] = time.monotonic() - began
        self.late.listen(self.device)
        self.ready = True

    def capture(self, recorder: Recorder, shapes: Sequence[Shape] | None = None) -> None:
        """Capture steps of these shapes, where none are given those of the ladder, or the one of deterministic mode; no
        step may be out."""
        spec, config, limits = self.spec, self.config, self.limits

        def forward(batch: Batch, out: torch.Tensor) -> step.Fed:
            return step.forward(spec, config, limits, self.weights, self.caches, batch, (), out=out)

        def sample(fed: step.Fed) -> torch.Tensor:
            return step.sample(fed, config, self.caches)[0]

        memory, gathers = graph_bytes(spec, config), not self._paged()
        graphs = Graphs(limits, self.device, forward, sample, memory, self.layout, gathers, self._agree)
        if shapes is None:
            shapes = one(limits) if config.deterministic else ladder(limits, self.layout)
        if gathers:  # as many rows as are told of: of one token each
            shapes = [shape for shape in shapes if shape.even]
        with self._device():
            graphs.record(recorder, shapes)
        self.graphs = graphs

    def forward(self, step_: ScheduleStep) -> Ticket:
        """Enqueue the model; never waits for the device."""
        self._open()
        may_forward(step_, bool(self.weights), self.waiting and self.waiting.step, self.flights, self.limits)
        check_step(step_, self.limits)
        asks = Asks.of(step_)
        before = self.seats.before(step_, asks)
        asked = scored(step_, before)
        most = 0 if asked is None else int(asked.asked.max())
        branched = pays(self.layout, step_)
        shape = self._shape(step_, asks, asked, branched)
        with self._device(), self.late.inside(self.ready):
            started = mark(self.device)
            if len(step_.copies):
                self.caches.copy(self.limits, step_.copies)
            if shape is not None and self.graphs is not None:
                fed, order = self.graphs.start(step_, shape, self.caches)
                if asks.any:
                    more = wishes(step_, asks, order.rows, self.limits.vocab, self.device)
                    seat(self.caches.counts, more)
                    fed = replace(fed, batch=replace(fed.batch, wishes=more))
            else:
                layout = self.layout if branched else None
                batch = pack(step_, self.limits, self.device, asks, asked, layout)
                order = batch.order
                taps = step_.taps
                fed = step.forward(self.spec, self.config, self.limits, self.weights, self.caches, batch, taps, most)
        self.seats.take(step_, before, asks)
        self.ran["called" if shape is None else "replayed"] += 1
        self.ran["together"] += fed.batch.branches is not None
        self.waiting = Waiting(
            step=step_, fed=fed, asked=asked, version=self.version, started=started, order=order, shape=shape
        )
        return step_.step

    def _agree(self, yes: bool) -> bool:
        """Whether any process of the mesh says yes: all must capture alike."""
        if self.comm is None:
            return yes
        return bool(self.comm.psum(torch.tensor([float(yes)], device=self.device)).item())

    def _paged(self) -> bool:
        """Whether no layer gathers pages, of which the host must know how many there are."""
        mixers = [layer.mixer for layer in self.spec.layers]
        own = self.config.deterministic and any(m.window is not None for m in mixers)
        return not own and all(attend.choose(m, self.config)[0] == "triton" for m in mixers)

    def _waits(self) -> bool:
        """Whether the host waits for a router in each step, which no capture can."""
        feeds = [layer.feed for layer in self.spec.layers]
        return any(isinstance(feed, Experts) and experts.waits(feed, self.device) for feed in feeds)

    def _layout(self) -> Layout | None:
        """How rows that read the same pages are attended together; None where each is by itself."""
        if self.config.cascade == "off":
            return None
        mixers = [layer.mixer for layer in self.spec.layers if layer.mixer.window is None]
        kernel = self.device.type != "cpu" and all(attend.choose(m, self.config)[0] == "triton" for m in mixers)
        return layout(self.spec, self.config, attend.processors(self.device), kernel)

    def _shape(self, step_: ScheduleStep, asks: Asks, asked: Scored | None, branched: bool) -> Shape | None:
        """What a step is padded to, to be replayed; None where it must be run call by call: it is large, returns inner
        values or scores of prompts, or asks for more where a row returns no token."""
        if self.graphs is None or step_.taps or (asked is not None and len(asked.at)):
            return None
        if asks.any and not (step_.output & TOKEN).all():
            return None
        return self.graphs.fit(len(step_.lens), len(step_.tokens), branched)

    def sample(self, ticket: Ticket, masks: U32 | None = None) -> None:
        """Choose tokens, and send them on their way to the host."""
        self._open()
        now = self.waiting
        may_sample(ticket, now and now.step, masks, self.limits)
        assert now is not None
        self.waiting = None
        most = int(now.step.sampling.logprobs.max(initial=0))
        with self._device(), self.late.inside(self.ready):
            sent = None if masks is None else send_masks(masks, self.device)
            scores = None
            if now.shape is not None and now.fed.batch.wishes is None and self.graphs is not None:
                made = self.graphs.choose(now.shape, now.step)
            else:
                made, scores = step.sample(now.fed, self.config, self.caches, sent, most)
            made = self._bring(made)
            taps = {name: self._bring(value) for name, value in now.fed.taps.items()}
            self.flights[ticket] = Flight(
                version=now.version,
                asked=now.step.sampling.logprobs.copy(),
                order=now.order,
                started=now.started,
                made=made,
                taps=taps,
                scores=self._bring_scores(scores),
                wanted=now.asked,
                prompts=self._bring_scores(now.fed.prompts),
                done=mark(self.device),
            )

    def collect(self, ticket: Ticket, timeout: float = 60.0) -> StepResult:
        """Wait for the oldest step. timeout: seconds."""
        self._open()
        may_collect(ticket, self.flights)
        flight = self.flights[ticket]
        with self._device():
            if not until(flight.landed, timeout):
                self._fail(TimeoutError(f"step {ticket} gave no result after {timeout:g} s"))
            micros = flight.micros
        del self.flights[ticket]
        return result(ticket, flight, micros)

    def status(self) -> Status:
        """How the backend stands. Programs are the pieces of steps that were captured."""
        cache = 0 if self.closed else sum(c.nbytes for c in self.caches.groups)
        graphs = self.graphs
        return Status(
            ready=self.ready and bool(self.weights) and not self.closed,
            version=self.version,
            programs=0 if graphs is None else graphs.programs,
            compiles_after_ready=self.late.count,
            device=mesh.name(self.device),
            memory={"weights": params.held(self.weights), "cache": cache}
            | ({} if graphs is None else {"graphs": graphs.taken}),
            ran=dict(self.ran),
            stages=dict(self.stages),
        )

    def close(self) -> None:
        """Free the device. Every later call raises BackendLost."""
        self.closed, self.weights, self.waiting = True, {}, None
        self.flights.clear()
        self.caches = self.graphs = None
        if self.comm is not None:
            self.comm.close()
            self.comm = None

    def _open(self) -> None:
        if self.closed:
            raise BackendLost("the torch backend is closed")

    def _empty(self) -> None:
        """Empty caches, no slot seated, no ticket out."""
        self.waiting = None
        self.flights.clear()
        self.seats.clear()
        if self.graphs is not None:
            self.caches.clear()
            return
        self.caches = None  # the old ones must not stand beside the new
        self.caches = caches.make(self.limits, self.config.cache_dtype, self.device, self.config.mesh)

    @contextmanager
    def _device(self) -> Iterator[None]:
        """Around everything that runs on the device: no autograd, full float32, and its failures as DeviceFailed."""
        self._open()
        try:
            with torch.inference_mode(), mesh.exact(self.device, self.config.dtype), over(self.comm):
                yield
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            self._fail(error)

    def _fail(self, error: Exception) -> NoReturn:
        """Void all tickets and start from empty caches; a device that can't do even that is lost."""
        try:
            self._empty()
        except (torch.OutOfMemoryError, torch.AcceleratorError) as again:
            self.close()
            raise BackendLost(f"the device failed and can't be used again: {again}") from error
        raise DeviceFailed(f"the device failed: {error}") from error

    def _bring(self, value: torch.Tensor) -> torch.Tensor:
        """Start a copy to the host."""
        if self.device.type == "cpu":
            return value.clone() if self.graphs is not None else value
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)

    def _bring_scores(self, scores: Scores | None) -> Scores | None:
        return None if scores is None else Scores(*(self._bring(value) for value in scores))
