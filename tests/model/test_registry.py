"""Opening a model folder: what it says of itself, and one line with cause and fix where it can't be opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from engine.errors import ModelError
from engine.model.registry import ARCHITECTURES, FAMILIES, read_spec

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "eos_token_id": 7,
}


def folder(path: Path, **changes: Any) -> Path:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))
    return path


def refused(path: Path, field: str, *words: str) -> None:
    with pytest.raises(ModelError) as e:
        read_spec(path)
    assert e.value.field == field
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_are_the_librarys_classes(name: str) -> None:
    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ARCHITECTURES[name]] == name
    assert ARCHITECTURES[name] in FAMILIES


def test_eos_ids_come_from_the_generation_config_where_it_names_them(tmp_path: Path) -> None:
    assert read_spec(folder(tmp_path)).eos == (7,)
    GenerationConfig(eos_token_id=[3, 9]).save_pretrained(tmp_path)
    assert read_spec(tmp_path).eos == (3, 9)
    GenerationConfig(eos_token_id=5).save_pretrained(tmp_path)
    assert read_spec(tmp_path).eos == (5,)
    GenerationConfig(bos_token_id=1).save_pretrained(tmp_path)
    assert read_spec(tmp_path).eos == (7,)
    GenerationConfig(eos_token_id=100).save_pretrained(tmp_path)
    refused(tmp_path, "eos_token_id", "generation_config.json", "100")


def test_missing_folders_and_files(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "model", "nowhere", "does not exist", "give a folder")
    refused(tmp_path, "model", "no config.json")
    refused(folder(tmp_path) / "config.json", "model", "not a folder")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": \xff}', "[" * 100_000])
def test_a_broken_config(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    refused(tmp_path, "config.json", str(tmp_path / "config.json"))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("FalconForCausalLM", None),
        ("Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        ("LLaMAForCausalLM", "LlamaForCausalLM"),
        ("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
        ("GptOss2ForCausalLM", "GptOssForCausalLM"),
    ],
)
def test_another_architecture_is_refused_with_the_nearest(name: str, nearest: str | None, tmp_path: Path) -> None:
    words = [name] + ([f"nearest that is: {nearest}"] if nearest else list(ARCHITECTURES))
    refused(folder(tmp_path, architectures=[name]), "architectures", *words)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [1], ["LlamaForCausalLM", "Qwen3ForCausalLM"]])
def test_no_single_architecture(names: Any, tmp_path: Path) -> None:
    refused(folder(tmp_path, architectures=names), "architectures", "LlamaForCausalLM")


def test_a_model_type_that_contradicts(tmp_path: Path) -> None:
    refused(folder(tmp_path, model_type="mistral"), "model_type", "mistral")
