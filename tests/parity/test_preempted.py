"""In a cache too small for those that run, some lose their pages and are computed again: the tokens stay the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from backends.api.step import ScheduleStep, Ticket
from backends.api.ties import first_difference, near_tie
from engine.model.registry import read_spec
from engine.model.spec import fit
from engine.sched.admission import LOW
from radixmesh import Engine
from radixmesh.parity.readings import Reading, ask_oracle, open_oracle
from tests.tiny import SHAPES, Tiny, assert_honest, prompt, tiny

BACKENDS = ("jax", "torch", "reference")
MADE, PAGE, LONG = 64, 8, 96
TIGHT: dict[str, Any] = {
    "dtype": "float32",
    "sched.slots": 4,
    "sched.max_tokens": 16,
    "sched.token_buckets": [16],
    "cache.page": PAGE,
    "model.max_len": LONG,
}
QUICK = {
    ("torch", "llama-grouped"),
    ("torch", "mistral-window"),  # a window group alone
    ("torch", "gemma3-two-ropes"),  # two groups
    ("torch", "gpt_oss-sinks"),
    ("torch", "qwen3_moe-some-dense"),
    ("reference", "gpt_oss-sinks"),
    ("jax", "gpt_oss-sinks"),  # two groups, sinks and experts at once
}
CASES = [
    pytest.param(backend, shape, marks=() if (backend, shape) in QUICK else pytest.mark.slow)
    for shape in SHAPES
    for backend in BACKENDS
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A model, prompts, and what Hugging Face makes of each."""

    model: Tiny
    prompts: list[list[int]]
    oracle: list[Reading]

    def assert_same(self, said: list[list[int]]) -> None:
        for made, judge in zip(said, self.oracle, strict=True):
            assert len(made) == MADE
            at = first_difference(judge.tokens, made)
            assert at is None or near_tie(judge.margins[at], 1e-5), f"token {at}, margin {judge.margins[at]}"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judged]:
    """By shape, once: two of the three prompts begin alike."""
    made: dict[str, Judged] = {}

    def get(shape: str) -> Judged:
        if shape not in made:
            model = tiny(tmp_path_factory.mktemp(shape), **SHAPES[shape])
            assert_honest(model)
            first = prompt(model, 30, seed=1)
            prompts = [first, first[:19] + prompt(model, 11, seed=2), prompt(model, 30, seed=3)]
            hf, spec = open_oracle(model.path), fit(read_spec(model.path), LONG)
            oracle = [ask_oracle(hf, spec, tokens, MADE) for tokens in prompts]
            made[shape] = Judged(model=model, prompts=prompts, oracle=oracle)
        return made[shape]

    return get


class Watch:
    """What an engine's steps seat and feed, counted on the way to its backend."""

    def __init__(self, engine: Engine) -> None:
        self.loop = engine._client.carrier.loop  # type: ignore[attr-defined]
        self.seats = self.fed = 0
        forward = self.loop.backend.forward

        def counted(step: ScheduleStep) -> Ticket:
            self.seats += int((step.starts >= 0).sum())
            self.fed += int(step.lens.sum())
            return forward(step)

        self.loop.backend.forward = counted

    @property
    def preemptions(self) -> int:
        return self.loop.stats().preemptions


@pytest.mark.parametrize(("backend", "shape"), CASES)
def test_preempted_requests_agree(judged: Callable[[str], Judged], backend: str, shape: str) -> None:
    """Together they want more pages than there are; then each alone, from nothing, which preempts nobody."""
    found = judged(shape)
    params = {"temperature": 0, "max_new_tokens": MADE, "ignore_eos": True}
    full = any(layer.mixer.window is None for layer in read_spec(found.model.path).layers)
    room = {"cache.tokens": 112 if full else 72}  # behind a window alone a request holds few pages
    with Engine(str(found.model.path), backend=backend, skip_tokenizer=True, **TIGHT, **room) as engine:
        watch = Watch(engine)
        watch.loop.scheduler.estimate.share = LOW  # as after hundreds of steps that went well: all are seated
        together = engine.generate(token_ids=found.prompts, sampling_params=params)
        preempted, seats, fed = watch.preemptions, watch.seats, watch.fed
        alone = [
            engine.generate(token_ids=tokens, sampling_params=params, cache_salt=str(i))
            for i, tokens in enumerate(found.prompts)
        ]
        once = watch.fed - fed
        assert watch.preemptions == preempted
    assert preempted > 0
    assert seats == len(found.prompts) + preempted
    assert fed >= once + PAGE, "nothing was computed again"
    assert [r["meta_info"]["cached_tokens"] for r in alone] == [0, 0, 0]
    found.assert_same([r["output_ids"] for r in together])
    found.assert_same([r["output_ids"] for r in alone])
