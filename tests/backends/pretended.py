"""A GPU that is not here: tensors of a CPU that say they are an H200's, and Triton's kernels, bound as for a launch on
sm_90, neither compiled nor run. For programs of their own: nothing of it is undone.

No number is right: they only have to be allowed. Inside of `busy` it is an error to wait for the device, and of
`recording` to copy from or to the host, or to come upon another kernel.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, JitFunctionInfo

from backends.torch import attend, backend, params, staging
from backends.torch.graphs import Play

ONE, SOME = 1, 1 << 16
"""What stands in memory that kernels write, where it is no larger than so many numbers."""
CUDA = torch.device("cuda", 0)
WAITING = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu", "unique")
STATE = {"busy": 0, "recording": 0}


class There(torch.Tensor):
    """A tensor that says it is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True


class Pinned(torch.Tensor):
    """A tensor of the host that can be copied without waiting."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class Pretend(TorchFunctionMode):
    """What makes a tensor on a device, or brings one there or back."""

    def __torch_function__(self, function: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(function, "__name__", ""), dict(kwargs or {})
        given = [x for x in _leaves((*args, *kwargs.values())) if isinstance(x, torch.Tensor)]
        there, pinned = (any(isinstance(x, kind) for x in given) for kind in (There, Pinned))
        device = _device(args if name == "to" else (), kwargs)
        if there and STATE["busy"]:
            _refuse_waiting(name, args)
        if given and name in ("copy_", "to"):
            _copied(name, args, device)
        pinned |= bool(kwargs.pop("pin_memory", False))
        if name == "pin_memory":
            return args[0].as_subclass(Pinned)
        if device is not None:
            there = device.type == "cuda"
            if there:
                args = tuple("cpu" if x == device else x for x in args) if name == "to" else args
                kwargs |= {"device": "cpu"} if "device" in kwargs else {}
        elif name in ("cpu", "numpy"):
            there = False
        made = INSTEAD.get(name, function)(*args, **kwargs)
        if there and name in ("empty", "empty_like", "new_empty") and made.numel() < SOME:
            made.fill_(ONE)
        if there and name == "to" and given and made is args[0]:
            made = made.clone()
        kind = There if there else Pinned if pinned and name != "copy_" else torch.Tensor
        if isinstance(made, torch.Tensor):
            return made.as_subclass(kind)
        if not isinstance(made, tuple | list) or name == "tolist":
            return made
        parts = (x.as_subclass(kind) if isinstance(x, torch.Tensor) else x for x in made)
        return type(made)(parts) if type(made) in (tuple, list) else type(made)([*parts])


def _leaves(given: Any) -> Iterator[Any]:
    for x in given:
        if isinstance(x, tuple | list):
            yield from _leaves(x)
        else:
            yield x


def _linear(x: torch.Tensor, w: torch.Tensor, bias: Any = None) -> torch.Tensor:
    return x.new_ones((*x.shape[:-1], len(w)))


def _mm(x: torch.Tensor, w: torch.Tensor, out_dtype: Any = None, out: Any = None) -> torch.Tensor:
    made = torch.ones((len(x), w.shape[1]), dtype=out_dtype or x.dtype) if out is None else out
    return made


def _scaled_mm(x: torch.Tensor, w: torch.Tensor, **given: Any) -> torch.Tensor:
    return torch.ones((len(x), w.shape[1]), dtype=given["out_dtype"])


INSTEAD: dict[str, Callable[..., Any]] = {"linear": _linear, "mm": _mm, "_scaled_mm": _scaled_mm}
"""Products: of the right shape."""


def _refuse_waiting(name: str, args: Any) -> None:
    """Refuse what waits for the device: to read numbers of it, and shapes that follow from them."""
    assert name not in WAITING, f"{name} waits for the device"
    if name in ("__getitem__", "__setitem__"):
        at = args[1] if isinstance(args[1], tuple) else (args[1],)
        assert not any(isinstance(x, There) and x.dtype == torch.bool for x in at), "a mask waits for the device"


def _copied(name: str, args: Any, device: torch.device | None) -> None:
    """Refuse a copy between host and device that is captured, or for which the host waits."""
    if name == "to":
        host, between = args[0], device is not None and (device.type == "cuda") != isinstance(args[0], There)
    else:
        host = args[0] if isinstance(args[1], There) else args[1]
        between = isinstance(args[0], There) != isinstance(args[1], There)
    if between:
        assert not STATE["recording"], f"{name} from or to the host is captured"
        assert isinstance(host, Pinned) or not STATE["busy"], f"{name} of memory that is not pinned waits"


def _device(args: Any, kwargs: Any) -> torch.device | None:
    found = kwargs.get("device", next((x for x in args if isinstance(x, torch.device | str)), None))
    return None if found is None else torch.device(found)


class Compiled:
    """A kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *given: Any) -> None:
        return None

    def run(self, *given: Any) -> None:
        return None


