"""The normative noise against jax.random and published vectors; the normative choice against transformers and
statistics; the near-tie rule."""

from __future__ import annotations

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from backends.api.choice import Choice, choose, kept, scaled, scores, unpack
from backends.api.random import bits, gumbel, threefry2x32, uniform
from backends.api.ties import admissible, first_difference, judge, margin, near_tie

SEEDS = np.array([0, 1, 2**32 - 1, 2**32, 0xDEADBEEF_12345678, 2**63, 2**64 - 1, 42], np.uint64)
POSITIONS = np.array([0, 1, 2, 77, 2**15, 2**20 + 3, 2**31 - 1], np.int32)
VOCAB = 1031


def draw(seed: int, count: int = 50) -> np.ndarray:
    """Logits with a standard deviation of 2."""
    return (2 * np.random.default_rng(seed).standard_normal(count)).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "count", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_published_vectors(key: tuple[int, int], count: tuple[int, int], expected: tuple[int, int]) -> None:
    """Known answers of Random123's kat_vectors, threefry2x32 with 20 rounds."""
    words = [np.array([[w]], np.uint32) for w in (*key, *count)]
    found = threefry2x32((words[0], words[1]), (words[2], words[3]))
    assert tuple(int(x[0, 0]) for x in found) == expected


def test_bits_are_those_of_jax() -> None:
    seeds, positions = np.repeat(SEEDS, len(POSITIONS)), np.tile(POSITIONS, len(SEEDS))
    data = np.stack([seeds >> np.uint64(32), seeds & np.uint64(0xFFFFFFFF)], 1).astype(np.uint32)

    def one(key: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.bits(jax.random.fold_in(jax.random.wrap_key_data(key), position), (VOCAB,))

    with jax.threefry_partitionable(True):
        truth = np.asarray(jax.vmap(one)(jnp.asarray(data), jnp.asarray(positions)))
    found = bits(seeds, positions, VOCAB)
    assert found.size > 50_000
    assert len(np.unique(truth[:, 0])) == len(truth)
    np.testing.assert_array_equal(found, truth)


def test_uniform_is_exact_and_never_0_or_1() -> None:
    edge = np.array([0, 511, 512, 2**32 - 1, 2**31], np.uint32)
    exact = ((edge >> 9).astype(np.float64) + 0.5) / 2**23
    assert uniform(edge).dtype == np.float32
    np.testing.assert_array_equal(uniform(edge).astype(np.float64), exact)
    assert 0 < uniform(edge).min() < uniform(edge).max() < 1


def test_gumbel_has_its_distribution() -> None:
    noise = gumbel(SEEDS, np.full(len(SEEDS), 9, np.int32), 20_000).astype(np.float64)
    assert np.isfinite(noise).all()
    assert abs(noise.mean() - np.euler_gamma) < 0.01
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    below = [(noise < x).mean() - np.exp(-np.exp(-x)) for x in (-1.5, -0.5, 0.0, 1.0, 3.0)]
    assert np.abs(below).max() < 0.005


def test_sampling_follows_the_softmax() -> None:
    """Chi-square over 8 tokens, 20,000 positions; 7 degrees of freedom, 1 in 10,000 beyond 29.9."""
    logits, choice = draw(3, 8), Choice(temperature=0.7, seed=11)
    noise = gumbel(np.full(20_000, 11, np.uint64), np.arange(20_000, dtype=np.int32), 8)
    found = (logits / np.float32(0.7) + noise).argmax(axis=1)
    assert [choose(logits, choice, p) for p in range(200)] == found[:200].tolist()
    p = np.exp(logits.astype(np.float64) / 0.7)
    expected = 20_000 * p / p.sum()
    assert (((np.bincount(found, minlength=8) - expected) ** 2) / expected).sum() < 29.9


def test_filters_are_those_of_transformers() -> None:
    for i in range(40):
        logits, rng = draw(i, 60), np.random.default_rng(i)
        k, p, m = int(rng.integers(1, 70)), float(rng.uniform(0.05, 0.999)), float(rng.uniform(0.001, 0.6))
        for choice, chain in (
            (Choice(temperature=1, top_k=k), [hf.TopKLogitsWarper(k)]),
            (Choice(temperature=1, top_p=p), [hf.TopPLogitsWarper(p)]),
            (Choice(temperature=1, min_p=m), [hf.MinPLogitsWarper(m)]),
            (
                Choice(temperature=1, top_k=k, top_p=p, min_p=m),
                [hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p), hf.MinPLogitsWarper(m)],
            ),
            (
                Choice(temperature=0.4, top_k=k, top_p=p),
                [hf.TemperatureLogitsWarper(0.4), hf.TopKLogitsWarper(k), hf.TopPLogitsWarper(p)],
            ),
        ):
            truth = torch.tensor(logits[None])
            for process in chain:
                truth = process(torch.zeros((1, 1), dtype=torch.long), truth)
            assert (kept(scaled(logits, choice), choice) == np.isfinite(truth[0].numpy())).all(), (i, choice)


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits, ids = draw(5), [3, 9, 9, 40]
    truth = hf.RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([ids]), torch.tensor(logits[None]))[0].numpy()
    seen = np.zeros(50, bool)
    seen[ids] = True
    np.testing.assert_allclose(scaled(logits, Choice(penalty=(1.8, 0, 0), seen=seen)), truth, rtol=1e-6)


