"""Groups of rows that read the same pages (ScheduleStep.shared): what they cover, and what is wrong with them."""

from __future__ import annotations

import numpy as np

from backends.api.limits import Limits
from backends.api.step import I32, PageTable, ScheduleStep

Wrong = tuple[str, range]
"""What, and of which rows."""


def covered(shared: I32, rows: int) -> I32:
    """How many of its first positions each row reads with others, int32[R]."""
    out = np.zeros(rows, np.int32)
    for first, last, _, end in shared.tolist():  # what lies within comes later
        out[first : last + 1] = end + 1
    return out


def wrong(step: ScheduleStep, limits: Limits) -> Wrong | None:
    """What in a step's groups, whose entries are in range, can't be: they are nested, those of a row lie end to end
    from position 0, what they read is cached before the step, and what the step's edits say of their pages is the same
    for all rows."""
    if all(group.kind != "full" for group in limits.groups):
        return "only full groups keep a prefix", range(0)
    reach, around = [0] * len(step.slots), list[int]()
    for first, last, begin, end in step.shared.tolist():
        rows = range(first, last + 1)
        if first > last or begin > end:
            return "first comes after last", rows
        while around and around[-1] < first:
            around.pop()
        if around and last > around[-1]:
            return "groups are neither nested nor apart", rows
        if set(reach[first : last + 1]) != {begin}:
            return "a group begins elsewhere than what is around it ends, or comes before it", rows
        reach[first : last + 1] = [end + 1] * len(rows)
        around.append(last)
    cached = np.where(step.starts >= 0, step.starts, step.upper - step.lens)
    for row in np.flatnonzero(np.array(reach) > cached).tolist():
        return "positions that are not cached before the step", range(row, row + 1)
    for group, table in zip(limits.groups, step.tables, strict=True):
        if group.kind == "full" and isinstance(table, PageTable) and (found := _differ(step, group.page, table.edits)):
            return found
    return None


def _differ(step: ScheduleStep, page: int, edits: I32) -> Wrong | None:
    """Rows of a group whose tables are set to different pages where all of them read."""
    if not len(edits):
        return None
    told = {(slot, index): at for slot, index, at in edits.tolist()}
    slots = step.slots.tolist()
    for first, last, begin, end in step.shared.tolist():
        for index in range(begin // page, end // page + 1):
            if len({told[slot, index] for slot in slots[first : last + 1] if (slot, index) in told}) > 1:
                return f"entry {index} of the tables is not the same page", range(first, last + 1)
    return None
