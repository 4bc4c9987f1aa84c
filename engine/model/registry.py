"""Which family describes an architecture, and a model folder's description."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

from engine.errors import ModelError
from engine.model.archs import gemma2, gemma3, gpt_oss, llama, mistral, mixtral, phi3, qwen2, qwen3, qwen3_moe
from engine.model.fields import Fields, read_eos
from engine.model.rules import Rules
from engine.model.spec import ModelSpec


class Family(Protocol):
    """A file of `archs`. docs/porting.md says how one is written."""

    @property
    def RULES(self) -> Rules:
        """Name of a checkpoint's tensor -> the parameters that it fills."""
        ...

    @property
    def BUFFERS(self) -> tuple[str, ...]:
        """Tensors that old checkpoints hold and nothing needs: constants that follow from the config."""
        ...

    def spec(self, config: Mapping[str, Any]) -> ModelSpec:
        """The description, from the content of config.json. Raises ModelError naming the field at fault."""
        ...


FAMILIES: Mapping[str, Family] = {
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
"""`ModelSpec.family`, which is Hugging Face's `model_type` too -> its file."""

ARCHITECTURES: Mapping[str, str] = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "MistralForCausalLM": "mistral",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3_text",
    "Phi3ForCausalLM": "phi3",
    "GptOssForCausalLM": "gpt_oss",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "MixtralForCausalLM": "mixtral",
}
"""Hugging Face's name of a model class -> family."""


def read_spec(path: str | Path) -> ModelSpec:
    """Describe the model in the folder `path` from its config.json; the ids that end a text come from
    generation_config.json where that names them. Raises ModelError, one line with cause and fix."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise ModelError(f"model {folder}: {what}; give a folder with config.json and safetensors", field="model")
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(
            f"model {folder}: there is no config.json; give a folder in Hugging Face's form", field="model"
        )
    config = read_json(file)
    spec = FAMILIES[_family(config, file)].spec(config)
    generation = folder / "generation_config.json"
    if generation.is_file():
        eos = read_eos(Fields(read_json(generation), file=generation.name), spec.vocab)
        spec = replace(spec, eos=eos or spec.eos)
    return spec


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming the file."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as e:
        raise ModelError(f"{file}: can't be read: {e.strerror}", field=file.name) from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{file}: not valid JSON ({e}); copy the file again", field=file.name) from e
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no JSON object; copy the file again", field=file.name)
    return content


def _family(config: Mapping[str, Any], file: Path) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        what = f"architectures = {names!r}: must name one of {', '.join(ARCHITECTURES)}"
        raise ModelError(f"{file}: {what}", field="architectures")
    name: str = names[0]
    if name not in ARCHITECTURES:
        nearest = get_close_matches(name, ARCHITECTURES, n=1, cutoff=0)[0]
        others = ", ".join(a for a in ARCHITECTURES if a != nearest)
        what = f"architecture {name!r} is not supported; the nearest that is: {nearest} (also {others})"
        raise ModelError(f"{file}: {what}", field="architectures")
    family, kind = ARCHITECTURES[name], config.get("model_type")
    if kind not in (family, None):
        raise ModelError(f"{file}: model_type = {kind!r} contradicts architecture {name}", field="model_type")
    return family
