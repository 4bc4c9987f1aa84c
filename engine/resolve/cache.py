"""What the cache holds: page, max_len, pages, radix, eviction, events, replay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from engine.config import Config
from engine.errors import ConfigError
from engine.model.groups import CacheGroup
from engine.model.spec import EIGHT, ModelSpec
from engine.resolve.facts import Decision, Device
from engine.resolve.memory import GIB, count_bytes, loaded_bytes, local_groups

SHARE = {"cpu": 0.25, "gpu": 0.85, "tpu": 0.85}
"""Of the free memory, what weights and cache take where cache.fraction is not given; on a CPU what the cache takes."""
CPU_CACHE = GIB
"""A CPU's cache takes no more, unless asked."""
SPARE = 4
"""The cache holds at most so many times what the slots can fill: prefixes of requests that ended."""
PAGES, TABLES = (16, 32, 64, 128), 896 << 10
"""Tokens of a page to choose from, and bytes that page tables may take of a TPU's scalar memory."""


def decide_cache(config: Config, spec: ModelSpec, device: Device, values: dict[str, Any]) -> list[Decision]:
    """values: what was decided before, by field."""
    page = _page(config, spec, device, values["max_rows"])
    return [
        page,
        *_lengths(config, spec, device, values | {"page": page.value}),
        Decision(field="radix", value=config.cache.radix, why="cache.radix"),
        Decision(field="eviction", value=config.cache.eviction, why="cache.eviction"),
        *_events(config),
    ]


def _page(config: Config, spec: ModelSpec, device: Device, rows: int) -> Decision:
    """Tokens of a page. A TPU's attention keeps the page tables of a step in a memory that holds few numbers."""
    if config.cache.page is not None:
        return Decision(field="page", value=config.cache.page, why="cache.page")
    if device.platform != "tpu":
        return Decision(field="page", value=PAGES[0], why="auto: prefixes are shared in small pages")
    reach = min(config.model.max_len or spec.max_len, spec.max_len)
    sizes = [n for n in PAGES if n >= 32] if config.cache.dtype in EIGHT else PAGES  # as lines share a register
    size = next((n for n in sizes if 4 * rows * -(-reach // n) <= TABLES), PAGES[-1])
    why = f"page tables of {rows} rows of {reach} tokens are kept in {TABLES >> 10} KiB of a TPU"
    why += ", which moves 32 lines of 8 bits at once" if config.cache.dtype in EIGHT else ""
    return Decision(field="page", value=size, why=why)


def _lengths(config: Config, spec: ModelSpec, device: Device, values: dict[str, Any]) -> list[Decision]:
    """max_len and pages: how far one request may reach, and how many tokens the cache holds."""
    page, asked = values["page"], config.model.max_len
    if asked is not None and asked > spec.max_len:
        raise ConfigError(
            f"model.max_len: {asked} is past the {spec.max_len} positions that the model was made for; lower it",
            field="model.max_len",
        )
    reach, why = asked or spec.max_len, "model.max_len" if asked else "the model's"
    groups = local_groups(spec, page, values["mesh"])
    costs = [g.page_bytes(values["cache_dtype"]) for g in groups]
    kept = {name: values[name] for name in ("backend", "dtype", "cache_dtype", "quantise", "mesh")}
    weights = loaded_bytes(spec, **kept) + count_bytes(spec, config.sched.penalties, values["slots"])
    free = device.memory_bytes - weights
    tokens, reason = _tokens(config, device, reach, groups, costs, free, values)
    pages = _pages(tokens, groups, values)
    held = min((n * page for n, g in zip(pages, groups, strict=True) if not g.window), default=reach)
    if held < reach:
        if asked is not None:
            raise ConfigError(
                f"model.max_len: {asked} tokens do not fit the cache of {held}; lower it, or raise cache.tokens",
                field="model.max_len",
            )
        reach, why = held, f"what the cache holds; the model's is {spec.max_len}"
    need = sum(n * c for n, c in zip(pages, costs, strict=True))
    if need > free:
        raise ConfigError(
            f"cache.tokens: {weights / GIB:.2f} GiB of weights and counts and {need / GIB:.2f} GiB of cache do not fit "
            f"the {device.memory_bytes / GIB:.2f} GiB that are free; lower cache.tokens or model.max_len",
            field="cache.tokens",
        )
    return [
        Decision(field="max_len", value=reach, why=why),
        Decision(field="pages", value=pages, why=reason),
    ]


def _tokens(
    config: Config,
    device: Device,
    reach: int,
    groups: Sequence[CacheGroup],
    costs: Sequence[int],
    free: int,
    values: dict[str, Any],
) -> tuple[int, str]:
    """Tokens that the cache shall hold, and why. free: bytes that the weights leave."""
    asked, page = config.cache.tokens, values["page"]
    if asked is not None:
        return asked, "cache.tokens"
    portion = config.cache.fraction or SHARE[device.platform]
    weights = device.memory_bytes - free
    if device.platform == "cpu":
        limit = free if config.cache.fraction else CPU_CACHE // values["mesh"].size
        room = min(int(portion * free), limit)
        source = f"{room / GIB:.2f} GiB of the CPU's free memory"
    else:
        room = int(portion * device.memory_bytes) - weights
        source = f"{portion:.0%} of the free memory, less {weights / GIB:.2f} GiB of weights and counts"
    fixed = sum(c * n for c, n, g in zip(costs, _pages(1 << 40, groups, values), groups, strict=True) if g.window)
    each = sum(c for c, g in zip(costs, groups, strict=True) if not g.window)
    most = SPARE * values["slots"] * reach
    fits = max(0, room - fixed) // each * page if each else most
    if fits < page:
        raise ConfigError(
            f"cache.fraction: nothing is left for the cache: {room / GIB:.2f} GiB of {device.memory_bytes / GIB:.2f} "
            "GiB free; use a smaller model, or free memory",
            field="cache.fraction",
        )
    if fits < most:
        return fits, source
    return most, f"{SPARE} times what {values['slots']} slots of {reach} tokens can fill"


def _pages(tokens: int, groups: Sequence[CacheGroup], values: dict[str, Any]) -> tuple[int, ...]:
    """Pages of each group for `tokens` tokens. A window group needs no more than its slots can see, as much again for
    prefixes of requests that ended, and what the steps that are out feed."""
    out = []
    for g in groups:
        pages = -(-tokens // g.page)
        if g.window:
            seen = 2 * values["slots"] * (-(-g.window // g.page) + 2)
            pages = min(pages, seen + -(-values["depth"] * values["max_tokens"] // g.page))
        out.append(pages)
    return tuple(out)


def _events(config: Config) -> list[Decision]:
    cache = config.cache
    if cache.events is not None and not cache.radix:
        raise ConfigError("cache.events: there is nothing to tell without cache.radix", field="cache.events")
    if cache.replay is not None and cache.events is None:
        raise ConfigError("cache.replay: there is nothing to tell again without cache.events", field="cache.replay")
    return [
        Decision(field=name, value=getattr(cache, name) or "", why=f"cache.{name}" if getattr(cache, name) else "off")
        for name in ("events", "replay")
    ]
