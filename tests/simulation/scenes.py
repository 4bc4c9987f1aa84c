"""Small scenes with a known end: who is seated when, who waits for whom, and how much is computed.

The device is one that makes up its tokens; what is right is counted, not compared.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence

from backends.api.limits import Limits
from engine.model.groups import CacheGroup
from engine.run.loop import Loop
from engine.run.messages import Abort, Submit
from engine.sampling import SamplingParams
from engine.sched.admission import HIGH, LOW
from engine.sched.policy import by_weight
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from tests.simulation.toy import ORDINARY, REFUSED, Toy
from tests.simulation.trial import balance


class Stage:
    """A scheduler over a toy device, and a clock that counts turns. ended: turn at which each request ended; order:
    those that ended, in order. broken: a turn in which the device fails."""

    def __init__(self, *, kinds: Sequence[str] = ("full",), pages: int = 1000, slots: int = 8, page: int = 4, **keys):
        tokens, max_len = keys.pop("max_tokens", 64), keys.pop("max_len", 128)
        groups = [
            CacheGroup(kind=kind, page=0 if kind == "state" else page, window=8 if kind == "window" else 0)
            for kind in kinds
        ]
        limits = Limits(
            groups=tuple(groups),
            pages=tuple(40 if kind == "state" else pages for kind in kinds),
            max_row_pages=tuple(1 if kind == "state" else max_len // page for kind in kinds),
            slots=slots,
            max_rows=keys.pop("max_rows", slots),
            max_tokens=tokens,
            max_len=max_len,
            max_edits=1000,
            vocab=97,
            max_copies=keys.pop("max_copies", 8),
            max_history=keys.pop("max_history", 0),
            max_logprobs=3,
            sharing=keys.pop("sharing", (0, 0, 100)),
        )
        self.scheduler = Scheduler(limits, **keys)
        self.toy = Toy(limits, 0, lambda slot, length: [], lambda out: self.turn == self.broken)
        self.broken = -1
        self.turn, self.ended, self.order = 0, {}, []
        self.outputs: dict[str, list[int]] = {}
        self.last: dict[str, Output] = {}
        self.scores: dict[str, int] = {}
        self.loop = Loop(self.scheduler, self.toy, self.hear, clock=lambda: float(self.turn))

    def hear(self, outputs: Sequence[Output]) -> None:
        for output in outputs:
            self.outputs.setdefault(output.rid, []).extend(output.tokens)
            self.last[output.rid] = output
            if output.prompt_logprobs is not None:
                self.scores[output.rid] = len(output.prompt_logprobs)
            if output.finish is not None:
                self.ended[output.rid] = self.turn
                self.order.append(output.rid)

    def ask(self, rid: str, tokens: Sequence[int], made: int = 4, **fields) -> None:
        scored = fields.pop("scored", {})
        params = SamplingParams(max_new_tokens=made, temperature=0.0, ignore_eos=True, **scored)
        self.loop.take([Submit(request=Request(rid=rid, tokens=tuple(tokens), params=params, **fields))])

    def run(self, turns: int = 2000, until: Callable[[], bool] = lambda: False) -> None:
        """Go on until nothing is left, or something is so."""
        while self.loop.busy and not until():
            self.turn += 1
            turns -= 1
            assert turns > 0, "stuck"
            self.loop.turn()
            balance(self.scheduler, self.turn)

    def to(self, turn: int) -> None:
        """Go on to the end of this turn."""
        self.run(until=lambda: self.turn == turn)

    @property
    def shared(self) -> list[tuple[int, ...]]:
        """Groups of the last step that was planned."""
        return [tuple(group) for group in self.scheduler._last.step.shared.tolist()]

    @property
    def seated(self) -> list[str]:
        return [run.request.rid for run in self.scheduler.running]


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(ORDINARY) for _ in range(length)]


def shared_prefixes_are_computed_once() -> None:
    """BENCH.md's `shared`, scaled down: in any order and whatever the policy, all shared tokens but those of the first
    of each group come from the cache, and nothing is fed twice."""
    groups, per, prefix, own = 6, 5, 48, 7
    rng = random.Random(1)
    bodies = []
    for _ in range(groups):
        start = prompt(rng, prefix)
        bodies.append([[*start, k, *prompt(rng, own)] for k in range(per)])
    grouped = [(g, k) for g in range(groups) for k in range(per)]
    orders = {
        "grouped": grouped,
        "interleaved": [(g, k) for k in range(per) for g in range(groups)],
        "shuffled": random.Random(2).sample(grouped, len(grouped)),
    }
    for policy in ("lpm", "fcfs", "dfs-weight"):
        for name, order in orders.items():
            for slots, dribble in ((64, 0), (64, 3), (7, 0)):
                stage = Stage(slots=slots, policy=policy, page=16, max_tokens=80)
                for n, (g, k) in enumerate(order):
                    stage.ask(f"{g}.{k}", bodies[g][k], made=6)
                    if dribble and n % dribble == 0:
                        stage.to(stage.turn + 1)
                stage.run()
                about = f"{policy}, {name}, {slots} slots, dribble {dribble}"
                want = groups * (per - 1) * prefix
                assert stage.scheduler.cached_tokens == want, f"{about}: {stage.scheduler.cached_tokens} not {want}"
                fed = groups * (prefix + per * (own + 1)) + groups * per * 5
                assert stage.toy.fed <= fed + len(order), f"{about}: fed {stage.toy.fed}, not {fed}"


def rows_that_read_the_same_pages_stand_together() -> None:
    """Three levels, submitted in the order that suits least: once all decode, each level is told of once, outermost
    first, with the rows side by side; answers go on as the groups lose their rows."""
    rng = random.Random(21)
    root, branches = prompt(rng, 16), [prompt(rng, 12) for _ in range(3)]
    leaves = [[prompt(rng, 8) for _ in range(2)] for _ in range(3)]
    stage = Stage(slots=24, max_tokens=200)
    for k in range(2):
        for b in range(3):
            for i in range(2):
                text = [*root, *branches[b], *leaves[b][i], 3 + k, 1 + b, 2 + i]
                stage.ask(f"{b}{i}{k}", text, made=12 + 2 * b + i)
    stage.ask("other", prompt(rng, 21), made=14)
    stage.run(until=lambda: len(stage.seated) == 13 and all(run.out for run in stage.scheduler.running))
    stage.to(stage.turn + 2)
    want = [(0, 11, 0, 15)]
    for b in range(3):
        want.append((4 * b, 4 * b + 3, 16, 27))
        want += [(4 * b + 2 * i, 4 * b + 2 * i + 1, 28, 35) for i in range(2)]
    seen = Counter(group[2:] for group in stage.shared)
    assert seen == Counter(group[2:] for group in want), stage.shared
    assert [group[:2] for group in stage.shared] == [group[:2] for group in want], stage.shared
    stage.run()
    assert stage.toy.shared["inner"] > 60, stage.toy.shared


def what_costs_more_than_it_saves_is_left_out() -> None:
    """The rule in figures. Two rows that share 24 positions and two others that share 16 with them: without the 16 as a
    level, 24 + 2 * 16 are read there, so the level saves 32; then the 8 save 8, or the 24 as one level 24."""
    rng = random.Random(22)
    root, branch = prompt(rng, 16), prompt(rng, 8)
    for sharing, want in (
        (None, []),
        ((0, 0, 100), [(0, 3, 0, 15), (0, 1, 16, 23)]),
        ((7, 0, 100), [(0, 3, 0, 15), (0, 1, 16, 23)]),
        ((8, 0, 100), [(0, 3, 0, 15)]),
        ((0, 4, 100), [(0, 3, 0, 15)]),
        ((31, 0, 100), [(0, 3, 0, 15)]),
        ((32, 0, 100), []),
        ((0, 8, 100), [(0, 1, 0, 23)]),
        ((0, 12, 100), []),
        ((15, 0, 75), [(0, 3, 0, 15)]),
        ((20, 0, 75), []),
    ):
        stage = Stage(sharing=sharing)
        for i in range(4):
            stage.ask(f"{i}", [*root, *(branch if i < 2 else []), i, *[5] * 9], made=20)
        stage.run(until=lambda stage=stage: all(run.out for run in stage.scheduler.running) and len(stage.seated) == 4)
        stage.to(stage.turn + 2)
        ends = sorted((end - begin, last - first) for first, last, begin, end in stage.shared)
        assert ends == sorted((end - begin, last - first) for first, last, begin, end in want), (sharing, stage.shared)


def groups_are_true_whatever_comes_and_goes() -> None:
    """Little room, forks, aborts, priorities and drafts of trees of prompts: the device looks at each step. What is
    saved is much of what could be."""
    lost = 0
    for page, pages, tokens in ((1, 130, 64), (2, 65, 20), (4, 33, 64)):
        rng = random.Random(page)
        stage = Stage(slots=9, page=page, pages=pages, max_tokens=tokens)
        stage.scheduler.estimate.share = 0.0
        trunk = prompt(rng, 24)
        for i in range(14):
            text = trunk[: rng.choice([5, 11, 24])] + [rng.randrange(2) for _ in range(rng.randrange(1, 12))]
            for j in range(rng.choice([1, 1, 3])):
                stage.ask(f"{i}.{j}", text, made=rng.randrange(1, 30), group=f"{i}", priority=rng.choice([0, 0, 12]))
            if rng.random() < 0.2:
                stage.loop.take([Abort(rid=rng.choice(stage.seated or [""]))])
            stage.to(stage.turn + rng.randrange(4))
        stage.run()
        seen = stage.toy.shared
        assert seen["inner"] > 20, seen
        assert seen["saved"] > stage.toy.fed, (seen, stage.toy.fed)
        lost += stage.scheduler.preemptions
    assert lost > 2, lost


def prefixes_behind_a_window_or_a_state_are_computed_once() -> None:
    """Where a chunk must end for others to go on, it does, if they wait when it is planned."""
    rng = random.Random(15)
    start = prompt(rng, 48)
    for kinds in (("full", "window"), ("full", "state"), ("full", "window", "state")):
        stage = Stage(kinds=kinds, page=16)
        for i in range(5):
            stage.ask(f"{i}", [*start, i, *prompt(rng, 9)], made=3)
        stage.run()
        assert stage.scheduler.cached_tokens == 4 * 48, f"{kinds}: {stage.scheduler.cached_tokens}"


def prompts_that_differ_wait_for_nobody() -> None:
    """A workload with nothing to share takes the same steps as if sharing did not exist."""
    steps = []
    for least in (32, 10**6):
        rng = random.Random(3)
        stage = Stage(slots=8, least=least)
        for i in range(40):
            stage.ask(f"{i}", prompt(rng, 50), made=5)
        stage.run()
        steps.append(stage.loop.steps)
    assert steps[0] == steps[1], steps


def a_long_prefix_is_waited_for() -> None:
    """To its end, over many chunks; what comes meanwhile and shares nothing is not held up."""
    rng = random.Random(14)
    start = prompt(rng, 96)
    stage = Stage(max_tokens=16)
    for i in range(4):
        stage.ask(f"{i}", [*start, i], made=20 if i == 0 else 2)
    stage.ask("other", prompt(rng, 10), made=1)
    stage.run()
    assert stage.scheduler.cached_tokens == 3 * 96, stage.scheduler.cached_tokens
    assert (stage.order[0], stage.order[-1]) == ("other", "0"), stage.order


def the_lowest_makes_room() -> None:
    """Where pages run short the lowest priority is preempted, though it came first."""
    stage = Stage(pages=40, ageing=0.0)
    stage.scheduler.estimate.share = 0.0
    for rid, priority in (("low", 0), ("high", 2), ("middle", 1)):
        stage.ask(rid, prompt(random.Random(priority), 20), made=80, priority=priority)
    stage.run()
    assert stage.scheduler.preemptions > 0
    assert stage.order == ["high", "middle", "low"], stage.order


def who_computes_may_go() -> None:
    """When the run that computes a prefix is aborted, those that wait for it go on, one of them first."""
    rng = random.Random(4)
    start = prompt(rng, 100)
    stage = Stage(max_tokens=16)
    for i in range(4):
        stage.ask(f"{i}", [*start, i], made=2)
    stage.to(3)
    assert stage.seated == ["0"], stage.seated
    stage.loop.take([Abort(rid="0")])
    stage.to(6)
    assert stage.seated == ["1"], stage.seated
    stage.run()
    assert set(stage.ended) == {"0", "1", "2", "3"}
    assert stage.toy.fed < 2 * len(start), stage.toy.fed


def answers_share_a_prompt() -> None:
    """n answers feed the prompt once and one token each, and the last page is copied for each but the first."""
    for kinds, page in ((("full",), 4), (("full", "window"), 4), (("full", "state"), 4), (("full",), 16)):
        for length in (41, 44, 47, 48):
            stage = Stage(kinds=kinds, page=page)
            tokens = prompt(random.Random(length), length)
            for i in range(4):
                stage.ask(f"{i}", tokens, made=3, seed=i, group="g")
            stage.run()
            about = f"{kinds}, page {page}, {length} tokens"
            assert stage.toy.fed == length + 3 + 4 * 2, f"{about}: fed {stage.toy.fed}"
            assert stage.scheduler.cached_tokens == 3 * (length - 1), f"{about}: {stage.scheduler.cached_tokens} cached"
            assert kinds != ("full",) or stage.loop.steps <= 5, f"{about}: {stage.loop.steps} steps"
            copied = 0 if (length - 1) % page == 0 else 3
            assert stage.toy.copied["full"] == copied, f"{about}: {stage.toy.copied}"
    stage = Stage(max_copies=0)
    tokens = prompt(random.Random(5), 47)
    for i in range(4):
        stage.ask(f"{i}", tokens, made=3, seed=i, group="g")
    stage.run()
    assert stage.toy.fed == 47 + 3 * 3 + 4 * 2, f"without copies the last page is computed again: {stage.toy.fed}"


def answers_that_score_compute_what_they_score() -> None:
    """Wherever the list of logprobs begins, whoever computed the prompt before: every position comes, and what stands
    before the list may be another's."""
    text = prompt(random.Random(4), 27)
    for start in (0, 5, 24, 25, 26):
        stage = Stage()
        for i in range(4):
            stage.ask(f"{i}", text, made=9, group="g", scored={"prompt_logprobs": 1, "logprob_start_len": start})
            stage.to(2 * i)  # the first has computed all of it when the last comes
        stage.run()
        stage.ask("late", text, made=0, scored={"prompt_logprobs": 1, "logprob_start_len": start})
        stage.run()
        assert stage.scores == dict.fromkeys(("0", "1", "2", "3", "late"), len(text) - start - 1)
        assert stage.last["late"].cached_tokens == start // 4 * 4


