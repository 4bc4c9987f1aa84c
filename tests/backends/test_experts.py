"""Rows through the experts that they chose: every form of the product against a loop in numpy."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import models_jax.experts as in_jax
import models_torch.experts as in_torch
from engine.model.spec import Experts

FORMS: dict[str, Callable[..., jax.Array]] = {"tiled": in_jax.tiled, "ragged": in_jax.ragged}


def made(rows: int, counts: list[int], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Random rows sorted by expert, `counts[e]` of each; weights; what each row must become."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((rows, 12)).astype(np.float32)
    w = draw.standard_normal((len(counts), 7, 12)).astype(np.float32)
    expert = np.repeat(np.arange(len(counts)), counts)
    return x, w, expert, np.stack([w[e] @ row for e, row in zip(expert, x, strict=True)])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "counts", [[1], [0, 1], [3, 0, 2], [16, 16], [0, 0, 40], [15, 1, 17, 0, 7], [33, 5, 0, 0, 2]], ids=str
)
def test_each_row_by_its_expert(form: str, counts: list[int]) -> None:
    x, w, _, expected = made(sum(counts), counts)
    found = jax.jit(FORMS[form])(jnp.asarray(x), jnp.asarray(w), jnp.asarray(counts))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_choices_are_sorted_multiplied_and_collected(tokens: int) -> None:
    """Both sides against numpy, from scores to sums."""
    draw = np.random.default_rng(tokens)
    x, scores = draw.standard_normal((tokens, 12)).astype(np.float32), draw.standard_normal((tokens, 6)).astype("f4")
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    p = {n: draw.standard_normal((6, 12) if "bias" in n else (6, 12, 12)).astype(np.float32) for n in names}
    e = Experts(count=6, top_k=3, size=12, renormalised=True, act="clamped", limit=2.0, bias=True)
    for renormalised in (False, True):
        expected = np.zeros_like(x)
        for t in range(tokens):
            best = np.argsort(-scores[t])[:3]
            share = np.exp(scores[t])
            share /= share[best].sum() if renormalised else share.sum()
            for i in best:
                gate, up = (p[n][i] @ x[t] + p[f"{n}_bias"][i] for n in ("gate", "up"))
                gate, up = gate.clip(max=e.limit), up.clip(-e.limit, e.limit)
                h = (up + 1) * gate / (1 + np.exp(-e.alpha * gate))
                expected[t] += share[i] * (p["down"][i] @ h + p["down_bias"][i])
        for side, array in ((in_jax, jnp.asarray), (in_torch, torch.tensor)):
            share, chosen = side.route(array(scores), 3, renormalised)
            order = side.sort(chosen, 6)
            given = {n: array(value) for n, value in p.items()}
            h = side.gated(e, given, array(x), order)
            found = side.collect(h, given["down"], share, order) + side.mix(given["down_bias"], share, chosen)
            np.testing.assert_allclose(np.asarray(found), expected, rtol=1e-4, atol=1e-5)


def test_a_cpu_does_no_more_than_it_must() -> None:
    """The tiled form of one row reads one expert: its program grows with neither experts nor rows."""

    def cost(experts: int) -> float:
        shapes = (
            jax.ShapeDtypeStruct((4, 64), jnp.float32),
            jax.ShapeDtypeStruct((experts, 64, 64), jnp.float32),
            jax.ShapeDtypeStruct((experts,), jnp.int32),
        )
        return float(jax.jit(in_jax.tiled).lower(*shapes).compile().memory_analysis().temp_size_in_bytes)

    assert cost(64) < 2 * cost(4) < 64 * 64 * 64 * 4
