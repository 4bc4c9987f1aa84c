"""One random configuration, run to the end through the real scheduler, cache and loop, against sequential decoding."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from backends.api.limits import Limits
from backends.api.step import U32
from engine.cache.check import check
from engine.config import EVICTIONS
from engine.errors import DeadlineExceeded
from engine.model.groups import CacheGroup
from engine.run.loop import Loop
from engine.run.messages import Abort, Submit
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from engine.sched.scores import Score, Scores
from tests.simulation.toy import DEADLY, NAN, ORDINARY, REFUSED, VOCAB, Toy, Truth, score

KINDS = (("full",), ("full",), ("full", "window"), ("full", "state"), ("full", "window", "state"))
EOS = frozenset(range(0, ORDINARY, 9))


def mask_after(token: int) -> U32:
    """A vocabulary mask that depends on the last token."""
    bits = np.array([v < ORDINARY and (v + token) % 2 == 1 for v in range(VOCAB + -VOCAB % 32)])
    return np.packbits(bits, bitorder="little").view(np.uint32)


class Alternate:
    """A grammar: each token's parity differs from the last one's."""

    def __init__(self, last: int) -> None:
        self.last = last

    def accept(self, tokens: Sequence[int]) -> None:
        self.last = tokens[-1] if tokens else self.last

    def mask(self) -> U32:
        return mask_after(self.last)


class Pair:
    """A stop string of two tokens."""

    def __init__(self) -> None:
        self.before, self.matched = 0, None

    def feed(self, tokens: Sequence[int]) -> int | None:
        for i, token in enumerate(tokens):
            if self.before % 3 == 1 and token % 5 == 2:
                self.matched = "pair"
                return i + 1
            self.before = token
        return None


@dataclass(kw_only=True)
class Case:
    """A request and what is known of it."""

    request: Request
    truth: list[int]
    poison: int | None
    abort_at: int | None
    scores: list[Score]
    prompt: list[Score]
    got: list[int] = field(default_factory=list)
    scored: list[Score] = field(default_factory=list)
    told: list[Score] | None = None
    end: Output | None = None


@dataclass(kw_only=True)
class Seen:
    """What happened in a trial, to show that trials reach the rare things."""

    counts: Counter[str] = field(default_factory=Counter)


def make_limits(rng: random.Random) -> tuple[Limits, int]:
    """Random groups, page sizes and pools: from just enough for one request to plenty."""
    page, window, kinds = rng.choice([1, 2, 4]), rng.choice([1, 3, 5, 8]), rng.choice(KINDS)
    depth, slots, rows = rng.choice([1, 2, 2, 2, 3, 4]), rng.choice([2, 3, 6]), rng.choice([1, 2, 6])
    draft = rng.choice([0, 0, 1, 2, 3])
    max_len, tokens = 40, rng.choice([4, 6, 16, 40, 200])
    groups, pages, table = [], [], []
    for kind in kinds:
        groups.append(
            CacheGroup(kind=kind, page=0 if kind == "state" else page, window=window if kind == "window" else 0)
        )
        need = -(-(max_len + draft) // page)
        if kind == "window":
            need = min(need, -(-(window + tokens + depth * (1 + draft)) // page) + 2)
        table.append(1 if kind == "state" else need)
        pages.append(slots + rng.choice([1, 3, 30]) if kind == "state" else int(need * rng.choice([1, 1.2, 2, 6])))
    limits = Limits(
        groups=tuple(groups),
        pages=tuple(pages),
        max_row_pages=tuple(table),
        slots=slots,
        max_rows=rows,
        max_tokens=tokens,
        max_len=max_len,
        max_edits=max(table) + rng.choice([2 * rows + tokens, 400]),
        vocab=VOCAB,
        depth=depth,
        run_ahead=rng.choice([0, 1]) if draft else 0,
        max_draft=draft,
        device_draft=draft > 0,
        max_masks=rng.choice([1, rows]),
        max_copies=8,
        max_history=max_len * rng.choice([1, 4]),
        max_bias=rng.choice([2, 5, 100]),
        max_logprobs=3,
    )
    return limits, window


def may(request: Request, made: Sequence[int]) -> U32 | None:
    """What may follow, token by token."""
    p, masked = request.params, request.grammar is not None
    stops = {*p.stop_token_ids, *(() if p.ignore_eos else EOS)} if len(made) < p.min_new_tokens else set()
    last = made[-1] if made else request.tokens[-1]
    bits = np.zeros(VOCAB + -VOCAB % 32, bool)
    for v in range(VOCAB):
        said = (*made, v)
        bits[v] = (
            (p.allowed_token_ids is None or v in p.allowed_token_ids)
            and v not in stops
            and not any(said[-len(w) :] == w for w in request.bad_words)
            and (not masked or bool(mask_after(last)[v // 32] >> np.uint32(v % 32) & 1))
        )
    return None if bits[:VOCAB].all() else np.packbits(bits, bitorder="little").view(np.uint32)


def scores_of(tokens: Sequence[int], first: int, k: int | None, truth: Truth, seed: int) -> list[Score]:
    """The logprobs of tokens from position `first` on, each from what stands before it."""
    if k is None or first >= len(tokens):
        return []
    picks = [truth.raw(tokens[:i], seed) for i in range(first, len(tokens))]
    return Scores.of(score(picks, tokens[first:], k), len(picks)).rows()


def truth_of(request: Request, truth: Truth, max_len: int) -> list[int]:
    """The output by sequential decoding."""
    tokens, made, stopper, p = list(request.tokens), [], Pair(), request.params
    room = min(request.params.max_new_tokens, max_len - len(tokens))
    for _ in range(room):
        mask = may(request, made)
        y = truth.next(tokens, len(request.tokens), request.seed, p.penalised, mask, p.logit_bias)
        tokens.append(y)
        made.append(y)
        if (y in EOS and not request.params.ignore_eos) or y in request.params.stop_token_ids:
            break
        if request.stopper is not None and stopper.feed([y]) is not None:
            break
    return made


def make_cases(rng: random.Random, truth: Truth, max_len: int, count: int, chaos: bool) -> list[Case]:
    pool = [[rng.randrange(ORDINARY) for _ in range(12)] for _ in range(2)]
    cases = []
    for i in range(count):
        prompt = rng.choice(pool)[: rng.randrange(1, 13)] + [
            rng.randrange(ORDINARY) for _ in range(rng.randrange(1, 9))
        ]
        poison = rng.choice([REFUSED, REFUSED, NAN, DEADLY]) if chaos and rng.random() < 0.2 else None
        if poison is not None:
            prompt[rng.randrange(len(prompt))] = poison
        masked = rng.random() < 0.25
        most = rng.choice([1, 3, 8, 100] if rng.random() < 0.9 else [0])
        params = SamplingParams(
            max_new_tokens=most,
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=(7, 13),
            presence_penalty=1.0 if rng.random() < 0.3 else 0.0,
            **wishes(rng, len(prompt), min(most, 5), masked),
        )
        request = Request(
            rid=f"r{i}",
            tokens=tuple(prompt),
            params=params,
            seed=rng.randrange(2**40),
            eos=EOS,
            stopper=Pair() if rng.random() < 0.3 else None,
            grammar=Alternate(prompt[-1]) if masked else None,
            priority=rng.choice([0, 0, 1, 3]),
            namespace=rng.choice(["", "", "other"]),
            deadline=rng.uniform(1, 60) if chaos and rng.random() < 0.15 else None,
            group=f"g{i}" if rng.random() < 0.3 else "",
        )
        if rng.random() < 0.25 and poison is None:
            request = replace(request, bad_words=words(rng, truth_of(request, truth, max_len)))
        answers = rng.randrange(2, 5) if request.group else 1
        for j in range(answers):
            answer = replace(
                request,
                rid=f"r{i}.{j}",
                seed=request.seed + j,
                stopper=Pair() if request.stopper else None,
                grammar=Alternate(prompt[-1]) if masked else None,
            )
            expected = [] if poison is not None else truth_of(answer, truth, max_len)
            abort_at = rng.randrange(30) if chaos and rng.random() < 0.15 else None
            p = answer.params
            cases.append(
                Case(
                    request=answer,
                    truth=expected,
                    poison=poison,
                    abort_at=abort_at,
                    scores=scores_of([*prompt, *expected], len(prompt), p.logprobs, truth, answer.seed),
                    prompt=scores_of(prompt, p.logprob_start_len + 1, p.prompt_logprobs, truth, 0),
                )
            )
    return cases


def words(rng: random.Random, made: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Some of what would be made, and some that only ends like it."""
    out = []
    for k in (1, 2, 2, 3, 3, 3):
        at = rng.randrange(len(made)) if made else 0
        word = tuple(made[at : at + k])
        out += [rng.choice([word, (rng.randrange(ORDINARY), *word)])] if len(word) == k else []
    return tuple(out)


