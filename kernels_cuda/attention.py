"""Attention of a step on a GPU: what a step is to a kernel, which kernel, and the call.

Rows are told by device tensors, and what shapes and grids follow from by a Plan of host numbers, so that a graph that
was captured of one Plan serves every step that has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch

if TYPE_CHECKING:
    from kernels_cuda.cascade import Shape, Tiles

Array: TypeAlias = torch.Tensor
LOG2E = 1.4426950408889634
FEW = 16
"""Tokens of a row that may still be short: read with its keys cut into parts."""
LEAST = 16
"""Rows of the smallest matrix product."""
WAVES = 4
"""Programs for each processor that keep a GPU's memory busy."""
PART = 64
"""Keys that a part should have at least."""
PARTS = 64
"""Parts at most."""
LARGE = ("sm_80", "sm_90", "sm_100", "sm_103")
"""NVIDIA's processors with more than 160 KiB of shared memory; others have 99."""
COPIED = ("sm_90", "sm_100", "sm_103", "sm_120")
"""Those whose copy engine brings tiles of dense keys."""
WHOLE = 1024
"""Tokens of a step of fresh prompts from which laying its keys side by side pays; and of long rows from which there are
tiles enough for kernels_cuda.hopper."""
FLOAT8 = torch.float8_e4m3fn
READ = (torch.float32, torch.bfloat16, torch.float16)
EIGHT = (FLOAT8, torch.int8)


class Rows(NamedTuple):
    """Rows of a cache group on the device, int32; those past the real ones have no tokens.

    first [R+1]: of each row's tokens among the fed. start [R]: position of its first. base [R]: position of entry 0
    of its table. table [R, W]: pages; token t of page p is entry p * page + t of the store.
    """

    first: Array
    start: Array
    base: Array
    table: Array


@dataclass(frozen=True)
class Plan:
    """Numbers of a step that grids follow from. rows, tokens: of the tensors, padding included. short: rows that lead
    and have at most `few` tokens each, a power of two; the rest are long. reach: no row is longer after the step.
    fresh: all rows are whole prompts or their beginnings, nothing is cached of them and each has more than FEW tokens.
    padded: some tokens may be no row's. sms: processors of the device."""

    rows: int
    tokens: int
    short: int
    few: int
    reach: int
    sms: int
    fresh: bool = False
    padded: bool = False


def plan(
    lens: Sequence[int],
    reach: int,
    *,
    sms: int,
    rows: int | None = None,
    tokens: int | None = None,
    fresh: bool = False,
) -> Plan:
    """Of rows in ascending order of `lens`, the tokens fed; rows, tokens: what the step is padded to.

    reach: upper bound of the longest row after the step, rounded up here so that plans are few. fresh: nothing is
    cached of any row.
    """
    full, fed = len(lens), sum(lens)
    rows, tokens = full if rows is None else rows, fed if tokens is None else tokens
    short = sum(n <= FEW for n in lens)
    few = max((n for n in lens[:short]), default=1)
    if short == full:
        short = rows  # padding is short too: it has no tokens
    return Plan(
        rows=rows,
        tokens=tokens,
        short=short,
        few=_up(max(few, 1)),
        reach=_up(max(reach, PART)),
        sms=sms,
        fresh=fresh and rows == full and short == 0,
        padded=(rows, tokens) != (full, fed),
    )


