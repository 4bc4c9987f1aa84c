"""What runs next: `plan` chooses the rows of a step, `commit` takes what came of it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from backends.api.limits import Limits
from backends.api.step import OK, U32, Logprobs, StepResult
from engine.cache.radix import NONE, Match, as_key
from engine.errors import ConfigError, DeadlineExceeded, Overloaded, RadixmeshError, RequestFailed, StepRefused
from engine.sched.admission import Estimate, capacity, check_request
from engine.sched.drafts import guesses
from engine.sched.masks import masks_of
from engine.sched.policy import WINDOW, Order, rank
from engine.sched.request import Output, Request, Row, Run
from engine.sched.rows import Draft, Plan, build, without
from engine.sched.scores import Scores
from engine.sched.sharing import LEAST, Sharing
from engine.sched.stop import Finish, ending, stopping
from engine.sched.store import Account, Store
from engine.sched.waiting import Waiting

RETRY = 8
"""Steps until those that didn't fit are tried again, where none came or went meanwhile."""


class Scheduler:
    """Requests in, steps out; results in, tokens out. Knows the hardware by its Limits alone, and the time by what it
    is told.

    policy: order of those that wait (engine.sched.policy). radix: keep prefixes. priority_preemption: by how much a
    request's priority must be above another's to take its seat, 0 = never. ageing: seconds of waiting that count as one
    priority, 0 = never. least: tokens of an uncached prefix that are worth waiting for when another computes them.
    queue, queue_tokens: requests that may wait, and tokens of their prompts; None is no bound. eviction: the cache's.
    prompt_tokens, cached_tokens: of the requests seated so far, and how many of them came from the prefix cache or from
    the run that computed them. repairs: how often `audit` found pages lost.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        policy: str = "lpm",
        radix: bool = True,
        priority_preemption: int = 10,
        ageing: float = 30.0,
        least: int = LEAST,
        queue: int | None = None,
        queue_tokens: int | None = None,
        eviction: str = "lru",
    ) -> None:
        for name, built in (("shards", limits.shards == 1), ("whole_rows", not limits.whole_rows)):
            if not built:
                raise ConfigError(f"{name}: not built yet in the scheduler", field=name)
        self.limits, self.radix = limits, radix
        self.priority_preemption, self.ageing = priority_preemption, ageing
        self.room = capacity(limits)
        self.store = Store(limits, radix, eviction)
        self.waiting = Waiting()
        self.running: dict[Run, None] = {}
        self.queue, self.queue_tokens = queue, queue_tokens
        self.preemptions = self.prompt_tokens = self.cached_tokens = self.repairs = 0
        self.estimate = Estimate()
        self._order = Order(policy if radix else "fcfs", ageing, lambda run: self.store.match(run).length)
        self._sharing = Sharing(limits.groups, self.store.page, least)
        self._runs: dict[str, Run] = {}
        self._suspects: dict[Run, None] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._slots = list(range(limits.slots - 1, -1, -1))
        self._flying: deque[Plan] = deque()
        self._last: Plan | None = None
        self._lowest: Run | None = None
        self._steps = self._orders = self._again = 0

    # Requests

    def check(self, request: Request) -> None:
        """Raise InvalidRequest or ContextOverflow, naming the field, for what can't be honoured."""
        check_request(request, self.limits, self.room, self._runs)

    def submit(self, request: Request, now: float) -> None:
        """Queue a request; now: seconds. Raises as `check` does, or Overloaded, and then nothing was queued."""
        self.check(request)
        self._bound(request)
        self._orders += 1
        params, masks = request.params, masks_of(request, self.limits.vocab)
        run = Run(
            request=request,
            order=self._orders,
            rank=rank(request.priority, now, self._orders, self.ageing),
            most=min(params.max_new_tokens, self.room - len(request.tokens)),
            ends=stopping(params, request.eos),
            watched=request.stopper is not None or masks is not None or params.logprobs is not None,
            steady=not (masks or params.logit_bias or self.limits.device_draft) and self.limits.stages == 1,
            masks=masks,
            fill=request.tokens,
            length=len(request.tokens),
            key=as_key(request.tokens),
        )
        self._runs[request.rid] = run
        self._again = 0
        self.waiting.add(run)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, run.order, request.rid))

    def _bound(self, request: Request) -> None:
        """Raise Overloaded where a request would wait in a queue that is full."""
        waiting = len(self.waiting) - len(self._slots)  # a slot that is free seats one of them
        if self.queue is not None and waiting >= self.queue:
            raise Overloaded(f"the queue is full: {waiting} requests wait, at most {self.queue} may; try again later")
        tokens = self.waiting.tokens
        if self.queue_tokens is not None and waiting > 0 and tokens + len(request.tokens) > self.queue_tokens:
            raise Overloaded(
                f"the queue is full: prompts of {tokens} tokens wait, at most {self.queue_tokens} may; try again later"
            )

    def flush(self) -> None:
        """Empty the prefix cache. Only when nothing is open."""
        assert not self._runs
        self.store.tree.flush()

    def abort(self, rid: str) -> Output | None:
        """End a request now. None when it isn't here any more."""
        run = self._runs.get(rid)
        return None if run is None else self._end(run, (), Finish(kind="abort"))

    def expire(self, now: float) -> list[Output]:
        """End the requests whose deadline has passed, waiting or running."""
        outputs = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, rid = heapq.heappop(self._deadlines)
            run = self._runs.get(rid)
            if run is not None and run.order == order:
                error = DeadlineExceeded(f"deadline: it passed after {len(run.out)} tokens", field="deadline")
                outputs.append(self._end(run, (), Finish(kind="abort"), error))
        return outputs

    def grow(self, limits: Limits) -> None:
        """Plan steps of this size from now on. limits: the ones that there are, with a larger max_tokens."""
        assert limits.max_tokens > self.limits.max_tokens
        self.limits = limits

    @property
    def busy(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._runs)

    def accounts(self) -> list[Account]:
        """Where the pages of each group are."""
        return self.store.accounts(self.running)

    # Plan

    def plan(self, now: float) -> Plan | None:
        """The next step, or None when nothing can run before something is collected. now: seconds, as in `submit`."""
        suspect = min(self._suspects, key=lambda r: r.order, default=None)
        if suspect is not None and not self._alone(suspect):
            return None
        if suspect is None:
            self._make_way()
        # Copies run before the forward: those asked for while planning belong to the next step.
        copies, self.store.copies = self.store.copies, []
        draft, preempted = Draft(self.limits, copies), self.preemptions
        filling = self._decode(draft)
        if filling and suspect is None and self.priority_preemption:
            self._admit(now, draft, before=filling[-1].rank[0] - self.priority_preemption)
        for run in filling:
            self._prefill(run, draft)
        if preempted == self.preemptions:
            if suspect is None:
                self._admit(now, draft)
            elif suspect.state == "waiting" and self._seat(suspect, draft):
                self._prefill(suspect, draft)
        if not draft.rows:
            self.store.copies = draft.copies + self.store.copies
            return None
        plan = build(self._steps, draft, self.limits, self._last)
        self._steps += 1
        self._flying.append(plan)
        self._last = plan
        return plan

    def _alone(self, suspect: Run) -> bool:
        """After a device failure, let nothing run but the next of those that must show that it wasn't them."""
        if any(row.run is not suspect for plan in self._flying for row in plan.rows if live(row)):
            return False
        for run in [r for r in self.running if r is not suspect]:  # they would only hold pages that it may need
            self._preempt(run)
        return True

    def _decode(self, draft: Draft) -> list[Run]:
        """A row for each run that makes tokens, while there is room. Gives the runs that must be fed first, by rank."""
        filling = []
        for run in list(self.running):
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
        if k is None or draft.tokens <= k or not self._reserve(run, run.upper + 1 + k, draft):
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
            run.newest = self._steps

    def _prefill(self, run: Run, draft: Draft) -> None:
        """The next chunk of what must be fed before tokens are made."""
        if run.state != "seated" or draft.free <= 0 or self._crowded(run):
            return
        if run.fed in run.stops and run.settled < run.fed:
            return  # what others wait for is shared before more of it leaves the window
        n = self._chunk(run, draft.tokens)
        makes = run.fed + n == run.length and run.most > 0
        if n <= 0 or (makes and not self._mask_in_time(run, draft)):
            return
        if not draft.history_fits(run) or (makes and not draft.bias_fits(run)):
            return
        if not self._reserve(run, run.upper + n, draft):
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
        run.upper += n
        run.lower += n
        run.pending += 1
        run.flying += makes
        run.newest = self._steps
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

    def _make_way(self) -> None:
        """Take the seat of the lowest where the first that waits is so much above it, and can't be seated otherwise."""
        for first in self.waiting.first(1) if self.priority_preemption else ():
            while self.running:
                if self._lowest is None:
                    self._lowest = max(self.running, key=lambda run: run.rank)
                if self._lowest.rank[0] - first.rank[0] < self.priority_preemption:
                    return
                self.estimate.count(self.running)
                match, free = self.store.match(first), self._slots and len(self.running) < self.limits.max_rows
                if self._leader(first, match) or (free and self._fits(first, match)):
                    return
                self._preempt(self._lowest)

    def _admit(self, now: float, draft: Draft, before: float | None = None) -> None:
        """Seat waiting runs, in order, until one doesn't fit. before: only those of a rank up to this."""
        first = self.waiting.first(1)
        if not (first and self._slots and draft.free > 0 and draft.tokens > 0) or self._steps < self._again:
            return
        if before is not None and first[0].rank[0] > before:
            return
        self.estimate.count(self.running)
        for run in self._order.sort(self.waiting.first(WINDOW), now):
            if not (self._slots and draft.free > 0 and draft.tokens > 0):
                return
            if before is not None and run.rank[0] > before:
                return
            if not self._seat(run, draft):
                self._again = self._steps + RETRY
                self.store.spare(self.running)
                return
            self._prefill(run, draft)

    def _estimate(self, run: Run, match: Match) -> list[int]:
        """Pages that seating a run needs now: what it feeds, a page for each run that decodes beside it, and a share of
        what all of them may still make."""
        out, beside = [], len(self.running)
        ahead = self.estimate.ahead(run) if beside else 0
        for g, group in enumerate(self.limits.groups):
            if group.kind == "state":
                out.append(1)
                continue
            last = run.length if group.kind == "full" else min(run.length, match.length + self.limits.max_tokens)
            out.append(-(-(last + 1 - match.base[g]) // group.page) - len(match.pages[g]) + beside)
            if group.kind == "full":
                out[g] += ahead // group.page
        return out

    def _fits(self, run: Run, match: Match) -> bool:
        return self.store.fits(match, self._estimate(run, match))

    def _seat(self, run: Run, draft: Draft) -> bool:
        """Give a run a slot and the longest cached prefix, if the pages that it needs can be had. True, too, when it
        does better to wait for another."""
        match = self.store.match(run)
        run.hint = match.length
        if (found := self._leader(run, match)) is not None:
            leader, upto = found
            self.waiting.follow(run, leader, upto)
            if self._sharing.exact(leader):
                leader.stops.add(upto)
            return True
        if not self._fits(run, match):
            return False
        self.waiting.remove(run)
        run.slot = self._slots.pop()
        self.store.open(run, match)
        run.start = run.fed = run.settled = run.lower = run.upper = self._branch(run, match.length, draft)
        if run.epoch == 0:
            run.cached = run.start
            self.prompt_tokens += run.length
            self.cached_tokens += run.start
        run.state = "seated"
        self.running[run] = self._lowest = None
        self.estimate.add(run)
        if self.store.keeps(run):
            self._sharing.begin(run)
            run.stops = self._sharing.stops(run, self.waiting.first(WINDOW))
        return True

    def _leader(self, run: Run, match: Match) -> tuple[Run, int] | None:
        return self._sharing.leader(run, match.length) if self.store.keeps(run) else None

    def _branch(self, run: Run, length: int, draft: Draft) -> int:
        """Where a run that has `length` matched tokens goes on: in the middle of the next page, when one of its group
        has computed that and it can be copied."""
        parent, last = self._sharing.parent(run), len(run.request.tokens) - 1
        if not self.store.keeps(run) or parent is None or parent.settled < last or run.unscored <= last:
            return length
        if not 0 < last - length < self.store.page:
            return length
        return last if self.store.branch(run, parent, last, draft.copies) else length

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

    def _reserve(self, run: Run, upto: int, draft: Draft) -> bool:
        """Make room for a run to reach `upto`: evict, then preempt those that came last. False: it was preempted
        itself, or must wait."""
        cache = run.cache
        assert cache is not None
        if upto <= cache.end and run.lower < cache.due:
            return True
        if run.lower >= cache.due:
            cache.trim(run.lower)
        while not self.store.tree.evict(cache.need(upto)):
            planned = {row.run for row in draft.rows}
            victim = max((r for r in self.running if r not in planned), key=lambda r: r.rank)
            self.estimate.rise()
            # Alone, it lacks just what is locked for it in the tree, where a node's window pages stay as one.
            run.cold |= len(self.running) == 1
            self._preempt(victim)
            if victim is run:
                return False
        cache.grow(upto)
        return True

    def _preempt(self, run: Run) -> None:
        """Back to the queue. Tokens not collected yet are dropped; committed ones will be fed again."""
        self.preemptions += 1
        self.store.share(run, run.settled)
        self._requeue(run)

    def _requeue(self, run: Run) -> None:
        """Back to the queue: what is committed will be fed again."""
        self._unseat(run)
        run.refill()
        self.waiting.add(run)

    def _unseat(self, run: Run) -> None:
        self._sharing.end(run)
        self.waiting.call(run)
        self.store.close(run)
        run.row = None
        del self.running[run]
        self._lowest = None
        self._again = 0
        self._slots.append(run.slot)
        run.epoch += 1
        run.state = "waiting"
        run.flying = run.verifying = run.pending = 0
        run.stops.clear()

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
        self.estimate.fall()
        outputs = []
        made = zip(plan.rows, result.tokens.tolist(), result.counts.tolist(), result.status.tolist(), strict=True)
        for i, (row, tokens, count, status) in enumerate(made):
            run = row.run
            if row is run.row and status == OK:  # one token; as below and as `ending` says, which takes longer
                token = tokens[0]
                run.settled += 1
                run.flying -= 1
                if run.alone_until:
                    self._passed(run)
                if token not in run.ends and len(run.out) + 1 < run.most and not run.watched:
                    run.out.append(token)
                    outputs.append(Output(rid=run.request.rid, tokens=(token,), cached_tokens=run.cached))
                else:
                    outputs.append(self._take(run, tokens[:1], _told(result.logprobs, i)))
                continue
            if run.state != "seated" or run.epoch != row.epoch:
                continue
            run.flying -= row.makes
            run.pending -= 1
            run.verifying -= row.drafts > 0
            if status != OK:
                outputs.append(self._fail(run, RequestFailed("the model's output was not finite for this request")))
                continue
            fed = len(row.tokens)
            moved = fed - row.drafts + count - 1 if row.makes else fed
            run.settled += moved
            run.upper -= fed - moved
            run.lower += moved - (fed - row.drafts)
            if row.end:
                self._fed(run, row.end)
            self._passed(run)
            if row.score >= 0 and (told := _told(result.prompt_logprobs, i)) is not None:
                run.scores += Scores.of(told, len(told.own))
            if row.makes:
                outputs.append(self._take(run, tokens[:count], _told(result.logprobs, i)))
            elif row.end == run.length and not run.most:
                outputs.append(self._take(run, ()))
        return outputs

    def _passed(self, run: Run) -> None:
        """A run that had to go on alone need not any more, once it is past where it stood."""
        if run.alone_until and run.settled >= run.alone_until:
            run.alone_until = 0
            del self._suspects[run]

    def _fed(self, run: Run, end: int) -> None:
        """A chunk is committed: share it, and call back those that waited for it."""
        self.store.share(run, run.settled, at=end)
        if end == run.length:
            self._sharing.done(run)
        if run.followers:
            self.waiting.call(run, run.settled)
            self._again = 0

    def _take(self, run: Run, new: Sequence[int], scores: Logprobs | None = None) -> Output:
        """Tokens were made; none of them for a request that only reads its prompt."""
        q = run.request
        keep, finish = ending(new, len(run.out), run.most, q.params, q.eos, q.stopper)
        kept, first = tuple(new[:keep]), not run.out
        run.out += kept
        if finish is None:
            if run.masks is not None:
                run.masks.accept(kept)
            news = Output(rid=q.rid, tokens=kept, cached_tokens=run.cached)
        else:
            news = self._end(run, kept, finish)
        if scores is not None:
            news.logprobs = Scores.of(scores, keep)
        if first and q.params.prompt_logprobs is not None:
            news.prompt_logprobs = run.scores
        return news

    def _end(self, run: Run, tokens: tuple[int, ...], finish: Finish, error: RadixmeshError | None = None) -> Output:
        """The last news of a run. Rows of it in flight are harmless: they write past the committed end."""
        if run.state == "seated":
            if finish.kind != "error":
                self.store.share(run, run.settled)
            self._unseat(run)
        elif run.state == "waiting":
            self.waiting.remove(run)
        run.state = "ended"
        self._suspects.pop(run, None)
        del self._runs[run.request.rid]
        return Output(rid=run.request.rid, tokens=tokens, finish=finish, cached_tokens=run.cached, error=error)

    def _fail(self, run: Run, error: RadixmeshError) -> Output:
        return self._end(run, (), Finish(kind="error"), error)

    # Failures

    def refused(self, plan: Plan, error: StepRefused) -> tuple[Plan | None, list[Output]]:
        """The newest step was refused before anything was enqueued: fail its culprits, return it without them."""
        newest = self._flying.pop()
        assert newest is plan
        self._last = None
        bad = error.rows or tuple(range(len(plan.rows)))
        slim = without(plan, bad)
        outputs = [self._fail(plan.rows[i].run, error) for i in bad if live(plan.rows[i])]
        if slim is None:
            self.store.copies = [(g, s, a, b) for g, s, a, b in plan.step.copies.tolist()] + self.store.copies
        else:
            self._flying.append(slim)
        return slim, outputs

    def device_failed(self, error: RadixmeshError) -> list[Output]:
        """All steps out are void and the caches empty: requeue every run from its committed tokens.

        Runs that were in the steps out go on alone until they are past where they stood; one that was alone fails.
        """
        suspects = {row.run: row.run.upper for plan in self._flying for row in plan.rows if live(row)}
        self._flying.clear()
        for run in list(self.running):
            self._requeue(run)
        self.store.copies.clear()
        self.store.tree.flush()
        for run, reached in suspects.items():
            run.alone_until = max(run.alone_until, reached)
            self._suspects[run] = None
        if len(suspects) != 1:
            return []
        return [self._fail(run, RequestFailed(f"the device failed on this request: {error}")) for run in suspects]

    def audit(self) -> bool:
        """Whether every page is somewhere. Where one is lost, which is a fault in this program, that is mended, and the
        runs that read what is gone are requeued from what is committed."""
        if all(account.sound for account in self.accounts()):
            return True
        self.repairs += 1
        for run in self.store.mend(self.running):
            self._requeue(run)
        return False

    def lost(self, error: RadixmeshError) -> list[Output]:
        """The backend is gone: end every request and say why."""
        self._flying.clear()
        return [self._fail(run, error) for run in list(self._runs.values())]


def _told(scores: Sequence[Logprobs | None] | None, row: int) -> Logprobs | None:
    """What a step tells of one row."""
    return None if scores is None else scores[row]


def live(row: Row) -> bool:
    """Whether a row's run is still the one that was seated when the row was planned."""
    return row.run.state == "seated" and row.run.epoch == row.epoch
