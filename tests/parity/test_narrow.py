"""Checkpoints in float8_e4m3fn, as compressed-tensors and Hugging Face write them: kept as they are or widened, each
backend is transformers with the numbers that they stand for; a scale too many or too few is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from backends.probe import probe
from engine.config import load
from engine.errors import ConfigError, ModelError
from engine.mesh import MeshSpec
from engine.model import quant
from engine.model.checkpoint import Checkpoint
from engine.model.params import params
from engine.model.registry import read_spec
from engine.model.scales import Scaled
from engine.resolve import resolve
from radixmesh.convert.convert import convert
from radixmesh.parity.compare import compare
from radixmesh.parity.readings import Reading, read_backend, read_oracle
from tests.parity.test_families import PROMPT, opened, spec_of, worst
from tests.tiny import SHAPES, Tiny, prompt, tiny

MADE, SIDE, MOST = 12, 128, 448.0
BIG: dict[str, Any] = {"hidden": 256, "q_heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 200}
"""Larger than a block, and no multiple of one."""
INPUTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}


def compressed(strategy: str, inputs: dict[str, Any] | None = INPUTS) -> dict[str, Any]:
    """A quantization_config as llm-compressor writes it."""
    weights = {
        "actorder": None,
        "block_structure": [SIDE, SIDE] if strategy == "block" else None,
        "dynamic": False,
        "group_size": None,
        "num_bits": 8,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "float",
    }
    group = {"input_activations": inputs, "output_activations": None, "targets": ["Linear"], "weights": weights}
    return {
        "config_groups": {"group_0": group},
        "format": "float-quantized",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [SIDE, SIDE],
}
STATIC = INPUTS | {"strategy": "tensor", "dynamic": False}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fp8 blocks": ("fp8", FP8, BIG),
    "fp8 blocks of experts": ("fp8", FP8, SHAPES["qwen3_moe-some-dense"]),
    "channels": ("fp8-row", compressed("channel"), SHAPES["llama-grouped"]),
    "tensors, static": ("fp8-row", compressed("tensor", STATIC), SHAPES["phi3-short"]),
    "compressed blocks": ("fp8", compressed("block"), SHAPES["qwen3-odd-heads"]),
}
"""Name -> what they are kept as, quantization_config, the model's shape."""


def narrowed(w: torch.Tensor, by: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix in float8_e4m3fn, its scales as they are stored, and what both stand for. The scales are no power of two
    and a little larger than need be, so that no number is the largest: quantised again it would be another."""
    rows, columns = w.shape
    high, wide = -(-rows // SIDE), -(-columns // SIDE)
    if by == "block":
        padded = torch.nn.functional.pad(w.abs(), (0, wide * SIDE - columns, 0, high * SIDE - rows))
        scale = padded.view(high, SIDE, wide, SIDE).amax((1, 3)) * 1.3 / MOST
        each = scale.repeat_interleave(SIDE, 0)[:rows].repeat_interleave(SIDE, 1)[:, :columns]
    else:
        scale = w.abs().amax(1, keepdim=True) if by == "channel" else w.abs().max().view(1)
        scale = each = (scale * 1.3 / MOST).bfloat16().float()  # as llm-compressor keeps them
    body = (w / each).to(torch.float8_e4m3fn)
    return body, scale, body.float() * each


def write(model: Tiny, config: dict[str, Any], narrow: Path, wide: Path) -> None:
    """The model's folder in 8 bits, and beside it what that stands for, in float32."""
    fp8 = config["quant_method"] == "fp8"
    by = "block" if fp8 else config["config_groups"]["group_0"]["weights"]["strategy"]
    suffix, less, more = ".weight_scale_inv" if fp8 else ".weight_scale", {}, {}
    static = not fp8 and not config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    for name, w in load_file(model.path / "model.safetensors").items():
        if "_proj." not in name or w.ndim != 2:
            less[name] = more[name] = w
            continue
        base = name.removesuffix(".weight")
        less[name], scale, more[name] = narrowed(w, by)
        less[base + suffix] = scale if by == "block" else scale.bfloat16()
        if static:
            less[base + ".input_scale"] = torch.ones(1)
    content = json.loads((model.path / "config.json").read_text())
    for folder, tensors, own in ((narrow, less, {"quantization_config": config}), (wide, more, {})):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(content | own))


