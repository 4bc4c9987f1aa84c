"""The kernels of a step and of experts on the GPU that is here: what they are interpreted to be, they are. Captured,
too, where they overlap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from kernels_cuda import angles, begin, cut, gated, grouped_matmul, grouped_row, norm, rope_write, route, row, sample
from tests.kernels import interpreted_step
from tests.kernels.interpreted_experts import ALPHA, LIMIT, Case, expected, matrices

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CALLED = (
    (norm, "add_norm"),
    (gated, "gated"),
    (rope_write, "rope_write"),
    (angles, "angles"),
    (begin, "begin"),
    (row, "row_times"),
    (cut, "edges"),
    (sample, "sample"),
)
EXPERTS = [
    Case(tokens, 16, 4, 256, 192, kind, clamped=tokens % 2 == 1)
    for tokens in (1, 2, 33, 130, 600)
    for kind in ("", "int8", "fp8")
]


def carried(call: Callable[..., Any], device: str = "cuda") -> Callable[..., Any]:
    """The same of a CPU's tensors, which are brought there and back, also what is changed in place."""

    def called(*args: Any, **kwargs: Any) -> Any:
        sent: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

        def there(x: torch.Tensor) -> torch.Tensor:
            return sent.setdefault(id(x), (x, x.to(device)))[1]

        made = each(call(*each(args, there), **{k: each(v, there) for k, v in kwargs.items()}), torch.Tensor.cpu)
        for x, y in sent.values():
            x.copy_(y)
        return made

    return called


def each(x: Any, of: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Tensors of tuples and lists."""
    if isinstance(x, torch.Tensor):
        return of(x)
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(each(y, of) for y in x))
    return type(x)(each(y, of) for y in x) if isinstance(x, tuple | list) else x


@pytest.mark.parametrize("check", [c for c in interpreted_step.CHECKS if c is not interpreted_step.narrowed])
def test_a_step_is_plain_torch_and_the_normative_sampler(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in CALLED:
        monkeypatch.setattr(module, name, carried(getattr(module, name)))
    for module, name, value in ((sample, "SPLIT", 1024), (cut, "SPLIT", 1024), (cut, "WAYS", (4, 8))):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(cut, "SECTION", cut.SECTION)
    wrong = [name for name, ok in check() if not ok]
    assert not wrong


@pytest.mark.parametrize("case", EXPERTS, ids=str)
def test_experts_are_experts_in_float64(case: Case) -> None:
    r = np.random.default_rng()
    x, scores = (torch.from_numpy(r.standard_normal((case.tokens, n))).bfloat16() for n in (case.hidden, case.count))
    shapes = [(case.size, case.hidden), (case.size, case.hidden), (case.hidden, case.size)]
    made, wide = zip(*(matrices(r, (case.count, *shape), case) for shape in shapes), strict=True)
    biases = [torch.from_numpy(r.standard_normal((case.count, case.size))).bfloat16() for _ in range(2)]
    if not case.kind:
        made = tuple(m._replace(body=m.body.bfloat16()) for m in made)
        wide = tuple(m.body.double() for m in made)
    native = torch.cuda.get_device_capability() >= (8, 9)
    gate, up, down = (m._replace(native=native) for m in each(made, torch.Tensor.cuda))
    if case.clamped:
        gate, up = (w._replace(bias=b.cuda()) for w, b in zip((gate, up), biases, strict=True))
    module = grouped_row if case.tokens == 1 else grouped_matmul
    share, chosen = route.route(scores.cuda(), case.top, True)
    plan = route.sort(chosen, case.count)
    h = module.gated(x.cuda(), gate, up, plan, (ALPHA, LIMIT) if case.clamped else None)
    got = module.summed(h, down, share, plan).double().cpu()
    told = [b.double() if case.clamped else None for b in biases]
    want = expected(x.double(), scores.double(), list(wide), told, case, True)
    assert ((got - want).abs().amax(-1) / want.abs().amax(-1)).max() < 3e-2


def test_a_chain_that_overlaps_is_the_same_each_time_it_is_replayed() -> None:
    size, layers = 1024, 12
    make = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x, weights = make(1, size), [(make(size), make(2 * size, size) / 40, make(size, size) / 40) for _ in range(layers)]

    def chain(times: Callable[..., torch.Tensor]) -> torch.Tensor:
        y = x
        for scale, wide, narrow in weights:
            y, h = norm.add_norm(y, times(y, narrow), scale, 1e-5, "plain")
            y = y + times(gated.gated(*times(h, wide).split(size, 1), "silu"), narrow)
        return y

    chain(row.row_times)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = chain(row.row_times)
    found = set()
    for _ in range(50):
        made.fill_(float("nan"))
        graph.replay()
        found.add(made.cpu().view(torch.int16).numpy().tobytes())
    assert len(found) == 1
    want = chain(torch.nn.functional.linear).float()
    assert (made.float() - want).abs().max() < 0.1 * want.abs().max()