def answers_share_a_prompt_without_the_cache() -> None:
    """radix=False: the answers of one group, and nobody after them, nor another of the same prompt."""
    tokens = prompt(random.Random(9), 41)
    for slots in (8, 2):
        stage = Stage(radix=False, slots=slots)
        for i in range(4):
            stage.ask(f"{i}", tokens, made=3, seed=i, group="g")
        stage.ask("other", tokens, made=3)
        stage.run()
        assert stage.toy.fed == 2 * 41 + 3 + 5 * 2, stage.toy.fed
        assert stage.scheduler.cached_tokens == 3 * 40, stage.scheduler.cached_tokens
        assert [p.free for p in stage.scheduler.store.pools] == [1000], "pages are kept"
        for i in range(2):
            stage.ask(f"again {i}", tokens, made=3, seed=i, group="g")
            stage.run()
            assert stage.last[f"again {i}"].cached_tokens == 0, "what nobody may use was used"
    stage = Stage(radix=False)
    for i in range(8):
        stage.ask(f"{i}", tokens, made=3, seed=i, group=f"g{i % 2}")
    stage.run()
    assert stage.scheduler.cached_tokens == 6 * 40, "one group took another's"


def a_prompt_is_scored_once_for_all_its_answers() -> None:
    """Those that come while the first computes it take its logprobs and its pages."""
    text = prompt(random.Random(4), 41)
    for radix in (True, False):
        for start in (0, 5):
            stage = Stage(radix=radix)
            for i in range(4):
                stage.ask(f"{i}", text, made=9, group="g", scored={"prompt_logprobs": 1, "logprob_start_len": start})
            stage.to(4)
            later = start + 3
            stage.ask("odd", text, made=9, group="g", scored={"prompt_logprobs": 1, "logprob_start_len": later})
            stage.run()
            want = dict.fromkeys(("0", "1", "2", "3"), len(text) - start - 1) | {"odd": len(text) - later - 1}
            assert stage.scores == want, stage.scores
            assert stage.toy.fed == 2 * 41 - later // 4 * 4 + 3 + 5 * 8, stage.toy.fed
    stage, text = Stage(), prompt(random.Random(5), 43)  # what is left to score stands in the page that would be copied
    stage.ask("0", text, made=20, group="g")
    stage.to(4)
    stage.ask("late", text, made=2, group="g", scored={"prompt_logprobs": 1, "logprob_start_len": 40})
    stage.run()
    assert stage.scores == {"late": 2}, stage.scores