def wishes(rng: random.Random, prompt: int, least: int, masked: bool) -> dict[str, Any]:
    """Some of what else a request may ask of the sampler."""
    given: dict[str, Any] = {}
    if rng.random() < 0.2:
        given["min_new_tokens"] = least
    if rng.random() < 0.15 and not masked:  # the two parities may leave nothing
        given["allowed_token_ids"] = tuple(range(rng.choice([0, 1]), ORDINARY, 2))
    if rng.random() < 0.2:
        given["logit_bias"] = tuple((t, float(rng.randrange(1, 50))) for t in rng.sample(range(ORDINARY), 2))
    if rng.random() < 0.3:
        given["logprobs"] = rng.randrange(4)
    if rng.random() < 0.3:
        given |= {"prompt_logprobs": rng.randrange(4), "logprob_start_len": rng.choice([0, rng.randrange(prompt)])}
    return given


def make_scheduler(rng: random.Random, limits: Limits, seed: int) -> Scheduler:
    scheduler = Scheduler(
        limits,
        policy=rng.choice(["lpm", "fcfs", "dfs-weight"]),
        radix=rng.random() < 0.75,
        priority_preemption=rng.choice([0, 1, 3]),
        ageing=rng.choice([0.0, 5.0, 50.0]),
        least=rng.choice([1, 4, 1000]),
        eviction=EVICTIONS[seed % len(EVICTIONS)],
    )
    scheduler.estimate.share = rng.choice([0.0, 0.7])
    return scheduler


