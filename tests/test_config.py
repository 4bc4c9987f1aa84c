"""Configuration: TOML and flags to a frozen tree, and from that tree and a device to decisions."""

from __future__ import annotations

import dataclasses
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends import probe as probing
from backends.api.limits import Limits
from backends.probe import probe
from engine.config import Config, dotted, keys, load, show
from engine.errors import ConfigError
from engine.model.groups import cache_groups
from engine.model.spec import Attention, Experts, Layer, Mlp, ModelSpec, Rope
from engine.resolve import resolve
from engine.resolve.facts import Device
from engine.resolve.memory import plan_memory
from engine.resolve.programs import SMALL
from engine.sched.admission import capacity

EXAMPLE = Path(__file__).parent.parent / "examples" / "radixmesh.toml"
GIB = 1 << 30


def device(platform: str = "cpu", memory: int = 16 * GIB, bf16: bool = True, backend: str = "jax") -> Device:
    return Device(backend=backend, why="test", platform=platform, kind="thing", count=1, memory_bytes=memory, bf16=bf16)


def model(layers: int = 2, window: int | None = None, max_len: int = 4096, dtype: str = "bfloat16") -> ModelSpec:
    def mixer(i: int) -> Attention:
        return Attention(
            q_heads=4,
            kv_heads=2,
            head_dim=64,
            rope=Rope(dim=64, theta=1e4),
            scale=0.125,
            window=window if i % 2 else None,
        )

    return ModelSpec(
        family="llama",
        vocab=1024,
        hidden=256,
        layers=tuple(Layer(mixer=mixer(i), feed=Mlp(size=512)) for i in range(layers)),
        norm_eps=1e-5,
        tied=True,
        max_len=max_len,
        dtype=dtype,
    )


def write(folder: Path, text: str) -> Path:
    file = folder / "c.toml"
    file.write_text(text)
    return file


def test_the_example_holds_every_key_at_its_default() -> None:
    assert load(EXAMPLE) == Config()
    tables = tomllib.loads(EXAMPLE.read_text())
    for key in keys():
        *path, name = key.split(".")
        table: Any = tables
        for part in path:
            table = table[part]
        assert name in table or key == "model.path"


def test_the_documentation_names_every_key() -> None:
    text = (EXAMPLE.parent.parent / "docs" / "configuration.md").read_text()
    assert [key for key in keys() if f"`{key}`" not in text and f"`.{key.rpartition('.')[2]}`" not in text] == []


def test_toml_then_flags(tmp_path: Path) -> None:
    file = write(tmp_path, '[model]\npath = "/m"\n[cache]\npage = 32\nradix = false\n[backend.jax]\nstack = "scan"\n')
    config = load(file, {"cache.page": 8, "slots": 3, "mesh": "tp=2,dp=2", "cache_tokens": 99, "backend": "torch"})
    assert (config.model.path, config.cache.page, config.cache.radix) == ("/m", 8, False)
    assert (config.sched.slots, config.cache.tokens, config.backend.name) == (3, 99, "torch")
    assert (config.mesh.tp, config.mesh.dp, config.mesh.pp) == (2, 2, 1)
    assert config.backend.jax.stack == "scan"
    assert load(file).cache.page == 32
    assert load(file, {"dtype": None}) == load(file)