Judge = Callable[[str], tuple[Tiny, Tiny, Reading]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    """case -> the narrow model, the wide one, and what transformers makes of the wide one."""
    made: dict[str, tuple[Tiny, Tiny, Reading]] = {}

    def get(case: str) -> tuple[Tiny, Tiny, Reading]:
        if case not in made:
            folder = tmp_path_factory.mktemp("narrow")
            model = tiny(folder / "full", **CASES[case][2])
            write(model, CASES[case][1], folder / "less", folder / "more")
            less, more = (Tiny(path=folder / name, hf=model.hf) for name in ("less", "more"))
            made[case] = less, more, read_oracle(spec_of(more), more.path, prompt(model, PROMPT), MADE)
        return made[case]

    return get


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["torch", "reference", "jax"])
def test_is_transformers_with_what_it_stands_for(judge: Judge, case: str, backend: str) -> None:
    """Kept in 8 bits, which is what is decided, and (jax, which compiles for seconds, once) widened."""
    less, _, right = judge(case)
    given = load(None, {"model": str(less.path), "backend": backend})
    assert resolve(given, spec_of(less), probe(backend, "cpu"))[0].quantise == CASES[case][0]
    for asked in ("auto", "none") if backend != "jax" else ("auto",) if case != "channels" else ("none",):
        with opened(less, backend, **{"model.quantise": asked}) as device:
            verdict = compare(right, read_backend(backend, device, spec_of(less), prompt(less, PROMPT), MADE))
        assert verdict.ok, f"{asked}: {worst(verdict)}"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_rounded_again(judge: Judge, case: str) -> None:
    """What a backend keeps is what the file has, to the bit; asked for as another kind it is quantised anew."""
    less, more, _ = judge(case)
    spec, kind = spec_of(less), CASES[case][0]
    source, wide = Checkpoint(less.path, spec), Checkpoint(more.path, spec_of(more))
    kept = 0
    for p in params(spec).values():
        whole = tuple(slice(0, n) for n in p.shape)
        np.testing.assert_array_equal(np.asarray(source.read(p.name, whole)), np.asarray(wide.read(p.name, whole)))
        made = quant.form(p, kind)
        if made is None:
            continue
        body, scale = quant.read_quantised(source, made)
        stands = np.asarray(wide.read(p.name, whole)).reshape(made.flat(p.shape))
        assert scale.shape == made.scale_shape(MeshSpec())
        np.testing.assert_array_equal(quant.dequantise(body, scale, kind), stands)
        kept += quant.has(source, made)
        other = quant.form(p, "int8")
        assert other is not None
        assert not quant.has(source, other)
    assert kept == len([p for p in params(spec).values() if quant.form(p, kind)])