def _up(n: int) -> int:
    """The power of two from n on."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Tile:
    """rows: of a product, queries times heads; keys: of a turn; warps, stages: as Triton has them."""

    rows: int
    keys: int
    warps: int
    stages: int


def tile(rows: int, head_dim: int, wide: int, arch: str) -> Tile:
    """For products of `rows` rows at least, or 0 for tiles of prompts. wide: bytes of a number that is multiplied."""
    size, hip = max(_up(head_dim), 16), arch.startswith("gfx")  # which has 64 KiB for a program
    if wide == 4:  # without tensor cores
        return Tile(rows=max(rows, LEAST) if rows else 32, keys=32 if size <= 128 else 16, warps=4, stages=1)
    if rows:
        warps = 2 if rows <= LEAST and size <= 128 and not hip else 4
        return Tile(rows=max(rows, LEAST), keys=64 if size <= 128 else 32, warps=warps, stages=1 if hip else 3)
    if hip:
        return Tile(rows=128 if size <= 128 else 64, keys=32, warps=4, stages=1)
    deep = size <= 128 and arch in LARGE
    return Tile(rows=64, keys=64 if size <= 128 else 32, warps=4, stages=5 if deep else 3)


def splits(programs: int, reach: int, sms: int) -> int:
    """Parts, a power of four so that kernels are few, that the keys of each row are cut into, where `programs` would do
    without."""
    parts = min(PARTS, max(reach // PART, 1), _up(max(math.ceil(WAVES * sms / programs), 1)))
    return 1 << ((parts.bit_length() - 1) & ~1)


def supports(head_dim: int, group: int, dtype: torch.dtype, store: torch.dtype, arch: str) -> str:
    """Why the paged kernels are not for a layer; "" where they are. group: query heads of a kv head."""
    if not 16 <= head_dim <= 256 or head_dim % 8:
        return f"head {head_dim} is no multiple of 8 from 16 to 256"
    if group > 64:
        return f"{group} query heads of one kv head are more than 64"
    if dtype not in READ:
        return f"{dtype} is not multiplied"
    if store != dtype and store not in EIGHT:
        return f"a cache of {store} is not read with queries of {dtype}"
    if arch.startswith("sm_") and int(arch[3:]) < 80:
        return f"{arch} is older than sm_80"
    return ""


def choose(
    *,
    platform: str,
    arch: str,
    triton: bool,
    head_dim: int,
    group: int,
    dtype: torch.dtype,
    store: torch.dtype,
    page: int = 16,
    plain: bool = True,
    flashinfer: bool = False,
) -> tuple[str, str]:
    """(kernel, reason): "triton" or "plain". platform: cuda, hip or cpu; arch: sm_90, gfx942; triton, flashinfer:
    whether they are installed; page: tokens of one; plain: the layer has no window, cap or sinks."""
    what = f"head {head_dim}, {str(store).removeprefix('torch.')} cache"
    if platform == "cpu":
        return "plain", f"torch over gathered pages, {what}: no GPU"
    if not triton:
        return "plain", f"torch over gathered pages, {what}: triton is not installed; `pip install triton` has it"
    why = supports(head_dim, group, dtype, store, arch)
    if why:
        return "plain", f"torch over gathered pages, {what}: {why}"
    exact = ", products in full float32" if dtype == torch.float32 else ""
    if hopper(arch, head_dim, group, dtype, store, page, plain=plain):
        exact = f", prompts from {WHOLE} tokens on by Hopper's copy engine"
    not_ = ""
    if platform == "cuda" and arch == "sm_90":
        not_ = f"; not FlashInfer, which {'is slower' if flashinfer else 'is not installed, and is slower'}"
    return "triton", f"Triton over pages on {arch}, {what}{exact}{not_}"


def kind(store: torch.dtype, arch: str) -> int:
    """How the store is read, as kernels_cuda.paged numbers it: not every device converts float8_e4m3fn."""
    if store == FLOAT8:
        return 1 if arch == "gfx950" or (arch.startswith("sm_") and int(arch[3:]) >= 89) else 2
    return 3 if store == torch.int8 else 0


@lru_cache(maxsize=8)
def arch_of(device: torch.device) -> str:
    """sm_90, gfx942; "" of a CPU, where Triton interprets."""
    if device.type != "cuda":
        return ""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@lru_cache(maxsize=256)
def constants(
    *,
    arch: str,
    q_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    store: torch.dtype,
    page: int,
    window: int | None,
    capped: bool,
    sinks: bool,
    parts: int,
    few: int,
    narrow: bool,
) -> tuple[dict[str, Any], Tile]:
    """What is compiled into `paged`, and its tile. few: tokens of a short row, 0 for tiles of long rows. narrow: the
    store has fewer than 2**31 numbers."""
    group = q_heads // kv_heads
    shape = tile(_up(few * group) if few else 0, head_dim, dtype.itemsize, arch)
    return {
        "Q_HEADS": q_heads,
        "KV_HEADS": kv_heads,
        "DIM": head_dim,
        "WIDE": max(_up(head_dim), 16),
        "PAGE": page,
        "WINDOW": window or 0,
        "CAPPED": capped,
        "SINKS": sinks,
        "SCALED": store in EIGHT,
        "KIND": kind(store, arch),
        "NARROW": narrow,
        "ROWS": shape.rows,
        "STEP": shape.keys,
        "SPLITS": parts,
        "SHORT": bool(few),
    }, shape


def attention(
    q: Array,
    store: Array,
    rows: Rows,
    plan: Plan,
    *,
    page: int,
    scale: float,
    window: int | None = None,
    cap: float | None = None,
    sinks: Array | None = None,
    scales: Array | None = None,
    shared: tuple[Tiles, Shape] | None = None,
) -> Array:
    """Attention of q [T, q_heads, D] over store [entries, 2, kv_heads, D] -> [T, q_heads, D]; never waits.

    The keys and values of the fed tokens are in the store. cap: soft cap of scores; sinks [q_heads]; scales
    float32[2, kv_heads]: of the keys and values of a store of 8 bits, which has them. A token that no row has gets
    zeros. shared: of rows of one token, which lead, those that read the same pages; None = none are told.
    """
    assert (scales is not None) == (store.dtype in EIGHT), "a store of 8 bits has scales, no other has"
    out = torch.zeros_like(q) if plan.padded else torch.empty_like(q)
    call = _Call(q, store, out, rows, page, scale, window, cap, sinks, scales)
    kv_heads, group = store.shape[2], q.shape[1] // store.shape[2]
    reach = plan.reach if window is None else min(plan.reach, _up(window + FEW))
    if shared is not None and window is None:
        from kernels_cuda import cascade

        tiles, shape = shared
        assert (plan.few, shape.rows) == (1, plan.short), "tiles are for rows of one token"
        how = {"page": page, "scale": scale, "cap": cap, "sinks": sinks, "scales": scales}
        cascade.attention(q, store, out, rows, tiles, shape, **how)
    elif plan.short:
        parts = splits(plan.short * kv_heads, reach, plan.sms)
        call(plan.short, 0, plan.few, parts, plan.short, min(plan.short * plan.few, plan.tokens))
    if plan.short < plan.rows:
        long, tokens = plan.rows - plan.short, plan.tokens - plan.short
        queries = tile(0, q.shape[2], q.element_size(), arch_of(q.device)).rows // group
        tiles = tokens // queries + long
        plain, arch = window is None and cap is None and sinks is None, arch_of(q.device)
        counted = q.numel() < 1 << 31  # in 32 bits
        if tokens >= WHOLE and counted and hopper(arch, q.shape[2], group, q.dtype, store.dtype, page, plain=plain):
            from kernels_cuda.hopper import attention as by_copies

            by_copies(q, store, out, rows, plan, page=page, scale=scale * LOG2E)
            return out
        parts = splits(tiles * kv_heads * WAVES, reach, plan.sms)
        call(plan.rows, plan.short, 0, parts, tiles, tokens)
    return out


def whole(plan: Plan, arch: str, head_dim: int, dtype: torch.dtype, store: torch.dtype, *, plain: bool = True) -> bool:
    """Whether `fresh` is there for a step, and pays where `hopper` is not. plain: no window, cap or sinks."""
    fits = head_dim in (64, 128) and dtype in (torch.bfloat16, torch.float16) and store == dtype
    return plan.fresh and plan.tokens >= WHOLE and plain and fits and arch in COPIED


def hopper(
    arch: str, head_dim: int, group: int, dtype: torch.dtype, store: torch.dtype, page: int, *, plain: bool = True
) -> bool:
    """Whether kernels_cuda.hopper is there for long rows, WHOLE tokens of them or more. plain: as for `whole`."""
    fits = head_dim in (64, 128) and group <= 64 and page in (16, 32, 64, 128)
    return arch == "sm_90" and plain and fits and dtype in (torch.bfloat16, torch.float16) and store == dtype


def fresh(q: Array, kv: Array, rows: Rows, plan: Plan, *, scale: float) -> Array:
    """`attention` of a plan that is fresh, over the keys and values of its tokens kv [T, 2, kv_heads, D]."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from kernels_cuda.dense import dense

    (tokens, q_heads, dim), kv_heads = q.shape, kv.shape[2]
    shape = Tile(rows=64, keys=64, warps=4, stages=3)
    tiles = tokens // (shape.rows // (q_heads // kv_heads)) + plan.rows
    keys, values = (TensorDescriptor.from_tensor(x, [shape.keys, 1, dim]) for x in kv.unbind(1))
    out = torch.empty_like(q)
    dense[(kv_heads * tiles,)](
        q, keys, values, out, rows.first, plan.rows, scale * LOG2E,
        Q_HEADS=q_heads, KV_HEADS=kv_heads, DIM=dim, ROWS=shape.rows, STEP=shape.keys,
        num_warps=shape.warps, num_stages=shape.stages,
    )  # fmt: skip
    return out


