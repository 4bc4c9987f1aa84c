"""Files written by transformers and safetensors load as a bijection; whatever else they hold or lack is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from engine.errors import ModelError
from engine.model import checkpoint
from engine.model.checkpoint import Checkpoint
from engine.model.params import params
from engine.model.registry import FAMILIES, read_spec
from engine.model.rules import origins
from tests.tiny import SHAPES, Tiny, tiny

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
WHERE = {
    "attention_norm": "input_layernorm.weight",
    "attention.q": "self_attn.q_proj.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.out": "self_attn.o_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.out_bias": "self_attn.o_proj.bias",
    "attention.q_norm": "self_attn.q_norm.weight",
    "attention.k_norm": "self_attn.k_norm.weight",
    "attention.sinks": "self_attn.sinks",
    "mlp_norm": "post_attention_layernorm.weight",
    "mlp.gate": "mlp.gate_proj.weight",
    "mlp.up": "mlp.up_proj.weight",
    "mlp.down": "mlp.down_proj.weight",
    "mlp.gate_bias": "mlp.gate_proj.bias",
    "mlp.up_bias": "mlp.up_proj.bias",
    "mlp.down_bias": "mlp.down_proj.bias",
    "moe.router": "mlp.gate.weight",
    "moe.gate": "mlp.experts.gate_up_proj",
    "moe.up": "mlp.experts.gate_up_proj",
    "moe.down": "mlp.experts.down_proj",
}
GEMMA = {
    "attention_out_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_out_norm": "post_feedforward_layernorm.weight",
}
PHI3 = dict.fromkeys(("attention.q", "attention.k", "attention.v"), "self_attn.qkv_proj.weight") | dict.fromkeys(
    ("mlp.gate", "mlp.up"), "mlp.gate_up_proj.weight"
)
GPT_OSS = {
    "moe.router": "mlp.router.weight",
    "moe.router_bias": "mlp.router.bias",
    "moe.gate_bias": "mlp.experts.gate_up_proj_bias",
    "moe.up_bias": "mlp.experts.gate_up_proj_bias",
    "moe.down_bias": "mlp.experts.down_proj_bias",
}
OWN = {"gemma2": GEMMA, "gemma3_text": GEMMA, "phi3": PHI3, "gpt_oss": GPT_OSS}
"""Parameter of a layer -> where transformers' own layer has it, alone or with others."""


def load(folder: Path) -> dict[str, np.ndarray]:
    """Every parameter, whole."""
    spec = read_spec(folder)
    source = Checkpoint(folder, spec)
    return {name: source.read(name, tuple(slice(None) for _ in p.shape)) for name, p in params(spec).items()}


