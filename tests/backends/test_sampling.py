"""Penalties, bias, masks and logprobs on both devices, against Hugging Face, statistics and plain counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec
from numpy.typing import NDArray
from transformers.generation import logits_process as hf

from backends import open_backend
from backends.api.build import Host, Row, build
from backends.api.choice import Choice, kept, scaled, score
from backends.api.conformance.bench import SPEC, Weights, config, prompt, refused
from backends.api.limits import Limits, choosing
from backends.api.seats import Asks, tally
from backends.api.step import ScheduleStep
from backends.jax import choosing as on_jax
from backends.jax.caches import State
from backends.jax.mesh import make_mesh
from backends.torch import choosing as on_torch
from backends.torch.inputs import pack
from backends.torch.sampler import choose
from engine.mesh import MeshSpec
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from tests.tiny import Tiny, tiny
from tests.tiny import prompt as random_prompt

ROWS, VOCAB = 4000, 12
DEVICES = ("jax", "torch")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Against Hugging Face


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp("model"), vocab=193, max_len=256, tied=True)


@pytest.fixture(scope="module", params=DEVICES)
def host(request: pytest.FixtureRequest, model: Tiny) -> Iterator[Host]:
    """A loaded backend whose steps hold more than one block of scored positions."""
    spec = read_spec(model.path)
    sizes = {"max_len": 256, "page": 8, "pages": (64,), "max_tokens": 160, "token_buckets": (8, 160), "max_rows": 4}
    backend = open_backend(request.param, spec, config(request.param, **sizes))
    backend.load(Checkpoint(model.path, spec))
    yield Host(backend)
    backend.close()


def test_prompts_are_scored_as_by_transformers(model: Tiny, host: Host) -> None:
    """150 tokens, more than two blocks, whole and in chunks, alternatives beside each."""
    ids = random_prompt(model, 150, seed=1)
    truth = model.logits(ids).log_softmax(-1).numpy()
    for chunk in (150, 70):
        text, own, top = host.open(), [], []
        for at in range(0, len(ids), chunk):
            part, following = ids[at : at + chunk], ids[at + chunk] if at + chunk < len(ids) else -1
            row = host.row(text, part, next=following, output=int(following < 0), prompt_logprobs=(1, 4))
            found = host.run([(text, row)]).prompt_logprobs
            assert found is not None
            assert found[0] is not None
            own.append(found[0].own)
            top.append((found[0].ids, found[0].top))
        host.close(text)
        assert np.abs(np.concatenate(own) - truth[np.arange(149), ids[1:]]).max() < 2e-4
        likely, values = (np.concatenate(each) for each in zip(*top, strict=True))
        assert np.abs(values - -np.sort(-truth[:149], axis=1)[:, :4]).max() < 2e-4
        assert np.abs(np.take_along_axis(truth[:149], likely, 1) - values).max() < 2e-4


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"repetition_penalty": 1.4}, {"penalty": (1.4, 0.0, 0.0)}),
        ({"sequence_bias": [[[94], -6.0], [[11], 2.5]]}, {"bias": [(94, -6.0), (11, 2.5)]}),
        ({"suppress_tokens": list(range(0, 193, 2))}, {"masked": True}),
    ],
)
def test_greedy_text_is_that_of_transformers(
    model: Tiny, host: Host, theirs: dict[str, Any], ours: dict[str, Any]
) -> None:
    """With steps in flight: what is counted is counted on the device."""
    ids = random_prompt(model, 20, seed=2)
    given = {"inputs": torch.tensor([ids]), "attention_mask": torch.ones((1, 20), dtype=torch.long)}
    asked = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    plain = model.hf.generate(**given, **asked)[0, 20:].tolist()
    want = model.hf.generate(**given, **asked, **theirs)[0, 20:].tolist()
    assert want != plain
    odd = np.full((1, 1, 7), 0xAAAAAAAA, np.uint32) if "masked" in ours else None
    text, made, out = host.open(), [], []
    for step in range(24):
        more = {"history": [(t, 0) for t in ids]} if step == 0 and "penalty" in ours else {}
        row = host.row(text, ids if step == 0 else [-1], **more, **ours)
        if len(out) == host.limits.depth:
            made += host.backend.collect(out.pop(0)).tokens[0].tolist()
        out.append(host.enqueue([(text, row)], odd))
    for ticket in out:
        made += host.backend.collect(ticket).tokens[0].tolist()
    host.close(text)
    assert made == want


# The functions by themselves


def limits_of(rows: int, vocab: int) -> Limits:
    sizes = {"max_rows": rows, "slots": rows, "max_tokens": rows, "token_buckets": (rows,), "max_logprobs": 4}
    given = config("jax", **sizes)
    return Limits.of(replace(SPEC, vocab=vocab), given, **choosing(given))


def rows_of(seeds: NDArray[np.uint64], **values: Any) -> list[Row]:
    return [Row(slot=i, tokens=[-1], upper=9, seed=int(s), **values) for i, s in enumerate(seeds)]


def by_jax(
    step: ScheduleStep, limits: Limits, logits: Any, counts: NDArray[np.int32], masks: NDArray[np.uint32]
) -> NDArray[Any]:
    """Tokens that the program behind a step makes."""
    rows, slots = len(logits), jnp.zeros(limits.slots + 1, jnp.int32)
    state = State(slots, slots, jnp.zeros((limits.slots + 1, 1), jnp.int32))
    alone = jax.shard_map(
        partial(on_jax.choose, limits),
        mesh=make_mesh(MeshSpec(), jax.devices()),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    _, after, made, _ = jax.jit(alone)(
        state,
        jnp.concatenate([counts, counts[:1]]),
        jnp.asarray(logits),
        jnp.zeros((rows, 2), jnp.int32),
        on_jax.pack_wishes(step, Asks.of(step), rows, limits),
        on_jax.pack_masks(masks, step, rows, limits),
        on_jax.pack_bias(step, limits),
    )
    grown = np.asarray(after)[: limits.slots] - counts
    assert np.array_equal(grown.nonzero()[1], np.asarray(made[:, 0]))
    assert (grown[grown > 0] == 2).all()
    return np.asarray(made[:, 0])


def by_torch(
    step: ScheduleStep, limits: Limits, logits: Any, counts: NDArray[np.int32], masks: NDArray[np.uint32]
) -> NDArray[Any]:
    batch = pack(step, limits, torch.device("cpu"))
    assert batch.wishes is not None
    assert batch.order.rows.tolist() == list(range(len(logits)))
    raw, held = torch.from_numpy(logits), torch.from_numpy(counts.copy())
    sent = on_torch.send_masks(masks, torch.device("cpu"))
    x = on_torch.adjust(raw, batch.wishes, held, sent)
    made = choose(x, batch.draws, torch.zeros(len(logits), dtype=torch.int64), raw)[0]
    on_torch.count(held, batch.wishes, made)
    assert torch.equal((held - torch.from_numpy(counts)).nonzero()[:, 1], made)
    assert torch.equal(raw, torch.from_numpy(logits)), "the raw logits stay"
    return made.numpy()


@pytest.mark.parametrize("run", [by_jax, by_torch])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.9, "min_p": 0.03}])
def test_what_is_drawn_follows_the_distribution(run: Callable[..., NDArray[Any]], filters: dict[str, Any]) -> None:
    """4,000 draws with penalties, a mask and filters, half of them with bias, by chi-square."""
    limits = limits_of(ROWS, VOCAB)
    rng = np.random.default_rng(4)
    logits = np.tile((1.5 * rng.standard_normal(VOCAB)).astype(np.float32), (ROWS, 1))
    made = np.array([0, 2, 0, 1, 0, 0, 0, 0, 3, 0, 0, 0], np.int32)
    seen = (made > 0) | (np.arange(VOCAB) % 3 == 0)
    counts = np.tile(2 * made + (np.arange(VOCAB) % 3 == 0), (ROWS, 1)).astype(np.int32)
    allowed = np.arange(VOCAB) != 5
    bias = np.where(np.arange(VOCAB) == 7, np.float32(1.5), np.float32(0))
    values: dict[str, Any] = {"temperature": 0.9, "penalty": (1.3, 0.2, 0.4), **filters}
    # half of the rows have a bias of their own, as a step has only so much room
    rows = rows_of(rng.integers(0, 2**64, ROWS, np.uint64), masked=True, **values)
    rows = [replace(row, bias=[(7, 1.5)]) if i % 2 else row for i, row in enumerate(rows)]
    masks = np.full((ROWS, 1, 1), 0xFFFFFFFF & ~(1 << 5), np.uint32)
    tokens = run(build(limits, 0, rows), limits, logits, counts, masks)
    for half, shift in ((tokens[::2], None), (tokens[1::2], bias)):
        choice = Choice(**values, seen=seen, made=made, bias=shift, allowed=allowed)
        x = scaled(logits[0], choice)
        p = np.where(kept(x, choice), np.exp(x.astype(np.float64)), 0)
        expected = len(half) * p / p.sum()
        found = np.bincount(half, minlength=VOCAB)
        assert (found[expected == 0] == 0).all()
        some = expected > 0
        assert some.sum() > 2
        chi = (((found - expected)[some] ** 2) / expected[some]).sum()
        free = int(some.sum()) - 1
        beyond = free * (1 - 2 / (9 * free) + 3.719 * (2 / (9 * free)) ** 0.5) ** 3  # 1 in 10,000; Wilson and Hilferty
        assert chi < beyond, (found, expected)


def test_penalties_are_those_of_transformers() -> None:
    """Repetition by its own processor; presence and frequency as OpenAI defines them."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 50)).astype(np.float32)
    ids, out = [3, 9, 9, 40], [7, 7, 9]
    counts = np.zeros((3, 50), np.int32)
    counts[:, ids] |= 1
    np.add.at(counts, (slice(None), out), 2)
    penalty = np.array([(1.8, 0, 0), (0.5, 0, 0), (1.0, 0.5, 0.25)], np.float32)
    want = [
        hf.RepetitionPenaltyLogitsProcessor(p)(torch.tensor([ids + out]), torch.tensor(logits[i : i + 1])).numpy()[0]
        for i, p in enumerate((1.8, 0.5))
    ]
    last = logits[2].copy()
    last[[7, 9]] -= [0.5 + 2 * 0.25, 0.5 + 0.25]
    lines = dict(zip(("repetition", "presence", "frequency"), penalty.T, strict=True))
    wishes = on_jax.Wishes(**(dict.fromkeys(on_jax.Wishes._fields) | lines))
    found = on_jax.penalise(jnp.asarray(logits), jnp.asarray(counts), wishes)
    np.testing.assert_allclose(found, [*want, last], rtol=1e-6)
    args = (torch.from_numpy(x) for x in (logits, counts, penalty))
    np.testing.assert_allclose(on_torch.penalise(*args), [*want, last], rtol=1e-6)


