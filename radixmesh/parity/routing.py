"""Which experts took a token. Two right readings may choose others where two scores are near; from there on every value
differs, so a comparison of values holds the choice still: the judge computes with the subject's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from backends.api.check import tap_names
from backends.api.step import I32
from engine.model.spec import Mlp, ModelSpec


def taps(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the values that tell the experts of each layer that has some: int [T, k]. Those that the contract of the
    backends knows; () for a model without experts."""
    known = tap_names(len(spec.layers))
    mixed = [i for i, layer in enumerate(spec.layers) if type(layer.feed) is not Mlp]
    return tuple(name for name in (f"layers.{i}.routing" for i in mixed) if name in known)


def routers(model: Any) -> dict[int, Any]:
    """layer -> the module of a Hugging Face model that chooses experts there: (logits, weights, experts) of tokens."""
    found = {}
    for i, layer in enumerate(model.model.layers):
        for module in layer.modules():
            if type(module).__name__.endswith("TopKRouter"):
                found[i] = module
    return found


@contextmanager
def routed(model: Any, pinned: Mapping[str, I32] | None = None) -> Any:
    """Within it, the experts that the model chooses are put into what this yields: tap's name -> int32[T, k] of the
    last forward, the largest weight first. pinned: experts to take instead, by tap's name; their weights follow from
    the model's own scores."""
    import torch

    chosen: dict[str, I32] = {}

    def hook(name: str) -> Any:
        def pin(module: Any, given: Any, out: Any) -> Any:
            scores, weights, experts = out
            if pinned is not None and name in pinned:
                experts = torch.from_numpy(np.asarray(pinned[name], np.int64))
                held = scores.float().softmax(-1).gather(-1, experts)
                if getattr(module, "norm_topk_prob", True):
                    held = held / held.sum(-1, keepdim=True)
                weights = held.to(weights.dtype)
            chosen[name] = experts.numpy().astype(np.int32)
            return scores, weights, experts

        return pin

    hooks = [m.register_forward_hook(hook(f"layers.{i}.routing")) for i, m in routers(model).items()]
    try:
        yield chosen
    finally:
        for h in hooks:
            h.remove()


def changed(judge: Mapping[str, I32], subject: Mapping[str, I32]) -> dict[str, float]:
    """Tap's name -> share of the tokens whose set of experts differs, for the layers that both tell."""
    out = {}
    for name in judge:
        if name in subject:
            a, b = (np.sort(np.asarray(x[name]), -1) for x in (judge, subject))
            out[name] = float((a != b).any(-1).mean())
    return out
