"""What a benchmark writes down beside its figures."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.installed import version

PACKAGES = ("radixmesh", "jax", "jaxlib", "torch", "transformers", "triton", "numpy")


def machine() -> dict[str, Any]:
    """Processor, cores, operating system, GPU where torch sees one."""
    import os

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "").split()
    out: dict[str, Any] = {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16": sorted({"avx512_bf16", "amx_bf16"} & set(flags)),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def versions() -> dict[str, str]:
    """Versions of what counts."""
    return {name: found for name in PACKAGES if (found := version(name))}


def commit() -> str:
    """The commit that is measured, with "+" when the tree has changed since; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    if head.returncode:
        return ""
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip()[:12] + ("+" if dirty.stdout.strip() else "")


def command(arguments: Sequence[str]) -> str:
    """The command line, without keys."""
    line = " ".join(["radixmesh", *arguments])
    return re.sub(r"(api[_-]key[= ])\S+", r"\1***", line)


def made() -> dict[str, Any]:
    """Where, with what and how figures are made, now."""
    return {"command": command(sys.argv[1:]), "commit": commit(), "machine": machine(), "versions": versions()}


def write(path: Path | None, name: str, figures: Any, plot: Path | None = None) -> None:
    """One JSON file: the figures, and where, with what and how they were made; and their charts (radixmesh.bench.plot).
    None: not that."""
    record = {"benchmark": name, **made(), "figures": figures}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    if plot is not None:
        from radixmesh.bench.plot import draw

        draw(plot, record)


def _lines(path: str) -> list[str]:
    file = Path(path)
    return file.read_text().splitlines() if file.is_file() else []
