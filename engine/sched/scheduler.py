"""What runs next: `plan` chooses the rows of a step, `commit` takes what came of it."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence

import numpy as np

from backends.api.limits import Limits
from backends.api.step import OK, U32, Logprobs, StepResult
from engine.errors import ConfigError, DeadlineExceeded, Overloaded, RadixmeshError, RequestFailed, StepRefused
from engine.sched.admission import capacity, check_request
from engine.sched.feeding import Feeding
from engine.sched.masks import masks_of
from engine.sched.policy import rank
from engine.sched.request import Output, Request, Row, Run
from engine.sched.rows import Draft, Plan, build, without
from engine.sched.scores import Scores
from engine.sched.seating import Seating
from engine.sched.sharing import LEAST
from engine.sched.stop import Finish, ending, stopping
from engine.sched.store import Account, Store


class Scheduler:
    """Requests in, steps out; results in, tokens out. Knows the hardware by its Limits alone, and the time by what it
    is told.

    policy: order of those that wait (engine.sched.policy). radix: keep prefixes. priority_preemption: by how much a
    request's priority must be above another's to take its seat, 0 = never. ageing: seconds of waiting that count as one
    priority, 0 = never. least: tokens of an uncached prefix that are worth waiting for when another computes them.
    queue, queue_tokens: requests that may wait, and tokens of their prompts; None is no bound. eviction, events: the
    cache's.
    repairs: how often `audit` found pages lost. version: of the weights that made the last tokens committed.
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
        events: bool = False,
    ) -> None:
        for name, built in (("shards", limits.shards == 1), ("whole_rows", not limits.whole_rows)):
            if not built:
                raise ConfigError(f"{name}: not built yet in the scheduler", field=name)
        self.limits, self.radix = limits, radix
        self.priority_preemption, self.ageing = priority_preemption, ageing
        self.room = capacity(limits)
        self.store = Store(limits, radix, eviction, events)
        self._seating = Seating(limits, self.store, policy if radix else "fcfs", priority_preemption, ageing, least)
        self.waiting, self.running, self.estimate = self._seating.waiting, self._seating.running, self._seating.estimate
        self.queue, self.queue_tokens = queue, queue_tokens
        self._runs: dict[str, Run] = {}
        self._suspects: dict[Run, None] = {}
        self._deadlines: list[tuple[float, int, str]] = []
        self._flying: deque[Plan] = deque()
        self._feeding = Feeding(limits, self._seating, self._flying)
        self._last: Plan | None = None
        self._steps = self._orders = self.repairs = self.version = 0

    # Requests

    def submit(self, request: Request, now: float) -> None:
        """Queue a request; now: seconds. Raises InvalidRequest or ContextOverflow, naming the field, for what can't be
        honoured, or Overloaded; then nothing was queued."""
        key = check_request(request, self.limits, self.room, self._runs)
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
            space=self.store.space(request),
            fill=request.tokens,
            length=len(request.tokens),
            key=key,
        )
        self._runs[request.rid] = run
        self.store.enter(run)
        self._seating.again = 0
        self.waiting.add(run)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, run.order, request.rid))

    def _bound(self, request: Request) -> None:
        """Raise Overloaded where a request would wait in a queue that is full."""
        waiting = len(self.waiting) - len(self._seating.slots)  # a slot that is free seats one of them
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

    def renew(self, version: int) -> None:
        """The weights are others from the next step on. What runs goes on from what it has computed, which nobody else
        is given any more; what waits is computed anew."""
        self.store.tree.renew(version)
        self._seating.renew()

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
                error = DeadlineExceeded(f"timeout: it passed after {len(run.out)} tokens were made", field="timeout")
                outputs.append(self._end(run, (), Finish(kind="abort"), error))
        return outputs

    def grow(self, limits: Limits) -> None:
        """Plan steps of this size from now on. limits: the ones that there are, with a larger max_tokens."""
        assert limits.max_tokens > self.limits.max_tokens
        self.limits = self._seating.limits = self._feeding.limits = limits

    @property
    def preemptions(self) -> int:
        """How often a run lost its seat to another."""
        return self._seating.preemptions

    @property
    def prompt_tokens(self) -> int:
        """Of the requests seated so far."""
        return self._seating.prompt_tokens

    @property
    def cached_tokens(self) -> int:
        """How many of them came from the prefix cache or from the run that computed them."""
        return self._seating.cached_tokens

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
            self._seating.make_way()
        # Copies run before the forward: those asked for while planning belong to the next step.
        copies, self.store.copies = self.store.copies, []
        draft, preempted = Draft(self.limits, copies, self._steps), self.preemptions
        filling = self._feeding.decode(draft)
        if filling and suspect is None and self.priority_preemption:
            self._admit(now, draft, filling[-1].rank[0] - self.priority_preemption)
        for run in filling:
            self._feeding.prefill(run, draft)
        if preempted == self.preemptions:
            if suspect is None:
                self._admit(now, draft)
            elif suspect.state == "waiting" and self._seating.seat(suspect, draft):
                self._feeding.prefill(suspect, draft)
        if not draft.rows:
            self.store.copies = draft.copies + self.store.copies
            return None
        plan = build(draft, self.limits, self._seating.prefixes, self._last)
        self._steps += 1
        self._flying.append(plan)
        self._last = plan
        return plan

    def _admit(self, now: float, draft: Draft, before: float | None = None) -> None:
        """Seat those that wait, and feed each as it sits."""
        for run in self._seating.admit(now, draft, before):
            self._feeding.prefill(run, draft)

    def _alone(self, suspect: Run) -> bool:
        """After a device failure, let nothing run but the next of those that must show that it wasn't them."""
        if any(row.run is not suspect for plan in self._flying for row in plan.rows if live(row)):
            return False
        for run in [r for r in self.running if r is not suspect]:  # they would only hold pages that it may need
            self._seating.preempt(run)
        return True

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
        self.version = result.version
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
                self._seating.fed(run, row.end)
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
            self._seating.unseat(run)
        elif run.state == "waiting":
            self.waiting.remove(run)
        run.state = "ended"
        self._suspects.pop(run, None)
        self.store.leave(run)
        del self._runs[run.request.rid]
        rid = run.request.rid
        return Output(
            rid=rid, tokens=tokens, finish=finish, cached_tokens=run.cached, error=error, version=self.version
        )

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
            self._seating.requeue(run)
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
            self._seating.requeue(run)
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
