"""What the scheduler costs, and what it saves: plan and commit on a device that computes nothing."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from backends.api.limits import Limits
from backends.api.step import ScheduleStep, StepResult
from engine.model.groups import CacheGroup
from engine.sampling import SamplingParams
from engine.sched.request import Request
from engine.sched.rows import Plan
from engine.sched.scheduler import Scheduler

VOCAB, PAGE, MAX_LEN, TOKENS = 32000, 16, 4096, 8192
CASES = ("decode", "pages", "flow", "groups", "grouped flow")
ORDERS = ("grouped", "interleaved", "shuffled")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Microseconds of a step's plan and commit. running, waiting: requests, after the last step. policy: of the
    scheduler. rows: a step's, on average. plan, commit: medians; least, median, mean, p99: of both together."""

    case: str
    policy: str
    running: int
    waiting: int
    steps: int
    rows: float
    plan: float
    commit: float
    least: float
    median: float
    mean: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Saving:
    """32 groups of 8 requests, 2,048 tokens that a group shares, 128 of their own and 128 made, in some order: tokens
    that were shared and might come from the cache, those that did, all tokens that were fed, and the steps."""

    order: str
    policy: str
    shared: int
    cached: int
    fed: int
    steps: int


class Null:
    """A device that answers at once, with tokens that were made up. Two steps in flight."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.rng = np.random.default_rng(0)
        self.out: deque[Plan] = deque()
        self.rows = self.fed = self.steps = 0

    def turn(self) -> tuple[float, float]:
        """One step: seconds that plan and commit took."""
        clock = time.perf_counter()
        plan = self.scheduler.plan(clock)
        planned = time.perf_counter() - clock
        if plan is not None:
            self.out.append(plan)
            self.rows += len(plan.rows)
            self.fed += len(plan.step.tokens)
            self.steps += 1
        if not self.out or (plan is not None and len(self.out) < 2):
            return planned, 0.0
        oldest = self.out.popleft()
        result = self.result(oldest.step)
        clock = time.perf_counter()
        self.scheduler.commit(oldest, result)
        return planned, time.perf_counter() - clock

    def result(self, step: ScheduleStep) -> StepResult:
        """One token for each row that asked for one."""
        counts = (step.output > 0).astype(np.int32)
        tokens = np.where(counts, self.rng.integers(1, VOCAB, len(counts)), -1).astype(np.int32)[:, None]
        return StepResult(
            step=step.step, version=0, tokens=tokens, counts=counts, status=np.zeros(len(counts), np.uint8)
        )


def limits_of(slots: int, tokens: int) -> Limits:
    """Of a device with one full group and pages for so many tokens, which reads shared prefixes once."""
    table = MAX_LEN // PAGE
    return Limits(
        groups=(CacheGroup(kind="full", page=PAGE, window=0),),
        pages=(tokens // PAGE,),
        max_row_pages=(table,),
        slots=slots,
        max_rows=slots,
        max_tokens=TOKENS,
        max_len=MAX_LEN,
        max_edits=table + TOKENS // PAGE + 2 * slots,
        vocab=VOCAB,
        sharing=(64, 16, 50),
    )


def requests(count: int, made: Sequence[int], seed: int, name: str, grouped: bool = False) -> list[Request]:
    """Greedy requests with prompts of about 1,000 random tokens, no two alike. made: tokens of the answers, in turn.
    grouped: eight have 768 tokens in common, and 32 the first 256 of them."""
    rng = np.random.default_rng(seed)
    bodies = [tuple(rng.integers(1, VOCAB, int(rng.integers(960, 1088))).tolist()) for _ in range(64)]
    params = [SamplingParams(temperature=0.0, max_new_tokens=n, ignore_eos=True) for n in made]
    if grouped:
        rng = np.random.default_rng(0)
        roots, stems = (rng.integers(1, VOCAB, (n, k)).tolist() for n, k in ((8, 256), (32, 512)))
        heads = [(*roots[i % 8], *stems[i % 32]) for i in range(32)]
        return [
            Request(
                rid=f"{name}{i}", tokens=(*heads[i % 32], 1 + i, *bodies[i % 64][:240]), params=params[i % len(params)]
            )
            for i in range(count)
        ]
    return [
        Request(rid=f"{name}{i}", tokens=(1 + i // 64, *bodies[i % 64]), params=params[i % len(params)])
        for i in range(count)
    ]


def measure(case: str, policy: str, running: int, waiting: int, steps: int) -> Cost:
    """One case. "decode": some run and others wait for their slots. "pages": there are slots, but no pages for more.
    "flow": each that ends, after 1 to 511 tokens, makes room for one that waits. "groups", "grouped flow": "decode" and
    "flow" with prompts that begin alike."""
    flows, grouped = case in ("flow", "grouped flow"), case.startswith("group")
    made = random.Random(0).sample(range(1, 512, 2), 256) if flows else [2900]
    scheduler = Scheduler(
        limits_of(running * 2 if case == "pages" else running, running * (1560 if case == "pages" else 4096)),
        policy=policy,
    )
    null, clock = Null(scheduler), time.perf_counter()
    scheduler.estimate.share = 0.1
    for request in requests(running, made, 1, "run", grouped):
        scheduler.submit(request, clock)
    while not (flows or (all(run.decoding for run in scheduler.running) and not scheduler.waiting)):
        null.turn()
    for request in requests(waiting, made, 2, "wait", grouped):
        scheduler.submit(request, clock)
    for _ in range(400 if flows else 40):
        null.turn()
    null.rows = null.steps = 0
    took = np.array([null.turn() for _ in range(steps)]) * 1e6
    both = took.sum(axis=1)
    return Cost(
        case=case,
        policy=policy,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting),
        steps=steps,
        rows=null.rows / null.steps,
        plan=float(np.median(took[:, 0])),
        commit=float(np.median(took[:, 1])),
        least=float(both.min()),
        median=float(np.median(both)),
        mean=float(both.mean()),
        p99=float(np.percentile(both, 99)),
    )


def share(order: str, policy: str, groups: int = 32, per: int = 8, prefix: int = 2048, own: int = 128) -> Saving:
    """All requests at once, in the order of the groups, one of each group after the other, or shuffled."""
    rng = np.random.default_rng(1)
    prompts = []
    for _ in range(groups):
        start = rng.integers(256, 31000, prefix).tolist()
        prompts.append([start + rng.integers(256, 31000, own).tolist() for _ in range(per)])
    places = [(g, k) for g in range(groups) for k in range(per)]
    if order == "interleaved":
        places.sort(key=lambda place: place[::-1])
    elif order == "shuffled":
        random.Random(1).shuffle(places)
    scheduler = Scheduler(limits_of(groups * per, 2 * groups * (prefix + per * 2 * own)), policy=policy)
    null, params = Null(scheduler), SamplingParams(temperature=0.0, max_new_tokens=own, ignore_eos=True)
    for g, k in places:
        scheduler.submit(Request(rid=f"{g}.{k}", tokens=tuple(prompts[g][k]), params=params), 0.0)
    while scheduler.busy:
        null.turn()
    return Saving(
        order=order,
        policy=policy,
        shared=groups * (per - 1) * prefix,
        cached=scheduler.cached_tokens,
        fed=null.fed,
        steps=null.steps,
    )
