"""How many guesses a decoding row carries."""

from __future__ import annotations

from backends.api.limits import Limits
from engine.sched.request import Run


def guesses(run: Run, limits: Limits) -> int | None:
    """Device-made drafts for the next row, or None when the row must wait for an earlier verify to be collected.

    A masked row carries none: its mask is known for one position only. A row must stay inside max_len + max_draft.
    """
    if not limits.device_draft or run.masked:
        return 0
    if run.verifying > limits.run_ahead:
        return None
    if run.upper + 1 + limits.max_draft > limits.max_len + limits.max_draft:
        return None if run.verifying else 0
    return limits.max_draft
