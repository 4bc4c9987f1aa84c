"""Sizes of a step: slots, max_rows, max_tokens, token_buckets, depth."""

from __future__ import annotations

from engine.config import Config
from engine.errors import ConfigError
from engine.resolve.facts import Decision, Device

STEP = {
    "cpu": (8, 256, (1, 8, 64)),
    "gpu": (256, 8192, (1, 8, 32, 64, 128, 512, 2048)),
    "tpu": (128, 2048, (8, 32, 128, 512)),
}
"""Platform -> slots, tokens of a step, and the sizes below it that steps are padded to. Each size is a program that jax
compiles before it is ready: some 5 s of a CPU's time each."""


def decide_steps(config: Config, device: Device) -> list[Decision]:
    """What was asked, else what suits the platform."""
    s, usual = config.sched, f"usual on a {device.platform}"
    slots, max_tokens, ladder = STEP[device.platform]
    out = [Decision(field="slots", value=s.slots or slots, why="sched.slots" if s.slots else usual)]
    slots = out[0].value
    if s.max_rows is not None and s.max_rows > slots:
        raise ConfigError(f"sched.max_rows: {s.max_rows} is more than the {slots} slots", field="sched.max_rows")
    rows = s.max_rows or slots
    out.append(Decision(field="max_rows", value=rows, why="sched.max_rows" if s.max_rows else "every slot in a step"))
    if s.max_tokens is not None and s.max_tokens < rows:
        raise ConfigError(
            f"sched.max_tokens: {s.max_tokens} is less than the {rows} rows of a step; raise it or lower sched.slots",
            field="sched.max_tokens",
        )
    tokens = s.max_tokens or max(max_tokens, rows)
    out.append(Decision(field="max_tokens", value=tokens, why="sched.max_tokens" if s.max_tokens else usual))
    if s.token_buckets is None:
        steps, why = tuple(sorted({b for b in (*ladder, rows) if b < tokens} | {tokens})), f"{usual}, with max_rows"
    elif s.token_buckets[-1] != tokens:
        raise ConfigError(
            f"sched.token_buckets: ends with {s.token_buckets[-1]}, but a step has up to {tokens} tokens; "
            f"end it with {tokens}, or set sched.max_tokens",
            field="sched.token_buckets",
        )
    else:
        steps, why = s.token_buckets, "sched.token_buckets"
    out.append(Decision(field="token_buckets", value=steps, why=why))
    why = "sched.depth" if s.depth else "the host plans a step while the device runs another"
    out.append(Decision(field="depth", value=s.depth or 2, why=why))
    return out
