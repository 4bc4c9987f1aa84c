"""Which backend suits this machine, and the facts of the device that it would run on."""

from __future__ import annotations

import os
import platform as machine
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from engine.config import Resolved
from engine.errors import ConfigError
from engine.model.spec import ModelSpec
from engine.resolve.facts import Device
from engine.target import MOST, Target, known

NVIDIA, AMD = Path("/dev/nvidiactl"), Path("/dev/kfd")
PCI = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"
PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin", "jax_rocm7_plugin", "jax_rocm60_plugin")
BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of CPUs (x86, ARM) that have bfloat16 instructions."""


def probe(backend: str = "auto", platform: str = "auto") -> Device:
    """The device that a backend finds. platform: "auto", "cpu", "gpu" or "tpu".

    Imports only that backend's library, and none to choose. Raises ConfigError, one line with cause and fix, for what
    isn't here.
    """
    gpu, tpu = _gpu(), _tpu()
    if backend == "auto":
        backend, why = _pick(gpu, tpu, platform)
    else:
        why = "backend.name"
    if backend == "reference":
        if platform not in ("auto", "cpu"):
            raise _absent(f"the reference backend runs on a CPU, not a {platform}; use jax or torch")
        return _cpu(backend, why)
    needs = {"jax": ("jax", "pip install jax"), "torch": ("torch", "pip install 'radixmesh[torch]', or use jax")}
    if backend not in needs:
        raise ConfigError(f"backend: unknown name {backend!r}; known are jax, torch, reference", field="backend")
    if find_spec(needs[backend][0]) is None:
        raise ConfigError(f"backend: {backend} is not installed: {needs[backend][1]}", field="backend")
    if platform == "tpu" and not tpu:
        raise _absent("no TPU is visible on this machine; use platform cpu or a TPU host")
    if platform == "gpu" and not gpu:
        raise _absent("no NVIDIA or AMD GPU is visible on this machine; use platform cpu")
    return _jax(platform, why, gpu, tpu) if backend == "jax" else _torch(platform, why, gpu)


def _pick(gpu: str, tpu: bool, platform: str) -> tuple[str, str]:
    """torch on NVIDIA and AMD, jax on TPUs and CPUs."""
    if gpu and platform in ("auto", "gpu"):
        return "torch", f"auto: an {gpu} GPU is visible"
    if tpu and platform in ("auto", "tpu"):
        return "jax", "auto: a TPU is visible"
    return "jax", "auto: no GPU is visible" if platform != "cpu" else "auto: jax runs on CPUs"


def _absent(what: str) -> ConfigError:
    return ConfigError(f"platform: {what}", field="backend.platform")


def _gpu() -> str:
    """Whose GPU is visible: "NVIDIA", "AMD" or ""."""
    return "NVIDIA" if NVIDIA.exists() else "AMD" if AMD.exists() else ""


def _tpu() -> bool:
    """Whether a TPU is on the PCI bus."""
    vendors = PCI.glob("*/vendor")
    return any(_read(v).strip() == GOOGLE for v in vendors) and find_spec("libtpu") is not None


def _jax(platform: str, why: str, gpu: str, tpu: bool) -> Device:
    plugin = any(find_spec(name) for name in PLUGINS)
    if platform == "gpu" and not plugin:
        raise _absent(f"jax has no plugin for the {gpu} GPU here: pip install 'radixmesh[cuda]', or use torch")
    if platform == "auto":
        platform = "tpu" if tpu else "gpu" if gpu and plugin else "cpu"
    if platform == "cpu":
        return _cpu("jax", why)
    from backends.jax.mesh import find_devices

    devices: Any = find_devices(platform)
    first = devices[0]
    stats = first.memory_stats() or {}
    free = int(stats.get("bytes_limit", 0)) - int(stats.get("bytes_in_use", 0))
    return Device(
        backend="jax",
        why=why,
        platform=platform,
        kind=first.device_kind,
        count=len(devices),
        memory_bytes=described(first.device_kind, free),
        bf16=platform == "tpu" or float(getattr(first, "compute_capability", "8.0")) >= 8,
    )


def described(kind: str, free: int) -> int:
    """The memory that is planned with on a device with `free` bytes: of a TPU that engine.target describes what stands
    there, so that a start decides what `radixmesh compile` and `explain --target` did; unless too little is free for
    what they decided, of which the resolver leaves enough."""
    chip = known(kind)
    return chip.memory if chip is not None and free >= MOST * chip.memory else free


def _torch(platform: str, why: str, gpu: str) -> Device:
    if platform == "tpu":
        raise _absent("the torch backend doesn't run on TPUs; use jax")
    if platform == "cpu" or not gpu:
        return _cpu("torch", why)
    import torch

    if not torch.cuda.is_available():
        extra = "rocm" if gpu == "AMD" else "cuda"
        raise _absent(
            f"this torch ({torch.__version__}) can't use the {gpu} GPU: pip install 'radixmesh[{extra}]' with a torch "
            "built for it, or use platform cpu"
        )
    return Device(
        backend="torch",
        why=why,
        platform="gpu",
        kind=torch.cuda.get_device_name(0),
        count=torch.cuda.device_count(),
        memory_bytes=torch.cuda.mem_get_info(0)[0],
        bf16=gpu == "AMD" or torch.cuda.get_device_capability(0) >= (8, 0),
    )


def _cpu(backend: str, why: str) -> Device:
    info = _read(Path("/proc/cpuinfo"))
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in info.splitlines())}
    flags = set(f"{fields.get('flags', '')} {fields.get('Features', '')}".split())
    return Device(
        backend=backend,
        why=why,
        platform="cpu",
        kind=fields.get("model name") or machine.machine(),
        count=1,
        memory_bytes=_memory(),
        bf16=bool(flags & BFLOAT16),
    )


def _memory() -> int:
    """Bytes of free memory, within the limit of the container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for line in _read(Path("/proc/meminfo")).splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    group = Path("/sys/fs/cgroup")
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        most, taken = _read(group / limit).strip(), _read(group / used).strip()
        if most.isdigit() and taken.isdigit():
            free = min(free, max(0, int(most) - int(taken)))
    return free


def _read(file: Path) -> str:
    """A file of /proc or /sys; "" where there is none."""
    try:
        return file.read_text()
    except OSError:
        return ""


def kernels(spec: ModelSpec, config: Resolved, target: Target | None = None) -> list[tuple[int, int, str]]:
    """Which attention kernel each layer would run, and why, by runs of layers that are alike: (first, last, kernel).

    target: where it would run, if not here.
    """
    if config.backend == "reference":
        return [(0, len(spec.layers) - 1, "numpy, written to be read")]
    choose = import_module(f"backends.{config.backend}.attend").choose
    if target is not None and target.chip is not None:
        from kernels_pallas.chip import named

        choose = partial(choose, on=named(target.chip.name.removeprefix("tpu")))
    if target is not None and config.backend == "torch":
        choose = partial(choose, on=target.arch)
    said = [choose(layer.mixer, config)[1] for layer in spec.layers]
    starts = [i for i, why in enumerate(said) if not i or said[i - 1] != why]
    return [(a, b - 1, said[a]) for a, b in zip(starts, [*starts[1:], len(said)], strict=True)]