KERNELS: list[str] = []
"""Those that were compiled, in turn, and what of."""
KNOWN: list[Any] = []
"""Functions that have some."""


def forget() -> None:
    """Nothing is compiled, and nobody listens."""
    for function in KNOWN:
        function.device_caches.clear()
    KERNELS.clear()
    KNOWN.clear()
    knobs.runtime.jit_post_compile_hook = None


def _do_compile(self: Any, key: Any, signature: Any, device: Any, *given: Any) -> Compiled:
    assert not STATE["recording"], f"{self.__name__} is compiled inside of a capture"
    KERNELS.append(f"{self.__name__} {key}")
    KNOWN.append(self)
    made = self.device_caches[device][0][key] = Compiled()
    if (hook := knobs.runtime.jit_post_compile_hook) is not None:
        info = JitFunctionInfo(self.__module__, self.__name__, self)
        hook(key=key, repr=self.__name__, fn=info, compile={}, is_manual_warmup=False, already_compiled=False)
    return made


class Event:
    """One that happened."""

    def __init__(self, **given: Any) -> None:
        pass

    def record(self, *given: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 0.0


class Recorder:
    """Of graphs: a piece is run, then run as it is captured, and played by running it."""

    taken = 1

    def __call__(self, piece: Play) -> Play:
        piece()
        with inside("recording"), inside("busy"):
            piece()
        return piece


@contextmanager
def inside(what: str) -> Iterator[None]:
    STATE[what] += 1
    try:
        yield
    finally:
        STATE[what] -= 1


def never_waits(call: Callable[..., Any]) -> Callable[..., Any]:
    """The same, inside of `busy` once the backend is ready."""

    def called(self: Any, *args: Any) -> Any:
        with inside("busy") if self.ready else nullcontext():
            return call(self, *args)

    return called


def begin() -> None:
    """From now on there is an H200."""
    device = types.SimpleNamespace(multi_processor_count=132)
    stream = types.SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None)
    answers = {"is_available": True, "current_device": 0, "device_count": 1, "get_device_capability": (9, 0)}
    answers |= {"get_device_name": "pretended", "get_device_properties": device, "mem_get_info": (100 << 30, 140 << 30)}
    answers |= {"synchronize": None, "empty_cache": None, "current_stream": stream, "_lazy_init": None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *given, answer=answer: answer)
    torch.cuda.Event, torch.cuda.Stream = Event, lambda *given: stream  # type: ignore[misc, assignment]
    torch.cuda.stream = torch.cuda.device = lambda *given: nullcontext()  # type: ignore[misc, assignment]
    torch.version.cuda = "13.0"
    target = types.SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(target)
    JITFunction._do_compile = _do_compile  # type: ignore[method-assign]
    params.Staging = lambda device, threads=1: staging.Staging(device, 1, 1 << 20)  # type: ignore[assignment, misc]
    attend.machine = lambda: ("cuda", "sm_90", True, False)  # type: ignore[assignment]
    backend.Graph = Recorder  # type: ignore[assignment, misc]
    for name in ("forward", "sample"):
        setattr(backend.TorchBackend, name, never_waits(getattr(backend.TorchBackend, name)))
    Pretend().__enter__()
