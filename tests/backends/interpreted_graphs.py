"""Padded steps with all kernels of GPUs interpreted, beside plain steps of torch: run as a program, as Triton must be
told so before it is imported. Prints whether the tokens are the same, and the kernels that ran."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from backends.api.conformance.bench import ASKS, generate
from backends.torch import attend, step
from models_torch import ops
from tests.backends.test_torch_graphs import DRAWN, Plain, opened, tokens

USED: set[str] = set()


def kernel(name: str, device: str) -> Any:
    USED.add(name)
    return import_module(f"kernels_cuda.{name}")


def main() -> None:
    torch.set_num_threads(1)
    asks = [*ASKS[:2], DRAWN[2]]
    want = tokens(generate(opened(), asks))
    ops.kernel = kernel  # type: ignore[assignment]
    attend.choose = step.kernel_of = lambda a, config: ("triton", "")  # type: ignore[assignment]
    recorder = Plain()
    print(tokens(generate(opened(recorder), asks)) == want and recorder.played > 0, *sorted(USED))


if __name__ == "__main__":
    main()
