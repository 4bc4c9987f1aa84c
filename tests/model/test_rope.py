"""Ropes of every kind against transformers' own, over random figures; and that one length fixes those that have one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from engine.model.archs import llama
from engine.model.rope import KINDS, Rope
from engine.model.spec import fit

SIZES = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def number(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def ropes(draw: st.DrawFn, kind: str) -> tuple[dict[str, Any], int]:
    """A Llama config with a rope of a kind, and the length that an engine goes to."""
    dim, original = 2 * draw(st.integers(2, 64)), draw(st.integers(16, 8192))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(number(100, 1e6))}
    if kind != "default":
        rope["factor"] = draw(number(1, 64))
    if kind == "llama3":
        low = draw(number(0.5, 4))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(number(0.1, 8))}
    if kind == "yarn":
        rope |= {"beta_slow": draw(number(0.5, 4)), "beta_fast": draw(number(5, 64)), "truncate": draw(st.booleans())}
        rope |= draw(st.sampled_from([{}, {"attention_factor": 1.25}, {"mscale": 0.7, "mscale_all_dim": 1.1}]))
    if kind == "longrope":
        factors = st.lists(number(1, 60), min_size=dim // 2, max_size=dim // 2)
        rope |= {"short_factor": draw(factors), "long_factor": draw(factors)}
        rope |= draw(st.sampled_from([{}, {"attention_factor": 0.8}]))
    if kind in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = original
    config = SIZES | {"head_dim": dim, "max_position_embeddings": original * draw(st.integers(1, 8))}
    return config | {"rope_parameters": rope}, draw(st.integers(1, 4 * original))


def rope_of(config: dict[str, Any], reach: int) -> Rope:
    rope = fit(llama.spec(config), reach).layers[0].mixer.rope
    assert rope is not None
    return rope


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"default"}))
def test_a_rope_is_that_of_transformers(kind: str) -> None:
    assert kind in ROPE_INIT_FUNCTIONS

    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(ropes(kind))
    def agrees(drawn: tuple[dict[str, Any], int]) -> None:
        config, reach = drawn
        hf = LlamaConfig.from_dict(config | {"rope_parameters": dict(config["rope_parameters"])})
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](hf, seq_len=reach)
        rope = rope_of(config, reach)
        # powers in float32 may differ in the last bit, and a blend of two frequencies makes more of it
        np.testing.assert_allclose(rope.frequencies(), frequencies.numpy(), rtol=5e-6, atol=0)
        assert rope.magnitude == pytest.approx(magnitude, rel=1e-9)

    agrees()


def test_a_length_changes_what_depends_on_one() -> None:
    long = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0] * 16, "long_factor": [3.0] * 16}
    long |= {"original_max_position_embeddings": 32, "rope_theta": 1e4}
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    for rope in (long, dynamic):
        config = SIZES | {"max_position_embeddings": 32, "rope_parameters": rope}
        within, at, past = (rope_of(config, reach).frequencies() for reach in (8, 32, 33))
        np.testing.assert_array_equal(within, at)
        assert (past[1:] < at[1:]).all()
    assert llama.spec(SIZES | {"max_position_embeddings": 32, "rope_parameters": dynamic}).max_len == 128