def test_alternatives_that_tie_come_by_id() -> None:
    """Few values, so that every edge ties; of either sign, and both zeros."""
    rng = np.random.default_rng(1)
    logits = rng.choice(np.array([-7.5, -1, 0, 1e-30, 2, 2.5], np.float32), (40, 300))
    logits[0] = 0
    for k in (1, 5, 20, 300):
        want = score(logits, np.zeros(40, np.int32), k)
        theirs = on_torch.score(torch.from_numpy(logits), torch.zeros(40, dtype=torch.int64), k)
        ours = jax.jit(on_jax.score, static_argnums=2)(logits, np.zeros(40, np.int32), k)
        for found in (theirs, ours):
            assert np.array_equal(np.asarray(found.ids), want.ids)
            np.testing.assert_allclose(np.asarray(found.own), want.own, rtol=2e-6)
            np.testing.assert_allclose(np.asarray(found.top), want.top, rtol=2e-6)
    signed = torch.tensor([[-0.0, 0.0, -0.0, -1.0]])
    assert on_torch.likeliest(signed, 3).tolist() == [[0, 1, 2]]


def test_histories_are_counted_whole() -> None:
    """More distinct tokens than one call takes, on slots that hold others' counts; what is not seated stays."""
    limits = limits_of(4, 5000)
    rng = np.random.default_rng(2)
    told = [list(zip(*rng.integers(0, (5000, 2), (6000, 2)).T.tolist(), strict=True)) for _ in range(2)]
    common = {"tokens": [1], "start": 0, "upper": 1}
    rows = [
        Row(slot=3, history=told[0], penalty=(1.1, 0, 0), **common),
        Row(slot=1, **common),
        Row(slot=0, history=told[1], penalty=(1, 0, 0.5), **common),
    ]
    step = build(limits, 0, rows)
    want = np.full((4, 5000), 77, np.int32)
    for slot, history in ((3, told[0]), (0, told[1])):
        out = Counter(t for t, m in history if m)
        prompt_ids = {t for t, m in history if not m}
        want[slot] = [2 * out[t] + (t in prompt_ids) for t in range(5000)]
    entries = tally(step)
    assert len(entries) == len(set(map(tuple, entries[:, :2].tolist()))) > 2 * on_jax.COUNTS
    counts = jnp.full((5, 5000), 77, jnp.int32)
    calls = on_jax.pack_counts(step, Asks.of(step), limits)
    assert len(calls) > 1
    for packed in calls:
        counts = jax.jit(on_jax.count, static_argnums=0)(limits, counts, packed)
    assert np.array_equal(counts[:4], want)
    held = torch.full((4, 5000), 77, dtype=torch.int32)
    batch = pack(step, limits, torch.device("cpu"))
    assert batch.wishes is not None
    on_torch.seat(held, batch.wishes)
    assert np.array_equal(held.numpy(), want)
    plain = build(limits, 0, [rows[1]])
    assert not on_jax.pack_counts(plain, Asks.of(plain), limits)