def trial(seed: int, requests: int = 8, turns: int = 3000) -> Counter[str]:
    """Run one random configuration; AssertionError says what differs. Returns what happened."""
    rng = random.Random(seed)
    limits, window = make_limits(rng)
    limits = replace(limits, sharing=random.Random(seed).choice([None, (0, 0, 100), (0, 0, 100), (2, 1, 80)]))
    truth = Truth(kinds=tuple(g.kind for g in limits.groups), window=window)
    chaos, flaky = rng.random() < 0.5, rng.random() < 0.2
    cases = {c.request.rid: c for c in make_cases(rng, truth, limits.max_len, requests, chaos)}
    later = random.Random(seed).randrange(-20, 40)  # when a backend that is ready early has all its programs
    first = replace(limits, max_tokens=min(4, limits.max_tokens)) if later > 0 else limits
    scheduler = make_scheduler(rng, first, seed)

    def guess(slot: int, length: int) -> list[int]:
        run = next((r for r in scheduler.running if r.slot == slot), None)
        known = [] if run is None else cases[run.request.rid].truth
        ahead = length - (len(run.request.tokens) if run else 0) + 1
        right = known[ahead : ahead + limits.max_draft] if ahead >= 0 else []
        right += [0] * (limits.max_draft - len(right))
        return [t if rng.random() < 0.7 else rng.randrange(ORDINARY) for t in right]

    toy = Toy(first, seed, guess, lambda out: flaky and out > 0 and toy.failures == 0 and rng.random() < 0.05)
    seen: Counter[str] = Counter()

    def emit(outputs: Sequence[Output]) -> None:
        for output in outputs:
            case = cases[output.rid]
            assert case.end is None, f"{output.rid}: news after the end"
            case.got += output.tokens
            case.scored += [] if output.logprobs is None else output.logprobs.rows()
            if output.prompt_logprobs is not None:
                assert case.told is None, f"{output.rid}: the prompt's logprobs twice"
                case.told = output.prompt_logprobs.rows()
            case.end = output if output.finish else None
            seen["cached"] += output.cached_tokens > 0 and output.finish is not None

    turn = 0
    loop = Loop(scheduler, toy, emit, clock=lambda: float(turn))
    todo, rush = list(cases.values()), rng.choice([0.5, 0.9])
    while todo or loop.busy:
        turn += 1
        if turn == later:
            toy.limits = limits
            seen["grown"] += first.max_tokens < limits.max_tokens and loop.busy
        assert turn < turns, f"seed {seed}: stuck, {len(scheduler.waiting)} waiting, {len(scheduler.running)} running"
        while todo and rng.random() < rush:
            loop.take([Submit(request=todo.pop(0).request)])
        loop.take([Abort(rid=c.request.rid) for c in cases.values() if c.abort_at == turn and c not in todo])
        loop.turn()
        balance(scheduler, seed)
        on_time(cases.values(), todo, turn, seed)
        seen["followed"] += followers(scheduler, seed)
    for case in cases.values():
        judge(case, seed, lone=flaky and toy.failures > 0)
    scheduler.store.tree.flush()
    assert [p.free for p in scheduler.store.pools] == list(limits.pages), f"seed {seed}: pages were lost"
    seen[f"depth {limits.depth}, drafts {limits.max_draft > 0}"] += 1
    return seen + happened(scheduler, toy, cases.values())


