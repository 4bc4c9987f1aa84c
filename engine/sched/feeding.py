"""The rows of a step: a chunk of what must be fed, or one that makes tokens."""

from __future__ import annotations

from collections import deque

from backends.api.limits import Limits
from engine.cache.radix import NONE
from engine.sched.drafts import guesses
from engine.sched.request import Row, Run
from engine.sched.rows import Draft, Plan
from engine.sched.seating import Seating


class Feeding:
    """Makes rows while there is room. flying: the steps that are out, oldest first."""

    def __init__(self, limits: Limits, seating: Seating, flying: deque[Plan]) -> None:
        self.limits, self.seating, self.store, self._flying = limits, seating, seating.store, flying

    def decode(self, draft: Draft) -> list[Run]:
        """A row for each run that makes tokens, while there is room. Gives the runs that must be fed first, by rank."""
        filling = []
        for run in list(self.seating.running):
            row, cache = run.row, run.cache
            if (len(run.out) + run.flying >= run.most and run.decoding) or draft.free <= 0 or draft.tokens <= 0:
                continue
            if row is not None and cache is not None and run.upper < cache.still:  # nothing but one position more
                draft.rows.append(row)
                draft.free -= 1
                draft.tokens -= 1
                run.upper += 1
                run.lower += 1
                run.flying += 1
            elif not run.decoding:
                filling.append(run)
            elif run.state == "seated":
                self._extend(run, draft)
        return sorted((run for run in filling if run.state == "seated"), key=lambda run: run.rank)

    def _extend(self, run: Run, draft: Draft) -> None:
        """One row that makes tokens from the slot's last one."""
        k: int | None = 0
        if not run.steady:
            if self._crowded(run) or not self._mask_in_time(run, draft):
                return
            k = guesses(run, self.limits) if draft.bias_fits(run) else None
        if k is None or draft.tokens <= k or not self.seating.reserve(run, run.upper + 1 + k, draft):
            return
        assert run.cache is not None
        if not draft.edits_fit(run.cache):
            return
        row = run.row
        if row is None:
            tokens = (-1, *[-2 - j for j in range(k)])
            row = Row(run=run, epoch=run.epoch, tokens=tokens, drafts=k, read=run.cache.write, made=run.made)
            run.row = row if run.steady else None
        draft.add(row, run.cache)
        run.upper += 1 + k
        run.lower += 1
        run.flying += 1
        if not run.steady:
            run.pending += 1
            run.verifying += k > 0
            run.newest = draft.number

    def prefill(self, run: Run, draft: Draft) -> None:
        """The next chunk of what must be fed before tokens are made."""
        if run.state != "seated" or draft.free <= 0 or self._crowded(run):
            return
        if run.fed in run.stops and run.settled < run.fed:
            return  # what others wait for is shared before more of it leaves the window
        if draft.fed and draft.tokens < min(self.store.page, run.length - run.fed):
            return  # a row more for a few tokens, which the next step feeds with others
        n = self._chunk(run, draft.tokens)
        makes = run.fed + n == run.length and run.most > 0
        if n <= 0 or (makes and not self._mask_in_time(run, draft)):
            return
        if not draft.history_fits(run) or (makes and not draft.bias_fits(run)):
            return
        if not self.seating.reserve(run, run.upper + n, draft):
            return
        assert run.cache is not None
        if not draft.edits_fit(run.cache):
            return
        begin, run.fed = run.fed, run.fed + n
        prompt = len(run.request.tokens)
        wanted = run.start >= 0 and run.request.params.penalised
        score = max(run.unscored, begin + 1)
        row = Row(
            run=run,
            epoch=run.epoch,
            tokens=run.fill[begin : run.fed],
            makes=makes,
            end=run.fed,
            start=run.start,
            following=NONE if run.decoding else run.fill[run.fed],
            read=run.cache.read,
            history=[(t, i >= prompt) for i, t in enumerate(run.fill)] if wanted else (),
            made=run.made,
            score=score if score <= min(run.fed, prompt - 1) else NONE,
        )
        draft.add(row, run.cache)
        draft.fed = True
        run.upper += n
        run.lower += n
        run.pending += 1
        run.flying += makes
        run.newest = draft.number
        run.start = NONE
        self.store.checkpoint(run)

    def _chunk(self, run: Run, room: int) -> int:
        """Tokens of the next chunk. Chunks end on the page grid, where the tree can share them and state can be
        checkpointed, and where others wait for them."""
        end = min(run.length, run.fed + room)
        if end < run.length:
            aligned = end // self.store.page * self.store.page
            end = aligned if aligned > run.fed else end
        return min([end, *(stop for stop in run.stops if stop > run.fed)]) - run.fed

    def _crowded(self, run: Run) -> bool:
        """With pipeline stages, a slot may only have its share of the steps out."""
        return self.limits.stages > 1 and run.pending >= max(1, self.limits.depth // self.limits.stages)

    def _mask_in_time(self, run: Run, draft: Draft) -> bool:
        """Whether every token that a mask depends on is collected before sample() needs the mask: nothing of the run
        that makes tokens is out, or it is in the oldest step, which the loop collects first when depth is reached."""
        if run.masks is None or not run.masked:
            return True
        if draft.masks <= 0:
            return False
        if not run.flying or not run.masks.late:
            return True
        oldest = self._flying[0].step.step
        return run.pending == 1 and run.newest == oldest and len(self._flying) + 1 >= self.limits.depth
