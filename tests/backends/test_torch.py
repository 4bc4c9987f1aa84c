"""What is particular to torch: packed weights, the order of rows, the sampler, that no step waits, failures."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

import models_jax
import models_torch
from backends.api import random
from backends.api.build import Host, Row, build
from backends.api.choice import Choice, kept
from backends.api.conformance.bench import SPEC, Ask, Weights, alike, config, one, prompt, refused
from backends.api.ties import judge, margin
from backends.torch import backend as torch_backend
from backends.torch import caches, sampler
from backends.torch.backend import TorchBackend
from backends.torch.inputs import SLACK, arrange, pack
from engine.errors import BackendLost, ConfigError, DeviceFailed, ModelError
from engine.mesh import MeshSpec
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from models_torch import decoder
from models_torch.packed import Packed, packable
from models_torch.packed import pack as pack_matrix
from tests.tiny import SHAPES, Tiny, tiny
from tests.tiny import prompt as random_prompt

TOLERANCE = 2e-4
MAKE = 64


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models are so small that threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def host_of(path: Path, **overrides: Any) -> Host:
    """A loaded backend on a model folder, whose steps return logits."""
    spec = read_spec(path)
    values: dict[str, Any] = {"max_len": 128, "page": 8, "pages": (64,), "max_tokens": 64}
    backend = TorchBackend(spec, config("torch", **(values | overrides)))
    backend.load(Checkpoint(path, spec))
    return Host(backend, taps=("logits",))


def mixed(host: Host, prompts: list[list[int]], make: int) -> tuple[list[list[int]], list[NDArray[np.float32]]]:
    """Greedy tokens of texts that come one after another, prompts in chunks of 7, beside texts that decode already; and
    the logits float32[T, V] of every token fed."""
    texts, rest = [host.open() for _ in prompts], [list(ids) for ids in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    seen: list[list[NDArray[np.float32]]] = [[] for _ in prompts]
    step = 0
    while any(len(tokens) < make for tokens in made):
        rows, who = [], []
        for i, text in enumerate(texts):
            if len(made[i]) == make or step < 3 * i:
                continue
            part, rest[i] = rest[i][:7], rest[i][7:]
            rows.append((text, host.row(text, part or [-1], output=int(not rest[i]))))
            who.append(i)
        step += 1
        if not rows:
            continue
        result = host.run(rows)
        parts = np.split(result.taps["logits"], np.cumsum([len(row.tokens) for _, row in rows])[:-1])
        for r, i in enumerate(who):
            seen[i].append(parts[r])
            made[i] += result.tokens[r, : result.counts[r]].tolist()
    return made, [np.concatenate(parts) for parts in seen]


def measure(model: Tiny, host: Host) -> tuple[float, float]:
    """Mixed batches give Hugging Face's greedy tokens, up to near-ties; (largest logit difference, their deviation)."""
    prompts = [random_prompt(model, n, seed=n) for n in (37, 5, 20)]
    made, found = mixed(host, prompts, MAKE)
    truth = [model.logits([*ids, *tokens[:-1]]).numpy() for ids, tokens in zip(prompts, made, strict=True)]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(found, truth, strict=True))
    tails = [t[len(ids) - 1 :] for t, ids in zip(truth, prompts, strict=True)]
    best, gaps = [t.argmax(1).tolist() for t in tails], [[margin(row) for row in t] for t in tails]
    assert judge(best, made, gaps, difference).ok
    return difference, float(np.mean([t.std() for t in truth]))


