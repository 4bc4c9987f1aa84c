"""Choosing tokens and verifying guesses, row by row, with `backends.api.choice`. The counts for penalties live here."""

from __future__ import annotations

import numpy as np

from backends.api.choice import Choice, choose, unpack
from backends.api.step import F32, I32, U32, ScheduleStep


class Counts:
    """What each slot's request has seen: times a token stood in the prompt, times it was put out; int32[slots, V]."""

    def __init__(self, slots: int, vocab: int) -> None:
        self.prompt, self.made = np.zeros((2, slots, vocab), np.int32)

    def seat(self, step: ScheduleStep) -> None:
        """Forget the slots that are seated, then take the history that came with them."""
        seated = step.slots[step.starts >= 0]
        self.prompt[seated] = self.made[seated] = 0
        for row, token, is_output in step.sampling.history:
            (self.made if is_output else self.prompt)[step.slots[row], token] += 1


def sample(
    step: ScheduleStep, row: int, logits: F32, guesses: I32, position: int, counts: Counts, masks: U32 | None
) -> list[int]:
    """The tokens that a row makes: its own choice at each place, as long as the guess before it was right.

    logits float32[1 + drafts, V]; guesses int32[drafts]; position: of the first token made; masks uint32[1+K, W]: of
    this row. Each token is counted at once, so that place j knows the guesses accepted before it.
    """
    slot, vocab, tokens = step.slots[row], logits.shape[1], []
    bias = np.zeros(vocab, np.float32)
    for _, token, value in step.sampling.bias[step.sampling.bias[:, 0] == row]:
        bias[int(token)] += value
    for j in range(1 + len(guesses)):
        made = counts.made[slot]
        seen = (counts.prompt[slot] + made) > 0
        allowed = None if masks is None else unpack(masks[j], vocab)
        choice = Choice.of(step.sampling, row, seen=seen, made=made, bias=bias, allowed=allowed)
        tokens.append(choose(logits[j], choice, position + j))
        made[tokens[-1]] += 1
        if j < len(guesses) and guesses[j] != tokens[-1]:
            break
    return tokens