def a_group_is_checked() -> None:
    """Requests that say they are answers to one prompt, and are not, share nothing."""
    stage = Stage()
    rng = random.Random(6)
    first = prompt(rng, 46)
    stage.ask("0", first, made=30, group="g")
    stage.to(4)
    stage.ask("1", [*first[:45], (first[45] + 1) % ORDINARY], made=2, group="g")
    stage.ask("2", [*first[:44], (first[44] + 1) % ORDINARY, 1], made=2, group="g")
    stage.run()
    assert stage.toy.copied["full"] == 0, stage.toy.copied


def higher_goes_first() -> None:
    """One slot: by priority, then arrival."""
    stage = Stage(slots=1, ageing=0.0)
    wanted = {"a": 0, "b": 2, "c": 1, "d": 2, "e": -1}
    stage.ask("first", [1, 2, 3], made=3)
    stage.to(2)
    for rid, priority in wanted.items():
        stage.ask(rid, [ord(rid) % 90, 5, 7], priority=priority)
    stage.run()
    assert stage.order == ["first", "b", "d", "c", "a", "e"], stage.order


def higher_takes_the_seat() -> None:
    """A request that is enough above a running one takes its seat, or its turn at the prompt; no other does."""
    for slots, pages in ((2, 1000), (8, 33)):  # no slot, or no page
        stage = Stage(slots=slots, pages=pages, priority_preemption=10, ageing=0.0)
        stage.scheduler.estimate.share = 0.0
        stage.ask("low", prompt(random.Random(7), 60), made=40)
        stage.ask("lower", prompt(random.Random(8), 20), made=40, priority=-1)
        stage.to(6)
        assert stage.seated == ["low", "lower"], stage.seated
        stage.ask("nine", prompt(random.Random(9), 50), made=3, priority=8)
        stage.to(12)
        assert stage.seated == ["low", "lower"], stage.seated
        stage.ask("ten", prompt(random.Random(10), 50), made=3, priority=9)
        stage.to(15)
        assert "ten" in stage.seated, stage.seated
        assert "low" in stage.seated, stage.seated
        assert "lower" not in stage.seated, stage.seated
        stage.run()
        assert stage.order[0] == "ten", stage.order
        assert {rid: len(out) for rid, out in stage.outputs.items()} == {"low": 40, "lower": 40, "nine": 3, "ten": 3}
    stage = Stage(max_tokens=8, ageing=0.0)
    stage.ask("long", prompt(random.Random(11), 120), made=1)
    stage.to(3)
    stage.ask("urgent", prompt(random.Random(12), 8), made=1, priority=10)
    stage.run()
    assert stage.order == ["urgent", "long"], stage.order
    never = Stage(slots=1, priority_preemption=0)
    never.ask("low", [1, 2], made=20)
    never.to(3)
    never.ask("high", [3, 4], priority=1000)
    never.run()
    assert never.order == ["low", "high"]


