"""Sizes of steps: the ladder that pads least is the one that trying all finds; what is logged is what ran."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from engine.config import load
from engine.errors import ConfigError
from engine.resolve.steps import STEP
from engine.run.sizes import Traffic, read, suggest
from radixmesh import Engine, cli


@pytest.mark.parametrize("seed", range(40))
def test_the_ladder_is_the_best_of_all(seed: int) -> None:
    rng = random.Random(seed)
    end = rng.choice([6, 9, 11])
    sizes = {n: rng.choice([1, 3, 50]) for n in rng.sample(range(1, end + 1), rng.randrange(1, min(end, 8) + 1))}
    traffic, most = Traffic(ladder=(end,), sizes=sizes), rng.choice([1, 2, 3, 5, 12])
    ladders = suggest(traffic, most)
    least = {
        k: min(traffic.padding((*some, end)) for some in combinations(range(1, end), k - 1))
        for k in range(1, min(most, end) + 1)
    }
    assert [len(ladder) for ladder in ladders] == list(range(1, len(ladders) + 1))
    assert all(ladder[-1] == end and list(ladder) == sorted(set(ladder)) for ladder in ladders)
    for ladder in ladders:
        assert traffic.padding(ladder) == least[len(ladder)]
    assert traffic.padding(ladders[-1]) == min(least.values())


def test_padding_is_what_is_added() -> None:
    traffic = Traffic(ladder=(1, 8, 64), sizes={1: 10, 5: 2, 9: 1})
    assert (traffic.steps, traffic.tokens, traffic.padding(traffic.ladder)) == (13, 29, 2 * 3 + 55)
    assert traffic.waste(traffic.ladder) == 61 / 90
    with pytest.raises(ValueError, match="9 tokens"):
        traffic.padding((1, 8))


def test_what_an_engine_logs_is_what_it_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "sizes"
    small = {"sched.slots": 4, "sched.max_tokens": 64, "sched.token_buckets": [4, 64], "cache.tokens": 2048}
    with Engine(backend="reference", skip_tokenizer=True, **small, **{"sched.log": str(log)}) as engine:
        greedy = {"temperature": 0, "max_new_tokens": 5, "ignore_eos": True}
        engine.generate(token_ids=[[7] * 20, [8] * 9, [9] * 4], sampling_params=greedy)
        engine.generate(token_ids=[5] * 30, sampling_params=greedy, return_logprob=True, logprob_start_len=0)
    traffic = read([log])
    assert traffic.ladder == (4, 64)
    assert traffic.sizes[33] == 1  # the three prompts; the prompt that is scored is left out
    assert 30 not in traffic.sizes
    assert traffic.tokens == 33 + 3 * 4 + 4
    app = cli.make_app()
    app(["buckets", str(log), str(log), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == 2 * traffic.tokens
    assert told["now"] == {"token_buckets": [4, 64], "waste": traffic.waste((4, 64))}
    assert told["best"][-1]["waste"] == 0
    app(["buckets", str(log)], standalone_mode=False)
    assert "--set sched.token_buckets='[1, 3, 33, 64]'" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("line", ["{", "[]", '{"ladder": [8], "sizes": {"9": 1}}', '{"ladder": [], "sizes": {}}', ""])
def test_a_log_that_is_none_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "log").write_text(line + "\n")
    with pytest.raises(ConfigError, match="log: "):
        read([tmp_path / "log"])


def test_more_than_twelve_sizes_are_refused_and_defaults_have_fewer() -> None:
    assert len(load(None, {"token_buckets": list(range(1, 13))}).sched.token_buckets or ()) == 12
    with pytest.raises(ConfigError, match=r"sched.token_buckets: at most 12 sizes, not 13"):
        load(None, {"token_buckets": list(range(1, 14))})
    assert all(len({*sizes, slots, tokens}) <= 12 for slots, tokens, sizes in STEP.values())


def test_a_log_that_can_not_be_opened_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sched\.log: .* can't be written"):
        Engine(backend="reference", **{"sched.log": str(tmp_path / "no" / "log")})
