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
    from position 0, whole pages, what they read is cached before the step, and what the step's edits say of their pages
    is the same for all rows."""
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
    covers = np.array(reach, np.int32)
    cached = np.where(step.starts >= 0, step.starts, step.upper - step.lens)
    for row in np.flatnonzero(covers > cached).tolist():
        return "positions that are not cached before the step", range(row, row + 1)
    for group, table in zip(limits.groups, step.tables, strict=True):
        if group.kind != "full" or not isinstance(table, PageTable):
            continue
        if np.count_nonzero(step.shared[:, 2] % group.page | (step.shared[:, 3] + 1) % group.page):
            return f"groups are no whole pages of {group.page}", range(0)
        if found := _differ(step, group.page, table.edits, covers):
            return found
    return None


def _differ(step: ScheduleStep, page: int, edits: I32, reach: I32) -> Wrong | None:
    """Rows of a group whose tables are set to different pages where all of them read. reach int32[R]: of `covered`."""
    row = np.full(int(edits[:, 0].max(initial=0)) + 1, -1)
    known = np.flatnonzero(step.slots < len(row))
    row[step.slots[known]] = known
    at = row[edits[:, 0]]
    inside = (at >= 0) & (edits[:, 1] * page < reach[at])
    if not np.count_nonzero(inside):
        return None
    told = dict(zip(zip(at[inside].tolist(), edits[inside, 1].tolist(), strict=True), edits[inside, 2], strict=True))
    for first, last, begin, end in step.shared.tolist():
        rows = range(first, last + 1)
        for index in {index for _, index in told if begin // page <= index <= end // page}:
            if len({told[r, index] for r in rows if (r, index) in told}) > 1:
                return f"entry {index} of the tables is not the same page", rows
    return None