def test_presence_and_frequency_count_only_what_was_made() -> None:
    """As the OpenAI interface defines them: logit - count * frequency - (count > 0) * presence."""
    logits, made = draw(6), np.zeros(50, np.int32)
    made[[2, 7]] = 1, 3
    found = scaled(logits, Choice(penalty=(1.0, 0.5, 0.25), made=made, seen=np.ones(50, bool)))
    expected = logits.copy()
    expected[2] -= 0.75
    expected[7] -= 1.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_order_of_the_stages() -> None:
    """Repetition before presence, penalties before bias, bias before mask, mask before temperature and filters."""
    logits = np.array([4.0, 3.0, 2.0, 1.0], np.float32)
    made = np.array([1, 0, 0, 0], np.int32)
    bias = np.array([0.5, 0, 0, 100], np.float32)
    allowed = np.array([True, True, True, False])
    choice = Choice(penalty=(2.0, 1.0, 0.0), seen=made > 0, made=made, bias=bias, allowed=allowed)
    np.testing.assert_allclose(scaled(logits, choice), [4 / 2 - 1 + 0.5, 3, 2, -np.inf])
    assert choose(logits, choice, 0) == 1
    masked = Choice(temperature=1, top_k=1, allowed=np.array([False, True, True, True]))
    assert {choose(logits, masked, p) for p in range(50)} == {1}, "top-k counts allowed tokens only"
    # top-p over what top-k left: 0.73 of the mass of two is reached by the first alone, of all four by two
    both = Choice(temperature=1, top_k=2, top_p=0.73)
    assert kept(scaled(logits, both), both).tolist() == [True, False, False, False]
    wide = Choice(temperature=1, top_p=0.73)
    assert kept(scaled(logits, wide), wide).tolist() == [True, True, False, False]


def test_ties() -> None:
    """The lowest id wins; equal values at the edge of a filter stay."""
    even = np.zeros(6, np.float32)
    assert choose(even, Choice(), 0) == 0
    assert choose(np.array([1, 5, 5, 0], np.float32), Choice(), 0) == 1
    for choice in (Choice(temperature=1, top_k=2), Choice(temperature=1, top_p=0.2), Choice(temperature=1, min_p=1.0)):
        assert kept(even, choice).all()
        assert len(Counter(choose(even, choice, p) for p in range(200))) == 6
    steps = np.log(np.array([0.4, 0.3, 0.3], np.float32))
    edge = Choice(temperature=1, top_p=0.5)
    assert kept(steps, edge).all(), "both of the equal tokens that reach 0.5"
    assert kept(steps, Choice(temperature=1, top_p=0.39)).tolist() == [True, False, False]


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = draw(9) * 100
    assert choose(logits, Choice(temperature=temperature, top_p=0.9, seed=4), 3) == logits.argmax()


def test_noise_depends_on_seed_and_position_only() -> None:
    logits = draw(1)
    few = [choose(logits, Choice(temperature=1, seed=s), p) for s in (5, 2**40 + 5) for p in range(40)]
    assert len(set(few)) > 5
    assert few[:40] != few[40:], "the high word of a seed counts"
    alone = gumbel(SEEDS[3:4], POSITIONS[2:3], 64)
    np.testing.assert_array_equal(gumbel(SEEDS[3:4], POSITIONS[2:3], 50), alone[:, :50])


def test_unpack() -> None:
    allowed = np.random.default_rng(0).random(77) < 0.5
    words = np.zeros(3, np.uint32)
    for v in np.flatnonzero(allowed):
        words[v // 32] |= np.uint32(1) << np.uint32(v % 32)
    np.testing.assert_array_equal(unpack(words, 77), allowed)


def test_near_ties() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert margin(np.array([1.0, 4.0, 3.5], np.float32)) == 0.5
    assert margin(np.array([4.0, 4.0], np.float32)) == 0
    assert near_tie(0.009, 0.001)
    assert not near_tie(0.011, 0.001)
    assert not near_tie(0.0, 0.0), "equal logits give equal tokens"
    gaps = [[1.0, 1.0], [1.0, 0.001], [1.0, 1.0]]
    found = judge([[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 9], [9, 2]], gaps, 0.001)
    assert (found.equal, found.near, found.faults) == (1, 1, ((2, 0),))
    assert not found.ok
    assert judge([[1, 2]] * 100, [[1, 2]] * 99 + [[1, 9]], [[1.0, 0.001]] * 100, 0.001).ok
    assert not judge([[1, 2]] * 100, [[1, 2]] * 98 + [[1, 9]] * 2, [[1.0, 0.001]] * 100, 0.001).ok
    assert judge([[1, 2]], [[1]], [[0.0, 0.0]], 1.0).faults == ((0, 1),), "a missing token is no near-tie"


def test_admissible() -> None:
    """A token is admissible just when logits that stand as near as measured could give it."""
    logits = np.array([2.0, 1.9999, 0.0], np.float32)
    assert admissible(0, logits, Choice(), 0, 0.0)
    assert admissible(1, logits, Choice(), 0, 1e-4)
    assert not admissible(1, logits, Choice(), 0, 1e-6)
    assert not admissible(2, logits, Choice(), 0, 1e-4)
    edge = Choice(temperature=1, top_k=1, seed=2)
    assert admissible(1, logits, edge, 0, 1e-4)
    assert not admissible(1, logits, edge, 0, 1e-6)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        logits = draw(seed, 30)
        choice = Choice(
            temperature=float(rng.choice([0.3, 1.0, 2.0])),
            top_k=int(rng.choice([0, 3, 10])),
            top_p=float(rng.choice([1.0, 0.8, 0.3])),
            min_p=float(rng.choice([0.0, 0.05])),
            seed=seed,
        )
        near = logits + rng.uniform(-0.03, 0.03, 30).astype(np.float32)
        assert admissible(choose(near, choice, 5), logits, choice, 5, 0.03)
        worst = int(np.argmin(scores(logits, choice, 5)))
        assert not admissible(worst, logits, choice, 5, 1e-5)
