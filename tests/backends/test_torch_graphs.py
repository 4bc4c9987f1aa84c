"""Steps that are captured: padded to a shape they give what they give as they are; what can't be captured is run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backends.api.build import Host, Row, build
from backends.api.conformance import CHECKS, Opener
from backends.api.conformance.bench import ASKS, FULL, SPEC, Ask, Made, Weights, config, generate, prompt
from backends.torch import step as steps
from backends.torch.backend import TorchBackend
from backends.torch.buckets import fit, ladder, padded, parts
from backends.torch.graphs import Play, empty
from backends.torch.inputs import Now, fill, spread
from backends.torch.joined import join
from backends.torch.params import held
from engine.config import load
from engine.errors import DeviceFailed
from engine.model.spec import Experts
from engine.resolve import resolve
from engine.resolve.facts import Device
from engine.resolve.memory import plan_memory
from models_torch.ops import Joined
from tests.backends.replayed import Replayed

DRAWN = [
    Ask(prompt=prompt(11), values={"temperature": 0.8, "seed": 3}),
    Ask(prompt=prompt(5), make=9),
    Ask(prompt=prompt(14), values={"temperature": 1.3, "seed": 2**40, "top_k": 7, "top_p": 0.8}),
    Ask(prompt=prompt(3), make=9, values={"temperature": 1.0, "seed": 9, "top_p": 0.6, "min_p": 0.05}),
]


class Plain:
    """A recorder without a device: a piece is played by calling it. played: how often."""

    def __init__(self, most: int = 1 << 30) -> None:
        self.played, self.made, self.most = 0, 0, most

    @property
    def taken(self) -> int:
        return 0 if self.made < self.most else 1 << 40

    def __call__(self, piece: Play) -> Play:
        self.made += 1
        piece()

        def play() -> None:
            self.played += 1
            piece()

        return play


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opened(recorder: Plain | Replayed | None = None, **overrides: Any) -> Host:
    """A loaded backend, with steps captured where a recorder is given."""
    backend = TorchBackend(SPEC, config("torch", **overrides))
    backend.load(Weights())
    if recorder is not None:
        backend.capture(recorder, ladder(backend.limits))
    return Host(backend)


def tokens(made: list[Made]) -> list[list[int]]:
    return [m.tokens for m in made]


@pytest.mark.parametrize("asks", [ASKS, DRAWN[:2], DRAWN, FULL], ids=["greedy", "drawn", "cut", "wishes"])
def test_padded_steps_give_the_tokens_of_plain_ones(asks: list[Ask]) -> None:
    recorder = Replayed()
    padded = opened(recorder)
    assert tokens(generate(padded, asks)) == tokens(generate(opened(), asks))
    assert recorder.played >= 5
    assert set(recorder.pieces) == {3}, "between the attention of two layers, which gathers pages on a CPU"
    assert not any(bool(group[:, -1].any()) for group in padded.backend.caches.groups), "padding wrote to the cache"


def test_what_padding_points_to_is_there() -> None:
    """Kernels, unlike torch, read what lies before row 0 where they are told of row -1."""
    limits = opened().backend.limits
    for shape in ladder(limits):
        at, size = parts(shape)
        buffer = empty(shape, limits)
        assert len(buffer) == size
        for name, below in (
            ("row", shape.rows),
            ("slots", limits.slots + 1),
            ("into", limits.slots + 1),
            ("ends", shape.tokens),
        ):
            values = buffer[at[name]]
            assert 0 <= values.min() <= values.max() < below, (shape, name)


@pytest.mark.slow
def test_with_every_kernel_interpreted_they_give_the_same_tokens() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.interpreted_graphs"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "True angles begin gated norm rope_write row sample\n", done.stdout + done.stderr[-2000:]


def test_captured_steps_conform() -> None:
    """The whole suite, where decode steps are replayed: seats, forks, masks, windows, what is refused."""

    def make(spec: Any, given: Any) -> TorchBackend:
        backend = TorchBackend(spec, given)
        load = backend.load

        def then(weights: Any, version: int = 0) -> None:
            load(weights, version)
            if backend.graphs is None:
                backend.capture(recorder, ladder(backend.limits))

        backend.load = then  # type: ignore[method-assign]
        return backend

    recorder, failed = Replayed(), []
    opener = Opener(make, config("torch"))
    for name, check in CHECKS.items():
        try:
            check(opener)
        except AssertionError as error:
            failed.append((name, error))
            opener.close()
    opener.close()
    assert not failed
    assert recorder.played > 50


def test_steps_with_experts_are_captured() -> None:
    """Padding goes through experts too, and changes nothing. On a CPU they wait for their router, between pieces."""
    feeds = (
        Experts(count=6, top_k=2, size=24, renormalised=True),
        Experts(count=5, top_k=3, size=16, renormalised=False, act="clamped", bias=True),
    )
    layers = tuple(replace(layer, feed=feed) for layer, feed in zip(SPEC.layers, feeds, strict=True))
    spec = replace(SPEC, layers=layers)
    recorder, made = Replayed(), []
    for captured in (recorder, None):
        backend = TorchBackend(spec, config("torch"))
        backend.load(Weights(spec=spec))
        if captured is not None:
            backend.capture(captured, ladder(backend.limits))
        made.append(tokens(generate(Host(backend), DRAWN)))
    assert made[0] == made[1]
    assert recorder.played >= 5
    assert set(recorder.pieces) == {1 + 2 * (1 + 1 + 3)}


def test_pieces_between_sums_over_devices(tmp_path: Path) -> None:
    """Two processes: pieces between the sums of embedding, attention and feed-forward, the attention itself, and the
    join of logits."""
    command = [sys.executable, "-m", "tests.backends.replayed_mesh"]
    both = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [each.communicate(timeout=120)[0].decode() for each in both]
    layers = len(SPEC.layers)
    want = f"{tokens(generate(opened(), ASKS))} {{{1 + 3 * layers + 2}}}\n"
    assert said == [want, want]


def test_a_capture_that_holds_what_the_host_knew_is_noticed() -> None:
    """A replay that is not told how far rows reach attends over what the first step had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Now, "tell", lambda *told: None)
        got = tokens(generate(opened(Replayed()), ASKS))
    assert got != tokens(generate(opened(), ASKS))


