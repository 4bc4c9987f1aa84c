"""Which meshes of a chip hold a model, and what each is estimated to give: arithmetic alone, refined by a compile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from engine.config import Config
from engine.errors import ConfigError
from engine.model.groups import cache_groups
from engine.model.spec import ModelSpec
from engine.resolve.memory import weight_bytes
from engine.run.start import Decided
from engine.target import Target, smallest
from radixmesh.compile import report, roofline
from radixmesh.compile.run import SIZES, records, settle

MOST = 64
"""Devices that are tried where the target names no topology."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A mesh. refused: why it is none, or "". weights: bytes on a device; kv_tokens: that the cache holds; rows: that
    decode together, each with the context; one_ms, many_ms: a step of one row and of `rows`."""

    mesh: str
    target: str
    refused: str = ""
    weights: int = 0
    kv_tokens: int = 0
    rows: int = 0
    one_ms: float = 0.0
    many_ms: float = 0.0
    compiled: bool = False

    @property
    def rate(self) -> float:
        """Tokens a second of all rows together."""
        return 1e3 * self.rows / self.many_ms if self.many_ms else 0.0

    def meets(self, latency: float | None, throughput: float | None) -> bool:
        """Whether it is fast enough: milliseconds of a step of one row, tokens a second of all."""
        slow = latency is not None and self.one_ms > latency
        return not self.refused and not slow and (throughput is None or self.rate >= throughput)


def options(config: Config, spec: ModelSpec, target: Target, context: int, compiled: bool) -> list[Option]:
    """Every mesh of a power of two of tensor shards, the smallest first. context: positions that each row sees.

    compiled: steps by the compiler's cycles instead of the roofline; minutes of a processor's time.
    Raises ConfigError for a target that is no TPU.
    """
    if target.chip is None:
        raise ConfigError(f"target {target}: plan knows chips of TPUs, such as tpu:v6e", field="target")
    most = target.devices if target.shape else MOST
    return [_option(config, spec, target, tp, context, compiled) for tp in SIZES if tp <= most]


def _option(config: Config, spec: ModelSpec, target: Target, tp: int, context: int, compiled: bool) -> Option:
    assert target.chip is not None
    at = target if target.shape else smallest(target.chip, tp)
    mesh = f"tp={tp}"
    try:
        decided = settle(replace(config, mesh=replace(config.mesh, tp=tp)), spec, Path(), at)
    except ConfigError as error:
        return Option(mesh=mesh, target=str(at), refused=str(error))
    resolved = decided.resolved
    whole = [n for n, g in zip(resolved.pages, cache_groups(spec, resolved.page), strict=True) if not g.window]
    tokens = min(whole, default=0) * resolved.page
    rows = min(resolved.max_rows, tokens // context)
    if not rows:
        return Option(mesh=mesh, target=str(at), refused=f"the cache holds {tokens} tokens, no row of {context}")
    bound = [roofline.load(spec, resolved, target.chip, n, n, context) for n in (1, rows)]
    one, many = (1e3 * b.seconds for b in bound)
    if compiled:
        one, many = _compiled(decided, at, context, rows)
    return Option(
        mesh=mesh,
        target=str(at),
        weights=weight_bytes(spec, resolved.dtype, resolved.mesh),
        kv_tokens=tokens,
        rows=rows,
        one_ms=one,
        many_ms=many,
        compiled=compiled,
    )


def _compiled(decided: Decided, target: Target, context: int, rows: int) -> tuple[float, float]:
    """Milliseconds of the steps whose buckets hold one row and `rows` rows. Raises ConfigError where one won't
    compile."""
    assert target.chip is not None
    steps = [p for p in records(decided, target, "ends") if "program" in p]
    out = []
    for count in (1, rows):
        p = min((p for p in steps if p["rows"] >= count), key=lambda p: p["tokens"])
        if "error" in p:
            raise ConfigError(f"target {target}: {p['program']} does not compile: {p['error']}", field="target")
        out.append(report.estimate(decided, target.chip, p, context)["ms"])
    return out[0], out[1]


def best(found: Sequence[Option], latency: float | None, throughput: float | None) -> Option | None:
    """The smallest mesh that is fast enough."""
    return next((o for o in found if o.meets(latency, throughput)), None)