def happened(scheduler: Scheduler, toy: Toy, cases: Iterable[Case]) -> Counter[str]:
    """Of a trial that is over."""
    ends = [case.end for case in cases if case.end]
    return Counter(
        {
            "preempted": scheduler.preemptions,
            "failed": toy.failures,
            "branched": toy.copied["full"],
            "shared": toy.shared["groups"],
            "nested": toy.shared["inner"],
            "late": sum(isinstance(end.error, DeadlineExceeded) for end in ends),
            "aborted": sum(end.finish.kind == "abort" for end in ends),
            "errors": sum(end.error is not None for end in ends),
        }
    )


def on_time(cases: Iterable[Case], todo: Sequence[Case], turn: int, seed: int) -> None:
    """Nobody goes on past a deadline, but those that are not submitted yet."""
    for case in cases:
        late = case.request.deadline is not None and case.request.deadline <= turn and case not in todo
        assert case.end or not late, f"seed {seed}: {case.request.rid} goes on past its deadline"


def followers(scheduler: Scheduler, seed: int) -> int:
    """Runs that wait for another, which must be seated."""
    led = [(run, run.leader) for run in scheduler.waiting if run.leader is not None]
    for run, leader in led:
        assert leader.state == "seated", f"seed {seed}: {run.request.rid} waits for what isn't computed"
    return len(led)


def balance(scheduler: Scheduler, seed: int) -> None:
    """Promise 10: free + evictable + in use == total, after every step."""
    for g, a in enumerate(scheduler.accounts()):
        parts = a.free + a.evictable + a.locked + a.owned
        assert parts == a.total, f"seed {seed}: group {g} has {a}"
        assert min(a.free, a.evictable, a.locked, a.owned) >= 0, f"seed {seed}: group {g} has {a}"
    if seed % 5 == 0:  # it walks the whole cache
        caches = [run.cache for run in scheduler.running if run.cache is not None]
        owned = [[page for cache in caches for page in cache.own[g]] for g in range(len(scheduler.store.pools))]
        wrong = check(scheduler.store.tree, owned, [cache.node for cache in caches])
        assert wrong == [], f"seed {seed}: {wrong}"


def judge(case: Case, seed: int, lone: bool) -> None:
    """Compare what a request got with the truth."""
    end, rid = case.end, case.request.rid
    assert end is not None, f"seed {seed}: {rid} never ended"
    assert end.finish is not None
    kind, about = end.finish.kind, f"seed {seed}: {rid} {end} got {case.got} truth {case.truth}"
    if kind == "abort":
        assert case.abort_at is not None or isinstance(end.error, DeadlineExceeded), about
        assert case.got == case.truth[: len(case.got)] or case.poison is not None, about
    elif case.poison is not None:
        assert kind == "error", about
        assert end.error is not None, about
        assert not case.got, about
    elif kind == "error":  # a device that fails for no reason while one request runs looks like that one's fault
        assert lone, about
        assert case.got == case.truth[: len(case.got)], about
    else:
        assert case.got == case.truth, about
        assert case.told == (None if case.request.params.prompt_logprobs is None else case.prompt), about
    if case.poison is None:
        assert case.scored == case.scores[: len(case.scored)], about
        assert len(case.scored) == (0 if case.request.params.logprobs is None else len(case.got)), about
        assert case.told is None or case.told == case.prompt, about
