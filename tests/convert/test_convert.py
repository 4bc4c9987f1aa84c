"""Checkpoints from one form to another and back: the same bytes, or refused by name."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from backends import open_backend
from engine.errors import ConfigError, ModelError
from engine.mesh import MeshSpec, shard_slices
from engine.model.checkpoint import Checkpoint
from engine.model.manifest import FILE, find
from engine.model.params import params
from engine.model.registry import read_spec
from engine.model.shards import INDEX, SINGLE
from radixmesh.cli import make_app
from radixmesh.convert import files
from radixmesh.convert.convert import PARTIAL, convert
from radixmesh.engine import DEMO
from radixmesh.parity.read import Settings, read_texts
from radixmesh.parity.subjects import parse
from tests.tiny import SHAPES, tiny

jax.config.update("jax_platforms", "cpu")
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded model of three dtypes with other files beside it; in Orbax; and back."""
    root = tmp_path_factory.mktemp("made")
    tiny(root / "source", hidden=64, q_heads=4, kv_heads=2, layers=3, max_shard_size="100KB")
    for file in sorted((root / "source").glob("*.safetensors")):
        tensors = load_file(file)
        for layer, dtype in ((".0.", torch.bfloat16), (".1.", torch.float16)):
            tensors |= {n: t.to(dtype) for n, t in tensors.items() if layer in n}
        save_file(tensors, file, {"format": "pt"})
    (root / "source" / "chat_template.jinja").write_text("{{ messages }}")
    (root / "source" / "old.bin").write_bytes(b"pickle")
    for before, after, form in (("source", "orbax", "orbax"), ("orbax", "back", "safetensors")):
        done = CliRunner().invoke(make_app(), ["convert", str(root / before), str(root / after), "--to", form])
        assert done.exit_code == 0, done.output
        assert "read back and equal" in done.output
        assert ("no checksums" in done.output) == (before == "source")
        assert ("left behind: old.bin" in done.output) == (before == "source")
    return root


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy to be spoiled."""

    def copy(name: str) -> Path:
        subprocess.run(["cp", "-r", made / name, tmp_path / name], check=True)
        return tmp_path / name

    return copy


def test_a_round_trip_is_byte_equal(made: Path) -> None:
    source = {f.name: f.read_bytes() for f in (made / "source").iterdir() if f.name != "old.bin"}
    back = {f.name: f.read_bytes() for f in (made / "back").iterdir() if f.name != FILE}
    assert len([n for n in source if n.endswith(".safetensors")]) > 3
    assert set(source) == set(back)
    for name, content in source.items():
        same = json.loads(content) == json.loads(back[name]) if name == INDEX else content == back[name]
        assert same, name


def test_orbax_itself_reads_it(made: Path) -> None:
    """As a JAX program would: a tree by the names' dots, dtypes kept."""
    tree = ocp.PyTreeCheckpointer().restore(made / "orbax" / "orbax")
    expected = {n: t for f in (made / "source").glob("*.safetensors") for n, t in load_file(f).items()}
    assert len(jax.tree.leaves(tree)) == len(expected)
    for name, tensor in expected.items():
        leaf = tree
        for part in name.split("."):
            leaf = leaf[part]
        assert str(leaf.dtype) == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(np.asarray(leaf, np.float32), tensor.float().numpy())
    assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {"bfloat16", "float16", "float32"}


@pytest.mark.parametrize("name", ["torch", "reference"])
def test_backends_load_it(made: Path, name: str) -> None:
    """The very same logits and tokens as from safetensors."""
    ids = [np.random.default_rng(0).integers(0, 256, 20).tolist()]
    a, b = (read_texts(parse(name), Settings(path=str(made / f), count=4), ids)[0] for f in ("source", "orbax"))
    np.testing.assert_array_equal(a.values["logits"], b.values["logits"])
    assert a.tokens == b.tokens