@pytest.fixture(scope="module", params=["llama-odd-heads", "llama-one-kv-head", "qwen3-grouped"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return tiny(tmp_path_factory.mktemp(request.param), **SHAPES[request.param])


@pytest.fixture(scope="module")
def narrow(small: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The same model rounded to bfloat16, as most checkpoints are; its oracle computes in float32 with those values."""
    path = tmp_path_factory.mktemp("bfloat16")
    copy.deepcopy(small.hf).bfloat16().save_pretrained(path)
    return Tiny(path=path, hf=transformers_of(path, torch.float32))


def transformers_of(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """A folder in transformers. Not the model cast: a cast rounds the frequencies of rope too."""
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def test_mixed_batches_are_those_of_transformers(small: Tiny) -> None:
    difference, spread = measure(small, host_of(small.path))
    assert difference <= TOLERANCE * max(1.0, spread)


def test_a_bfloat16_checkpoint_is_computed_in_float32(narrow: Tiny) -> None:
    host = host_of(narrow.path)
    difference, spread = measure(narrow, host)
    assert difference <= TOLERANCE * max(1.0, spread)
    q = host.backend.weights["layers"][0]["attention"]["q"]
    assert isinstance(q, Packed) == packable(torch.float32)
    assert isinstance(host.backend.weights["layers"][0]["attention_norm"], torch.Tensor)


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1.5), ("float32", 0.9)])
def test_bfloat16_loses_no_more_than_in_transformers(narrow: Tiny, dtype: str, share: float) -> None:
    """dtype: of the computation, beside a cache in bfloat16. share: of the error that all bfloat16 has elsewhere."""
    ids = random_prompt(narrow, 40)
    truth = narrow.logits(ids)
    with torch.no_grad():
        theirs = transformers_of(narrow.path, torch.bfloat16)(torch.tensor([ids])).logits[0].float()
    host = host_of(narrow.path, dtype=dtype, cache_dtype="bfloat16")
    text = host.open()
    parts = [host.run([(text, host.row(text, ids[at : at + 8]))]).taps["logits"] for at in range(0, 40, 8)]
    error = lambda x: float((x - truth).square().mean().sqrt())  # noqa: E731
    assert 1e-3 < error(torch.from_numpy(np.concatenate(parts))) < share * error(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_matrices_lose_nothing(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for out, inner, size in ((1, 1, 1.0), (7, 5, 1e-4), (193, 56, 3e4), (64, 96, 1.0)):
        # the values span 24 powers of two, so that float16 alone would lose the small ones
        spread = torch.exp2(-24 * torch.rand(out, inner, generator=draw))
        w = (size * spread * torch.randn(out, inner, generator=draw).sign()).to(dtype)
        packed = pack_matrix(w, 1, torch.float32)
        assert (packed is not None) == packable(torch.float32)
        if packed is None:
            return
        held = packed.multiply(torch.eye(inner))  # [in, out], one product a sum: what stands in memory, unrounded
        assert torch.equal(held, w.float().t())
        x = torch.randn(6, inner, generator=draw)
        assert torch.allclose(packed.multiply(x).double(), x.double() @ w.double().t(), rtol=1e-5, atol=1e-5 * size)


def test_a_matrix_that_is_not_finite_stays_plain() -> None:
    for value in (float("nan"), float("inf")):
        assert pack_matrix(torch.tensor([[1.0, value]], dtype=torch.bfloat16), 1, torch.float32) is None


def test_noise_has_the_bits_of_the_contract() -> None:
    draw = np.random.default_rng(0)
    edges = np.array([0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1], np.uint64)
    seeds = np.concatenate([edges, draw.integers(0, 2**64, 10, np.uint64)])
    positions = np.concatenate([[0, 1, 2**31 - 1], draw.integers(0, 2**20, 13)]).astype(np.int32)
    words = np.stack([seeds >> np.uint64(32), seeds & np.uint64(2**32 - 1)], 1).astype(np.int64)
    keys = sampler.fold(torch.from_numpy(words), torch.from_numpy(positions.astype(np.int64)))
    ids = sampler.wrap(torch.arange(1000)[None])
    x0, x1 = sampler.threefry((keys[0][:, None], keys[1][:, None]), (torch.zeros_like(ids), ids))
    assert np.array_equal((x0 ^ x1).numpy().view(np.uint32), random.bits(seeds, positions, 1000))
    noise = sampler.gumbel(keys[:, :, None], torch.arange(1000)[None]).numpy()
    assert np.abs(noise - random.gumbel(seeds, positions, 1000)).max() < 3e-6


def test_nucleus_is_that_of_a_sort() -> None:
    draw = np.random.default_rng(1)
    for spread in (0.0, 0.01, 1.0, 5.0, 40.0):
        values = (spread * draw.standard_normal((8, 300))).astype(np.float32)
        values[:, ::7] = values[:, :1]  # ties
        values -= values.max(1, keepdims=True)
        p = np.array([1e-6, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999999, 1.0])
        x = torch.from_numpy(values)
        distance = x.abs().view(torch.int32)
        edge = sampler.nucleus(x.double().exp(), distance, torch.from_numpy(p))
        found = (distance <= edge[:, None]).numpy()
        for row in range(8):
            choice = Choice(temperature=1.0, top_p=float(p[row]))
            low, high = (kept(values[row], choice, slack) for slack in (-1e-12, 1e-12))
            assert (low <= found[row]).all(), (spread, p[row])
            assert (found[row] <= high).all(), (spread, p[row])


def test_a_nucleus_that_is_reached_exactly_ends_there() -> None:
    mass = torch.tensor([[1.0, 4.0, 2.0, 1.0]], dtype=torch.float64)
    distance = torch.tensor([[2.0, 0.0, 1.0, 2.5]]).view(torch.int32)
    edges = [float(sampler.nucleus(mass, distance, torch.tensor([p])).view(torch.float32)) for p in (0.5, 0.75, 0.875)]
    assert edges == [0.0, 1.0, 2.0]


def test_noise_for_a_few_tokens_chooses_as_noise_for_all() -> None:
    draw = torch.Generator().manual_seed(3)
    values = torch.randn(20, 500, generator=draw)
    keys = torch.randint(-(2**31), 2**31, (2, 20), generator=draw).int()
    keep = torch.rand(20, 500, generator=draw) < 0.1
    few = sampler.among(values, keep, keys)
    assert torch.equal(few, sampler.everywhere(values.clone(), keep, keys))
    assert keep.gather(1, few[:, None]).all()
    assert not torch.equal(few, sampler.everywhere(values.clone(), None, keys))


class Watch(TorchDispatchMode):
    """Notes operations whose result or shape the host can only know by waiting for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [i for i in args[1] if i is not None and i.dtype == torch.bool]
            if name.startswith("index") and isinstance(args[1], (list, tuple))
            else []
        )
        self.seen += 1
        if name in self.WAITS or masks:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device() -> None:
    host = Host(TorchBackend(SPEC, config("torch")))
    host.backend.load(Weights())
    texts = [host.open() for _ in range(3)]
    host.run([(texts[0], host.row(texts[0], prompt(5))), (texts[1], host.row(texts[1], prompt(3), output=0))])
    rows = [
        (texts[0], host.row(texts[0], [-1], temperature=0.7, seed=3)),
        (texts[1], host.row(texts[1], prompt(4))),
        (texts[2], host.row(texts[2], prompt(6), output=0)),
    ]
    with Watch() as watch:
        host.enqueue(rows)
    assert watch.seen > 100
    assert watch.found == []
    host.close(texts.pop())
    text = host.open()
    history = [(t, 0) for t in prompt(6)]
    rows = [
        (texts[0], host.row(texts[0], [-1], temperature=0.7, seed=3, bias=[(4, 1.0)], logprobs=3, masked=True)),
        (texts[1], host.row(texts[1], [-1], masked=True)),
        (text, host.row(text, prompt(6), penalty=(1.1, 0.2, 0.3), history=history, prompt_logprobs=(1, 2))),
    ]
    with Watch() as watch:
        host.enqueue(rows, np.full((2, 1, 4), 2**32 - 1, np.uint32), copies=[(0, 0, 60, 61)])
    assert watch.seen > 150
    assert watch.found == []


def test_rows_are_put_in_an_order_that_batches_well() -> None:
    draw = np.random.default_rng(2)
    limits = TorchBackend(SPEC, config("torch", max_len=4096, max_rows=64, slots=64, max_tokens=4096)).limits
    for _ in range(50):
        count = int(draw.integers(1, 40))
        lens = draw.choice([1, 1, 1, 2, 9], count)
        upper = lens + draw.integers(0, 4000, count)
        slots = draw.permutation(64)[:count]
        rows = [
            Row(slot=int(s), tokens=[i] * n, start=int(u - n), upper=int(u), output=int(draw.integers(2)))
            for i, (s, n, u) in enumerate(zip(slots, lens.tolist(), upper.tolist(), strict=True))
        ]
        step = build(limits, 1, rows)
        order = arrange(step, limits)
        assert sorted(order.rows.tolist()) == list(range(count))
        assert step.tokens[order.tokens].tolist() == [i for i in order.rows.tolist() for _ in range(lens[i])]
        covered = np.concatenate([np.arange(count)[b.rows] for b in order.bunches])
        assert covered.tolist() == list(range(count))
        for bunch in order.bunches:
            mine = order.rows[bunch.rows]
            assert set(lens[mine]) == {bunch.queries}
            assert bunch.tokens.stop - bunch.tokens.start == bunch.queries * len(mine)
            reach = bunch.reach[0] * limits.groups[0].page
            assert (reach >= upper[mine]).all()
            assert (reach < 2 * upper[mine] + SLACK + limits.groups[0].page).all(), "work beyond the real lengths"


def test_a_step_crosses_to_the_device_in_one_buffer() -> None:
    backend = TorchBackend(SPEC, config("torch"))
    rows = [Row(slot=1, tokens=[5, 6], start=0, upper=2, temperature=0.5, top_k=3, top_p=0.25, seed=2**63 + 5)]
    batch = pack(build(backend.limits, 1, rows, [[(1, 0, 9)], []]), backend.limits, torch.device("cpu"))
    assert batch.draws is not None
    tensors = [batch.slots, batch.tokens, batch.base[0], batch.edits[0][1], batch.draws.temperature, batch.draws.top_k]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert batch.draws.seed.tolist() == [[2**31, 5]]
    assert (float(batch.draws.temperature), float(batch.draws.top_p), int(batch.draws.top_k)) == (0.5, 0.25, 3)
    assert [t.tolist() for t in batch.edits[0]] == [[backend.limits.max_row_pages[0]], [9]]


def started() -> tuple[Host, Ask, Any]:
    """A backend with a text on it, and what a text alone gives."""
    host = Host(TorchBackend(SPEC, config("torch")), taps=("logits",))
    host.backend.load(Weights())
    ask = Ask(prompt=prompt(6), make=5)
    return host, ask, one(host, ask)


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def test_a_device_failure_voids_what_is_out_and_the_next_step_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    host, ask, want = started()
    text = host.open()
    ticket = host.enqueue([(text, host.row(text, prompt(4)))])
    with monkeypatch.context() as patch:
        patch.setattr(decoder, "forward", out_of_memory)
        with pytest.raises(DeviceFailed, match="no room"):
            host.enqueue([(text, host.row(text, [-1]))])
    refused(lambda: host.backend.collect(ticket))
    lost = host.step([(text, host.row(text, [-1]))])
    refused(lambda: host.backend.forward(lost), "starts")
    host.close(text)
    alike(want, one(host, ask))


def test_a_step_that_never_ends_is_a_device_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Never:
        def query(self) -> bool:
            return False

    host, ask, want = started()
    text = host.open()
    with monkeypatch.context() as patch:
        patch.setattr(torch_backend, "mark", lambda device: Never())
        ticket = host.enqueue([(text, host.row(text, prompt(4)))])
    with pytest.raises(DeviceFailed, match=r"0\.02 s"):
        host.backend.collect(ticket, timeout=0.02)
    host.close(text)
    alike(want, one(host, ask))


def test_a_device_that_fails_again_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    host, _, _ = started()
    text = host.open()
    monkeypatch.setattr(decoder, "forward", out_of_memory)
    monkeypatch.setattr(caches, "make", out_of_memory)
    step = host.step([(text, host.row(text, prompt(4)))])
    for _ in range(2):
        with pytest.raises(BackendLost):
            host.backend.forward(step)
    assert not host.backend.status().ready


def test_what_a_slot_cannot_do_is_refused() -> None:
    host, ask, want = started()
    text, fresh = host.open(), host.open()  # the slot of the text alone, and one that was never seated
    fresh.start = -1
    never = host.step([(fresh, host.row(fresh, prompt(3)))])
    refused(lambda: host.backend.forward(never), "starts", [0])
    host.run([(text, host.row(text, prompt(6)))])
    short = build(host.limits, 99, [Row(slot=text.slot, tokens=[-1], upper=6)])
    refused(lambda: host.backend.forward(short), "upper", [0])
    for each in (fresh, text):
        host.close(each)
    alike(want, one(host, ask))


def test_a_weight_of_another_shape_is_named() -> None:
    class Short(Weights):
        def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
            return super().read(name, part)[1:] if name == "layers.1.mlp.up" else super().read(name, part)

    backend = TorchBackend(SPEC, config("torch"))
    with pytest.raises(ModelError) as error:
        backend.load(Short())
    assert error.value.field == "layers.1.mlp.up"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mesh", MeshSpec(tp=2)),
        ("platform", "tpu"),
        ("platform", "gpu"),
        ("dtype", "float8"),
        ("cache_dtype", "int4"),
        ("options", {"graphs": True}),
    ],
)
def test_what_is_not_built_is_refused_by_name(field: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError) as error:
        TorchBackend(SPEC, config("torch", **{field: value}))
    assert error.value.field == ("backend.torch.graphs" if field == "options" else field)


@pytest.mark.parametrize("name", ["attention", "decoder", "mlp", "moe"])
def test_the_model_files_differ_from_jax_only_in_their_imports(name: str) -> None:
    ours, theirs = (
        (Path(room.__path__[0]) / f"{name}.py").read_text().splitlines() for room in (models_torch, models_jax)
    )
    assert len(ours) == len(theirs)
    differ = [(a, b) for a, b in zip(ours, theirs, strict=True) if a != b]
    assert differ
    for a, b in differ:
        assert a.startswith("from models_torch")
        assert a.replace("models_torch", "models_jax") == b
