"""What every backend must do, as checks that drive it through its protocol alone. `CHECKS` names them all.

Each check opens a backend with a small model and asserts. Whatever changes only the batching, the pages or the slot
must not change a token; near-ties follow `backends.api.ties`. A check of a feature that the limits say isn't built
does nothing: `refusals` sees to it that the feature is refused. Use:

    open = Opener(lambda spec, config: open_backend("jax", spec, config), config("jax"))
    for name, check in CHECKS.items():
        check(open)
    open.close()
"""

from __future__ import annotations

from collections.abc import Callable

from backends.api.conformance import batching, choosing, memory, rules, telling
from backends.api.conformance.bench import Opener, config

CHECKS: dict[str, Callable[[Opener], None]] = {
    check.__name__: check
    for check in (
        batching.chunks,
        batching.batches,
        batching.lengths,
        batching.brim,
        batching.ahead,
        batching.taps,
        memory.tenants,
        memory.stale,
        memory.prefixes,
        memory.zombies,
        memory.windows,
        memory.garbage,
        memory.copies,
        choosing.noise,
        choosing.filters,
        choosing.penalties,
        choosing.counts,
        choosing.bias,
        choosing.masks,
        choosing.together,
        choosing.drafts,
        telling.logprobs,
        telling.prompts,
        rules.order,
        rules.refusals,
        rules.nonfinite,
        rules.weights,
        rules.closed,
        batching.warm,
    )
}

__all__ = ["CHECKS", "Opener", "config"]
