"""FlashInfer's attention over the pages of a case, where it is installed. Plans are made outside of what is timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

Call = Callable[[int], Any]
HEADS = (32, 8, 128)
"""Query heads, kv heads, numbers of a head."""


def there() -> bool:
    """Whether FlashInfer is installed."""
    return find_spec("flashinfer") is not None


def _views(cache: torch.Tensor, page: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values [pages, page, kv_heads, D] of each layer of cache [layers, entries, 2, kv_heads, D]."""
    pages = cache.shape[1] // page
    return [tuple(x[: pages * page].view(pages, page, *x.shape[1:]).unbind(2)) for x in cache]  # type: ignore[misc]


def _told(table: torch.Tensor, lengths: Sequence[int], page: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Begin of each row's pages, the pages of all rows, and how much of each row's last one is filled."""
    need = [-(-n // page) for n in lengths]
    begin = torch.tensor([0, *need]).cumsum(0).int()
    pages = torch.cat([line[:n] for line, n in zip(table.cpu(), need, strict=True)]).int()
    return begin, pages, torch.tensor([n - (k - 1) * page for n, k in zip(lengths, need, strict=True)]).int()


def _space() -> torch.Tensor:
    return torch.zeros(256 << 20, dtype=torch.uint8, device="cuda")


def decode(q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lengths: Sequence[int], page: int) -> Call:
    """Rows of one token, q [R, heads, D], by its tensor cores."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    wrapper = BatchDecodeWithPagedKVCacheWrapper(_space(), "NHD", use_tensor_cores=True, backend="fa2")
    told = [x.cuda() for x in _told(table, lengths, page)]
    wrapper.plan(*told, *HEADS, page, q_data_type=q.dtype, kv_data_type=cache.dtype)
    views = _views(cache, page)
    return lambda i: wrapper.run(q, views[i])


def paged(
    q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, lens: Sequence[int], lengths: Sequence[int], page: int
) -> Call:
    """Rows of lens tokens, the last of lengths, by FlashAttention 3. cache: of one layer."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(_space(), "NHD", backend="fa3")
    first, told = torch.tensor([0, *lens]).cumsum(0).int(), _told(table, lengths, page)
    given = [x.cuda() for x in (first, *told)]
    wrapper.plan(*given, *HEADS, page, causal=True, q_data_type=q.dtype, kv_data_type=cache.dtype)
    (view,) = _views(cache[None], page)
    return lambda i: wrapper.run(q, view)


def ragged(q: torch.Tensor, kv: torch.Tensor, lens: Sequence[int]) -> Call:
    """Whole prompts over their own keys and values kv [T, 2, kv_heads, D], by FlashAttention 3."""
    from flashinfer import BatchPrefillWithRaggedKVCacheWrapper

    wrapper = BatchPrefillWithRaggedKVCacheWrapper(_space(), "NHD", backend="fa3")
    first = torch.tensor([0, *lens]).cumsum(0).int().cuda()
    wrapper.plan(first, first, *HEADS, causal=True, q_data_type=q.dtype, kv_data_type=kv.dtype)
    k, v = (x.contiguous() for x in kv.unbind(1))
    return lambda i: wrapper.run(q, k, v)


def cascade(
    q: torch.Tensor, cache: torch.Tensor, table: torch.Tensor, groups: int, shared: int, own: int, page: int
) -> Call:
    """Groups of as many rows of one token: two levels, what each group shares and what each row has for itself."""
    from flashinfer import MultiLevelCascadeAttentionWrapper

    wrapper, rows = MultiLevelCascadeAttentionWrapper(2, _space(), "NHD"), len(q)
    upper = _told(table[:: rows // groups], [shared] * groups, page)
    lower = _told(table[:, shared // page :], [own] * rows, page)
    firsts = [torch.arange(0, rows + 1, rows // groups), torch.arange(rows + 1)]
    levels = [[x.int().cuda() for x in parts] for parts in (firsts, *zip(upper, lower, strict=True))]
    wrapper.plan(*levels, *HEADS, page, q_data_type=q.dtype)
    views = _views(cache, page)
    return lambda i: wrapper.run(q, views[i % len(views)])
