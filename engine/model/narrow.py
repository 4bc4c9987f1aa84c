"""Checkpoints that hold matrices in float8_e4m3fn: what their config says of it (engine.model.pairs reads them).

compressed-tensors ("float-quantized"): NAME.weight and NAME.weight_scale, one for the tensor, for each row or for each
block. Hugging Face's "fp8": NAME.weight and NAME.weight_scale_inv, one for each 128 x 128. Either may have
NAME.input_scale, which scales what a matrix is multiplied with: activations here are not narrowed by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from engine.model.fields import Fields
from engine.model.quant import SIDE
from engine.model.spec import Narrow

BY: dict[str, Literal["tensor", "row", "block"]] = {"tensor": "tensor", "channel": "row", "block": "block"}
"""Strategy of weights -> what has a scale."""


def read_narrow(fields: Fields) -> Narrow | None:
    """`quantization_config`, if there is one. Raises ModelError naming what is not read."""
    given = fields.take("quantization_config")
    if given is None:
        return None
    f = fields.inner("quantization_config", given)
    method = f.take("quant_method")
    if method == "fp8":
        return _fp8(f)
    if method == "compressed-tensors":
        return _compressed(f)
    f.refuse("quant_method", method, "not supported; fp8 and compressed-tensors are, of float8_e4m3fn")


def _fp8(f: Fields) -> Narrow:
    block = f.take("weight_block_size")
    if block != [SIDE, SIDE]:
        f.refuse("weight_block_size", block, f"not supported; [{SIDE}, {SIDE}] is")
    f.only("fmt", "e4m3")
    f.only("scale_fmt", "float")
    f.only("expert_dtype", "fp8")
    scheme = f.take("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        f.refuse("activation_scheme", scheme, "not supported; dynamic and static are")
    _names(f, "modules_to_not_convert", "ignored_layers", "modules_to_convert")
    f.drop("dequantize")  # how transformers would load it
    f.close()
    return Narrow(suffix=".weight_scale_inv", by="block", inputs=scheme == "static")


def _compressed(f: Fields) -> Narrow:
    f.only("format", "float-quantized")
    groups = f.take("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        f.refuse("config_groups", groups, "must be one group")
    name, inside = next(iter(groups.items()))
    group = f.inner("config_groups", groups).inner(name, inside)
    group.only("targets", ["Linear"])
    group.only("format", "float-quantized")
    weights, inputs = group.take("weights"), group.take("input_activations")
    w = group.inner("weights", weights)
    by = _scheme(w, tuple(BY))
    if by == "block" and w.take("block_structure") not in ([SIDE, SIDE], f"{SIDE}x{SIDE}"):
        w.refuse("block_structure", weights.get("block_structure"), f"not supported; [{SIDE}, {SIDE}] is")
    if w.flag("dynamic"):
        w.refuse("dynamic", True, "weights have scales of their own")
    w.close()
    static = False
    if inputs is not None:
        x = group.inner("input_activations", inputs)
        _scheme(x, ("tensor", "token", "group"))
        x.drop("group_size", "block_structure")
        static = not x.flag("dynamic")
        x.close()
    group.close()
    cache = f.take("kv_cache_scheme")
    if cache is not None:  # whose scales are the checkpoint's (engine.model.checkpoint); cache.dtype says what is kept
        c = f.inner("kv_cache_scheme", cache)
        _scheme(c, ("tensor",))
        c.only("dynamic", False)
        c.drop("group_size", "block_structure")
        c.close()
    for unused in ("sparsity_config", "transform_config"):
        value = f.take(unused)
        if value:
            f.refuse(unused, value, "not supported")
    _names(f, "ignore")
    f.only("quantization_status", "compressed")
    f.drop("global_compression_ratio", "version")  # figures about the file
    f.close()
    return Narrow(suffix=".weight_scale", by=BY[by], inputs=static)


def _scheme(f: Fields, kinds: tuple[str, ...]) -> str:
    """The strategy of weights or activations in 8 bits."""
    f.only("num_bits", 8)
    f.only("type", "float")
    f.only("symmetric", True)
    f.drop("observer", "observer_kwargs", "actorder", "scale_dtype", "zp_dtype")  # how scales were found
    strategy = f.take("strategy")
    if strategy not in kinds:
        f.refuse("strategy", strategy, f"not supported; {', '.join(kinds)} are")
    return str(strategy)


def _names(f: Fields, *lists: str) -> None:
    """Lists of modules: which tensors are narrow, the tensors themselves say."""
    for name in lists:
        value = f.take(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            f.refuse(name, value, "must be a list of names")


def stored_as(how: Narrow) -> str:
    """What `model.quantise` is called that keeps matrices as a checkpoint has them."""
    return "fp8" if how.by == "block" else "fp8-row"
