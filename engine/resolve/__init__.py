"""From what was asked and what the device is to what is done: every decision with its reason, before any allocation.

Each module decides the fields that its first line names.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import Config, Resolved
from engine.mesh import AXES, MeshSpec
from engine.model.spec import ModelSpec
from engine.resolve.cache import decide_cache
from engine.resolve.facts import Decision, Device
from engine.resolve.memory import GIB
from engine.resolve.mesh import check_mesh, decide_mesh
from engine.resolve.numbers import decide_numbers
from engine.resolve.programs import decide_programs
from engine.resolve.steps import decide_steps


def resolve(config: Config, spec: ModelSpec, device: Device) -> tuple[Resolved, list[Decision]]:
    """Decide every field of Resolved. Raises ConfigError naming the key that can't be honoured."""
    mesh = MeshSpec(**{axis: getattr(config.mesh, axis) for axis in AXES})
    check_mesh(mesh, spec, device)
    if device.platform == "cpu":  # whose devices are threads or processes that share its memory
        device = replace(device, memory_bytes=device.memory_bytes // mesh.size)
    sched = config.sched
    made: list[Decision] = [
        Decision(field="backend", value=device.backend, why=device.why),
        Decision(
            field="platform",
            value=device.platform,
            why=f"{device.count} x {device.kind}, {device.memory_bytes / GIB:.1f} GiB free"
            + (" for each device" if mesh.size > 1 else ""),
        ),
        *decide_mesh(config, spec, mesh, device),
        *decide_numbers(config, spec, mesh, device),
        *decide_steps(config, device),
    ]
    made += decide_cache(config, spec, device, {d.field: d.value for d in made})
    made += [
        Decision(field="policy", value=sched.policy, why="sched.policy"),
        Decision(field="deterministic", value=config.backend.deterministic, why="backend.deterministic"),
        Decision(field="penalties", value=sched.penalties, why="sched.penalties"),
        Decision(field="max_logprobs", value=min(sched.max_logprobs, spec.vocab), why="sched.max_logprobs"),
        Decision(field="priority_preemption", value=sched.priority_preemption, why="sched.priority_preemption"),
        Decision(field="ageing", value=sched.ageing, why="sched.ageing"),
    ]
    made += decide_programs(config, spec, device, {d.field: d.value for d in made})
    made.append(Decision(field="log", value=sched.log or "", why="sched.log" if sched.log else "auto: none"))
    return Resolved(**{d.field: d.value for d in made}), made
