"""Planted faults (tests.planting): each changes one line of the engine, or of the toy device; a scene or a few random
trials notice.

`python -m tests.simulation.faults N` runs fault N in this process and exits 1 when one of them fails, as it should.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import partial

from tests.planting import faults, plant

TRIALS = 150

FAULTS = [
    # Those that the sketch of the contract was tried with.
    *faults(
        "engine.cache.sequence",
        ("window trimmed one token early", "lower - group.window + 1", "lower - group.window + 2"),
        ("pages stay the sequence's after the tree took them", "self.own[g].difference_update(taken)", "pass"),
        ("the shared prefix is not locked", "self.tree.lock(node)\n        self.tree.unlock(self.node)", "pass"),
        ("seating sends no page table", "[list(enumerate(pages)) for pages in self.table]", "[[] for _ in self.table]"),
        ("the whole table is not told after a rebase", "self.edits[g] = list(enumerate(self.table[g]))", "pass"),
    ),
    *faults(
        "engine.sched.store",
        (
            "state checkpoint copy lost",
            "self.copies += [(g, 0, cache.write[g], page)",
            "_ = [(g, 0, cache.write[g], page)",
        ),
        ("rows that outlive their run are shared", "whole = min(length,", "whole = min(length + self.page,"),
        ("a fork copies nothing", "copies += [(g, 0, source, page) for g, source, page in made]", "pass"),
        ("a checkpoint inside a page is shared at the page", "if at % self.page == 0 else None", "if at > 0 else None"),
    ),
    *faults(
        "engine.cache.sequence",
        ("a fork copies the wrong page", "i = (at - other.base[g]) // group.page", "i = at // group.page - 1"),
        ("a fork's page is not told", "self.edits[g].append((len(self.table[g]), page))", "pass"),
        ("a fork reads zeros for its state", "self.read = [page if i == g else", "self.read = [NONE if i == g else"),
    ),
    *faults(
        "engine.sched.scheduler",
        ("mask one token stale", "run.masks.accept(kept)", "run.masks.accept(kept[:-1])"),
        ("lower bound forgets rejections", "run.lower += moved - (fed - row.drafts)", "run.lower += row.drafts"),
        (
            "copies never cleared",
            "copies, self.store.copies = self.store.copies, []",
            "copies = list(self.store.copies)",
        ),
        (
            "a slot's new tenant sees old results",
            'if run.state != "seated" or run.epoch != row.epoch:\n',
            'if run.state != "seated":\n',
        ),
        ("scores of tokens past the end", "Scores.of(scores, keep)", "Scores.of(scores, len(new))"),
        ("nothing ends a request that only reads", "elif row.end == run.length and not run.most", "elif False"),
        ("tree survives a device failure", "self.store.tree.flush()\n        for run", "for run"),
        ("everyone in a failed step fails", "if len(suspects) != 1:", "if len(suspects) < 1:"),
        ("suspects stay alone to their end", "if run.alone_until:\n                    self._passed(run)", "pass"),
        (
            "suspects run together",
            "suspect = min(self._suspects, key=lambda r: r.order, default=None)",
            "suspect = min([], default=None)",
        ),
        ("a deadline is only kept by those that wait", "run.order == order:", 'run.state == "waiting":'),
        ("deadlines are ignored", "self._deadlines[0][0] <= now", "self._deadlines[0][0] < 0"),
        ("the estimate never falls", "self.estimate.fall()", "pass"),
    ),
    *faults(
        "engine.sched.seating",
        ("epoch not counted", "run.epoch += 1", "run.epoch += 0"),
        ("rows in flight survive a preemption", "run.flying = run.verifying = run.pending = 0", "pass"),
        ("a slot is given out twice", "self.slots.append(run.slot)", "self.slots += [run.slot] * 2"),
        ("a steady row outlives its seat", "run.row = None", "pass"),
        ("every answer scores the prompt", "run.scores = parent.scores", "pass"),
        ("scores that were not asked for are taken", "parent.scored and parent.scores_alike(run):", "parent.scored:"),
        ("a prompt that is scored branches where another's ends", " or run.unscored <= last", ""),
        ("those that wait for a run that is gone wait for ever", "self.waiting.call(run)\n", "pass\n"),
        ("the estimate never rises", "self.estimate.rise()", "pass"),
        ("the highest is preempted", "victim = max(", "victim = min("),
        ("way is made for those below", "self._lowest = max(", "self._lowest = min("),
        ("a fork goes on one token late", "return last if self.store.branch", "return last + 1 if self.store.branch"),
    ),
    *faults(
        "engine.sched.feeding",
        ("seated row sent as continuing", "start=run.start,", "start=-1,"),
        ("pages sized without drafts", "run.upper + 1 + k, draft)", "run.upper + 1, draft)"),
        ("a row with nothing new is not looked at for its page", "run.upper < cache.still", "run.upper <= cache.still"),
        ("fed again, output counts as prompt", "(t, i >= prompt)", "(t, False)"),
        (
            "history only at the first seating",
            "wanted = run.start >= 0 and",
            "wanted = run.start >= 0 and run.epoch == 0 and",
        ),
        (
            "history without the output",
            "for i, t in enumerate(run.fill)] if",
            "for i, t in enumerate(run.request.tokens)] if",
        ),
        ("the last chunk of one that only reads is not fed", "run.most and run.decoding) or", "run.most) or"),
    ),
    *faults(
        "engine.sched.request",
        (
            "preempted output is not fed again",
            "self.fill = [*self.request.tokens, *self.out]",
            "self.fill = self.request.tokens",
        ),
    ),
    *faults(
        "engine.sched.waiting",
        ("called back only when all is over", "settled >= upto", "settled < 0"),
        ("who waited for what is forgotten", "self._insert(run)\n\n    def _insert", "pass\n\n    def _insert"),
    ),
    *faults(
        "engine.sched.sharing",
        ("chunks end for nobody", "return {end for end in ends if end > run.fed}", "return set()"),
        ("chunks end where nothing needs it", "return run.length + self.page > self._whole", "return True"),
        ("nobody is waited for", "if same < self.least or", "if True or"),
        ("what is computed is not waited for once it is planned", "other.settled >= same:", "other.fed >= same:"),
        (
            "a group's prompt is taken on trust",
            "parent if parent.request.tokens == run.request.tokens else None",
            "parent",
        ),
    ),
    *faults(
        "engine.sched.prefixes",
        ("rows of a group in any order", "return [rows[i] for i in order], np", "return rows, np"),
        ("one position too many is shared", "end * page - 1)", "end * page)"),
        (
            "a page too many is shared",
            "while at < end and a[at] == b[at]:",
            "while at < end and a[at - 1] == b[at - 1]:",
        ),
        ("between two rows, what only one has with those between", "min(self._same[a + 1 : b + 1])", "self._same[b]"),
        ("what remains is not compared", "self._same[at]\n        self._meet(at)\n", "self._same[at]\n"),
        ("a level that doesn't pay is told", "if end > begin and saves", "if end > begin or saves"),
    ),
    *faults(
        "engine.sched.seating",
        ("a run that lost its seat stays in its group", "self.prefixes.leave(run)", "pass"),
    ),
    *faults(
        "engine.sched.rows",
        ("groups stay when runs begin to decode", " and last.stamp == stamp:", ":"),
    ),
    *faults(
        "engine.sched.policy",
        ("ageing off", "return (now / ageing if ageing else 0.0) - priority, order", "return float(-priority), order"),
        ("priority inversion", "- priority, order", "+ priority, order"),
        ("shortest prefix first", "-run.hint, run.rank, run)", "run.hint, run.rank, run)"),
        ("the lightest branch first", "(-len(b), b[0].rank), reverse=True", "(-len(b), b[0].rank)"),
    ),
    *faults(
        "engine.sched.admission",
        ("nothing is kept free for what runs", "return ceil(self.share *", "return ceil(0 *"),
    ),
    *faults(
        "engine.sched.rows",
        ("refused rows leave their tokens behind", "[i] for i in keep]", "[i] for i in range(len(keep))]"),
        ("one seed for all", "[run.request.seed for run in runs]", "[runs[0].request.seed for run in runs]"),
        ("history of refused rows keeps its row numbers", "(moved[r], *rest)", "(r, *rest)"),
        ("a step like the last keeps its lengths", "last.step.upper + np.int32(1)", "last.step.upper"),
        (
            "a step like the last keeps its pages",
            "table if isinstance(table, StateTable) else _table",
            "table if True else _table",
        ),
    ),
    *faults(
        "engine.sched.request",
        ("scored again after a preemption", " + 1 + len(self.scores)", " + 1"),
        ("masks forget the tokens in flight", "return len(self.out) + self.flying", "return len(self.out)"),
    ),
    *faults(
        "engine.sched.store",
        ("a group's pages outlive it", "self.tree.flush(run.space)", "pass"),
        ("groups are one without the cache", "else (request.namespace, request.group)", "else (request.namespace, '')"),
        ("a scored prompt comes from the cache", "min(run.length, run.unscored) - 1", "run.length - 1"),
    ),
    *faults(
        "engine.sched.rows",
        ("bias is not counted", "self.bias -= len(row.run.request.params.logit_bias)", "pass"),
    ),
    *faults(
        "engine.sched.masks",
        ("a late mask is not waited for", "self.late = any(s.late for s in sources)", "self.late = False"),
        ("one token too many before it may stop", "made < self._until", "made <= self._until"),
        ("a bad word by its last token alone", " if tuple(self._made[1 - len(w) :]) == w[:-1]]", "]"),
        ("the longest bad word is forgotten", "max(len(w) for w in words) - 1", "min(len(w) for w in words) - 1"),
    ),
    *faults(
        "engine.cache.node",
        ("a page too much is matched", "return low * width", "return high * width"),
        ("a prefix without its window is matched", "ok[1:] &= last <", "ok[1:] |= last <"),
    ),
    *faults(
        "engine.cache.radix",
        (
            "eviction ignores locks",
            "if not node.lock and not node.children:\n                    self._drop(node)",
            "if not node.children:\n                    self._drop(node)",
        ),
        ("a window's pages are taken too soon", "away < group.window - 1", "away < 0"),
        ("a split forgets who reads", "upper.lock, upper.tick,", "_, upper.tick,"),
    ),
    *faults(
        "engine.sched.stop",
        ("stops one token late", "keep, finish = i + 1, Finish", "keep, finish = i + 2, Finish"),
        ("length ignores what was made before", "if before + len(new) >= room:", "if len(new) >= room:"),
    ),
    *faults(
        "tests.simulation.toy",
        ("state version ignored after a partial accept", "0 if seated else slot.version", "0"),
        (
            "device length counts rejected drafts",
            "row.start + n - row.drafts + len(got) - 1, len(got) - 1",
            "row.start + n, len(got) - 1",
        ),
    ),
]


def trials() -> Iterable[tuple[str, Callable[[], object]]]:
    """All scenes, then random trials."""
    from tests.simulation.scenes import SCENES
    from tests.simulation.trial import trial

    scenes = [(f"scene {scene.__name__}", scene) for scene in SCENES]
    return [*scenes, *((f"trial {seed}", partial(trial, seed, turns=600)) for seed in range(TRIALS))]


if __name__ == "__main__":
    sys.exit(plant(FAULTS[int(sys.argv[1])], trials))