def test_jax_loads_it(made: Path) -> None:
    """The very same weights on the device; compiling a step of each would take half a minute."""
    trees = []
    for form in ("source", "orbax"):
        decided = Settings(path=str(made / form), count=1).decide(parse("jax"))
        with closing(open_backend("jax", decided.spec, decided.resolved)) as backend:
            backend.load(Checkpoint(decided.path, decided.spec))
            trees.append(jax.tree.map(np.asarray, backend.weights))
    held = sum(leaf.size for leaf in jax.tree.leaves(trees[0]))
    assert held == sum(math.prod(p.shape) for p in params(decided.spec).values())  # all there are
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("shape", ["gpt_oss-sinks", "phi3-short", "mixtral-window"])
def test_rules_that_turn_split_and_stack_read_it(tmp_path: Path, shape: str) -> None:
    """Whole, and the second half of every dimension."""
    model = tiny(tmp_path / "m", **SHAPES[shape])
    convert(model.path, tmp_path / "o", "orbax")
    spec = read_spec(model.path)
    source, expected = Checkpoint(tmp_path / "o", spec), Checkpoint(model.path, spec)
    for p in params(spec).values():
        for part in (tuple(map(slice, p.shape)), tuple(slice(n // 2, n) for n in p.shape)):
            part = tuple(slice(s.start or 0, s.stop) for s in part)
            np.testing.assert_array_equal(source.read(p.name, part), expected.read(p.name, part))


def test_reading_imports_neither_jax_nor_orbax(made: Path) -> None:
    code = (
        "import sys, numpy as np; from engine.model.registry import read_spec\n"
        "from engine.model.checkpoint import Checkpoint\n"
        f"p = {str(made / 'orbax')!r}; s = Checkpoint(p, read_spec(p))\n"
        "print(s.read('layers.0.attention.q', (slice(0, 2), slice(0, 16), slice(0, 64))).dtype)\n"
        "assert not {'jax', 'orbax', 'torch'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "bfloat16"), done.stderr


def whole(path: Path) -> None:
    """Read every parameter."""
    spec = read_spec(path)
    source = Checkpoint(path, spec)
    for p in params(spec).values():
        source.read(p.name, tuple(slice(0, n) for n in p.shape))


@pytest.mark.parametrize("form", ["orbax", "back"])
def test_a_flipped_byte_is_refused_by_name(folder: Callable[[str], Path], form: str) -> None:
    path = folder(form)
    whole(path)
    if form == "back":
        file = path / json.loads((path / INDEX).read_text())["weight_map"][Q]
        raw = bytearray(file.read_bytes())
        at = raw.index(load_file(file)[Q].contiguous().view(torch.uint8).numpy().tobytes()) + 1001
        raw[at] ^= 1
        file.write_bytes(raw)
    else:  # a value that is whole as far as zarr and zstd can see
        store = ts.open(
            {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}/orbax/", "path": f"{Q}/"}}
        ).result()
        store[3, 5] = store[3, 5].read().result() + np.float16(1)
    with pytest.raises(ModelError, match=rf"tensor '{Q}' is damaged") as e:
        whole(path)
    assert e.value.field == Q
    with pytest.raises(ModelError, match=rf"tensor '{Q}' is damaged"):
        convert(path, path.with_name("again"), "orbax" if form == "back" else "safetensors")
    assert not path.with_name("again").exists()


def test_bytes_flipped_anywhere_never_load(folder: Callable[[str], Path]) -> None:
    """Whatever is hit (an index, a header, compressed numbers), no other weights come out of it."""
    path = folder("orbax")
    spec = read_spec(path)
    expected = {p.name: Checkpoint(path, spec).read(p.name, tuple(map(slice, p.shape))) for p in params(spec).values()}
    data = max((f for f in (path / "orbax").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    raw, said = data.read_bytes(), []
    for at in range(100, len(raw), len(raw) // 12):
        data.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        try:
            source = Checkpoint(path, spec)
            for p in params(spec).values():
                np.testing.assert_array_equal(source.read(p.name, tuple(map(slice, p.shape))), expected[p.name])
        except ModelError as error:
            said.append(str(error))
    assert len(said) > 8
    assert all("damaged" in x or "can't be read" in x for x in said)


def test_a_manifest_of_other_tensors(folder: Callable[[str], Path]) -> None:
    path = folder("back")
    file = path / FILE
    content = json.loads(file.read_text())
    entry = content["tensors"].pop(Q)
    for change, said in (
        ({}, "has no checksum"),
        ({Q: entry, "extra": entry}, "is missing"),
        ({Q: entry | {"shape": [32, 128], "chunk": [32, 128]}}, "says"),
        ({Q: entry | {"chunks": []}}, "not a manifest"),
        ({Q: entry | {"chunk": [0, 1]}}, "not a manifest"),
    ):
        file.write_text(json.dumps(content | {"tensors": content["tensors"] | change}))
        with pytest.raises(ModelError, match=said):
            Checkpoint(path, read_spec(path))
    file.write_text(json.dumps(content | {"format": 2}))
    with pytest.raises(ModelError, match="format 2"):
        find(path)


def read_bytes() -> int:
    """Bytes that tensorstore has read from files so far."""
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(sum(v.get("value", v.get("sum", 0)) for m in found for v in m["values"]))


@pytest.mark.parametrize("name", ["layers.0.mlp.gate", "layers.0.mlp.down"])
def test_a_shard_reads_its_own_bytes(tmp_path: Path, name: str) -> None:
    """A quarter of a matrix, of its outputs (gate) or of its inputs (down), reads a quarter of its bytes."""
    model = tiny(tmp_path / "m", hidden=1024, q_heads=8, kv_heads=8, layers=1, ffn=4096, vocab=64)
    convert(model.path, tmp_path / "o", "orbax")
    spec = read_spec(tmp_path / "o")
    param = params(spec)[name]
    size = 4 * int(np.prod(param.shape))
    source = Checkpoint(tmp_path / "o", spec)
    expected = Checkpoint(model.path, spec)
    total = 0
    for rank in range(4):
        part = shard_slices(param.shape, param.axes, MeshSpec(tp=4), {"tp": rank})
        before = read_bytes()
        found = source.read(name, part)
        read = read_bytes() - before
        assert size / 8 < read < size / 4 * 1.1, (read, size)  # compressed, and some of an index
        np.testing.assert_array_equal(found, expected.read(name, part))
        total += read
    assert total > 0.8 * size


@pytest.mark.parametrize("kind", ["standard", "zarr3", "folders"])
def test_what_a_trainer_saved(tmp_path: Path, kind: str) -> None:
    """jax arrays saved by orbax in its own ways, without checksums."""
    model = tiny(tmp_path / "m", layers=2)
    tree: dict[str, Any] = {}
    for name, tensor in load_file(model.path / SINGLE).items():
        *path, leaf = name.split(".")
        at = tree
        for part in path:
            at = at.setdefault(part, {})
        at[leaf] = jax.numpy.asarray(tensor.numpy(), ml_dtypes.bfloat16 if "mlp" in name else np.float32)
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "config.json").write_bytes((model.path / "config.json").read_bytes())
    handler = {
        "standard": lambda: ocp.PyTreeCheckpointHandler(),
        "zarr3": lambda: ocp.PyTreeCheckpointHandler(use_zarr3=True),
        "folders": lambda: ocp.PyTreeCheckpointHandler(use_ocdbt=False),
    }[kind]()
    with ocp.Checkpointer(handler) as writer:
        writer.save(tmp_path / "t" / "orbax", args=ocp.args.PyTreeSave(tree))
    spec = read_spec(tmp_path / "t")
    source, expected = Checkpoint(tmp_path / "t", spec), Checkpoint(model.path, spec)
    for p in params(spec).values():
        part = tuple(slice(0, n) for n in p.shape)
        dtype = ml_dtypes.bfloat16 if ".mlp." in p.name else np.float32
        np.testing.assert_array_equal(source.read(p.name, part), expected.read(p.name, part).astype(dtype))
    done = convert(tmp_path / "t", tmp_path / "s", "safetensors")
    assert not done.known
    whole(tmp_path / "s")


def test_large_ones_are_split(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing says which files they came from. transformers reads them."""
    monkeypatch.setattr(files, "SHARD", 60_000)
    subprocess.run(["cp", "-r", made / "orbax", tmp_path / "o"], check=True)
    (tmp_path / "o" / FILE).unlink()
    convert(tmp_path / "o", tmp_path / "s", "safetensors")
    found = sorted(f.name for f in (tmp_path / "s").glob("*.safetensors"))
    assert len(found) > 3
    assert found[0] == f"model-00001-of-{len(found):05}.safetensors"
    expected = {n: t for f in (made / "source").glob("*.safetensors") for n, t in load_file(f).items()}
    split = {n: t for f in (tmp_path / "s").glob("*.safetensors") for n, t in load_file(f).items()}
    assert set(split) == set(expected)
    assert all(torch.equal(split[n], t) and split[n].dtype == t.dtype for n, t in expected.items())
    whole(tmp_path / "s")


def test_the_demo_model_both_ways(tmp_path: Path) -> None:
    convert(DEMO, tmp_path / "o", "orbax")
    convert(tmp_path / "o", tmp_path / "s", "safetensors")
    for file in DEMO.iterdir():
        assert (tmp_path / "s" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda p: ("safetensors",), ConfigError, "in safetensors already"),
        (lambda p: ("pickle",), ConfigError, "'pickle'"),
        (lambda p: (p / "t").mkdir() or (p / "t" / "x").touch(), ConfigError, "is there already"),
        (lambda p: (p / ("t" + PARTIAL)).mkdir() or (p / ("t" + PARTIAL) / "x").touch(), ConfigError, "is there"),
        (lambda p: edit(p, "x", torch.ones(3, dtype=torch.int64)), ModelError, "tensor 'x' has dtype I64"),
        (lambda p: edit(p, "model.norm", torch.ones(3)), ModelError, "'model.norm"),
        (lambda p: edit(p, "a..b", torch.ones(3)), ModelError, "'a..b'"),
        (lambda p: edit(p, "a", torch.ones(0)), ModelError, "'a': is empty"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: Callable[[Path], Any], error: type[Exception], said: str) -> None:
    tiny(tmp_path / "m", layers=1)
    form = change(tmp_path)
    with pytest.raises(error) as e:
        convert(tmp_path / "m", tmp_path / "t", form[0] if isinstance(form, tuple) else "orbax")
    assert said in str(e.value)
    assert not (tmp_path / "t" / "config.json").exists()


def edit(folder: Path, name: str, tensor: torch.Tensor) -> None:
    file = folder / "m" / SINGLE
    save_file(load_file(file) | {name: tensor}, file)


def test_two_forms_in_one_folder_are_refused(folder: Callable[[str], Path], made: Path) -> None:
    path = folder("orbax")
    (path / SINGLE).write_bytes(next((made / "source").glob("*.safetensors")).read_bytes())
    with pytest.raises(ModelError, match=f"holds both orbax and {SINGLE}"):
        Checkpoint(path, read_spec(path))


def test_hugging_face_can_not_judge_it(made: Path) -> None:
    done = CliRunner().invoke(make_app(), ["parity", "--model", str(made / "orbax"), "--a", "hf", "--b", "torch"])
    assert isinstance(done.exception, ModelError)
    assert "Hugging Face can't read" in str(done.exception) or "tokenizer" in str(done.exception)