def test_shapes_hold_what_they_are_for() -> None:
    limits = TorchBackend(SPEC, config("torch", slots=100, max_rows=100, max_tokens=600)).limits
    shapes = ladder(limits)
    assert [s.rows for s in reversed(shapes) if s.even] == [1, 2, 4, 8, 16, 32, 64, 96, 100]
    assert [s.tokens for s in reversed(shapes) if not s.even] == [64, 128, 256, 512]
    for rows, tokens_, want in ((1, 1, 1), (3, 3, 4), (65, 65, 96), (1, 2, 64), (64, 70, 128), (9, 512, 512)):
        shape = fit(shapes, rows, tokens_)
        assert shape is not None
        assert (shape.tokens, shape.even) == (want, rows == tokens_)
    assert fit(shapes, 100, 513) is None
    assert [padded(n) for n in (1, 3, 32, 33, 64, 97)] == [1, 4, 32, 64, 64, 128]
    assert fit(shapes, 65, 66) is not None  # more rows than the smallest has tokens


@pytest.mark.parametrize("lens", [(20, 7), (1, 3), (64,)])
def test_a_padded_step_gives_the_logits_of_each_rows_last_token(
    lens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of as many rows as tokens, too, where these are not one and the same."""
    host = opened(slots=64, max_rows=64, max_tokens=64)
    limits, backend = host.limits, host.backend
    step = host.step([(text, host.row(text, prompt(n))) for text, n in ((host.open(), n) for n in lens)])
    shape = next(s for s in ladder(limits) if not s.even and s.rows == s.tokens)
    buffer = torch.zeros(sum(shape.fields().values()), dtype=torch.int64)
    order, _ = fill(step, limits, shape, buffer.numpy())
    batch = spread(buffer, limits, shape, torch.arange(64))

    def forward(spec: Any, weights: Any, tokens: torch.Tensor, *rest: Any) -> Any:
        numbers = torch.arange(len(tokens))[:, None].float()
        return numbers if rest[-1] is None else numbers[rest[-1]], None, {}

    monkeypatch.setattr(steps.decoder, "forward", forward)
    monkeypatch.setattr(steps, "_logits", lambda spec, weights, x, out=None: x)
    fed = steps.forward(SPEC, backend.config, limits, {}, backend.caches, batch, ())
    assert fed.logits is not None
    assert fed.logits[: len(lens), 0].tolist() == [end - 1 for end in np.cumsum(np.array(lens)[order.rows])]


def test_a_long_list_of_edits_goes_ahead() -> None:
    host, plain = opened(Plain(), slots=3), opened(slots=3)
    made = []
    for each in (host, plain):
        source = each.open()
        first = int(each.run([(source, each.row(source, prompt(13)))]).tokens[0, 0])
        text = each.open(source, 12)  # three pages by edits, and one token
        made.append([first, int(each.run([(text, each.row(text, prompt(13)[12:]))]).tokens[0, 0])])
    assert made[0] == made[1]
    assert made[0][0] == made[0][1]


def test_the_choice_that_is_replayed_is_what_rows_that_return_a_token_want() -> None:
    graphs = opened(Plain()).backend.graphs  # type: ignore[attr-defined]
    shape, ran = graphs.shapes[0], list[str]()
    graphs.captured[shape] = replace(
        graphs.captured[shape],
        **{name: partial(ran.append, name) for name in ("greedy", "drawn", "cut")},
    )
    for output in (0, 1):
        for values in ({"temperature": 0.0}, {"temperature": 0.7}, {"temperature": 0.7, "top_k": 3}):
            row: Any = {"slot": 0, "tokens": [-1], "upper": 5, "output": output} | values
            graphs.choose(shape, build(graphs.limits, 0, [Row(**row)]))
    assert ran == ["greedy"] * 3 + ["greedy", "drawn", "cut"]


def test_new_weights_are_what_captured_steps_read() -> None:
    recorder = Plain()
    host, other = opened(recorder), Weights(seed=5)
    held = host.backend.weights["layers"][0]["mlp"]["down"].data_ptr()
    host.backend.load(other, 1)
    plain = opened()
    plain.backend.load(other, 1)
    assert tokens(generate(host, ASKS)) == tokens(generate(plain, ASKS))
    assert host.backend.weights["layers"][0]["mlp"]["down"].data_ptr() == held


def test_after_a_failure_captured_steps_start_from_empty_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    host = opened(Plain())
    held = [group.data_ptr() for group in host.backend.caches.groups]

    def broken(step: Any, shape: Any, caches: Any) -> Any:
        raise torch.OutOfMemoryError("planted")

    text = host.open()
    with monkeypatch.context() as patch:
        patch.setattr(host.backend.graphs, "start", broken)
        with pytest.raises(DeviceFailed):
            host.run([(text, host.row(text, [1]))])
    host.close(text)
    assert [group.data_ptr() for group in host.backend.caches.groups] == held
    assert tokens(generate(host, ASKS)) == tokens(generate(opened(), ASKS))


def test_memory_bounds_what_is_captured() -> None:
    recorder = Plain(most=8)
    host = opened(recorder)
    assert recorder.made == 8  # two shapes, the largest
    assert host.backend.status().programs == 8
    assert host.backend.status().memory["graphs"] > 0
    asks = [Ask(prompt=prompt(3), make=4)]  # rows for which nothing is captured
    assert tokens(generate(host, asks)) == tokens(generate(opened(), asks))


def test_matrices_are_joined_to_what_they_are_apart() -> None:
    apart, joint = opened(), opened()
    join(joint.backend.weights)
    layer = joint.backend.weights["layers"][1]
    assert isinstance(layer["attention"]["qkv"], Joined)
    assert set(layer["mlp"]) == {"gate_up", "down"}
    assert held(joint.backend.weights) == held(apart.backend.weights)
    for asks in (ASKS, FULL):
        assert tokens(generate(joint, asks)) == tokens(generate(apart, asks))


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("backend.torch.graphs", {"backend.torch.graphs": "off"}),
        ("over a window gathers", {"backend.deterministic": True}),
        ("captured at warm-up", {"mesh": "tp=2"}),
        ("captured at warm-up", {}),
    ],
)
def test_the_resolver_says_whether_steps_are_captured(why: str, given: dict[str, Any]) -> None:
    device = Device(backend="torch", why="", platform="gpu", kind="a GPU", count=2, memory_bytes=40 << 30, bf16=True)
    experts = Experts(count=4, top_k=2, size=48, renormalised=True)
    sparse = replace(SPEC, layers=tuple(replace(layer, feed=experts) for layer in SPEC.layers))
    wanted = "whole" if why == "captured at warm-up" else ""
    assert resolve(load(None, given), sparse, device)[0].graphs == wanted
    resolved, made = resolve(load(None, given), SPEC, device)
    assert next(why in d.why for d in made if d.field == "graphs")
    assert resolved.graphs == wanted
    assert (plan_memory(SPEC, resolved).graphs > 0) == bool(wanted)