def of_transformers(model: Tiny, name: str) -> np.ndarray:
    """The parameter in the live model, with heads told apart."""
    config = model.hf.config
    top = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in top:
        return model.hf.get_parameter(top[name]).detach().float().numpy()
    _, i, rest = name.split(".", 2)
    where = (WHERE | OWN.get(config.model_type, {}))[rest]
    value = model.hf.get_parameter(f"model.layers.{i}.{where}").detach().float()
    last = rest.rpartition(".")[2].removesuffix("_bias")
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if "qkv" in where:
        value = torch.cat(value.split(len(value) // (q_heads + 2 * kv_heads))[SPAN[last](q_heads, kv_heads)])
    elif where.startswith("mlp.experts.") and config.model_type == "gpt_oss":
        if "gate_up" in where:
            value = value[..., 0 if last == "gate" else 1 :: 2]
        value = value if where.endswith("bias") else value.mT
    elif "gate_up" in where:
        value = value.chunk(2, dim=-2)[last == "up"]
    if last in ("q", "k", "v"):
        value = value.reshape(q_heads if last == "q" else kv_heads, -1, *value.shape[1:])
    if rest == "attention.out":
        value = value.reshape(len(value), q_heads, -1)
    return value.numpy()


SPAN = {
    "q": lambda q, kv: slice(0, q),
    "k": lambda q, kv: slice(q, q + kv),
    "v": lambda q, kv: slice(q + kv, q + 2 * kv),
}
"""Heads of q, k and v in one tensor."""


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_parameter_is_transformers(name: str, sharded: bool, tmp_path: Path) -> None:
    model = tiny(tmp_path, **SHAPES[name], **({"max_shard_size": "50KB"} if sharded else {}))
    assert (tmp_path / INDEX).exists() == sharded
    assert len(list(tmp_path.glob("*.safetensors"))) >= (3 if sharded else 1)
    total = 0
    for name, found in load(tmp_path).items():
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, of_transformers(model, name), err_msg=name)
        total += found.size
    assert total == sum(p.numel() for p in model.hf.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_tensors_are_made_of_their_parameters_again(name: str, tmp_path: Path) -> None:
    """The rules are a bijection: what was cut from a tensor joins to that tensor, bit for bit."""
    tiny(tmp_path, **SHAPES[name])
    spec, values = read_spec(tmp_path), load(tmp_path)
    file = load_file(tmp_path / SINGLE)
    found = origins(FAMILIES[spec.family].RULES, len(spec.layers), params(spec))
    assert set(found) == set(file)
    for tensor, origin in found.items():
        parts = [values[p.name] if origin.expert is None else values[p.name][origin.expert] for p in origin.params]
        np.testing.assert_array_equal(origin.join(parts), file[tensor].numpy())


@pytest.mark.parametrize("name", ["gpt_oss-sinks", "mixtral-window", "phi3-short"])
def test_a_slice_is_that_of_the_whole(name: str, tmp_path: Path) -> None:
    """Of split, turned, interleaved and stacked parameters; what is in one tensor is never copied."""
    tiny(tmp_path, **SHAPES[name])
    spec = read_spec(tmp_path)
    source = Checkpoint(tmp_path, spec)
    for param, p in params(spec).items():
        whole = source.read(param, tuple(slice(None) for _ in p.shape))
        part = tuple(slice(n // 3, n) for n in p.shape)
        found = source.read(param, part)
        np.testing.assert_array_equal(found, whole[part])
        stacked = name.startswith("mixtral") and ".moe." in param and "router" not in param
        assert found.flags.owndata == stacked, param


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tmp_path: Path) -> None:
    model = tiny(tmp_path, hidden=48, q_heads=3, kv_heads=1, bias=True)
    model.hf.to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert read_spec(tmp_path).dtype == dtype
    for name, found in load(tmp_path).items():
        assert found.dtype == {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
        np.testing.assert_array_equal(found.astype(np.float32), of_transformers(model, name))


def test_reading_a_slice_is_a_view_of_the_file(tmp_path: Path) -> None:
    tiny(tmp_path, hidden=64, q_heads=8, kv_heads=4)
    source = Checkpoint(tmp_path, read_spec(tmp_path))
    part = source.read("layers.0.attention.q", (slice(2, 4), slice(None), slice(None)))
    assert part.shape == (2, 8, 64)
    assert not part.flags.owndata
    assert not part.flags.writeable
    raw = (tmp_path / SINGLE).read_bytes()
    at = raw.index(part.tobytes())
    with (tmp_path / SINGLE).open("r+b") as f:
        f.seek(at)
        f.write(np.float32(1234.5).tobytes())
    assert part[0, 0, 0] == 1234.5


def test_bytes_that_are_not_aligned_are_copied(tmp_path: Path) -> None:
    model = tiny(tmp_path)
    raw = (tmp_path / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" "  # one byte more before the data, which the format allows
    (tmp_path / SINGLE).write_bytes((length + 1).to_bytes(8, "little") + header + raw[8 + length :])
    assert len(load_file(tmp_path / SINGLE)) == len(list(model.hf.parameters()))
    for name, found in load(tmp_path).items():
        assert found.flags.aligned
        np.testing.assert_array_equal(found, of_transformers(model, name))


def test_a_name_that_is_no_parameter(tmp_path: Path) -> None:
    tiny(tmp_path)
    with pytest.raises(ModelError, match=r"layers\.9\.mlp\.up"):
        Checkpoint(tmp_path, read_spec(tmp_path)).read("layers.9.mlp.up", (slice(None), slice(None)))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A single file, the same sharded, and a tied model."""
    root = tmp_path_factory.mktemp("made")
    tiny(root / "single")
    tiny(root / "sharded", max_shard_size="100KB")
    tiny(root / "tied", tied=True)
    return root


@pytest.fixture
def single(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "single", tmp_path / "single"))


@pytest.fixture
def sharded(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "sharded", tmp_path / "sharded"))


@pytest.fixture
def tied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "tied", tmp_path / "tied"))


def refused(folder: Path, field: str, *words: str) -> None:
    """Opening fails, in one line that holds the words."""
    spec = read_spec(folder)
    with pytest.raises(ModelError) as e:
        Checkpoint(folder, spec)
    assert e.value.field == field
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = SINGLE) -> None:
    """Rewrite a file of tensors with the library."""
    tensors = from_bytes((folder / file).read_bytes())
    change(tensors)
    (folder / file).write_bytes(to_bytes({n: t.clone().contiguous() for n, t in tensors.items()}))


def test_a_missing_tensor(single: Path) -> None:
    edit(single, lambda t: t.pop(Q))
    refused(single, Q, f"'{Q}' is missing")


def test_a_renamed_tensor(single: Path) -> None:
    edit(single, lambda t: t.update({"model.layers.1.self_attn.query.weight": t.pop(Q)}))
    name = "model.layers.1.self_attn.query.weight"
    refused(single, name, f"'{name}' belongs to no parameter", f"'{Q}' is missing")


@pytest.mark.parametrize(
    "name",
    ["layers.0.attention.q", "embed", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"],
)
def test_a_tensor_too_many(name: str, single: Path) -> None:
    edit(single, lambda t: t.update({name: torch.ones(64)}))
    refused(single, name, f"'{name}' belongs to no parameter")


@pytest.mark.parametrize(
    "change",
    [lambda t: t[:-1], lambda t: t.reshape(4, 16, 64), lambda t: t.reshape(32, 128), lambda t: t.flatten()],
    ids=["short", "split", "folded", "flat"],
)
def test_a_reshaped_tensor(change: Callable[[torch.Tensor], torch.Tensor], single: Path) -> None:
    edit(single, lambda t: t.update({Q: change(t[Q])}))
    refused(single, Q, f"'{Q}'", "config.json asks for [64, 64]")


def test_a_transposed_tensor(single: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edit(single, lambda t: t.update({name: t[name].T}))
    refused(single, name, f"'{name}' has shape [136, 64]", "[64, 136]")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float64, torch.int8, torch.float8_e4m3fn, torch.bool])
def test_a_dtype_of_another_family(dtype: torch.dtype, single: Path) -> None:
    edit(single, lambda t: t.update({Q: t[Q].to(dtype)}))
    narrow = dtype == torch.float8_e4m3fn  # which is read where the config says how it is scaled
    refused(single, Q, f"'{Q}' has dtype", "no quantization_config" if narrow else "F32, BF16, F16")


def test_dtypes_may_be_mixed(single: Path) -> None:
    edit(single, lambda t: t.update({Q: t[Q].bfloat16()}))
    found = load(single)
    assert found["layers.1.attention.q"].dtype == ml_dtypes.bfloat16
    assert found["layers.1.attention.k"].dtype == np.float32


@pytest.mark.parametrize("kept", [0, 7, 8, 500, -4096, -1])
def test_a_truncated_file(kept: int, single: Path) -> None:
    raw = (single / SINGLE).read_bytes()
    (single / SINGLE).write_bytes(raw[:kept])
    if kept >= 0:
        return refused(single, SINGLE, f"{single / SINGLE}: truncated, or not safetensors")
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    left = len(raw) - 8 - length + kept
    cut = [n for n, e in header.items() if n != "__metadata__" and e["data_offsets"][1] > left]
    refused(single, min(cut, key=lambda n: header[n]["data_offsets"]), f"{SINGLE}: truncated: tensor")


def test_bytes_too_many(single: Path) -> None:
    with (single / SINGLE).open("ab") as f:
        f.write(b"more")
    refused(single, SINGLE, "4 bytes follow the last tensor")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Edit the header by hand, which the library would not write."""
    raw = (folder / SINGLE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def shift(entry: dict[str, Any], by: int) -> None:
    entry["data_offsets"] = [i + by for i in entry["data_offsets"]]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda h: b"\x00\xff not json", SINGLE),
        (lambda h: b"[]", SINGLE),
        (lambda h: b'{"a": 1, "a": 2}', SINGLE),
        (lambda h: b"[" * 100_000, SINGLE),
        (lambda h: h[Q].pop("dtype") and None, Q),
        (lambda h: h[Q].update(shape=[64, -64]), Q),
        (lambda h: h[Q].update(shape="64"), Q),
        (lambda h: h[Q].update(shape=[64, 65]), Q),
        (lambda h: h[Q].update(data_offsets=[64]), Q),
        (lambda h: h[Q].update(data_offsets=h[Q]["data_offsets"][::-1]), Q),
        (lambda h: h[Q].update(dtype="F16"), Q),
        (lambda h: shift(h[Q], 4), Q),
        (lambda h: shift(h[Q], -4), Q),
        (lambda h: h.update({Q: 3}), Q),
    ],
)
def test_a_corrupted_header(change: Callable[[dict[str, Any]], Any], field: str, single: Path) -> None:
    rewrite(single, change)
    refused(single, field, "corrupted header", SINGLE)


def test_a_folder_of_pickles_is_never_read(single: Path) -> None:
    (single / SINGLE).unlink()
    refused(single, SINGLE, f"holds neither {SINGLE} nor {INDEX}")
    torch.save({}, single / "pytorch_model.bin")
    refused(single, "pytorch_model.bin", "pytorch_model.bin is a pickle", "convert it to safetensors")


def test_two_checkpoints_in_one_folder(single: Path, sharded: Path) -> None:
    shutil.copy(single / SINGLE, sharded)
    refused(sharded, INDEX, "holds both")


def index(folder: Path, change: Callable[[dict[str, str]], Any]) -> dict[str, str]:
    """Edit the weight map; returns it."""
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))
    return dict(content["weight_map"])


def test_a_shard_that_is_not_there(sharded: Path) -> None:
    file = index(sharded, lambda m: None)[Q]
    (sharded / file).unlink()
    refused(sharded, file, f"names {file}", "which is not there")


def test_a_tensor_in_another_shard_than_the_index_says(sharded: Path) -> None:
    files = sorted(set(index(sharded, lambda m: None).values()))
    file = index(sharded, lambda m: None)[Q]
    other = next(f for f in files if f != file)
    index(sharded, lambda m: m.update({Q: other}))
    refused(sharded, Q, f"'{Q}'", file, other)


def test_a_tensor_that_the_index_forgets(sharded: Path) -> None:
    index(sharded, lambda m: m.pop(Q))
    refused(sharded, Q, f"'{Q}' stands in", "the index does not name it")


def test_a_tensor_that_only_the_index_knows(sharded: Path) -> None:
    file = index(sharded, lambda m: None)[Q]
    edit(sharded, lambda t: t.pop(Q), file)
    refused(sharded, Q, f"'{Q}' is not in {file}")


def test_a_truncated_shard(sharded: Path) -> None:
    file = index(sharded, lambda m: None)[Q]
    (sharded / file).write_bytes((sharded / file).read_bytes()[:-1])
    with pytest.raises(ModelError, match=f"{file}: truncated: tensor"):
        Checkpoint(sharded, read_spec(sharded))


@pytest.mark.parametrize("file", ["../single/model.safetensors", "/etc/passwd", "shard.bin", 3, None])
def test_an_index_stays_in_its_folder(file: Any, sharded: Path, single: Path) -> None:
    index(sharded, lambda m: m.update({Q: file}))
    refused(sharded, Q, "not a safetensors file of this folder")


@pytest.mark.parametrize("text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, INDEX if text == "{" else "weight_map", INDEX)


def test_a_tied_head_may_be_stored_if_it_is_equal(tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", 1000)  # many blocks
    embed = "model.embed_tokens.weight"
    assert "lm_head.weight" not in load_file(tied / SINGLE)
    edit(tied, lambda t: t.update({"lm_head.weight": t[embed].clone()}))
    assert "head" not in load(tied)
    edit(tied, lambda t: t["lm_head.weight"][-1, -1].add_(1e-3))
    refused(tied, "lm_head.weight", "tie_word_embeddings", "'lm_head.weight' differs from 'model.embed_tokens.weight'")
    edit(tied, lambda t: t.update({"lm_head.weight": t[embed][:-1]}))
    refused(tied, "lm_head.weight", "differs")
    edit(tied, lambda t: t.update({"lm_head.weight": t.pop(embed)}))
    refused(tied, "lm_head.weight", f"'{embed}' is missing")


def test_an_untied_head_must_be_there(single: Path) -> None:
    edit(single, lambda t: t.pop("lm_head.weight"))
    refused(single, "lm_head.weight", "'lm_head.weight' is missing")


def test_the_buffers_of_old_checkpoints_are_known_by_name(single: Path) -> None:
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    edit(single, lambda t: t.update({name.format(i): torch.ones(8) for i in range(2)}))
    Checkpoint(single, read_spec(single))
    edit(single, lambda t: t.update({name.format(2): torch.ones(8)}))
    refused(single, name.format(2), "belongs to no parameter")
