"""Long rows on sm_90, in Gluon, which nothing interprets: who takes them, that they compile, and on such a GPU that
ragged steps over pages are softmax(q k) v in float32, whatever stands where nothing was written."""

from __future__ import annotations

import pytest
import torch

from kernels_cuda import attention as gpu
from kernels_cuda.build import build
from kernels_cuda.cases import Layer, attention

HALF = torch.bfloat16
HERE = torch.cuda.is_available() and gpu.arch_of(torch.device("cuda")) == "sm_90"
LAYERS = ((128, 32, 8, 16, HALF), (64, 8, 8, 32, torch.float16), (128, 24, 8, 64, HALF), (128, 10, 2, 128, HALF))
"""Numbers of a head, query heads, kv heads, tokens of a page, dtype."""
STEPS = (
    ((1, 5, 17, 33, 130, 260, 700, 1024), (300, 40, 1000, 2048, 511, 17, 0, 128)),
    ((2048,), (0,)),
    ((17, 1500, 1500), (0, 7000, 0)),
    ((33,) * 40, tuple(37 * i for i in range(40))),
    ((127, 128, 129, 256, 1100), (1, 0, 0, 128, 1)),
)
"""Tokens fed of each row, and cached before."""


def test_who_takes_long_rows() -> None:
    fits = {"arch": "sm_90", "head_dim": 128, "group": 4, "dtype": HALF, "store": HALF, "page": 16}
    assert gpu.hopper(**fits)
    for change in ({"arch": "sm_100"}, {"head_dim": 80}, {"group": 65}, {"store": gpu.FLOAT8}, {"page": 8}):
        assert not gpu.hopper(**fits | change)
    assert not gpu.hopper(**fits | {"dtype": torch.float32, "store": torch.float32})
    assert not gpu.hopper(**fits, plain=False)


@pytest.mark.slow
@pytest.mark.parametrize("head", [64, 128])
def test_they_compile(head: int) -> None:
    layer = Layer(q_heads=8, kv_heads=2, head_dim=head, page=16)
    (case,) = (c for c in attention(layer, HALF, HALF, "sm_90", (0,), (1,)) if c.module == "hopper")
    made = build(case, "sm_90")
    assert "error" not in made, made
    assert made["shared"] <= 227 << 10, made
    assert made["spilled"] <= 64, made


@pytest.mark.skipif(not HERE, reason="needs sm_90")
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_a_ragged_step_is_softmax(layer: tuple[int, int, int, int, torch.dtype], step: int) -> None:
    dim, q_heads, kv_heads, page, dtype = layer
    lens, before = STEPS[step]
    lengths = [n + b for n, b in zip(lens, before, strict=True)]
    need = [-(-n // page) for n in lengths]
    pages = torch.randperm(sum(need) + 3)[: sum(need)].split(need)
    table = torch.full((len(lens), max(need) + 2), sum(need) + 2, dtype=torch.int32)
    store = torch.full(((sum(need) + 3) * page + 1, 2, kv_heads, dim), float("nan"), dtype=dtype)
    kvs = [torch.randn((n, 2, kv_heads, dim)).to(dtype) for n in lengths]
    for r, kv in enumerate(kvs):
        at = torch.arange(len(kv))
        table[r, : need[r]] = pages[r]
        store[pages[r][at // page] * page + at % page] = kv
    q = torch.randn((sum(lens), q_heads, dim)).to(dtype).cuda()
    number = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    first = number([0, *lens]).cumsum(0).int()
    rows = gpu.Rows(first, number(before), number([0] * len(lens)), table.cuda())
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    plan = gpu.plan(lens, max(lengths), sms=sms)
    got = gpu.attention(q, store.cuda(), rows, plan, page=page, scale=dim**-0.5).float()
    want = [softmax(x.float(), kv.cuda().float(), dim**-0.5) for x, kv in zip(q.split(lens), kvs, strict=True)]
    torch.testing.assert_close(got, torch.cat(want), atol=2e-2, rtol=0)


def softmax(q: torch.Tensor, kv: torch.Tensor, scale: float) -> torch.Tensor:
    """q [n, q_heads, D], the last of kv [N, 2, kv_heads, D]."""
    k, v = kv.repeat_interleave(q.shape[1] // kv.shape[2], 2).transpose(0, 2).unbind(1)
    s = torch.einsum("nhd,hkd->hnk", q, k) * scale
    seen = torch.ones(s.shape[1:], dtype=torch.bool, device=q.device).tril(len(kv) - len(q))
    return torch.einsum("hnk,hkd->nhd", s.masked_fill(~seen, -float("inf")).softmax(-1), v)