def nobody_starves() -> None:
    """One slot, and a stream of requests of higher priority: the low one is seated once it has waited long enough."""
    ended = {}
    for ageing in (0.0, 20.0):
        stage = Stage(slots=1, ageing=ageing)
        stage.ask("first", [1], made=4)
        stage.to(1)
        stage.ask("low", [1, 2, 3], made=2)
        for i in range(100):
            stage.ask(f"high{i}", [i % 90, 1, 2], made=2, priority=3)
            stage.to(stage.turn + 2)
        ended[ageing] = stage.ended.get("low")
        stage.run()
    assert ended[0.0] is None, ended
    assert ended[20.0] is not None, ended
    assert 40 < ended[20.0] < 120, ended


def deadlines_are_kept() -> None:
    """Past its deadline a request ends and says so, whether it waits or runs; before, it is not touched."""
    stage = Stage(slots=1)
    stage.ask("runs", [1, 2, 3], made=100, deadline=20.5)
    stage.ask("waits", [4, 5, 6], made=4, deadline=10.0)
    stage.ask("in time", [7, 8, 9], made=4, deadline=100.0)
    stage.run()
    assert stage.ended["waits"] == 10, stage.ended
    assert stage.ended["runs"] == 21, stage.ended
    for rid in ("runs", "waits"):
        assert type(stage.last[rid].error).__name__ == "DeadlineExceeded", stage.last[rid]
        assert stage.last[rid].finish.kind == "abort"
    assert 10 < len(stage.outputs["runs"]) < 21
    assert stage.last["in time"].finish.kind == "length"


