"""One step on the device: the model over the fed tokens, then tokens chosen and the slots moved on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from backends.api.limits import Limits
from backends.torch import fixed
from backends.torch.attend import Attend, locate
from backends.torch.caches import Caches
from backends.torch.inputs import Batch
from backends.torch.params import DTYPES
from backends.torch.sampler import choose
from engine.config import Resolved
from engine.model.spec import ModelSpec
from models_torch import decoder


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """A step between forward and sample. after int64[O]: length of each row that returns a token. logits float32[O, V].
    taps: float32[T, ...], in the device's order."""

    batch: Batch
    after: torch.Tensor
    logits: torch.Tensor | None
    taps: dict[str, torch.Tensor]


def forward(
    spec: ModelSpec,
    config: Resolved,
    limits: Limits,
    weights: Mapping[str, Any],
    caches: Caches,
    batch: Batch,
    taps: Sequence[str],
) -> Fed:
    """Run the model; nothing here waits for the device. Changes caches."""
    for table, (entry, page) in zip(caches.tables, batch.edits, strict=True):
        if len(entry):
            table.view(-1).index_copy_(0, entry, page)
    before = torch.where(batch.starts >= 0, batch.starts, caches.length[batch.slots])
    after = before + batch.lens
    caches.length.index_copy_(0, batch.slots, after)
    positions = before[batch.row] + batch.offset
    tokens = batch.tokens
    if not batch.order.literal:
        tokens = torch.where(tokens >= 0, tokens, caches.last[batch.slots[batch.row]])
    attend: Any
    if config.deterministic:
        attend = fixed.Attend(fixed.locate(batch, caches, positions, limits))
    else:
        attend = Attend(config, batch, locate(batch, caches, before, positions, limits, DTYPES[config.dtype]))
    hidden, _, found = decoder.forward(spec, weights, tokens, positions, attend, caches, taps)
    logits = None
    if "logits" in taps or config.deterministic:  # the head too has one shape
        found["logits"] = decoder.logits(spec, weights, hidden)
        logits = found["logits"][batch.ends]
    elif len(batch.ends):
        last = hidden if len(batch.ends) == len(hidden) else hidden.index_select(0, batch.ends)
        logits = decoder.logits(spec, weights, last)
    inner = {name: found[name].float() for name in taps}
    return Fed(batch=batch, after=after[batch.chosen], logits=logits, taps=inner)


def sample(fed: Fed, caches: Caches) -> torch.Tensor:
    """Choose tokens and keep them as the slots' last. Returns int64[2, O]: tokens, and where logits are finite."""
    if fed.logits is None or not len(fed.batch.ends):
        return torch.zeros((2, 0), dtype=torch.int64)
    made = choose(fed.logits, fed.batch.draws, fed.after)
    caches.last.index_copy_(0, fed.batch.slots[fed.batch.chosen], made[0])
    return made
