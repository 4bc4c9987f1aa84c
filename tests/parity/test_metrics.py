"""Figures of a comparison against torch's own; thresholds and subjects as they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.config import DTYPES
from engine.errors import ConfigError
from engine.mesh import MeshSpec
from radixmesh.parity import metrics
from radixmesh.parity.metrics import KS, Positions, buckets, measure, summarise
from radixmesh.parity.subjects import choose, parse
from radixmesh.parity.thresholds import FILE, thresholds

RNG = np.random.default_rng(0)


def logits(count: int, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    a = RNG.normal(0, 2, (count, 61)).astype(np.float32)
    return a, a + RNG.normal(0, noise, a.shape).astype(np.float32)


def test_positions_are_what_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 7)  # several blocks, the last one short
    a, b = logits(40)
    ids = RNG.integers(0, 61, 40)
    found = measure(a, b, ids.tolist())
    p, q = (torch.tensor(x, dtype=torch.float64) for x in (a, b))
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl, rtol=1e-9)
    np.testing.assert_allclose(found.gap, (p - q).abs().amax(-1), rtol=1e-6)
    assert (found.same == (p.argmax(-1) == q.argmax(-1)).numpy()).all()
    assert 0 < found.same.mean() < 1
    for j, k in enumerate(KS):
        left, right = (x.topk(k).indices.tolist() for x in (p, q))
        expected = [len(set(x) & set(y)) / k for x, y in zip(left, right, strict=True)]
        np.testing.assert_allclose(found.overlap[:, j], expected)
    nll = [F.cross_entropy(x[:-1], torch.tensor(ids[1:]), reduction="none") for x in (p, q)]
    np.testing.assert_allclose(found.nll, torch.stack(nll, 1), rtol=1e-9)
    whole = summarise([found])
    assert whole is not None
    assert whole.perplexity is not None
    np.testing.assert_allclose(whole.perplexity, [float(x.mean().exp()) for x in nll])
    assert whole.kl_p99 == pytest.approx(float(kl.quantile(0.99)))


def test_equal_logits_differ_in_nothing() -> None:
    a, _ = logits(20)
    whole = summarise([measure(a, a, [0] * 20)])
    assert whole is not None
    assert (whole.gap, whole.kl_max, whole.top1, whole.flips, whole.near) == (0, 0, 1, 0, 0)
    assert whole.overlap == (1, 1, 1, 1)


def test_the_k_best_are_decided_by_id_where_they_are_equal() -> None:
    x = np.array([[0, 3, 3, 3, 1, 3], [5, 4, 3, 2, 1, 0]], float)
    assert metrics.best(x, 2).tolist() == [[1, 2], [0, 1]]
    assert metrics.best(x, 6).tolist() == [[1, 2, 3, 5, 4, 0], [0, 1, 2, 3, 4, 5]]


def test_a_flip_is_a_near_tie_or_a_fault() -> None:
    """All logits are off by 0.01 or so. At position 3 the judge's two best are 0.05 apart: a near-tie may turn. At
    position 5 they are 2 apart, and no difference of that size explains what the subject prefers."""
    a = np.zeros((10, 40), np.float32)
    a[:, 0], a[:, 1] = 4, 2
    a[3, 1] = 3.95
    b = a + RNG.uniform(-0.01, 0.01, a.shape).astype(np.float32)
    b[3, 1] = 4.02
    only = summarise([measure(a, b, [0] * 10)])
    assert only is not None
    assert (only.near, only.flips) == (0.1, 0)
    b[5, 1] = 4.5
    both = summarise([measure(a, b, [0] * 10)])
    assert both is not None
    assert (both.top1, both.near, both.flips) == (0.8, 0.1, 0.1)


def test_buckets_hold_their_positions() -> None:
    def text(count: int) -> Positions:
        at = np.arange(count, dtype=float)
        return Positions(
            kl=at, gap=at, margin=at, same=at >= 0, overlap=np.ones((count, len(KS))), nll=np.ones((count - 1, 2))
        )

    found = buckets([text(600), text(130)])
    assert [(b.first, b.last, b.count, b.kl_max) for b in found] == [
        (0, 127, 256, 127),
        (128, 511, 386, 511),
        (512, 2047, 88, 599),
    ]


def test_every_pair_of_dtypes_has_thresholds() -> None:
    floats = [d for d in DTYPES if d != "auto"]
    for a in floats:
        for b in floats:
            assert thresholds(a, b) == thresholds(b, a)
    assert thresholds("float32", "float32").value == 2e-4
    assert thresholds("float32", "bfloat16").kl_mean > thresholds("float32", "float32").kl_mean


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("kl_mean = 1e-8", "kl_maen = 1e-8"), "float32:float32.kl_maen"),
        (("kl_mean = 1e-8", ""), "float32:float32.kl_mean"),
        (("kl_mean = 1e-8", "kl_mean = -1"), "from 0"),
        (("kl_mean = 1e-8", "kl_mean = nan"), "from 0"),
        (('["float32:float32"]', '["float32:float16"]'), 'no table ["float32:float32"]'),
    ],
)
def test_thresholds_are_honoured_or_refused(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    file = tmp_path / "t.toml"
    text = FILE.read_text()
    assert change[0] in text
    file.write_text(text.replace(*change, 1))
    with pytest.raises(ConfigError) as e:
        thresholds("float32", "float32", file)
    assert said in str(e.value)


def test_subjects_are_read() -> None:
    found = parse("jax:bfloat16:tp=2")
    assert (found.backend, found.dtype, found.mesh) == ("jax", "bfloat16", MeshSpec(tp=2))
    assert found.overrides == {"backend": "jax", "dtype": "bfloat16", "mesh": "tp=2"}
    judge, others = choose("jax, torch,hf,jax", None, [])
    assert (judge.name, [s.name for s in others]) == ("hf", ["jax", "torch"])
    judge, others = choose("", "jax", ["hf:bfloat16", "jax:tp=4"])
    assert (judge.name, [s.name for s in others]) == ("jax", ["hf:bfloat16", "jax:tp=4"])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("torch", None, []), "at least two"),
        (("torch,torch:float32", None, []), "at least two"),
        (("torch,tpu", None, []), "'tpu'"),
        (("", "jax", ["torch:fp8"]), "'fp8'"),
        (("", "jax", ["torch:float32:bfloat16"]), "two dtypes"),
        (("", "jax", ["torch:tp=0"]), "tp must be a positive integer"),
        (("", "jax", ["torch:sp=2"]), "unknown axis 'sp'"),
        (("", "jax", ["hf:tp=2"]), "one device"),
        (("", "jax", []), "give both"),
        (("", None, ["jax"]), "give both"),
    ],
)
def test_subjects_that_are_none(args: tuple[str, str | None, list[str]], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        choose(*args)
    assert said in str(e.value)