def the_estimate_adapts() -> None:
    """Short of pages, with all made that may be made: few preemptions. With steps that go well the share falls."""
    stage = Stage(pages=64, slots=32, max_len=128, radix=False)
    stage.scheduler.estimate.share = LOW
    for i in range(60):
        stage.ask(f"{i}", prompt(random.Random(i), 8), made=56)
    stage.run(until=lambda: len(stage.ended) >= 30, turns=4000)
    before = stage.scheduler.preemptions
    assert stage.scheduler.estimate.share > 2 * LOW, stage.scheduler.estimate.share
    stage.run(turns=4000)
    assert 0 < before < 20, f"{before} preemptions for 30 requests"
    stage = Stage(pages=64, slots=32)
    for i in range(400):
        stage.ask(f"{i}", [i % 90, i // 90, 3], made=3)
    stage.run()
    assert stage.scheduler.estimate.share < HIGH - 0.05, stage.scheduler.estimate.share


def branches_by_weight() -> None:
    """dfs-weight: the heavier branch first, deepest first, and what others go on from before them."""
    stage = Stage(slots=1)
    prompts = {"a": [1, 2, 9], "b": [3, 4, 5], "c": [3, 4, 6], "d": [3, 4], "e": [3, 7, 7], "f": [8], "g": [3, 4, 6, 1]}
    stage.ask("first", [80], made=50)
    stage.to(2)
    for rid, tokens in prompts.items():
        stage.ask(rid, tokens)
    order = [run.request.rid for run in by_weight(stage.scheduler.waiting.first(100))]
    assert order == ["d", "c", "g", "b", "e", "a", "f"], order


def longest_prefix_first() -> None:
    """lpm seats what the cache holds most of; the window moves on, so all are seated."""
    rng = random.Random(13)
    stage = Stage(slots=1, ageing=0.0)
    known = prompt(rng, 60)
    stage.ask("known", known, made=1)
    stage.run()
    stage.ask("first", prompt(rng, 4), made=3)
    stage.run(until=lambda: len(stage.seated) == 1)
    lengths = Counter({"none": 0, "some": 12, "all": 60, "half": 32})
    for rid, n in lengths.items():
        stage.ask(rid, [*known[:n], 1 + n, 2, 3], made=1)
    for i in range(300):
        stage.ask(f"x{i}", [5, i % 90, i // 90], made=1)
    stage.run()
    assert stage.order[2:6] == ["all", "half", "some", "none"], stage.order[:8]
    assert len(stage.order) == 306


def the_innocent_go_on_together() -> None:
    """After a device failure each shows alone that it wasn't to blame, and no longer than that."""
    stage = Stage()
    stage.broken = 10
    for i in range(4):
        stage.ask(f"{i}", [i, 2, 3], made=60)
    stage.run()
    assert stage.toy.failures == 1
    assert {len(out) for out in stage.outputs.values()} == {60}
    assert stage.loop.steps < 100, stage.loop.steps


def the_refused_leave_others_their_history() -> None:
    """Rows beside one that the device refuses are penalised for their own tokens."""
    made = []
    for first in (3, REFUSED):
        stage = Stage(max_history=1000)
        for rid, tokens in {"a": (first, 5), "b": (1, 1, 2), "c": (4, 6, 7, 8)}.items():
            stage.ask(rid, tokens, made=6, scored={"repetition_penalty": 1.5})
        stage.run()
        made.append(stage.outputs)
    assert (len(made[0]["a"]), len(made[1]["a"])) == (6, 0)
    assert made[0]["b"] == made[1]["b"]
    assert made[0]["c"] == made[1]["c"]


def lost_pages_are_found() -> None:
    """A page that nobody has is noticed and free again, and no run is disturbed. Where a page has two owners all begin
    anew. Nothing that was promised is lost."""
    whole = Stage(pages=40)
    ask_six(whole)
    whole.run()
    for twice in (False, True):
        stage = Stage(pages=40)
        ask_six(stage)
        stage.run(until=lambda s=stage: s.turn == 10)
        assert stage.scheduler.audit()
        before = stage.scheduler.preemptions
        if twice:
            first, second = list(stage.scheduler.running)[:2]
            first.cache.own[0].add(max(second.cache.own[0]))
        else:
            stage.scheduler.store.pools[0].take(1)
        assert not stage.scheduler.audit()
        assert stage.scheduler.repairs == 1
        assert stage.scheduler.audit()
        assert bool(stage.seated) is not twice, stage.seated
        assert stage.scheduler.preemptions == before
        stage.run()
        assert stage.outputs == whole.outputs


def ask_six(stage: Stage) -> None:
    for i in range(6):
        stage.ask(f"{i}", prompt(random.Random(i), 20), made=20)


SCENES = (
    the_innocent_go_on_together,
    the_refused_leave_others_their_history,
    prefixes_behind_a_window_or_a_state_are_computed_once,
    a_long_prefix_is_waited_for,
    the_lowest_makes_room,
    shared_prefixes_are_computed_once,
    rows_that_read_the_same_pages_stand_together,
    what_costs_more_than_it_saves_is_left_out,
    groups_are_true_whatever_comes_and_goes,
    prompts_that_differ_wait_for_nobody,
    who_computes_may_go,
    answers_share_a_prompt,
    answers_that_score_compute_what_they_score,
    answers_share_a_prompt_without_the_cache,
    a_prompt_is_scored_once_for_all_its_answers,
    a_group_is_checked,
    higher_goes_first,
    higher_takes_the_seat,
    nobody_starves,
    deadlines_are_kept,
    the_estimate_adapts,
    branches_by_weight,
    longest_prefix_first,
    lost_pages_are_found,
)
