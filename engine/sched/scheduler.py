"""What runs next: `plan` chooses the rows of a step, `commit` takes what came of it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from backends.api.limits import Limits
from backends.api.step import OK, U32, Logprobs, StepResult
from engine.cache.pages import PagePool
from engine.cache.radix import NONE, Match, RadixTree, as_key
from engine.cache.sequence import SequenceCache
from engine.errors import ConfigError, Overloaded, RadixmeshError, RequestFailed, StepRefused
from engine.sched.admission import Room, capacity, check_request
from engine.sched.drafts import guesses
from engine.sched.masks import masks_of
from engine.sched.policy import order
from engine.sched.request import Output, Request, Row, Run
from engine.sched.rows import Draft, Plan, build, without
from engine.sched.scores import Scores
from engine.sched.stop import Finish, ending


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Where the pages of one cache group are; the four always sum to total, or a page is lost."""

    free: int
    evictable: int
    locked: int
    owned: int
    total: int


class Scheduler:
    """Requests in, steps out; results in, tokens out. Knows the hardware by its Limits alone.

    queue, queue_tokens: requests that may wait, and tokens of their prompts; None is no bound.
    prompt_tokens, cached_tokens: of the requests seated so far, and how many of them came from the prefix cache.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        policy: str = "lpm",
        radix: bool = True,
        queue: int | None = None,
        queue_tokens: int | None = None,
    ) -> None:
        for name, built in (("shards", limits.shards == 1), ("whole_rows", not limits.whole_rows)):
            if not built:
                raise ConfigError(f"{name}: not built yet in the scheduler", field=name)
        self.limits, self.policy, self.radix = limits, policy, radix
        self.room = capacity(limits)
        self.pools = [PagePool(n) for n in limits.pages]
        self.tree = RadixTree(limits.groups, self.pools)
        self.waiting: list[Run] = []
        self.running: list[Run] = []
        self.queue, self.queue_tokens = queue, queue_tokens
        self.preemptions = self.prompt_tokens = self.cached_tokens = 0
        self._runs: dict[str, Run] = {}
        self._slots = list(range(limits.slots - 1, -1, -1))
        self._flying: deque[Plan] = deque()
        self._copies: list[tuple[int, int, int, int]] = []
        self._stateful = [g for g, group in enumerate(limits.groups) if group.kind == "state"]
        self._steps = self._orders = 0

    # Requests

    def check(self, request: Request) -> None:
        """Raise InvalidRequest or ContextOverflow, naming the field, for what can't be honoured."""
        check_request(request, self.limits, self.room, self._runs)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises as `check` does, or Overloaded, and then nothing was queued."""
        self.check(request)
        self._bound(request)
        self._orders += 1
        masks = masks_of(request, self.limits.vocab)
        run = Run(request=request, order=self._orders, fill=request.tokens, masks=masks)
        self._runs[request.rid] = run
        self.waiting.append(run)

    def _bound(self, request: Request) -> None:
        """Raise Overloaded where a request would wait in a queue that is full."""
        waiting = len(self.waiting) - len(self._slots)  # a slot that is free seats one of them
        if self.queue is not None and waiting >= self.queue:
            raise Overloaded(f"the queue is full: {waiting} requests wait, at most {self.queue} may; try again later")
        if self.queue_tokens is None or waiting <= 0:
            return
        tokens = sum(len(run.fill) for run in self.waiting)
        if tokens + len(request.tokens) > self.queue_tokens:
            raise Overloaded(
                f"the queue is full: prompts of {tokens} tokens wait, at most {self.queue_tokens} may; try again later"
            )

    def flush(self) -> None:
        """Empty the prefix cache. Only when nothing is open."""
        assert not self._runs
        self.tree.flush()

    def abort(self, rid: str) -> Output | None:
        """End a request now. None when it isn't here any more."""
        run = self._runs.get(rid)
        return None if run is None else self._end(run, (), Finish(kind="abort"))

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._runs)

    def accounts(self) -> list[Account]:
        """Where the pages of each group are."""
        owned = [sum(len(r.cache.own[g]) for r in self.running if r.cache) for g in range(len(self.pools))]
        return [
            Account(free=p.free, evictable=e, locked=h - e, owned=o, total=p.total)
            for p, e, h, o in zip(self.pools, self.tree.evictable, self.tree.held, owned, strict=True)
        ]

    # Plan

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can run before something is collected."""
        running, waiting = list(self.running), self.waiting
        suspect = self._suspect()
        if suspect is not None:
            if any(row.run is not suspect for plan in self._flying for row in plan.rows if live(row)):
                return None
            for run in [r for r in running if r is not suspect]:  # they would only hold pages that it may need
                self._preempt(run)
            running, waiting = [r for r in running if r is suspect], [r for r in waiting if r is suspect]
        room, drafts, preempted = Room(self.limits), list[Draft](), self.preemptions
        # Copies run before the forward: those asked for while planning belong to the next step.
        copies, self._copies = self._copies, []
        for run in [r for r in running if r.decoding]:
            self._decode(run, room, drafts)
        for run in [r for r in running if not r.decoding]:
            self._prefill(run, room, drafts)
        if waiting and preempted == self.preemptions:
            self._admit(order(self.policy if self.radix else "fcfs", waiting, self._cached), room, drafts)
        if not drafts:
            self._copies = copies
            return None
        plan = build(self._steps, drafts, copies, self.limits)
        self._steps += 1
        self._flying.append(plan)
        return plan

    def _suspect(self) -> Run | None:
        """After a device failure, the next of those that must show alone that it wasn't them."""
        suspects = [r for r in (*self.running, *self.waiting) if r.alone_until]
        return min(suspects, key=lambda r: r.order, default=None)

    def _decode(self, run: Run, room: Room, drafts: list[Draft]) -> None:
        """One row that makes tokens from the slot's last one."""
        if run.state != "seated" or len(run.out) + run.flying >= self._most(run) or self._crowded(run):
            return
        if not self._mask_in_time(run, room):
            return
        k = guesses(run, self.limits)
        if k is None or not (room.fits(1 + k) and room.bias_fits(run)):
            return
        if not self._reserve(run, run.upper + 1 + k, drafts):
            return
        self._add(run, [-1, *(-2 - j for j in range(k))], k, room, drafts)

    def _prefill(self, run: Run, room: Room, drafts: list[Draft]) -> None:
        """The next chunk of what must be fed before tokens are made."""
        if run.state != "seated" or self._crowded(run):
            return
        n = min(len(run.fill) - run.fed, room.tokens)
        if run.fed + n < len(run.fill):
            # Chunks end on the page grid, where the tree can share them and state can be checkpointed.
            aligned = (run.fed + n) // self.tree.page * self.tree.page
            n = aligned - run.fed if aligned > run.fed else n
        makes = run.fed + n == len(run.fill) and self._most(run) > 0
        if n <= 0 or (makes and not self._mask_in_time(run, room)):
            return
        if not room.fits(n) or not room.history_fits(run) or (makes and not room.bias_fits(run)):
            return
        if not self._reserve(run, run.upper + n, drafts):
            return
        self._add(run, run.fill[run.fed : run.fed + n], 0, room, drafts)

    def _add(self, run: Run, tokens: Sequence[int], k: int, room: Room, drafts: list[Draft]) -> None:
        """Put a row into the step, if the step has room for its page edits."""
        cache = run.cache
        assert cache is not None
        if not room.edits_fit(cache.edits):
            return
        n, filling = len(tokens), not run.decoding
        prompt = len(run.request.tokens)
        score = max(run.unscored, run.fed + 1) if filling else prompt
        if filling:
            run.fed += n
        makes = run.decoding and self._most(run) > 0
        following = NONE if run.decoding else run.fill[run.fed]
        score = score if score <= min(run.fed, prompt - 1) else NONE
        made, masked = run.made, run.masked and makes
        seated = run.start >= 0
        wanted = seated and run.request.params.penalised
        history = [(t, i >= prompt) for i, t in enumerate(run.fill)] if wanted else []
        run.upper += n
        run.lower += n - k
        run.pending += 1
        run.flying += makes
        run.verifying += k > 0
        row = Row(run=run, epoch=run.epoch, fed=n, drafts=k, makes=makes, end=run.fed if filling else 0,
                  made=made, score=score)  # fmt: skip
        drafts.append(
            Draft(
                row=row,
                tokens=tokens,
                start=run.start,
                following=following,
                edits=cache.edits,
                read=list(cache.read),
                history=history,
            )
        )
        room.take(n, cache.edits, len(history), masked, len(run.request.params.logit_bias) if makes else 0)
        cache.sent()
        run.start = -1
        if filling and k == 0 and self.radix:
            self._checkpoint(run)

    def _checkpoint(self, run: Run) -> None:
        """Ask for a copy of the recurrent state after the row just added, where the tree could share it."""
        cache = run.cache
        if not self._stateful or run.fed % self.tree.page or cache is None:
            return
        if len(self._copies) + len(self._stateful) > self.limits.max_copies:
            return
        pages = {g: cache.checkpoint(g) for g in self._stateful}
        if NONE in pages.values():
            for g, page in pages.items():
                if page != NONE:
                    cache.give(g, page)
            return
        run.checkpoints[run.fed] = pages
        self._copies += [(g, 0, cache.write[g], page) for g, page in pages.items()]

    def _admit(self, waiting: Sequence[Run], room: Room, drafts: list[Draft]) -> None:
        """Seat waiting runs, in order, until one doesn't fit."""
        for run in waiting:
            if not (self._slots and room.rows and room.tokens):
                return
            if not self._seat(run):
                return
            self._prefill(run, room, drafts)

    def _estimate(self, run: Run, match: Match) -> list[int]:
        """Pages that seating a run needs now: what it feeds, and a page for each run that decodes beside it."""
        out, beside = [], len(self.running)
        for g, group in enumerate(self.limits.groups):
            if group.kind == "state":
                out.append(1)
                continue
            last = len(run.fill) if group.kind == "full" else min(len(run.fill), match.length + self.limits.max_tokens)
            out.append(-(-(last + 1 - match.base[g]) // group.page) - len(match.pages[g]) + beside)
        return out

    def _seat(self, run: Run) -> bool:
        """Give a run a slot and the longest cached prefix, if the pages that it needs can be had."""
        match = self._match(run)
        self.tree.lock(match.node)
        fits = self.tree.evict(self._estimate(run, match))
        if fits:
            run.slot = self._slots.pop()
            run.cache = SequenceCache(self.tree, self.pools, self.limits.max_row_pages, match)
            run.start = run.fed = run.settled = run.lower = run.upper = match.length
            if run.epoch == 0:
                run.cached = match.length
                self.prompt_tokens += len(run.fill)
                self.cached_tokens += match.length
            run.state = "seated"
            self.waiting.remove(run)
            self.running.append(run)
        self.tree.unlock(match.node)
        return fits

    def _match(self, run: Run) -> Match:
        # What feeds the token before one that must be scored can't come from the cache.
        limit = min(len(run.fill), run.unscored) - 1 if self.radix else 0
        return self.tree.match(run.request.namespace, as_key(run.fill), limit)

    def _cached(self, run: Run) -> int:
        return self._match(run).length

    def _most(self, run: Run) -> int:
        """Tokens that a run may make in all."""
        return min(run.request.params.max_new_tokens, self.room - len(run.request.tokens))

    def _crowded(self, run: Run) -> bool:
        """With pipeline stages, a slot may only have its share of the steps out."""
        return self.limits.stages > 1 and run.pending >= max(1, self.limits.depth // self.limits.stages)

    def _mask_in_time(self, run: Run, room: Room) -> bool:
        """Whether every token that a mask depends on is collected before sample() needs the mask: nothing of the run
        that makes tokens is out, or it is in the oldest step, which the loop collects first when depth is reached."""
        if run.masks is None or not run.masked:
            return True
        if not room.masks:
            return False
        if not run.masks.late:
            return True
        out = [i for i, plan in enumerate(self._flying) for row in plan.rows if row.run is run and live(row)]
        return not run.flying or (out == [0] and len(self._flying) + 1 >= self.limits.depth)

    def _reserve(self, run: Run, upto: int, drafts: Sequence[Draft]) -> bool:
        """Make room for a run to reach `upto`: evict, then preempt those that came last. False: it was preempted
        itself, or must wait."""
        cache = run.cache
        assert cache is not None
        cache.trim(run.lower)
        planned = {id(d.row.run) for d in drafts}
        while not self.tree.evict(cache.need(upto)):
            victims = [r for r in self.running if id(r) not in planned]
            victim = max(victims, key=lambda r: (-r.request.priority, r.order))
            self._preempt(victim)
            if victim is run:
                return False
        cache.grow(upto)
        return True

    def _preempt(self, run: Run) -> None:
        """Back to the queue. Tokens not collected yet are dropped; committed ones will be fed again."""
        self.preemptions += 1
        self._share(run, run.tokens, run.settled)
        self._unseat(run)
        self.waiting.append(run)

    def _unseat(self, run: Run) -> None:
        assert run.cache is not None
        dropped = {(g, page) for g, own in enumerate(run.cache.own) for page in own}
        self._copies = [c for c in self._copies if (c[0], c[3]) not in dropped]
        run.cache.release()
        run.cache = None
        self.running.remove(run)
        self._slots.append(run.slot)
        run.epoch += 1
        run.state, run.fill, run.fed = "waiting", run.tokens, 0
        run.flying = run.verifying = run.pending = 0
        run.checkpoints.clear()

    # Commit

    def masks(self, plan: Plan) -> U32 | None:
        """Vocabulary masks of a step's masked rows, for sample(); None when it has none."""
        rows = [row for row, masked in zip(plan.rows, plan.step.masked, strict=True) if masked]
        if not rows:
            return None
        out = np.full((len(rows), 1 + self.limits.max_draft, -(-self.limits.vocab // 32)), 0xFFFFFFFF, np.uint32)
        for mask, row in zip(out, rows, strict=True):
            if live(row) and row.run.masks is not None:
                mask[:] = row.run.masks.mask(row.made)
        return out

    def commit(self, plan: Plan, result: StepResult) -> list[Output]:
        """Take the result of the oldest step out. Rows of a run that ended or was preempted since are dropped."""
        oldest = self._flying.popleft()
        assert oldest is plan, "steps are committed in order"
        outputs = []
        for i, row in enumerate(plan.rows):
            if not live(row):
                continue
            run = row.run
            run.pending -= 1
            run.flying -= row.makes
            run.verifying -= row.drafts > 0
            if result.status[i] != OK:
                outputs.append(self._fail(run, RequestFailed("the model's output was not finite for this request")))
                continue
            count = int(result.counts[i]) if row.makes else 0
            moved = row.fed - row.drafts + count - 1 if row.makes else row.fed
            run.settled += moved
            run.upper -= row.fed - moved
            run.lower += moved - (row.fed - row.drafts)
            if row.end:
                self._share(run, run.fill, run.settled, run.checkpoints.pop(row.end, None))
            if run.settled >= run.alone_until:
                run.alone_until = 0
            told = None if row.score < 0 or result.prompt_logprobs is None else result.prompt_logprobs[i]
            if told is not None:
                run.scores += Scores.of(told, len(told.own))
            if row.makes:
                scores = None if result.logprobs is None else result.logprobs[i]
                outputs.append(self._extend(run, result.tokens[i, :count].tolist(), scores))
            elif row.end == len(run.fill) and not self._most(run):
                outputs.append(self._extend(run, ()))
        return outputs

    def _extend(self, run: Run, new: Sequence[int], scores: Logprobs | None = None) -> Output:
        """Take tokens that were made; none of them for a request that only reads its prompt."""
        q = run.request
        keep, finish = ending(new, len(run.out), self._most(run), q.params, q.eos, q.stopper)
        kept = tuple(new[:keep])
        first = not run.out
        run.out += kept
        if finish is None and run.masks is not None:
            run.masks.accept(kept)
        news = Output(rid=q.rid, tokens=kept, cached_tokens=run.cached)
        if finish is not None:
            news = self._end(run, kept, finish)
        if scores is not None:
            news = replace(news, logprobs=Scores.of(scores, keep))
        if first and q.params.prompt_logprobs is not None:
            news = replace(news, prompt_logprobs=run.scores)
        return news

    def _share(self, run: Run, tokens: Sequence[int], length: int, states: dict[int, int] | None = None) -> None:
        """Offer the first `length` positions to the tree; models with recurrent state only where a checkpoint is."""
        cache = run.cache
        if cache is None or not self.radix or (self._stateful and states is None):
            return
        whole = min(length, len(tokens)) // self.tree.page * self.tree.page
        given = [(states or {}).get(g, NONE) for g in range(len(self.pools))]
        cache.share(run.request.namespace, as_key(tokens[:whole]), given)
        for g, page in (states or {}).items():
            if page in cache.own[g]:  # the tree had one already
                cache.give(g, page)
                self._copies = [c for c in self._copies if (c[0], c[3]) != (g, page)]

    def _end(self, run: Run, tokens: tuple[int, ...], finish: Finish, error: RadixmeshError | None = None) -> Output:
        """The last news of a run. Rows of it in flight are harmless: they write past the committed end."""
        if run.state == "seated":
            if finish.kind != "error":
                self._share(run, run.tokens, run.settled)
            self._unseat(run)
        elif run.state == "waiting":
            self.waiting.remove(run)
        run.state = "ended"
        del self._runs[run.request.rid]
        return Output(rid=run.request.rid, tokens=tokens, finish=finish, cached_tokens=run.cached, error=error)

    def _fail(self, run: Run, error: RadixmeshError) -> Output:
        return self._end(run, (), Finish(kind="error"), error)

    # Failures

    def refused(self, plan: Plan, error: StepRefused) -> tuple[Plan | None, list[Output]]:
        """The newest step was refused before anything was enqueued: fail its culprits, return it without them."""
        newest = self._flying.pop()
        assert newest is plan
        bad = error.rows or tuple(range(len(plan.rows)))
        slim = without(plan, bad)
        outputs = [self._fail(plan.rows[i].run, error) for i in bad if live(plan.rows[i])]
        if slim is None:
            self._copies = [(g, s, a, b) for g, s, a, b in plan.step.copies.tolist()] + self._copies
        else:
            self._flying.append(slim)
        return slim, outputs

    def device_failed(self, error: RadixmeshError) -> list[Output]:
        """All steps out are void and the caches empty: requeue every run from its committed tokens.

        Runs that were in the steps out go on alone until they are past where they stood; one that was alone fails.
        """
        suspects = {id(row.run): row.run for plan in self._flying for row in plan.rows if live(row)}
        self._flying.clear()
        self._copies.clear()
        reached = {key: run.upper for key, run in suspects.items()}
        for run in list(self.running):
            self._unseat(run)
            self.waiting.append(run)
        self.tree.flush()
        for key, run in suspects.items():
            run.alone_until = max(run.alone_until, reached[key])
        if len(suspects) != 1:
            return []
        return [
            self._fail(run, RequestFailed(f"the device failed on this request: {error}")) for run in suspects.values()
        ]

    def lost(self, error: RadixmeshError) -> list[Output]:
        """The backend is gone: end every request and say why."""
        self._flying.clear()
        return [self._fail(run, error) for run in list(self._runs.values())]


def live(row: Row) -> bool:
    """Whether a row's run is still the one that was seated when the row was planned."""
    return row.run.state == "seated" and row.run.epoch == row.epoch
