"""Rows dealt out over the devices of a mesh, which jax.vmap stands for: nothing is lost, and the choice is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backends.api.build import Row, build
from backends.api.conformance.bench import SPEC, config
from backends.api.limits import Limits, choosing
from backends.api.seats import Asks
from backends.jax import choosing as late
from backends.jax import dealt
from backends.jax.caches import State
from engine.mesh import RULES, MeshSpec

ROWS, VOCAB = 5, 41


def everywhere(fn: Callable[..., Any], devices: int, *split: bool) -> Callable[..., Any]:
    """fn in local view on so many devices. split: of each argument, whether its first axis is that of the devices."""
    return jax.jit(jax.vmap(fn, in_axes=[0 if s else None for s in split], axis_name=RULES["vocab"], axis_size=devices))


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_each_row_is_whole_on_one_device(devices: int) -> None:
    """Neither rows nor the vocabulary are divided by the devices."""
    logits = np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype(np.float32)
    each = -(-VOCAB // devices)
    padded = np.pad(logits, ((0, 0), (0, each * devices - VOCAB)))
    parts = np.stack([padded[:, i * each : (i + 1) * each] for i in range(devices)])
    rows = everywhere(lambda x: dealt.deal(x, VOCAB), devices, True)(parts)
    assert rows.shape == (devices, dealt.room(ROWS, MeshSpec(tp=devices)) // devices, VOCAB)
    assert np.array_equal(rows.reshape(-1, VOCAB)[:ROWS], logits)
    mine = everywhere(dealt.mine, devices, False)((logits, np.arange(ROWS)))
    assert np.array_equal(mine[0].reshape(-1, VOCAB)[:ROWS], logits)
    assert mine[1].reshape(-1).tolist()[:ROWS] == list(range(ROWS))
    whole = everywhere(lambda x: dealt.join(x, ROWS), devices, True)(rows)
    assert all(np.array_equal(one, logits) for one in whole), "every device has all"


def test_a_mesh_chooses_as_one_device_does() -> None:
    """Rows that are drawn, greedy, penalised, biased, masked, and told, on four devices; their counts and slots."""
    sizes = {"max_rows": ROWS, "slots": ROWS, "max_tokens": ROWS, "token_buckets": (ROWS,), "max_logprobs": 4}
    given = config("jax", **sizes)
    limits = Limits.of(replace(SPEC, vocab=VOCAB), given, **choosing(given))
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (ROWS, VOCAB)).astype(np.float32)
    wants: list[dict[str, Any]] = [
        {"temperature": 0.9, "seed": 5, "top_k": 7},
        {"bias": [(11, 9.0)], "logprobs": 3},
        {"temperature": 1.5, "seed": 2**40, "penalty": (1.4, 0.3, 0.2), "top_p": 0.8},
        {"masked": True},
        {"bias": [(40, 20.0), (3, 1.0)], "temperature": 0.5, "seed": 9, "min_p": 0.1},
    ]
    step = build(limits, 0, [Row(slot=i, tokens=[-1], upper=9, **w) for i, w in enumerate(wants)])
    counts = rng.integers(0, 4, (ROWS + 1, VOCAB)).astype(np.int32)
    slots = jnp.arange(ROWS + 1, dtype=jnp.int32)
    masks = rng.integers(0, 2**32, (1, 1, -(-VOCAB // 32)), np.uint32)
    masks[..., -1] &= np.uint32(2 ** (VOCAB % 32) - 1)
    rest = (
        np.zeros((ROWS, 2), np.int32),
        late.pack_wishes(step, Asks.of(step), ROWS, limits),
        late.pack_masks(masks, step, ROWS, limits),
        late.pack_bias(step, limits),
    )

    def chosen(devices: int) -> list[np.ndarray[Any, Any]]:
        """All that the program gives, as the last device has it."""
        room = dealt.room(ROWS, MeshSpec(tp=devices))
        split = np.pad(logits, ((0, room - ROWS), (0, 0))).reshape(devices, -1, VOCAB)

        def run(x: jax.Array) -> Any:
            state = State(slots, slots, jnp.zeros((ROWS + 1, 1), jnp.int32))
            return late.choose(limits, state, jnp.asarray(counts), x, *rest)

        return [np.asarray(leaf[-1]) for leaf in jax.tree.leaves(everywhere(run, devices, True)(split))]

    alone, mesh = chosen(1), chosen(4)
    assert alone[4][:, 0].tolist() != logits.argmax(1).tolist()
    for one, other in zip(alone[:5], mesh[:5], strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(alone[5:], mesh[5:], strict=True):
        np.testing.assert_allclose(other[1], one[1], rtol=1e-6)  # the logprobs that a row asked for