class _Call(NamedTuple):
    """What the two launches of a step have in common."""

    q: Array
    store: Array
    out: Array
    rows: Rows
    page: int
    scale: float
    window: int | None
    cap: float | None
    sinks: Array | None
    scales: Array | None

    def __call__(self, high: int, low: int, few: int, parts: int, programs: int, tokens: int) -> None:
        """Launch for rows low .. high - 1, in `parts` parts. programs: for each head and part."""
        from kernels_cuda.merge import merge
        from kernels_cuda.overlap import options
        from kernels_cuda.paged import paged

        q, store = self.q, self.store
        (total, q_heads, dim), kv_heads = q.shape, store.shape[2]
        fixed, shape = constants(
            arch=arch_of(q.device),
            q_heads=q_heads,
            kv_heads=kv_heads,
            head_dim=dim,
            dtype=q.dtype,
            store=store.dtype,
            page=self.page,
            window=self.window,
            capped=self.cap is not None,
            sinks=self.sinks is not None,
            parts=parts,
            few=few,
            narrow=store.numel() < 1 << 31,
        )
        part = stat = self.out
        if parts > 1:
            lines = tokens if few else total  # short rows lead
            part = torch.empty((lines, q_heads, parts, dim), dtype=torch.float32, device=q.device)
            stat = torch.empty((lines, q_heads, parts, 2), dtype=torch.float32, device=q.device)
        first, start, base, table = self.rows
        scale, cap = self.scale * LOG2E, 0.0
        if self.cap is not None:
            scale, cap = 2 * scale / self.cap, self.cap * LOG2E
        paged[(programs * parts * kv_heads,)](
            q, store.view(torch.uint8) if store.dtype == FLOAT8 else store, self.out, part, stat,
            first, start, base, table,
            q if self.sinks is None else self.sinks, q if self.scales is None else self.scales,
            high, table.shape[1], low, scale, cap,
            **fixed, num_warps=shape.warps, num_stages=shape.stages, **options(q),
        )  # fmt: skip
        if parts > 1:
            merge[(tokens, q_heads)](
                part, stat, self.out, first, low, high,
                Q_HEADS=q_heads, DIM=dim, WIDE=fixed["WIDE"], SPLITS=parts, num_warps=4, **options(q),
            )  # fmt: skip