def test_a_matrix_whose_parts_share_a_block_is_quantised_anew(tmp_path: Path) -> None:
    """q, k and v of one tensor, 64 rows, 64 and 64: the blocks are of two."""
    model = tiny(tmp_path / "full", **SHAPES["phi3-short"])
    write(model, FP8, tmp_path / "less", tmp_path / "more")
    spec = read_spec(tmp_path / "less")
    source = Checkpoint(tmp_path / "less", spec)
    k = quant.form(params(spec)["layers.0.attention.k"], "fp8")
    assert k is not None
    assert not quant.has(source, k)
    body, _ = quant.read_quantised(source, k)
    assert body.shape == (64, 64)


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "change", "name", "words"),
    [
        ("channels", lambda t: t.pop(f"{Q}.weight_scale"), f"{Q}.weight_scale", "is missing, the scale of"),
        ("channels", lambda t: t.update({f"{Q}.weight": torch.ones(64, 64)}), f"{Q}.weight_scale", "no parameter"),
        ("channels", lambda t: t.update({f"{Q}.input_scale": torch.ones(1)}), f"{Q}.input_scale", "no parameter"),
        ("channels", lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)}), f"{Q}.weight_scale", "for a row of"),
        (
            "fp8 blocks",
            lambda t: t.update({f"{Q}.weight_scale_inv": torch.ones(2, 1)}),
            f"{Q}.weight_scale_inv",
            "[2, 2]",
        ),
        ("fp8 blocks", lambda t: t.update({f"{Q}.weight_scale": torch.ones(1)}), f"{Q}.weight_scale", "no parameter"),
    ],
)
def test_a_scale_too_many_or_too_few_is_named(
    judge: Judge, tmp_path: Path, case: str, change: Callable[[dict[str, torch.Tensor]], Any], name: str, words: str
) -> None:
    less, _, _ = judge(case)
    tensors = load_file(less.path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as error:
        Checkpoint(tmp_path, spec_of(less))
    assert error.value.field == name
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (FP8 | {"weight_block_size": [64, 128]}, "weight_block_size"),
        (FP8 | {"weight_block_size": None}, "weight_block_size"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt"),
        (FP8 | {"fmt": "e5m2"}, "fmt"),
        (FP8 | {"unheard_of": 3}, "unheard_of"),
        (compressed("group"), "config_groups.group_0.weights.strategy"),
        (compressed("channel") | {"format": "pack-quantized"}, "format"),
        (compressed("channel") | {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme.strategy"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method"),
    ],
)
def test_what_is_not_read_is_named(judge: Judge, tmp_path: Path, config: dict[str, Any], field: str) -> None:
    content = json.loads((judge("channels")[0].path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(content | {"quantization_config": config}))
    with pytest.raises(ModelError) as error:
        read_spec(tmp_path)
    assert error.value.field == f"quantization_config.{field}"


def test_a_mesh_that_cuts_blocks_widens(judge: Judge) -> None:
    """By itself; asked for 8 bits, it is refused."""
    less, _, _ = judge("fp8 blocks")
    given = {"model": str(less.path), "backend": "torch", "mesh": "tp=2", "sched.slots": 4}
    resolved, decisions = resolve(load(None, given), spec_of(less), probe("torch", "cpu"))
    assert resolved.quantise == "none"
    assert "would cut blocks" in next(d.why for d in decisions if d.field == "quantise")
    with pytest.raises(ConfigError, match="would cut"):
        resolve(load(None, given | {"model.quantise": "fp8"}), spec_of(less), probe("torch", "cpu"))


def test_is_converted_bit_for_bit(judge: Judge, tmp_path: Path) -> None:
    """To Orbax, which is read as the file is, and back."""
    less, _, _ = judge("channels")
    convert(less.path, tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "back", "safetensors")
    spec = spec_of(less)
    a, b = Checkpoint(less.path, spec), Checkpoint(tmp_path / "orbax", spec)
    for p in params(spec).values():
        whole = tuple(slice(0, n) for n in p.shape)
        np.testing.assert_array_equal(np.asarray(a.read(p.name, whole)), np.asarray(b.read(p.name, whole)))
    back, before = (folder / "model.safetensors" for folder in (tmp_path / "back", less.path))
    assert back.read_bytes() == before.read_bytes()


def test_scales_of_a_cache_stand_beside_it(judge: Judge, tmp_path: Path) -> None:
    """As compressed-tensors writes them; a calibration over it hides no matrix that is kept as it is."""
    less, _, _ = judge("channels")
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    content = json.loads((less.path / "config.json").read_text())
    content["quantization_config"]["kv_cache_scheme"] = scheme
    (tmp_path / "config.json").write_text(json.dumps(content))
    tensors = load_file(less.path / "model.safetensors")
    for i in range(2):
        tensors |= {f"model.layers.{i}.self_attn.{side}_scale": torch.tensor([0.5 + i]) for side in "kv"}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    spec = read_spec(tmp_path)
    source = Checkpoint(tmp_path, spec)
    assert (source.read("layers.1.attention.scales", (slice(0, 2), slice(0, 2))) == 1.5).all()
    made = quant.form(params(spec)["layers.0.attention.q"], "fp8-row")
    assert made is not None
    scaled = Scaled(source, {}, "fp8")
    assert quant.has(scaled, made)
    np.testing.assert_array_equal(quant.read_quantised(scaled, made)[1], quant.read_quantised(source, made)[1])
