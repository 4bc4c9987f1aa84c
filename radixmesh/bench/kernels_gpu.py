"""Attention on the GPU that is here: over pages, beside torch's own over dense keys, and FlashInfer's where it is
installed, in one run.

An 8B Llama's attention in bfloat16. Times are of CUDA graphs of many launches, over caches larger than what the GPU
keeps close, medians of repeats. Rates are of what the work needs: bytes of keys and values that are read, products
of a query with each key that it sees.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from kernels_cuda import attention as kernels
from kernels_cuda import cascade
from radixmesh.bench import peer_gpu as peer

Q_HEADS, KV_HEADS, HEAD, PAGE = 32, 8, 128, 16
LINE = 2 * KV_HEADS * HEAD
"""Numbers of a token in the cache."""
DECODE = ((1, 1024), (1, 16384), (16, 4096), (64, 1024), (256, 1024), (256, 2240))
"""Rows of one token, and the length of each."""
PREFILL = ((1, 2048, 0), (1, 4096, 0), (4, 2048, 0), (16, 1024, 0), (1, 2048, 6144))
"""Rows, tokens of each, tokens cached before."""
GROUPS, EACH, SHARED, OWN = 32, 8, 2048, 192
"""Of rows of one token that read the same pages: groups, rows of each, positions that they share and have for
themselves."""
TREE = f"tree {GROUPS} x {EACH}, {SHARED} shared, {OWN} own"
PEERS = ("flashinfer", "flashinfer_dense")
BUDGET = 600 << 20
"""Bytes of caches that are read in turn."""
DTYPE = torch.bfloat16


def measure(only: str = "") -> Iterator[dict[str, Any]]:
    """A record a case: "ms", and what share of the measured ceiling it is. only: cases whose name holds this."""
    ceiling = ceilings()
    yield ceiling
    for rows, length in DECODE:
        for store in (DTYPE, kernels.FLOAT8):
            name = f"decode {rows} x {length}, {str(store).removeprefix('torch.')}"
            if only in name:
                yield {"case": name} | decode(rows, length, store, ceiling["copy_gbs"])
    if only in TREE:
        yield {"case": TREE} | tree(ceiling["copy_gbs"])
    for rows, tokens, cached in PREFILL:
        name = f"prefill {rows} x {tokens}" + (f" after {cached}" if cached else "")
        if only in name:
            yield {"case": name} | prefill(rows, tokens, cached, ceiling["matrix_tflops"])


def ceilings() -> dict[str, Any]:
    """Copy, bytes read and written, and an 8192-cubed product of random numbers."""
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    copy = timed(lambda i: torch.add(source, 1.0, out=target), 4)  # a copy that is captured goes another way
    moved = 2 * source.nbytes
    x = torch.randn(8192, 8192, device="cuda", dtype=DTYPE)
    product = timed(lambda i: x @ x, 4)
    return {
        "case": "ceilings",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gbs": round(moved / copy / 1e6),
        "matrix_tflops": round(2 * 8192**3 / product / 1e9),
    }


def timed(call: Callable[[int], Any], count: int, repeats: int = 9) -> float:
    """Milliseconds of call(i), i < count, in a graph: the median of repeats."""
    for i in range(min(count, 2)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i)
    graph.replay()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / count)
    return statistics.median(found)


def told(lens: Sequence[int], before: Sequence[int]) -> tuple[kernels.Rows, kernels.Plan, int]:
    """Rows on shuffled pages, their plan, and how many pages they take."""
    number = lambda x: torch.tensor(x, dtype=torch.int32, device="cuda")  # noqa: E731
    need = [-(-(n + b) // PAGE) for n, b in zip(lens, before, strict=True)]
    pages = torch.randperm(sum(need), dtype=torch.int32).split(need)
    table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True).cuda()
    first = torch.tensor([0, *lens]).cumsum(0).int().cuda()
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    reach = max(n + b for n, b in zip(lens, before, strict=True))
    plan = kernels.plan(list(lens), reach, sms=sms, fresh=not any(before))
    return kernels.Rows(first, number(list(before)), number([0] * len(lens)), table), plan, sum(need)


def decode(rows: int, length: int, store: torch.dtype, copy: float) -> dict[str, Any]:
    """Rows of one token; torch over dense keys beside it where the cache is as wide as the queries."""
    bytes_ = rows * length * LINE * store.itemsize
    layers = max(1, min(32, BUDGET // bytes_))
    told_, plan, pages = told([1] * rows, [length - 1] * rows)
    cache = random((layers, pages * PAGE + 1, 2, KV_HEADS, HEAD), store)
    q = random((rows, Q_HEADS, HEAD), DTYPE)
    scales = torch.ones((2, KV_HEADS), device="cuda") if store == kernels.FLOAT8 else None
    ms = timed(
        lambda i: kernels.attention(q, cache[i], told_, plan, page=PAGE, scale=HEAD**-0.5, scales=scales), layers
    )
    out = {"ms": round(ms, 4), "gbs": round(bytes_ / ms / 1e6), "of_copy": round(bytes_ / ms / 1e6 / copy, 3)}
    if store == DTYPE:
        out |= beside(lambda: peer.decode(q, cache, told_.table, [length] * rows, PAGE), layers)
        del cache
        k, v = (random((layers, rows, KV_HEADS, length, HEAD), DTYPE) for _ in range(2))
        grouped = q.view(rows, KV_HEADS, -1, HEAD)
        out["sdpa_ms"] = round(timed(lambda i: F.scaled_dot_product_attention(grouped, k[i], v[i]), layers), 4)
    return out


def tree(copy: float) -> dict[str, Any]:
    """Groups of rows whose pages are read once, and as many rows each by itself."""
    rows, length = GROUPS * EACH, SHARED + OWN
    told_, plan, _ = told([1] * rows, [length - 1] * rows)
    of, own = SHARED // PAGE, OWN // PAGE
    pages = torch.randperm(GROUPS * of + rows * own, dtype=torch.int32)
    shared = pages[: GROUPS * of].view(GROUPS, 1, of).expand(-1, EACH, -1).reshape(rows, of)
    told_ = told_._replace(table=torch.cat([shared, pages[GROUPS * of :].view(rows, own)], 1).cuda())
    sms, group = plan.sms, Q_HEADS // KV_HEADS
    heads = cascade.tuning(group, HEAD, DTYPE.itemsize, False).heads
    groups = [(i * EACH, i * EACH + EACH - 1, 0, SHARED - 1) for i in range(GROUPS)]
    made = cascade.cut(groups, rows, group=group, kv_heads=KV_HEADS, heads=heads, sms=sms)
    shape = cascade.fit(made, OWN, kv_heads=KV_HEADS, sms=sms)
    tiles = cascade.Tiles(*(torch.from_numpy(x).cuda() for x in cascade.pad(made, shape)))
    bytes_ = len(pages) * PAGE * LINE * DTYPE.itemsize
    layers = max(1, BUDGET // bytes_)
    cache = random((layers, len(pages) * PAGE + 1, 2, KV_HEADS, HEAD), DTYPE)
    q = random((rows, Q_HEADS, HEAD), DTYPE)

    def call(i: int, by: tuple[cascade.Tiles, cascade.Shape] | None) -> torch.Tensor:
        return kernels.attention(q, cache[i % layers], told_, plan, page=PAGE, scale=HEAD**-0.5, shared=by)

    ms = timed(lambda i: call(i, (tiles, shape)), 8)
    out = {"ms": round(ms, 4), "gbs": round(bytes_ / ms / 1e6), "of_copy": round(bytes_ / ms / 1e6 / copy, 3)}
    out |= {"rows_ms": round(timed(lambda i: call(i, None), 8), 4)}
    return out | beside(lambda: peer.cascade(q, cache, told_.table, GROUPS, SHARED, OWN, PAGE), 8)


def prefill(rows: int, tokens: int, cached: int, matrix: float) -> dict[str, Any]:
    """Prompts or a later part of one: over pages, over their own keys, torch over dense keys."""
    flops = 4 * Q_HEADS * HEAD * rows * (tokens * cached + tokens * (tokens + 1) / 2)
    told_, plan, pages = told([tokens] * rows, [cached] * rows)
    cache = random((pages * PAGE + 1, 2, KV_HEADS, HEAD), DTYPE)
    q, kv = random((rows * tokens, Q_HEADS, HEAD), DTYPE), random((rows * tokens, 2, KV_HEADS, HEAD), DTYPE)
    scale = HEAD**-0.5
    calls: dict[str, Callable[[int], Any]] = {
        "pages": lambda i: kernels.attention(q, cache, told_, plan, page=PAGE, scale=scale)
    }
    if kernels.whole(plan, kernels.arch_of(q.device), HEAD, DTYPE, DTYPE):  # which steps do without on Hopper
        calls["dense"] = lambda i: kernels.fresh(q, kv, told_, plan, scale=scale)
    if not cached:
        dense = [x.view(rows, tokens, -1, HEAD).transpose(1, 2) for x in (q, *kv.unbind(1))]
        calls["sdpa"] = lambda i: F.scaled_dot_product_attention(*dense, is_causal=True, enable_gqa=True)
    lens, ends = [tokens] * rows, [tokens + cached] * rows
    out = beside(lambda: peer.paged(q, cache, told_.table, lens, ends, PAGE), 4)
    if not cached:
        out |= beside(lambda: peer.ragged(q, kv, lens), 4, "flashinfer_dense")
    out |= {f"{name}_tflops": round(flops / out[f"{name}_ms"] / 1e9) for name in PEERS if f"{name}_ms" in out}
    for name, call in calls.items():
        ms = timed(call, 4)
        out |= {f"{name}_ms": round(ms, 4), f"{name}_tflops": round(flops / ms / 1e9)}
        out[f"{name}_of_matrix"] = round(flops / ms / 1e9 / matrix, 3)
    return out


def beside(plan: Callable[[], peer.Call], count: int, name: str = "flashinfer") -> dict[str, Any]:
    """Milliseconds of FlashInfer, which builds its kernels first, or why there are none; nothing without it."""
    if not peer.there():
        return {}
    try:
        return {f"{name}_ms": round(timed(plan(), count), 4)}
    except Exception as error:  # noqa: BLE001 a peer that does not build or start must not stop the table
        return {f"{name}_error": " ".join(str(error).split())[-200:]}


def random(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, made a part at a time where the dtype is narrower than what makes them."""
    if dtype.itemsize > 1:
        return torch.randn(shape, device="cuda", dtype=dtype)
    out = torch.empty(shape, device="cuda", dtype=dtype)
    for part in out.split(max(1, len(out) // 16)):
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    return out