@pytest.mark.parametrize(
    ("toml", "key", "says"),
    [
        ("[cache]\npaeg = 1", "cache.paeg", "did you mean cache.page"),
        ("[cahce]\npage = 1", "cahce", "did you mean [cache]"),
        ("[sched]\npage = 1", "sched.page", "did you mean cache.page"),
        ("[model]\ndtype = 'bf16'", "model.dtype", "must be one of auto, float32, bfloat16"),
        ("[cache]\ndtype = 'fp4'", "cache.dtype", "must be one of auto, float32, bfloat16, int8, fp8, not 'fp4'"),
        ("[cache]\nscales = 1", "cache.scales", "must be a string"),
        ("[cache]\npage = 0", "cache.page", "between 1 and 128, not 0"),
        ("[cache]\npage = 129", "cache.page", "between 1 and 128, not 129"),
        ("[cache]\neviction = 'rlu'", "cache.eviction", "did you mean lru"),
        ("[cache]\npage = true", "cache.page", "must be an integer"),
        ("[cache]\npage = 1.5", "cache.page", "must be an integer"),
        ("[cache]\nfraction = nan", "cache.fraction", "must be a number"),
        ("[cache]\nfraction = 1.5", "cache.fraction", "at most 1"),
        ("[cache]\nradix = 1", "cache.radix", "true or false"),
        ("[cache]\ntokens = 'many'", "cache.tokens", "must be an integer"),
        ("[sched]\ntoken_buckets = [8, 8]", "sched.token_buckets", "must rise"),
        ("[sched]\ntoken_buckets = []", "sched.token_buckets", "must be a list"),
        ("[sched]\npolicy = 'lmp'", "sched.policy", "did you mean lpm"),
        ("[sched]\npolicy = 'dfs'", "sched.policy", "must be one of lpm, fcfs, dfs-weight"),
        ("[sched]\nageing = -1", "sched.ageing", "must be between 0"),
        ("[sched]\npriority_preemption = true", "sched.priority_preemption", "must be an integer"),
        ("[serve]\nprot = 80", "serve.prot", "did you mean serve.port"),
        ("[backend.torch]\nstack = 'list'", "backend.torch.stack", "did you mean backend.jax.stack"),
        ("[backend.cuda]\na = 1", "backend.cuda", "unknown key"),
        ("cache = 3", "cache", "must be a table"),
        ("[cache", "config", "not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, toml: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, toml))
    assert caught.value.field == key
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_that_are_wrong() -> None:
    for flag, says in (("paeg", "did you mean cache.page"), ("mesh", "unknown axis 'xp'"), ("cache.pag", "cache.page")):
        with pytest.raises(ConfigError, match=says):
            load(None, {flag: "xp=2"})
    with pytest.raises(ConfigError, match="No such file"):
        load("nowhere.toml")


def test_every_key_can_be_said_flat() -> None:
    for key in keys():
        assert dotted(key) == dotted(key.replace(".", "_")) == key
    assert dotted("dtype") == "model.dtype"


def test_nothing_is_mutated(tmp_path: Path) -> None:
    given = {"cache.page": 8}
    config = load(None, given)
    spec, facts = model(), device()
    before = list(show(config))
    first, again = resolve(config, spec, facts), resolve(config, spec, facts)
    assert first == again
    assert (given, list(show(config)), spec, facts) == ({"cache.page": 8}, before, model(), device())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cache.page = 3  # type: ignore[misc]


@pytest.mark.parametrize(("size", "kind", "says"), [(256, "int8", ""), (192, "int8", "192"), (192, "none", "192")])
def test_experts_that_no_kernel_reads_are_told(size: int, kind: str, says: str) -> None:
    spec = model()
    feed = Experts(count=4, top_k=2, size=size, renormalised=True)
    spec = dataclasses.replace(spec, layers=tuple(dataclasses.replace(layer, feed=feed) for layer in spec.layers))
    for platform in ("cpu", "tpu"):
        _, decisions = resolve(load(None, {"model.quantise": kind}), spec, device(platform))
        why = next(d for d in decisions if d.field == "quantise").why
        told = platform == "tpu" and bool(says)
        assert (f"experts of {size} inputs on a device, no multiple of 128, are multiplied by XLA" in why) == told
        assert ("which widens them all in each step" in why) == (told and kind != "none")


def test_every_decision_has_a_reason_and_is_what_was_resolved() -> None:
    for platform in ("cpu", "gpu", "tpu"):
        resolved, decisions = resolve(load(), model(), device(platform))
        made = {d.field: d.value for d in decisions}
        left = {f.name for f in dataclasses.fields(resolved)} - set(made)
        assert left == {"options", "edits"}  # told by whoever opens a backend within: nothing to decide
        assert all(d.why for d in decisions)
        assert all(getattr(resolved, name) == value for name, value in made.items())


@pytest.mark.parametrize(
    ("asked", "checkpoint", "platform", "bf16", "dtype", "cache"),
    [
        ({}, "bfloat16", "cpu", True, "float32", "float32"),
        ({}, "bfloat16", "gpu", True, "bfloat16", "bfloat16"),
        ({}, "bfloat16", "gpu", False, "float32", "float32"),
        ({}, "float32", "tpu", True, "float32", "float32"),
        ({}, "float16", "gpu", True, "bfloat16", "bfloat16"),
        ({"dtype": "bfloat16"}, "float32", "cpu", False, "bfloat16", "bfloat16"),
        ({"cache.dtype": "bfloat16"}, "float32", "cpu", False, "float32", "bfloat16"),
        ({"cache.dtype": "fp8"}, "bfloat16", "gpu", True, "bfloat16", "fp8"),
        ({"cache.dtype": "int8", "cache.scales": "f"}, "bfloat16", "tpu", True, "bfloat16", "int8"),
    ],
)
def test_dtypes(asked: dict[str, Any], checkpoint: str, platform: str, bf16: bool, dtype: str, cache: str) -> None:
    resolved, _ = resolve(load(None, asked), model(dtype=checkpoint), device(platform, bf16=bf16))
    assert (resolved.dtype, resolved.cache_dtype) == (dtype, cache)


def test_a_cache_of_8_bits_needs_scales_and_half_the_memory() -> None:
    spec = model()
    for asked, says in (
        ({"cache.dtype": "int8"}, "radixmesh calibrate --model DIR --out FILE"),
        ({"cache.dtype": "bfloat16", "cache.scales": "f"}, "set cache.dtype, or leave it out"),
        ({"cache.scales": "f"}, "set cache.dtype, or leave it out"),
    ):
        with pytest.raises(ConfigError, match=says) as caught:
            resolve(load(None, asked), spec, device())
        assert caught.value.field == "cache.scales"
    size = {}
    for dtype in ("bfloat16", "fp8", "int8"):
        given = {"cache.dtype": dtype, "cache.tokens": 4096} | ({"cache.scales": "f"} if dtype == "int8" else {})
        resolved, _ = resolve(load(None, given), spec, device("gpu"))
        size[dtype] = plan_memory(spec, resolved)
    assert size["fp8"].cache == size["int8"].cache
    assert [2 * n for n in size["fp8"].cache] == list(size["bfloat16"].cache)
    assert size["fp8"].weights == size["bfloat16"].weights + 2 * 2 * 2 * 2 * 4  # scales and inverses of 2 layers
    tight = replace(device("gpu"), memory_bytes=64 << 20)
    wide, narrow = (
        resolve(load(None, {"cache.dtype": d, "slots": 8, "max_tokens": 64}), spec, tight)[0].pages[0]
        for d in ("bfloat16", "fp8")
    )
    assert 2 * wide <= narrow <= 2 * wide + 1
    assert resolve(load(None, {"cache.dtype": "fp8"}), spec, device("tpu"))[0].page == 32
    assert resolve(load(None, {"cache.dtype": "int8", "model.weights": "dummy"}), spec, device())[0].scales == ""


def test_stack_follows_the_device_unless_asked() -> None:
    assert [resolve(load(), model(), device(p))[0].stack for p in ("cpu", "gpu", "tpu")] == ["scan", "list", "scan"]
    assert resolve(load(None, {"stack": "scan"}), model(), device("gpu"))[0].stack == "scan"
    large = replace(model(), vocab=1 << 15)
    assert plan_memory(large, resolve(load(), large, device())[0]).weights > SMALL
    assert resolve(load(), large, device())[0].stack == "list"


@pytest.mark.parametrize(
    ("platform", "reach", "asked", "page"),
    [("cpu", 131072, None, 16), ("gpu", 131072, None, 16), ("tpu", 8192, None, 16), ("tpu", 65536, None, 64),
     ("tpu", 131072, None, 128), ("tpu", 1 << 20, None, 128), ("tpu", 131072, 32, 32)],
)  # fmt: skip
def test_pages_are_as_large_as_the_tables_of_a_tpu_need(
    platform: str, reach: int, asked: int | None, page: int
) -> None:
    """128 rows: 4 bytes for each page of each."""
    facts = device(platform, memory=64 * GIB)
    given = {"max_rows": 128, "slots": 128} | ({"cache.page": asked} if asked else {})
    decided, _ = resolve(load(None, given), model(max_len=reach), facts)
    assert decided.page == page
    if platform == "tpu" and not asked and reach < 1 << 20:
        assert 4 * 128 * reach // page < 1 << 20


@pytest.mark.parametrize("axis", ["dp", "pp", "ep"])
def test_mesh_axes_that_are_not_built_are_refused_by_name(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"mesh: {axis}=2 is not built yet") as caught:
        resolve(load(None, {"mesh": f"{axis}=2"}), model(), device())
    assert caught.value.field == "mesh"


@pytest.mark.parametrize(
    ("mesh", "where", "says"),
    [
        ("tp=3", {}, "tp=3 does not divide q_heads"),
        ("tp=2", {"backend": "reference"}, "the reference backend runs on one device"),
        ("tp=4", {"platform": "gpu", "count": 2}, "needs 4 devices, this host has 2 x"),
    ],
)
def test_a_mesh_that_can_not_be_is_refused_by_name(mesh: str, where: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        resolve(load(None, {"mesh": mesh}), model(), replace(device(), **where))
    assert caught.value.field == "mesh"


def test_a_mesh_is_planned_by_what_one_device_holds() -> None:
    """Weights, cache and free memory of one device of the mesh; a CPU's devices share its memory."""
    one, many = (resolve(load(None, {"mesh": m}), model(), replace(device("gpu"), count=2))[0] for m in ("", "tp=2"))
    whole, half = plan_memory(model(), one), plan_memory(model(), many)
    assert whole.weights / 2 < half.weights < whole.weights * 0.6  # norms are on both
    assert [a / p for a, p in zip(half.cache, many.pages, strict=True)] == [
        b / p / 2 for b, p in zip(whole.cache, one.pages, strict=True)
    ]
    small = replace(device(), memory_bytes=1 << 24)
    cut = [resolve(load(None, {"mesh": m, "cache.fraction": 0.5}), model(), small) for m in ("", "tp=2")]
    why = [next(d.why for d in made if d.field == "platform") for _, made in cut]
    assert "for each device" in why[1]
    assert "for each device" not in why[0]


def test_the_devices_of_a_cut_cpu() -> None:
    given = {"mesh": "tp=2", "backend.jax.devices": 4}
    assert resolve(load(None, given), model(), device())[0].devices == 4
    assert resolve(load(None, {"mesh": "tp=2"}), model(), device())[0].devices == 2
    assert resolve(load(None, given), model(), replace(device(), backend="torch"))[0].devices == 2
    with pytest.raises(ConfigError, match="1 is less than the 2 of tp=2") as caught:
        resolve(load(None, given | {"backend.jax.devices": 1}), model(), device())
    assert caught.value.field == "backend.jax.devices"


def test_cache_tokens_are_honoured() -> None:
    resolved, _ = resolve(load(None, {"cache.tokens": 1000, "max_len": 512}), model(), device())
    assert resolved.pages == (63,)  # rounded up to whole pages
    assert resolved.max_len == 512


def test_max_len_is_what_the_pool_holds_unless_it_was_asked() -> None:
    resolved, decisions = resolve(load(None, {"cache.tokens": 1000}), model(), device())
    assert resolved.max_len == 63 * 16
    assert "what the cache holds" in next(d.why for d in decisions if d.field == "max_len")
    with pytest.raises(ConfigError, match=r"model\.max_len: 2000 tokens do not fit the cache of 1008"):
        resolve(load(None, {"cache.tokens": 1000, "max_len": 2000}), model(), device())
    with pytest.raises(ConfigError, match=r"model\.max_len: 5000 is past the 4096 positions"):
        resolve(load(None, {"max_len": 5000}), model(), device())


def test_what_does_not_fit_memory_is_refused_before_anything_is_allocated() -> None:
    for asked, key in (({"cache.tokens": 10_000_000}, "cache.tokens"), ({}, "cache.fraction")):
        with pytest.raises(ConfigError) as caught:
            resolve(load(None, asked), model(), device("gpu", memory=2 << 20))
        assert caught.value.field == key


@pytest.mark.parametrize(
    ("asked", "key"),
    [
        ({"slots": 4, "max_rows": 5}, "sched.max_rows"),
        ({"slots": 64, "max_tokens": 32}, "sched.max_tokens"),
        ({"max_tokens": 64, "token_buckets": [8, 32]}, "sched.token_buckets"),
    ],
)
def test_sizes_that_contradict_each_other(asked: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(load(None, asked), model(), device())
    assert caught.value.field == key


@settings(deadline=None)
@given(
    platform=st.sampled_from(["cpu", "gpu", "tpu"]),
    memory=st.integers(16 << 20, 64 * GIB),
    window=st.sampled_from([None, 16, 100, 100_000]),
    page=st.integers(1, 64),
    slots=st.one_of(st.none(), st.integers(1, 64)),
    tokens=st.one_of(st.none(), st.integers(1, 100_000)),
    max_tokens=st.one_of(st.none(), st.integers(64, 1024)),
    max_len=st.integers(2, 8192),
)
def test_whatever_is_decided_fits_and_a_scheduler_takes_it(
    platform: str,
    memory: int,
    window: int | None,
    page: int,
    slots: int | None,
    tokens: int | None,
    max_tokens: int | None,
    max_len: int,
) -> None:
    spec = model(window=window, max_len=max_len)
    asked = {"page": page, "slots": slots, "cache.tokens": tokens, "max_tokens": max_tokens}
    facts = device(platform, memory)
    try:
        resolved, _ = resolve(load(None, asked), spec, facts)
    except ConfigError as error:
        if error.field not in ("cache.tokens" if tokens else "cache.fraction", "sched.max_tokens"):
            raise
        return
    plan = plan_memory(spec, resolved)
    assert plan.total <= memory
    assert plan.cache == tuple(
        n * g.page_bytes(resolved.cache_dtype) for n, g in zip(resolved.pages, cache_groups(spec, page), strict=True)
    )
    assert 2 <= resolved.max_len <= max_len or tokens is not None
    assert resolved.token_buckets[-1] == resolved.max_tokens
    assert capacity(Limits.of(spec, resolved)) == resolved.max_len


def test_auto_picks_a_backend_by_what_is_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "NVIDIA", tmp_path / "nvidiactl")
    monkeypatch.setattr(probing, "AMD", tmp_path / "kfd")
    monkeypatch.setattr(probing, "PCI", tmp_path / "pci")
    found = probe()
    assert (found.backend, found.platform) == ("jax", "cpu")
    assert found.memory_bytes > 1 << 28
    assert probe("torch").backend == "torch"
    for platform in ("gpu", "tpu"):
        with pytest.raises(ConfigError, match=f"no .*{platform.upper()}.* is visible") as caught:
            probe("jax", platform)
        assert caught.value.field == "backend.platform"
    with pytest.raises(ConfigError, match="reference backend runs on a CPU"):
        probe("reference", "gpu")
    (tmp_path / "nvidiactl").touch()
    assert probe("auto", "cpu").backend == "jax"
    with pytest.raises(ConfigError, match="can't use the NVIDIA GPU: pip install"):
        probe()  # auto is torch here, and this torch is built for CPUs
