"""What is particular to jax: no copies, no waiting, no late compiles; noise, filters, stacking, failures."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from backends.api.build import Host, Row, build
from backends.api.check import shares
from backends.api.choice import Choice, kept
from backends.api.conformance.bench import FULL, SPEC, Ask, Weights, alike, config, generate, one, prompt, refused
from backends.api.limits import Limits
from backends.api.seats import Asks
from backends.api.step import NONFINITE
from backends.jax import sampler
from backends.jax.backend import JaxBackend
from backends.jax.buckets import make_shape
from backends.jax.inputs import pack, unpack
from backends.jax.mesh import Spread, make_mesh
from backends.jax.warmup import COPY, COUNT, Program
from backends.reference.backend import ReferenceBackend
from engine.errors import BackendLost, ConfigError, DeviceFailed, ModelError
from engine.mesh import MeshSpec
from engine.model.params import params
from engine.model.spec import ModelSpec
from engine.resolve.memory import count_bytes

FLAT: ModelSpec = replace(SPEC, layers=SPEC.layers[:1])
DEEP: ModelSpec = replace(
    SPEC, layers=(*SPEC.layers, replace(SPEC.layers[0], mixer=replace(SPEC.layers[0].mixer, qk_norm=False))) * 2
)
"""A pattern of three layers, repeated: full, window, another full."""


def host_of(spec: ModelSpec = SPEC, weights: Any = None, taps: tuple[str, ...] = (), **overrides: Any) -> Host:
    """A loaded backend."""
    backend = JaxBackend(spec, config("jax", **overrides))
    backend.load(weights or Weights(spec=spec))
    return Host(backend, taps=taps)


@pytest.fixture(scope="module")
def warm() -> Iterator[Host]:
    """A backend with all its programs, for the tests that leave it as it was."""
    host = host_of(max_tokens=40, token_buckets=(1, 8, 40))
    host.backend.warmup()
    yield host
    host.backend.close()


def test_step_copies_neither_caches_nor_state(warm: Host) -> None:
    backend: Any = warm.backend
    held = sum(array.nbytes for array in (*backend.caches, *backend.state))
    assert backend.counts.nbytes == count_bytes(SPEC, True, backend.limits.slots)  # what the memory plan says
    for tokens in (1, 8, 40):
        memory = backend.programs.take(Program("step", tokens)).memory_analysis()
        assert memory.alias_size_in_bytes == held, f"{tokens} tokens: a donation is lost"

    def addresses() -> list[int]:
        return [array.addressable_shards[0].data.unsafe_buffer_pointer() for array in (*backend.caches, *backend.state)]

    one(warm, Ask(prompt=prompt(3), make=1))
    before = addresses()
    one(warm, Ask(prompt=prompt(5), make=4))
    assert addresses() == before


def test_what_stands_beside_a_step_is_changed_in_place(warm: Host) -> None:
    """Page copies and counts copy neither the caches nor the counts; choosing copies no counts."""
    backend: Any = warm.backend
    caches, state, counts = (sum(a.nbytes for a in tree) for tree in (backend.caches, backend.state, [backend.counts]))
    for name, held in ((COPY, caches), (COUNT, counts), (Program("choose", 6), state + counts)):
        memory = backend.programs.take(name).memory_analysis()
        assert memory.alias_size_in_bytes == held, f"{name}: a donation is lost"
    wide = JaxBackend(SPEC, replace(backend.plan.config, pages=(4096, 4096), slots=4096))
    for name in (COPY, COUNT, Program("choose", 6)):
        sizes = [p.take(name).memory_analysis().temp_size_in_bytes for p in (backend.programs, wide.programs)]
        assert sizes[0] == sizes[1], f"{name}: a temporary grows with what it changes"


def test_temporaries_do_not_grow_with_the_cache(warm: Host) -> None:
    """A copy of the cache, or of a layer of it, would show here."""
    backend: Any = warm.backend
    large = JaxBackend(SPEC, replace(backend.plan.config, pages=(4096, 4096)))
    sizes = [p.take(Program("step", 8)).memory_analysis() for p in (backend.programs, large.programs)]
    assert sizes[0].temp_size_in_bytes == sizes[1].temp_size_in_bytes
    assert sizes[0].alias_size_in_bytes < sizes[1].alias_size_in_bytes


def test_nothing_compiles_after_warmup(warm: Host) -> None:
    """By jax's own count, whatever the steps: sampled, filtered, chunked, seated on a prefix, loaded anew; penalised,
    biased, masked, told and scored, with pages copied."""
    events: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **__: events.append(name) if "compile" in name or "trace" in name else None
    )
    jax.jit(lambda x: x + len(events))(np.ones(3)).block_until_ready()
    assert events, "the listener hears compiles"
    events.clear()
    values = {"temperature": 0.8, "seed": 5, "top_k": 7, "top_p": 0.9, "min_p": 0.02}
    asks = [Ask(prompt=prompt(n), make=3, chunk=40, values=values if n % 2 else {}) for n in (1, 2, 9, 39)]
    made = generate(warm, asks) + generate(warm, FULL)
    only = np.full((1, 1, 4), 1 << 9, np.uint32)
    text = warm.open()
    assert warm.run([(text, warm.row(text, prompt(9), masked=True))], only).tokens.tolist() == [[9]]
    warm.run([(text, warm.row(text, [-1]))], copies=[(0, 0, 50, 51), (1, 0, 51, 50)])
    warm.close(text)
    warm.backend.load(Weights(), version=1)
    again = [one(warm, ask) for ask in (*asks, *FULL)]
    tapped = warm.step([(text := warm.open(), warm.row(text, prompt(3)))])
    refused(lambda: warm.backend.forward(replace(tapped, taps=("logits",))), "taps")
    warm.close(text)
    assert [m.tokens for m in made] == [m.tokens for m in again]
    assert not events
    status = warm.backend.status()
    assert (status.ready, status.compiles_after_ready, status.programs) == (True, 0, 10)


def test_forward_does_not_wait(warm: Host) -> None:
    """A step goes on from what the device still works at: forward returns before that is there."""
    backend, text = warm.backend, warm.open()
    assert isinstance(backend, JaxBackend)
    assert backend.state is not None
    size = jnp.full((256, 256), 1 / 256, jnp.float32)

    def long(last: jax.Array, x: jax.Array) -> jax.Array:
        return last + (jax.lax.fori_loop(0, 5000, lambda _, y: y @ x, x)[0, 0] > 2).astype(last.dtype)

    busy = jax.jit(long, donate_argnums=0)
    busy.lower(backend.state.last, size).compile()
    last = busy(jnp.copy(backend.state.last), size)
    backend.state = backend.state._replace(last=last)
    ticket = backend.forward(warm.step([(text, warm.row(text, prompt(40)))]))
    assert not backend.flights[ticket].made.is_ready()
    backend.sample(ticket)
    backend.collect(ticket)
    warm.close(text)


def test_tiles_of_large_buckets_agree_with_the_reference(warm: Host) -> None:
    """Rows of one token and of many in one step: tiles that are full, ragged, almost empty, and more than one group."""
    reference = ReferenceBackend(SPEC, config("reference", max_tokens=40))
    reference.load(Weights())
    asks = [Ask(prompt=prompt(n, seed=n), make=8, chunk=chunk) for n, chunk in ((3, 40), (30, 17), (25, 9), (39, 40))]
    assert make_shape(40, warm.limits).tile > 1
    want = generate(Host(reference), asks)
    assert [made.tokens for made in generate(warm, asks)] == [made.tokens for made in want]


def test_edits_beyond_the_bucket_go_ahead_of_the_step(warm: Host) -> None:
    """A row of one token seated on a long prefix sends its whole table in a bucket of one token."""
    ids, limits = prompt(56, seed=8), warm.limits
    root = warm.open()
    warm.run([(root, warm.row(root, ids[:40], output=0))])
    want = warm.run([(root, warm.row(root, ids[40:]))]).tokens[0, 0]
    text = warm.open(root, 52)
    warm.run([(text, warm.row(text, ids[52:55], output=0))])
    warm.close(text)
    text = warm.open(root, 52)  # seated again, on pages that hold position 52 to 54 already
    text.pages = [list(pages) for pages in root.pages]
    text.unsent, text.start, text.upper = [list(range(len(p))) for p in text.pages], 55, 55
    step = warm.step([(text, warm.row(text, ids[55:]))])
    assert sum(len(table.edits) for table in step.tables) > make_shape(1, limits).edits
    warm.backend.sample(warm.backend.forward(step))
    assert warm.backend.collect(step.step).tokens[0, 0] == want
    for each in (text, root):
        warm.close(each)


def test_packed_buffer_holds_the_step() -> None:
    limits = Limits.of(SPEC, config("jax", max_tokens=40, token_buckets=(40,)))
    shape = make_shape(40, limits)
    rows = [
        Row(slot=3, tokens=range(20), start=0, upper=20, temperature=0.5, top_p=0.25, seed=2**64 - 2),
        Row(slot=1, tokens=[-1], upper=9, top_k=4, min_p=0.125, seed=2**40 + 1),
    ]
    step = build(limits, 1, rows, [[(3, 0, 7)], [(1, 2, 5)]])
    packed = pack(step, shape, limits)
    buffer, ahead = packed.buffer, packed.ahead
    batch = jax.jit(unpack, static_argnums=1)(buffer, shape)
    assert not ahead
    assert batch.tokens[:21].tolist() == [*range(20), -1]
    assert batch.row[:21].tolist() == [0] * 20 + [1]
    assert int(batch.real.sum()) == 21
    assert batch.slot.tolist() == [3, 1, 8, 8, 8, 8], "padding stands on the slot behind the last"
    assert batch.length.tolist() == [20, 1, 0, 0, 0, 0]
    assert batch.tiles[: int(batch.tile_count)].tolist() == [[0, 0, 8], [0, 8, 8], [0, 16, 4], [1, 20, 1]]
    assert batch.edits[:2].tolist() == [[3, 0, 7], [1, limits.max_row_pages[0] + 2, 5]]
    assert (batch.edits[2:, 0] == 8).all()
    seeds = [(int(h) << 32) + int(l) for h, l in zip(batch.seed_high, batch.seed_low, strict=True)]
    assert seeds[:2] == [2**64 - 2, 2**40 + 1]
    for name in ("temperature", "top_p", "min_p", "top_k"):
        assert np.array_equal(getattr(batch, name)[:2], getattr(step.sampling, name))


def test_a_packed_buffer_is_used_again_where_only_page_tables_differ() -> None:
    limits = Limits.of(SPEC, config("jax", max_tokens=40, token_buckets=(40,)))
    shape = make_shape(40, limits)
    rows = [Row(slot=3, tokens=[-1], upper=9, temperature=0.5), Row(slot=1, tokens=[-1], upper=9, top_k=4)]
    first = build(limits, 1, rows, [[(3, 0, 7)], [(1, 2, 5)]])
    tables = build(limits, 2, rows, [[(1, 4, 2)], []]).tables
    second = replace(first, step=2, tables=(tables[0], replace(tables[1], base=np.array([0, 4], np.int32))))
    last = pack(first, shape, limits)
    kept = last.buffer.copy()
    for step, chosen in (
        (second, True),
        (second, False),
        (replace(second, slots=np.array([3, 2], np.int32)), True),
        (replace(second, starts=np.array([4, -1], np.int32)), True),
        (replace(second, lens=np.array([1, 1], np.int32), output=np.array([0, 1], np.uint8)), True),
        (replace(second, tokens=np.array([5, -1], np.int32)), True),
        (replace(second, sampling=replace(second.sampling, top_k=np.array([0, 9], np.int32))), True),
    ):
        assert shares(step, first) == (step is second)
        again = pack(step, shape, limits, chosen=chosen, last=last if shares(step, first) else None)
        assert np.array_equal(again.buffer, pack(step, shape, limits, chosen=chosen).buffer)
        assert np.array_equal(last.buffer, kept)
    small = make_shape(8, limits)
    assert np.array_equal(pack(second, small, limits, last=last).buffer, pack(second, small, limits).buffer)


@pytest.mark.parametrize(("partitionable", "vocab"), [(True, 257), (False, 257), (True, 2 * sampler.BLOCK + 3)])
def test_noise_is_that_of_jax_random(partitionable: bool, vocab: int) -> None:
    """The bits are those of jax.random, also in blocks, and ours do not depend on how jax is configured."""
    seeds = np.array([0, 1, 2**32 - 1, 2**32 + 7, 0xDEADBEEF_12345678, 2**64 - 1], np.uint64)
    positions = np.array([0, 1, 17, 2**31 - 1, 5, 4096], np.int32)

    def theirs(seed: int, position: int) -> NDArray[np.float32]:
        key = jax.random.wrap_key_data(jnp.array([seed >> 32, seed & 0xFFFFFFFF], jnp.uint32), impl="threefry2x32")
        with jax.threefry_partitionable(True):
            bits = np.asarray(jax.random.bits(jax.random.fold_in(key, position), (vocab,), jnp.uint32))
        u = ((bits >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2**-23)
        return -np.log(-np.log(u))

    with jax.threefry_partitionable(partitionable):
        rows = wants(len(seeds), seeds=seeds)._replace(position=positions)
        ours = jax.jit(sampler.gumbel, static_argnums=1)(rows, vocab)
    want = np.stack([theirs(int(s), int(p)) for s, p in zip(seeds, positions, strict=True)])
    np.testing.assert_allclose(ours, want, rtol=2e-6, atol=2e-6)


def wants(rows: int, *, seeds: NDArray[np.uint64] | None = None, **values: Any) -> sampler.Wants:
    """What the sampler reads."""
    seeds = np.zeros(rows, np.uint64) if seeds is None else seeds
    neutral = {
        "temperature": np.ones(rows, np.float32),
        "top_k": np.zeros(rows, np.int32),
        "top_p": np.ones(rows, np.float32),
        "min_p": np.zeros(rows, np.float32),
        "seed_high": (seeds >> np.uint64(32)).astype(np.uint32),
        "seed_low": seeds.astype(np.uint32),
    }
    given = neutral | {name: np.array(value, neutral[name].dtype) for name, value in values.items()}
    return sampler.Wants(**given, position=np.zeros(rows, np.int32))


def test_filters_keep_what_the_normative_filters_keep() -> None:
    """In every other row ties at every edge: logits are multiples of 1/4, so many are equal."""
    draw, rows, vocab = np.random.default_rng(3), 64, 300
    logits = draw.normal(0, 3, (rows, vocab)).astype(np.float32)
    logits[::2] = np.round(logits[::2] * 4) / 4
    logits[1, 5:] = -np.inf
    values = {
        "temperature": draw.choice([1e-3, 0.5, 1.0, 4.0], rows),
        "top_k": draw.choice([0, 1, 3, 50, 299, 300, 10**6], rows),
        "top_p": draw.choice([1e-6, 0.3, 0.9, 0.9999, 1.0], rows).astype(np.float32),
        "min_p": draw.choice([0.0, 0.01, 0.3, 1.0], rows).astype(np.float32),
    }
    found = np.asarray(jax.jit(sampler.draw)(logits, wants(rows, **values))) > -np.inf
    for r in range(rows):
        choice = Choice(
            **{name: float(value[r]) for name, value in values.items()} | {"top_k": int(values["top_k"][r])}
        )
        distance = (logits[r] - logits[r].max()) / np.float32(choice.temperature)
        least, most = kept(distance, choice, -1e-6), kept(distance, choice, 1e-6)
        assert (least <= found[r]).all(), f"row {r}: a token is missing, {choice}"
        assert (found[r] <= most).all(), f"row {r}: a token too many, {choice}"
        assert np.array_equal(least, most) or choice.top_p < 1 or choice.min_p > 0


def test_ties_go_to_the_lowest_id() -> None:
    logits = np.zeros((2, 50), np.float32)
    logits[:, [7, 30, 49]] = 3
    tokens, status = jax.jit(sampler.sample)(logits, wants(2, temperature=[0, 0]))
    assert (tokens.tolist(), status.tolist()) == ([7, 7], [0, 0])


def test_many_rows_are_looked_through_some_at_a_time() -> None:
    """As if all were at once, whether or not the last are as many as the others."""
    draw, vocab = np.random.default_rng(5), 211
    for rows in (32, 37):
        logits = draw.normal(0, 2, (rows, vocab)).astype(np.float32)
        logits[rows - 1, 3] = np.nan
        given = wants(rows, seeds=draw.integers(0, 2**64, rows, np.uint64), temperature=draw.choice([0, 1.2], rows))
        (want, bad), (found, told) = jax.jit(sampler._some)((logits, given)), jax.jit(sampler.sample)(logits, given)
        assert np.array_equal(found[:-1], want[:-1])  # of the last, which is not finite, there is no token
        assert told.tolist() == bad.tolist() == [0] * (rows - 1) + [NONFINITE]


def test_scanned_equals_listed() -> None:
    """Inner values, over two repeats of a pattern of three kinds of layers in two cache groups; and what is drawn, in
    the step where layers are listed, behind it where they are scanned."""
    values = {"temperature": 1.5, "seed": 5, "top_k": 40, "top_p": 0.95}
    asks = [Ask(prompt=prompt(14), chunk=9, make=3), Ask(prompt=prompt(6), make=5, values=values)]
    names = ("layers.0.mlp", "layers.1", "layers.2.attention", "layers.4", "layers.5.attention", "logits")
    made = {}
    for stack in ("list", "scan"):
        host = host_of(DEEP, taps=names, stack=stack, token_buckets=(16,))
        made[stack] = generate(host, asks)
        text = host.open()
        taps = host.run([(text, host.row(text, prompt(12)))]).taps
        made[stack + " taps"] = [np.array(taps[name]) for name in names]
        assert set(taps) == set(names)
        assert host.backend.plan.greedy == (stack == "scan")  # type: ignore[attr-defined]
        assert isinstance(host.backend.weights["layers"], list if stack == "list" else tuple)  # type: ignore[attr-defined]
    for a, b in zip(made["list"], made["scan"], strict=True):
        alike(a, b)
    for name, a, b in zip(names, made["list taps"], made["scan taps"], strict=True):
        assert np.abs(a - b).max() < 1e-4, name
    assert len({float(np.abs(tap).sum()) for tap in made["list taps"]}) == len(names), "the values tell layers apart"


def test_a_row_that_returns_no_token_draws_none(warm: Host) -> None:
    """Else each part of a prompt would wait for a choice that nobody reads."""
    rows = [Row(slot=0, tokens=[-1], upper=5, temperature=0.0), Row(slot=1, tokens=[-1], upper=5, temperature=0.7)]
    for output, draws in ((0, False), (1, True)):
        assert Asks.of(build(warm.backend.limits, 0, [rows[0], replace(rows[1], output=output)])).draws is draws


def test_arrays_go_to_the_devices_without_what_is_jaxs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh, value = make_mesh(MeshSpec(), jax.devices()), np.arange(6, dtype=np.int32).reshape(2, 3)
    made = [Spread(mesh)(value)]
    monkeypatch.setattr("backends.jax.mesh.xla_client", object())
    made.append(Spread(mesh)(value))
    assert [np.asarray(array).tolist() for array in made] == [value.tolist()] * 2
    assert made[0].sharding == made[1].sharding


@pytest.mark.parametrize(("dtype", "cache"), [("float32", "bfloat16"), ("bfloat16", "bfloat16")])
def test_bfloat16_stays_near_float32(dtype: str, cache: str) -> None:
    """A step that reads what another has cached, against the reference in float32."""
    reference = ReferenceBackend(FLAT, config("reference", pages=(64,)))
    reference.load(Weights(spec=FLAT))
    narrow = host_of(FLAT, taps=("logits",), dtype=dtype, cache_dtype=cache, pages=(64,), token_buckets=(1, 16))
    seen = []
    for host in (narrow, Host(reference, taps=("logits",))):
        text = host.open()
        parts = [
            host.run([(text, host.row(text, part))]).taps["logits"]
            for part in (prompt(14), prompt(9, seed=2), prompt(1, seed=3))
        ]
        seen.append(np.concatenate(parts))
    assert 1e-4 < np.abs(seen[0] - seen[1]).mean() < 0.05 * seen[1].std()


class Arrays:
    """A source whose arrays can change, or be of a wrong shape, after they were handed out."""

    def __init__(self) -> None:
        source = Weights()
        self.arrays = {name: source.read(name, (slice(None),) * len(p.shape)) for name, p in params(SPEC).items()}

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        if name not in self.arrays:
            raise ModelError(f"no parameter is called {name!r}", field=name)
        return self.arrays[name][part]


def test_weights_are_copied_and_a_failed_load_changes_nothing(warm: Host) -> None:
    ask, source = Ask(prompt=prompt(6), make=4), Arrays()
    want = one(warm, ask).tokens
    warm.backend.load(source)
    for array in source.arrays.values():
        array *= 0
    assert one(warm, ask).tokens == want
    del source.arrays["layers.1.mlp.up"]
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up"):
        warm.backend.load(source)
    assert one(warm, ask).tokens == want


def test_a_step_that_times_out_voids_what_is_out(warm: Host) -> None:
    ask = Ask(prompt=prompt(6), make=4)
    want = one(warm, ask).tokens
    texts = [warm.open() for _ in range(2)]
    tickets = [warm.enqueue([(text, warm.row(text, prompt(40)))]) for text in texts]
    backend: Any = warm.backend
    backend.flights[tickets[0]] = replace(backend.flights[tickets[0]], made=Never())
    with pytest.raises(DeviceFailed, match="no result after"):
        backend.collect(tickets[0], timeout=0.01)
    refused(lambda: backend.collect(tickets[1]), "ticket")
    for text in texts:
        warm.close(text)
    assert one(warm, ask).tokens == want


class Never:
    """An array that is never ready."""

    def is_ready(self) -> bool:
        return False


class Broken:
    """An array of a step that failed on the device."""

    def is_ready(self) -> bool:
        return True

    def __array__(self, *_: Any, **__: Any) -> NDArray[Any]:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")


def test_an_error_found_at_collect_voids_what_is_out(warm: Host) -> None:
    ask = Ask(prompt=prompt(6), make=4)
    want = one(warm, ask).tokens
    text, backend = warm.open(), warm.backend
    assert isinstance(backend, JaxBackend)
    ticket = warm.enqueue([(text, warm.row(text, prompt(5)))])
    backend.flights[ticket] = replace(backend.flights[ticket], made=Broken())  # type: ignore[arg-type]
    with pytest.raises(DeviceFailed, match="fell off the bus"):
        backend.collect(ticket)
    warm.close(text)
    assert one(warm, ask).tokens == want


def test_an_error_of_the_runtime_empties_the_caches(warm: Host) -> None:
    """A real error, raised by a part of the step while it runs; the donated caches are gone with it."""
    backend, key = warm.backend, Program("step", 8)
    assert isinstance(backend, JaxBackend)
    ask = Ask(prompt=prompt(6), make=4)
    want, good = one(warm, ask).tokens, backend.programs.take(key)

    def explode(_: Any) -> NDArray[np.int32]:
        raise RuntimeError("the device is on fire")

    def burn(made: jax.Array) -> jax.Array:
        return jax.pure_callback(explode, jax.ShapeDtypeStruct(made.shape, made.dtype), made)

    # compiled here, or it would be counted as late
    burning = jax.jit(burn).lower(jax.ShapeDtypeStruct((backend.limits.max_rows, 2), np.int32)).compile()

    def bad(*args: Any) -> Any:
        caches, state, made, *rest = good(*args)
        return caches, state, burning(made), *rest

    backend.programs.made[key] = bad  # type: ignore[assignment]
    text = warm.open()
    with pytest.raises(DeviceFailed, match="on fire"):
        backend.collect(warm.enqueue([(text, warm.row(text, prompt(5)))]))
    backend.programs.made[key] = good
    warm.close(text)
    assert not any(np.asarray(array).any() for array in (*backend.caches, *backend.state))
    assert one(warm, ask).tokens == want
    assert backend.status().compiles_after_ready == 0


def test_a_failure_while_choosing_voids_what_is_out(warm: Host) -> None:
    """Counts go with the caches: a text that is seated again has its own history alone."""
    backend: Any = warm.backend
    ask, key = FULL[1], Program("choose", 6)
    want, good = one(warm, ask).tokens, backend.programs.take(key)

    def bad(*args: Any) -> Any:
        raise jax.errors.JaxRuntimeError("INTERNAL: the device fell off the bus")

    text = warm.open()
    ticket = backend.forward(warm.step([(text, warm.row(text, prompt(9), bias=[(1, 0.5)]))]))
    backend.programs.made[key] = bad
    with pytest.raises(DeviceFailed, match="fell off the bus"):
        backend.sample(ticket)
    backend.programs.made[key] = good
    lost = warm.step([(text, warm.row(text, [-1]))])
    refused(lambda: backend.forward(lost), "starts")
    warm.close(text)
    assert not np.asarray(backend.counts).any()
    assert one(warm, ask).tokens == want


def test_close_frees_the_device() -> None:
    backend: Any = host_of(FLAT, pages=(64,)).backend
    pointers = {id(array) for array in (*backend.caches, *jax.tree.leaves(backend.weights))}
    backend.close()
    gc.collect()
    assert not pointers & {id(array) for array in jax.live_arrays()}
    with pytest.raises(BackendLost):
        backend.collect(1)
    assert backend.status().memory == {"weights": 0, "cache": 0}


@pytest.mark.parametrize(
    ("field", "overrides"),
    [
        ("mesh", {"mesh": MeshSpec(pp=2)}),
        ("mesh", {"mesh": MeshSpec(ep=2)}),
        ("backend.jax.speed", {"options": {"speed": 11}}),
        ("platform", {"platform": "tpu"}),
    ],
)
def test_what_is_not_built_is_refused_by_name(field: str, overrides: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        JaxBackend(SPEC, config("jax", **overrides))
    assert refusal.value.field == field
