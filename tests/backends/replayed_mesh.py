"""One of two processes that compute a model together, whose steps are replayed in the pieces between their sums: RANK
FOLDER. Prints the tokens and how many pieces steps are in."""

from __future__ import annotations

import sys

import torch

from backends.api.build import Host
from backends.api.conformance.bench import ASKS, SPEC, Weights, config, generate
from backends.api.protocol import Member
from backends.torch.backend import TorchBackend
from backends.torch.buckets import ladder
from engine.mesh import MeshSpec
from tests.backends.replayed import Replayed


def main() -> None:
    torch.set_num_threads(1)
    member = Member(rank=int(sys.argv[1]), size=2, folder=sys.argv[2])
    backend = TorchBackend(SPEC, config("torch", mesh=MeshSpec(tp=2)), member)
    backend.load(Weights())
    recorder = Replayed()
    backend.capture(recorder, ladder(backend.limits))
    made = [m.tokens for m in generate(Host(backend), ASKS)]
    assert recorder.played > 0
    print(made, set(recorder.pieces))
    backend.close()


if __name__ == "__main__":
    main()