@pytest.mark.parametrize("name", ["reference", *DEVICES])
def test_what_is_switched_off_is_refused_and_the_rest_goes_on(name: str) -> None:
    given = config(name, penalties=False, max_logprobs=0, token_buckets=(16,))
    backend = open_backend(name, SPEC, given)
    backend.load(Weights())
    host, ids = Host(backend), prompt(4)
    assert (host.limits.max_history, host.limits.max_logprobs) == (0, 0)
    text = host.open()
    for field, row in (
        ("sampling.penalty", {"penalty": (1.0, 0.5, 0.0)}),
        ("sampling.logprobs", {"logprobs": 0}),
        ("sampling.prompt_logprobs", {"prompt_logprobs": (1, 0)}),
    ):
        step = build(host.limits, 0, [Row(slot=text.slot, tokens=ids, start=0, upper=4, **row)])
        refused(lambda step=step: backend.forward(step), field, [0])  # type: ignore[misc]
    only = np.zeros((1, 1, 4), np.uint32)
    only[0, 0, 1] = 1 << 5
    assert host.run([(text, host.row(text, ids, masked=True))], only).tokens.tolist() == [[37]]
    assert host.run([(text, host.row(text, [-1], bias=[(9, 1e9)]))]).tokens.tolist() == [[9]]
    backend.close()
