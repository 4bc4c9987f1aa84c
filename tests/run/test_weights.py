"""New weights while an engine serves: nothing cached is matched, what runs goes on, what is broken is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from engine.config import load
from engine.errors import ModelError
from engine.model.checkpoint import Checkpoint
from engine.run.loop import Loop
from engine.run.messages import Load, Submit
from engine.run.start import decide, start
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.serve.grpc import FIELD, start_grpc
from engine.serve.pb import radixmesh_pb2 as pb
from engine.serve.pb import radixmesh_pb2_grpc as rpc
from radixmesh.engine import Engine
from tests.serve.harness import House, folder, house
from tests.tiny import tiny

SIZE: dict[str, Any] = {"vocab": 97, "max_len": 128, "hidden": 32, "q_heads": 2, "kv_heads": 1}
KEYS: dict[str, Any] = {
    "slots": 4,
    "max_tokens": 32,
    "token_buckets": (32,),
    "cache_tokens": 1024,
    "penalties": False,
    "max_logprobs": 0,
}
PROMPT = [*range(3, 43)]
GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two of one shape, and what can be wrong with another."""
    root = tmp_path_factory.mktemp("models")
    for i, name in enumerate(("old", "new", "lacking", "bent")):
        tiny(root / name, seed=i, **SIZE)
    for name in ("lacking", "bent"):
        file = root / name / "model.safetensors"
        tensors = load_file(file)
        gone = tensors.pop(TENSOR)
        save_file(tensors if name == "lacking" else tensors | {TENSOR: gone[:-1]}, file, {"format": "pt"})
    tiny(root / "deeper", **(SIZE | {"layers": 3}))
    tiny(root / "other", family="qwen3", **SIZE)
    return {p.name: p for p in root.iterdir()}


def made(engine: Engine) -> tuple[list[int], int, int]:
    out = engine.generate(token_ids=PROMPT, sampling_params=GREEDY)
    assert isinstance(out, dict)
    return out["output_ids"], out["meta_info"]["cached_tokens"], out["meta_info"]["weight_version"]


def opened(path: Path, backend: str) -> Engine:
    return Engine(path, backend=backend, skip_tokenizer=True, dtype="float32", **KEYS)


@pytest.mark.parametrize("backend", ["reference", "jax", "torch"])
def test_tokens_are_those_of_an_engine_with_these_weights(backend: str, models: dict[str, Path]) -> None:
    with opened(models["new"], "reference") as engine:
        new = made(engine)[0]
    with opened(models["old"], backend) as engine:
        old = made(engine)
        assert made(engine) == (old[0], 32, 0)
        assert new != old[0]
        assert engine.update_weights(models["new"]) == 1
        assert made(engine) == (new, 0, 1), "a prefix that the old weights made was matched"
        assert made(engine) == (new, 32, 1)
        for name, field in {
            "lacking": TENSOR,
            "bent": TENSOR,
            "deeper": "layers",
            "other": "family",
            "none": None,
        }.items():
            with pytest.raises(ModelError) as caught:
                engine.update_weights(models.get(name, models["old"].parent / "none"))
            assert field is None or caught.value.field == field, caught.value
            assert field is None or field in str(caught.value)
        for path in ("x" * 5000, "a\0b", "", str(models["old"] / "model.safetensors")):
            with pytest.raises(ModelError):
                engine.update_weights(path)
        loop = engine._client.carrier.loop
        whole, loop._weights = loop._weights, lambda path: Torn(Checkpoint(models["old"], engine.spec))
        with pytest.raises(ModelError, match="torn"):
            engine.update_weights(models["old"])
        loop._weights = whole
        assert made(engine) == (new, 32, 1), "weights that were refused changed something"
        assert engine.update_weights(str(models["old"])) == 2
        assert made(engine) == (old[0], 0, 2)
        assert engine.status().version == 2
        assert engine.status().compiles_after_ready == 0


class Torn:
    """A checkpoint that can't be read to its end."""

    def __init__(self, whole: Checkpoint) -> None:
        self._whole = whole

    def read(self, name: str, part: tuple[slice, ...]) -> NDArray[Any]:
        if name == "norm" or name.endswith("layers.1.mlp.down"):
            raise ModelError(f"{name}: torn", field=name)
        return self._whole.read(name, part)


class Driven:
    """A loop whose turns the test makes."""

    def __init__(self, path: Path, **keys: Any) -> None:
        config = load(None, {"model": str(path), "backend": "reference", "slots": 2, "cache_tokens": 512, **keys})
        self.outputs: list[Output] = []
        started = start(decide(config, path), lambda: None)
        self.loop = Loop(started.scheduler, started.backend, self.outputs.extend, weights=started.weights)

    def ask(self, rid: str, tokens: list[int], made: int, **more: Any) -> None:
        params = SamplingParams(temperature=0.0, max_new_tokens=made, ignore_eos=True)
        self.loop.take([Submit(request=Request(rid=rid, tokens=tuple(tokens), params=params, **more))])

    def load(self, path: Path) -> None:
        self.loop.take([Load(rid="load", path=str(path))])
        assert self.outputs[-1].error is None

    def run(self, turns: int = 1000) -> None:
        while self.loop.busy and turns:
            self.loop.turn()
            turns -= 1

    def tokens(self, rid: str) -> list[int]:
        return [t for o in self.outputs if o.rid == rid for t in o.tokens]

    def alone(self, tokens: list[int], made: int) -> list[int]:
        self.ask("alone", tokens, made)
        self.run()
        return self.tokens("alone")


