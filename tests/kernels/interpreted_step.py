"""The kernels of a step, interpreted, beside plain torch and the normative sampler: run as a program, since Triton must
be told so before it is imported. Prints a line for each check that failed, then "done"."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch

from backends.api.choice import Choice, kept, scaled, scores
from backends.torch import attend
from kernels_cuda import angles, begin, cut, gated, norm, rope_write, row, sample
from models_torch import ops

VOCAB, ROWS = 2000, 6
DRAW = torch.Generator().manual_seed(int(np.random.SeedSequence().entropy % 2**31))  # type: ignore[operator]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=DRAW)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.allclose(a, b, rtol=1e-5, atol=2e-5)) and a.is_contiguous()


def norms() -> Iterator[tuple[str, bool]]:
    for kind in norm.KINDS:
        for shape in ((3, 56), (2, 4, 20)):
            wide = random(shape[0], 2 * int(np.prod(shape[1:])))  # rows that do not lie side by side
            x = wide[:, : wide.shape[1] // 2].unflatten(1, shape[1:])
            y, w = random(*shape), random(shape[-1])
            assert not norm.supports(x, y)
            for other in (y, None):
                total, normed = norm.add_norm(x, other, w, 0.1, kind)
                want = norm.plain(x, other, w, 0.1, kind)
                yield f"norm {kind} {shape}", bool(torch.equal(total, want[0])) and near(normed, want[1])


def gates() -> Iterator[tuple[str, bool]]:
    both = random(3, 2 * 1100)
    for act in gated.ACTS:
        given = both[:, :1100], both[:, 1100:], act
        yield f"gated {act}", near(gated.gated(*given), gated.plain(*given))


def ropes() -> Iterator[tuple[str, bool]]:
    for q_heads, kv_heads, size, dim in ((5, 1, 20, 20), (4, 2, 16, 8), (12, 9, 16, 0)):
        sizes = (q_heads * size, kv_heads * size, kv_heads * size)
        q, k, v = (part.unflatten(1, (-1, size)) for part in random(3, sum(sizes)).split(sizes, 1))
        steps = np.linspace(1, 0.1, dim // 2).astype(np.float32)
        turn = ops.angles(steps, 1.2, torch.tensor([0, 5, 9]), torch.float32) if dim else None
        write, ours = torch.tensor([7, -1, 3]), random(20, 2, kv_heads, size)
        theirs = ours.clone()
        want = rope_write.plain(q, k, v, turn, write, theirs)
        made = rope_write.rope_write(q, k, v, turn, write, ours)
        yield f"rope {q_heads} {size} {dim}", near(made, want) and near(ours, theirs)


def turns() -> Iterator[tuple[str, bool]]:
    steps, at = np.linspace(1, 1e-3, 24).astype(np.float32), torch.tensor([0, 7, 100_000])
    want = ops.angles(steps, 1.3, at, torch.float32)  # of a CPU: plain torch
    made = angles.angles(torch.from_numpy(steps), 1.3, at, torch.float32)
    yield "angles", all(near(a, b) for a, b in zip(made, want, strict=True))


def whole(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=DRAW)


def begins() -> Iterator[tuple[str, bool]]:
    for rows, tokens, width, count in ((1, 1, 5, 1), (3, 7, 9, 1), (5, 300, 1100, 2)):
        slots, lens = torch.randperm(rows + 3, generator=DRAW)[:rows], whole(0, 4, rows)
        starts = torch.where(whole(0, 2, rows) > 0, whole(8, 40, rows), -1)
        first = torch.cat([lens.new_zeros(1), lens.cumsum(0)])
        fed = whole(-1, 9, tokens), whole(0, rows, tokens), whole(-1, 3, tokens)
        step = begin.Step(slots, starts, lens, first, *fed)
        length, last = whole(10, 60, rows + 3), whole(0, 99, rows + 3)
        groups = []
        for _ in range(count):
            entry = torch.randperm((rows + 3) * width, generator=DRAW)[:6]
            base = whole(0, 3, rows) * 4
            groups.append(begin.Group(whole(0, 500, rows + 3, width), base, entry, whole(0, 500, 6), 4))
        again = [group._replace(table=group.table.clone()) for group in groups]
        before = length.clone()
        *made, seen = begin.begin(step, groups, length, last)
        *want, told = begin.plain(step, again, before, last)
        pairs = [*zip(made, want, strict=True), (length, before)]
        pairs += [(a.table, b.table) for a, b in zip(groups, again, strict=True)]
        pairs += [pair for a, b in zip(seen, told, strict=True) for pair in zip(a, b, strict=True)]
        yield f"begin {rows} {tokens}", all(torch.equal(a, b) for a, b in pairs)


def edges(dtype: torch.dtype) -> torch.Tensor:
    """Numbers of a store of 8 bits, what lies between two of them, and their neighbours in float32; some past all."""
    held = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    held = held[held.isfinite()].sort().values
    middle = torch.cat([held, (held[1:] + held[:-1]) / 2, torch.tensor([464.0, 465.0, 1e9, torch.inf, torch.nan])])
    far = torch.tensor(torch.inf)
    return torch.cat([middle, middle.nextafter(far), middle.nextafter(-far), -middle])


def narrowed() -> Iterator[tuple[str, bool]]:
    """Bytes as plain torch writes them, which tests/backends/test_eight_bit.py holds to the reference."""
    kv_heads, size = 9, 40
    for dtype in rope_write.KINDS:
        for wide, dim in ((torch.float32, 0), (torch.float16, 16)):
            some = edges(dtype)
            tokens = -(-len(some) // (kv_heads * size)) + 1
            scales = torch.rand((2, kv_heads), generator=DRAW) * 2 + 0.01
            scales[:, 0] = 1
            v = (random(tokens, kv_heads, size) * 200 * scales[1, :, None]).to(wide)
            k = (random(tokens, kv_heads, size) * 200 * scales[0, :, None]).to(wide)
            for x in (k, v)[dim > 0 :]:  # where nothing rotates them
                x.view(-1)[: len(some)] = some.to(wide)
            q, write = random(tokens, 4, size).to(wide), torch.randperm(tokens + 5, generator=DRAW)[:tokens]
            write[1] = -1
            steps = np.linspace(1, 0.1, dim // 2).astype(np.float32)
            turn = ops.angles(steps, 1.2, torch.arange(tokens), wide) if dim else None
            ours = torch.zeros((tokens + 6, 2, kv_heads, size), dtype=dtype)
            theirs, inverses = torch.zeros_like(ours), 1 / scales
            want = attend.write(q, k, v, turn, write, theirs, inverses, True)
            assert not rope_write.supports(q, k, v, ours, dim)
            made = rope_write.rope_write(q, k, v, turn, write, ours, inverses)
            name = f"rope to {dtype} of {wide}"
            yield name, torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) and near(made, want)


def row_times() -> Iterator[tuple[str, bool]]:
    for many, inner in ((9, 768), (5, 4096), (3, 1104)):
        x, w = random(1, inner), random(many, inner) / 30
        assert not row.supports(x, w)
        yield f"row {many} {inner}", near(row.row_times(x, w), row.plain(x, w))
    for act in gated.ACTS:
        x, w = random(1, 1104), random(256, 1104) / 30
        assert not row.supports(x, w, act=act)
        want = gated.plain(*row.plain(x, w).chunk(2, 1), act)
        yield f"row {act}", near(row.row_times(x, w, act=act), want)


def samples() -> Iterator[tuple[str, bool]]:
    given = {
        "temperature": [0, 1.0, 0.7, 2.0, 1.0, 0.3],
        "top_k": [0, 0, 5, 50, 3, 0],
        "top_p": [1, 1, 1, 0.9, 0.5, 0.95],
        "min_p": [0, 0, 0, 0, 0.1, 0.3],
    }
    seed, position = torch.randint(0, 2**32, (ROWS, 2), generator=DRAW), torch.randint(0, 1000, (ROWS,), generator=DRAW)
    real = {name: torch.tensor(values, dtype=torch.float64) for name, values in given.items()}
    real["top_k"] = torch.tensor([k or VOCAB for k in given["top_k"]])
    for ties in (False, True):
        x = 3 * random(ROWS, VOCAB)
        if ties:
            x[:, ::7] = x[:, :1]
        made = sample.sample(x, sample.Filters(**real, seed=seed, position=position))
        for r in range(ROWS):
            high, low = seed[r].tolist()
            choice = Choice(**{name: values[r] for name, values in given.items()}, seed=high << 32 | low)
            want = scores(x[r].numpy(), choice, int(position[r]))
            token = int(made[0, r])
            yield f"row {r} draws", bool(want[token] >= want.max() - 1e-5) and int(made[1, r]) == 1
        yield "the largest", bool(torch.equal(sample.sample(x)[0], x.argmax(1)))
    x[0, 5], x[1, 7], x[2] = float("nan"), float("inf"), float("nan")
    tokens, finite = sample.sample(x)
    yield "finite", finite.tolist() == [0, 0, 0, 1, 1, 1] and bool(((tokens >= 0) & (tokens < VOCAB)).all())


def cuts() -> Iterator[tuple[str, bool]]:
    """What is kept of rows is what the normative sampler keeps: of few values, of all alike, of many that are masked,
    of some that are far from all others; then where programs have no room."""
    plain, hidden = 3 * random(5, VOCAB), torch.rand(VOCAB, generator=DRAW) < 0.9
    plain[0] = plain[0].bfloat16().float()
    plain[1] = 1.5
    plain[2] = plain[2].masked_fill(hidden, -torch.inf)
    plain[3] = plain[3].masked_fill(hidden, -1e9)
    temperature, top_k, top_p = (1, 1, 2, 0.05, 0.7), (0, 0, 100, 40, VOCAB - 1), (0.9, 0.5, 0.3, 0.999, 1)
    for room, rows in ((cut.SECTION, (0, 1, 2, 3, 4)), (1, (0, 2))):
        cut.SECTION, some = room, list(rows)
        x, lows = plain[some], torch.where(plain.isfinite(), plain, torch.inf)[some].view(len(rows), 2, -1).amin(2)
        k = torch.tensor([top_k[r] or VOCAB for r in rows])
        t, p = (torch.tensor([values[r] for r in rows], dtype=torch.float64) for values in (temperature, top_p))
        for r, edge in zip(rows, cut.edges(x, x.amax(1), lows, t, k, p).tolist(), strict=True):
            choice = Choice(temperature=temperature[r], top_k=top_k[r], top_p=top_p[r])
            values = scaled(plain[r].numpy(), choice)
            near = (values.view(np.int32) & 0x7FFFFFFF) <= edge
            yield f"cut {r}, room for {room}", bool((near == kept(values, choice))[np.isfinite(values)].all())


CHECKS: tuple[Callable[[], Iterator[tuple[str, bool]]], ...] = (
    norms,
    gates,
    ropes,
    narrowed,
    turns,
    begins,
    row_times,
    cuts,
    samples,
)


def main() -> None:
    """Every check; then norms whose kinds are mixed up, which must be noticed."""
    sample.SPLIT, cut.SPLIT, cut.WAYS = 1024, 1024, (4, 8)
    for check in CHECKS:
        for name, ok in check():
            if not ok:
                print(f"failed: {name}")
    norm.KINDS = {"plain": 0, "wide": 2, "offset": 1}
    if all(ok for _, ok in norms()):
        print("not noticed: kinds")
    print("done")


if __name__ == "__main__":
    main()
