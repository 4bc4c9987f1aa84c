"""One step on the device: the model over the fed tokens, then tokens chosen and the slots moved on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from backends.api.limits import Limits
from backends.torch import fixed
from backends.torch.attend import Attend
from backends.torch.attend import choose as kernel_of
from backends.torch.buckets import padded
from backends.torch.caches import Caches
from backends.torch.choosing import Scores, adjust, count, score, score_prompts, seat
from backends.torch.inputs import Batch
from backends.torch.sampler import choose
from engine.config import Resolved
from engine.model.spec import ModelSpec
from models_torch import decoder, ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Fed:
    """A step between forward and sample. after int64[O]: length of each row that returns a token. logits float32[O, V].
    taps: float32[T, ...], in the device's order. prompts: scores of prompts' tokens, in the order of Wishes.at."""

    batch: Batch
    after: torch.Tensor
    logits: torch.Tensor | None
    taps: dict[str, torch.Tensor]
    prompts: Scores | None


def forward(
    spec: ModelSpec,
    config: Resolved,
    limits: Limits,
    weights: Mapping[str, Any],
    caches: Caches,
    batch: Batch,
    taps: Sequence[str],
    alternatives: int = 0,
    out: torch.Tensor | None = None,
) -> Fed:
    """Run the model; nothing here waits for the device. Changes caches. alternatives: beside a prompt's token. out
    float32[O, V]: where the logits are put."""
    wishes = batch.wishes
    if wishes is not None:
        seat(caches.counts, wishes)
    before, after, positions, tokens, seen = _begin(spec, config, limits, caches, batch)
    attend: Any
    if config.deterministic:
        attend = fixed.Attend(config, batch, caches, positions, limits)
    else:
        attend = Attend(config, batch, caches, before, positions, limits, seen)
    ends = _ends(batch, config, taps)
    hidden, _, found = decoder.forward(spec, weights, tokens, positions, attend, caches, taps, ends)
    logits = None
    if "logits" in taps or config.deterministic:  # the head too has one shape
        found["logits"] = _logits(spec, weights, hidden)
        logits = (
            found["logits"][batch.ends] if out is None else torch.index_select(found["logits"], 0, batch.ends, out=out)
        )
    elif len(batch.ends):
        last = hidden if ends is not None or _every(batch) else hidden.index_select(0, batch.ends)
        logits = _logits(spec, weights, last, out)[: len(batch.ends)]
    prompts = None
    if wishes is not None and len(wishes.at) and config.deterministic:
        prompts = fixed.score(found["logits"].index_select(0, wishes.at), wishes.token, alternatives)
    elif wishes is not None and len(wishes.at):
        prompts = score_prompts(hidden, wishes, alternatives, lambda x: _logits(spec, weights, x))
    inner = {name: found[name].float() for name in taps}
    after = after if batch.shape is not None else after[batch.chosen]  # of a padded step, all rows return a token
    return Fed(batch=batch, after=after, logits=logits, taps=inner, prompts=prompts)


def _begin(
    spec: ModelSpec, config: Resolved, limits: Limits, caches: Caches, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequence[Any] | None]:
    """Edit the page tables and move the lengths on: int64 lengths before and after [R], positions and ids of tokens
    [T]; and, where a kernel does all of it, what each cache group is to the rows."""
    fused = ops.kernel("begin", batch.slots.device.type) if batch.shape is not None else None
    if fused is not None and all(kernel_of(layer.mixer, config)[0] == "triton" for layer in spec.layers):
        step = fused.Step(*(getattr(batch, name) for name in fused.Step._fields))
        groups = [
            fused.Group(table, base, *edits, group.page)
            for table, base, edits, group in zip(caches.tables, batch.base, batch.edits, limits.groups, strict=True)
        ]
        return fused.begin(step, groups, caches.length, caches.last)  # type: ignore[no-any-return]
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
    return before, after, positions, tokens, None


def _every(batch: Batch) -> bool:
    """Whether the last tokens of the rows that return one are all tokens of the step, in order."""
    return len(batch.ends) == len(batch.tokens) and (batch.shape is None or batch.shape.even)


def _ends(batch: Batch, config: Resolved, taps: Sequence[str]) -> torch.Tensor | None:
    """The tokens that the last layer is computed to its end for; None: all of them. One, whatever it is, where none is
    asked for. On a GPU as many as a captured step of so many rows has, whose kernels are loaded: the first launch of
    another makes the host wait for the device."""
    scores = batch.wishes is not None and len(batch.wishes.at) > 0
    if taps or scores or config.deterministic or _every(batch):
        return None
    ends = batch.ends if len(batch.ends) else batch.first[:1]
    more = 0 if ends.device.type == "cpu" or batch.shape is not None else padded(len(ends)) - len(ends)
    return functional.pad(ends, (0, more)) if more else ends


def _logits(
    spec: ModelSpec, weights: Mapping[str, Any], x: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normed hidden states [R, hidden] -> float32[R, V] on every device; put into `out` where one is given."""
    if out is not None and spec.logit_cap is None and ops.parts("vocab") == 1:
        return ops.unembed(x, weights["embed"] if spec.tied else weights["head"], out)
    y = ops.gather(decoder.logits(spec, weights, x), "vocab", 1)[:, : spec.vocab]
    return y if out is None else out.copy_(y)


def sample(
    fed: Fed, config: Resolved, caches: Caches, masks: torch.Tensor | None = None, alternatives: int = 0
) -> tuple[torch.Tensor, Scores | None]:
    """Choose tokens and keep them as the slots' last. masks int32[M, W]. alternatives: beside a token that is told.

    Returns int64[2, O]: tokens, and where logits are finite; and the logprobs of those told.
    """
    raw, wishes = fed.logits, fed.batch.wishes
    if raw is None or not len(fed.batch.ends):
        return torch.zeros((2, 0), dtype=torch.int64), None
    pick = fixed.choose if config.deterministic else choose
    if wishes is None:
        made = pick(raw, fed.batch.draws, fed.after, None)
    else:
        made = pick(adjust(raw, wishes, caches.counts, masks), fed.batch.draws, fed.after, raw)
    scores = None
    if wishes is not None:
        count(caches.counts, wishes, made[0])
        if len(wishes.told):
            at, told = wishes.told, fixed.score if config.deterministic else score
            scores = told(raw.index_select(0, at), made[0].index_select(0, at), alternatives)
    caches.last.index_copy_(0, fed.batch.into, made[0])
    return made, scores