def test_what_runs_goes_on_and_shares_with_nobody(models: dict[str, Path]) -> None:
    old = Driven(models["old"]).alone(PROMPT, 30)
    new = Driven(models["new"]).alone([*PROMPT, *old[:20]], 4)
    case = Driven(models["old"])
    case.ask("a", PROMPT, 30)
    while len(case.tokens("a")) < 20:
        case.loop.turn()
    case.load(models["new"])
    known = len(case.tokens("a"))
    case.run()
    assert len(case.tokens("a")) == 30
    assert case.tokens("a")[: known + 1] == old[: known + 1], "a step that was out has the old weights"
    assert case.tokens("a") != old, "the new weights make no token"
    assert case.outputs[-1].version == 1
    case.ask("b", [*PROMPT, *old[:20]], 4)
    case.run()
    assert case.tokens("b") == new
    assert case.outputs[-1].cached_tokens == 0


def test_a_fork_takes_nothing_that_other_weights_made(models: dict[str, Path]) -> None:
    """The second answer is seated after the new weights, while the first, whose page it would copy, still runs."""
    new = Driven(models["new"]).alone(PROMPT[:10], 6)
    assert new != Driven(models["old"]).alone(PROMPT[:10], 6)
    case = Driven(models["old"], depth=1, max_tokens=10, token_buckets=(10,))
    for rid in ("first", "second"):
        case.ask(rid, PROMPT[:10], 6, group="one")
    case.loop.turn()
    assert [len(case.tokens(rid)) for rid in ("first", "second")] == [1, 0]
    case.load(models["new"])
    case.run()
    assert case.tokens("second") == new


def test_those_that_wait_for_a_prefix_compute_it_anew(models: dict[str, Path]) -> None:
    longer = [*PROMPT, 50, 51]
    new = Driven(models["new"]).alone(longer, 6)
    case = Driven(models["old"], max_tokens=32, token_buckets=(32,))
    case.ask("first", PROMPT, 2)
    case.ask("second", longer, 6)
    case.loop.turn()
    case.load(models["new"])
    case.run()
    assert case.tokens("second") == new
    assert next(o for o in case.outputs if o.rid == "second").cached_tokens == 0


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    root = tmp_path_factory.mktemp("served")
    for name, seed in (("old", 0), ("new", 1)):
        folder(root / name, seed=seed)
    with house(root / "old", api_key="sesame") as door:
        yield door


def test_the_faces(door: House, models: dict[str, Path]) -> None:
    new = str(Path(door.service.info.path).parent / "new")
    body = {"prompt": "the dog", "max_tokens": 8, "temperature": 0}
    route = "/update_weights_from_disk"
    assert httpx.post(door.url + route, json={"model_path": new}).status_code == 401
    with httpx.Client(base_url=door.url, headers={"authorization": "Bearer sesame"}, timeout=60) as client:
        first = client.post("/v1/completions", json=body).json()
        answer = client.post(route, json={"model_path": str(models["other"])})
        assert answer.status_code == 400
        assert answer.json()["success"] is False
        assert answer.json()["error"]["param"] == "family"
        for bad in ({"model_path": ""}, {"model_path": "\0"}, {}, {"model_path": new, "load_format": "dummy"}):
            answer = client.post(route, json=bad)
            assert answer.status_code == 400, answer.text
            name = "load_format" if "load_format" in bad else "model_path"
            assert answer.json()["error"]["param"] == name
            assert answer.json()["error"]["message"].startswith(name)
        assert client.get("/v1/models").json()["data"][0]["weight_version"] == 0
        same = client.post("/v1/completions", json=body).json()
        assert same["choices"] == first["choices"]
        assert same["system_fingerprint"] == first["system_fingerprint"]
        answer = client.post(route, json={"model_path": new, "load_format": "auto", "flush_cache": True})
        assert (answer.status_code, answer.json()["success"], answer.json()["weight_version"]) == (200, True, 1)
        other = client.post("/v1/completions", json=body).json()
        assert other["choices"] != first["choices"]
        assert other["system_fingerprint"] != first["system_fingerprint"]
        assert client.get("/v1/models").json()["data"][0]["weight_version"] == 1
        native = client.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 1}}).json()
        assert native["meta_info"]["weight_version"] == 1
    server, port = door.run(start_grpc(door.service, "127.0.0.1", 0))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = rpc.RadixmeshStub(channel)
            with pytest.raises(grpc.RpcError) as caught:
                stub.UpdateWeights(pb.UpdateWeightsRequest(path=str(models["other"])))
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert dict(caught.value.trailing_metadata())[FIELD] == "family"
            assert stub.UpdateWeights(pb.UpdateWeightsRequest(path=door.service.info.path)).weight_version == 2
            assert stub.ListModels(pb.ListModelsRequest()).models[0].weight_version == 2
            end = [*stub.Generate(pb.GenerateRequest(text="a"))][-1]
            assert end.pieces[0].finish.weight_version == 2
    finally:
        door.run(server.stop(0))
