"""`radixmesh calibrate`: the largest key and value of each layer and head, which caches of 8 bits have scales from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from radixmesh.commands import options

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from engine.run.start import Decided
    from radixmesh.parity.report import Text

BACKENDS = ("reference", "torch")
"""Those whose caches can be looked at."""
MOST = 8192
"""Tokens of a text that are fed."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(calibrate)


def calibrate(
    out: Annotated[Path, typer.Option(help="File to write, for cache.scales.")],
    model: options.Model = None,
    backend: Annotated[str, typer.Option(help="reference, or torch, which runs on a GPU where one is.")] = "reference",
    dtype: options.Dtype = None,
    prompt: options.Texts = None,
    tokens: options.Ids = 0,
    seed: options.Seed = 0,
    config: options.File = None,
    pairs: options.Set = None,
) -> None:
    """Feed texts and keep the largest key and value of each layer and head, for a cache in int8 or fp8."""
    from engine.config import load
    from engine.errors import ConfigError
    from engine.model.scales import write_largest
    from engine.run.start import decide
    from radixmesh.engine import DEMO
    from radixmesh.parity import texts

    if backend not in BACKENDS:
        raise ConfigError(f"backend: calibrate runs on {' or '.join(BACKENDS)}, not {backend}", field="backend")
    if prompt and tokens:
        raise ConfigError("prompt, tokens: give one of them", field="tokens")
    steps = {"sched.slots": 1, "sched.max_tokens": 256, "sched.token_buckets": [256], "cache.tokens": MOST}
    given = steps | options.flags(model, backend, None, dtype, pairs) | {"cache.dtype": "auto", "cache.scales": "auto"}
    decided = decide(load(config, given), DEMO)
    fed = texts.pick(decided, prompt, tokens, seed, 1)
    write_largest(out, measure(decided, fed))
    print(f"{out}: {len(decided.spec.layers)} layers, from {sum(len(t.ids) for t in fed)} tokens")


def measure(decided: Decided, fed: Sequence[Text]) -> list[NDArray[np.float32]]:
    """Of each layer the largest magnitudes of keys and values, float32[2, kv_heads]. Raises ModelError where a text has
    no finite logits."""
    import numpy as np

    from backends.api.build import Host
    from backends.api.step import OK
    from engine.errors import ModelError
    from engine.model.groups import places
    from engine.run.start import open_device

    backend: Any = open_device(decided)
    try:
        backend.load(decided.source())
        host, size, found = Host(backend), backend.limits.max_tokens, None
        for text in fed:
            row = host.open()
            for i in range(0, len(text.ids), size):
                made = host.run([(row, host.row(row, text.ids[i : i + size], output=int(i + size >= len(text.ids))))])
            host.close(row)
            if made.status[0] != OK:
                raise ModelError(f"calibrate: {text.name}: this model gives logits that are not finite", field="model")
            now = [backend.caches.largest()[p.group][p.rank] for p in places(decided.spec)]
            found = now if found is None else [np.maximum(a, b) for a, b in zip(found, now, strict=True)]
    finally:
        backend.close()
    assert found is not None
    return found
