"""Train the demo model on the text that prepare.py left: `python train.py --out DIR --steps 4650`."""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from matplotlib.figure import Figure
from model import Attention, Llama, Shape
from prepare import Text

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "tokenizers", "safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    batch: int = 16  # sequences of one context each
    rate: float = 3e-3  # at its highest
    floor: float = 0.02  # the last rate, as a part of the highest
    warmup: int = 200  # steps
    decay: float = 0.6  # weight decay; matrices only
    clip: float = 1.0
    dropout: float = 0.1  # after embedding, attention and MLP
    chunk: int = 50  # steps a dispatch
    checks: int = 4  # chunks between two looks at the validation text
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    step: int
    train: float  # nats a token, mean of the last chunk
    valid: float


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    weights: nnx.State
    moments: optax.OptState
    step: Array


def rate(recipe: Recipe, step: Array, progress: Array) -> Array:
    """Linear warmup by steps, cosine to the floor by progress (0 to 1): a run limited by time ends at the floor too."""
    cosine = recipe.floor + (1 - recipe.floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return recipe.rate * jnp.minimum((step + 1) / recipe.warmup, 1) * cosine


def loss(graph: nnx.GraphDef, window: Array, dropout: float, key: Array | None, weights: nnx.State) -> Array:
    logits = nnx.merge(graph, weights)(window[:, :-1], dropout, key)
    return optax.softmax_cross_entropy_with_integer_labels(logits, window[:, 1:]).mean()


def windows(tokens: Array, starts: Array, context: int) -> Array:
    return tokens[starts[:, None] + jnp.arange(context + 1)].astype(jnp.int32)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW but for its rate, which the step multiplies in."""
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)),
    )


def program(recipe: Recipe, shape: Shape, graph: nnx.GraphDef) -> jax.stages.Wrapped:
    tx = optimizer(recipe)

    @partial(jax.jit, donate_argnums=0)
    def advance(state: State, tokens: Array, key: Array, progress: Array) -> tuple[State, Array]:
        """One chunk of steps in one dispatch, each on random crops; returns its mean loss."""

        def step(state: State, _: None) -> tuple[State, Array]:
            draw, mask = jax.random.split(jax.random.fold_in(key, state.step))
            starts = jax.random.randint(draw, (recipe.batch,), 0, tokens.shape[0] - shape.context)
            window = windows(tokens, starts, shape.context)
            value, slope = jax.value_and_grad(partial(loss, graph, window, recipe.dropout, mask))(state.weights)
            update, moments = tx.update(slope, state.moments, state.weights)
            pace = rate(recipe, state.step, progress)
            weights = jax.tree.map(lambda weight, change: weight - pace * change, state.weights, update)
            return State(weights=weights, moments=moments, step=state.step + 1), value

        state, values = jax.lax.scan(step, state, length=recipe.chunk)
        return state, values.mean()

    return advance


def judge(recipe: Recipe, shape: Shape, graph: nnx.GraphDef, tokens: np.ndarray) -> Callable[[nnx.State], float]:
    """Mean loss over the validation text in windows of one context, with the weights rounded as they are exported."""
    count = (len(tokens) - 1) // shape.context
    size = min(recipe.batch, count)
    starts = jnp.arange(count // size * size).reshape(-1, size) * shape.context
    held = jnp.asarray(tokens)

    @jax.jit
    def measure(weights: nnx.State, held: Array) -> Array:
        rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), weights)
        return jax.lax.map(
            lambda row: loss(graph, windows(held, row, shape.context), 0.0, None, rounded), starts
        ).mean()

    return lambda weights: float(measure(weights, held))


def fit(
    recipe: Recipe, shape: Shape, text: Text, *, attention: Attention, minutes: float, steps: int
) -> tuple[nnx.State, list[Point], dict[str, Any]]:
    """Train for `steps`, or for about as many as fit in `minutes`; returns the last weights."""
    graph, weights = nnx.split(Llama(shape, attention=attention, seed=recipe.seed))
    advance, measure = program(recipe, shape, graph), judge(recipe, shape, graph, text.valid)
    state = State(weights=weights, moments=optimizer(recipe).init(weights), step=jnp.zeros((), jnp.int32))
    tokens, key = jnp.asarray(text.train), jax.random.key(recipe.seed, impl="rbg")
    done, progress, curve = 0, 0.0, []
    advance = advance.lower(state, tokens, key, jnp.float32(progress)).compile()
    start = time.monotonic()
    while progress < 1:
        state, value = advance(state, tokens, key, jnp.float32(progress))
        mean = float(value)
        done += recipe.chunk
        progress = min(done / steps if steps else (time.monotonic() - start) / (60 * minutes), 1.0)
        if done % (recipe.checks * recipe.chunk) == 0 or progress == 1:
            valid = measure(state.weights)
            curve.append(Point(step=done, train=round(mean, 4), valid=round(valid, 4)))
            print(f"step {done} train {mean:.4f} valid {valid:.4f} {time.monotonic() - start:.0f}s", flush=True)
    seconds = time.monotonic() - start
    bits = curve[-1].valid / np.log(2) * len(text.valid) / text.valid_bytes
    figures = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.weights)),
        "steps": done,
        "tokens_seen": done * recipe.batch * shape.context,
        "epochs": round(done * recipe.batch * shape.context / len(text.train), 1),
        "seconds": round(seconds, 1),
        "tokens_per_second": round(done * recipe.batch * shape.context / seconds),
        "final": {**asdict(curve[-1]), "valid_bits_per_byte": round(float(bits), 4)},
    }
    return state.weights, curve, figures


def plot(curve: list[Point], path: Path) -> None:
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name in ("train", "valid"):
        axes.plot([point.step for point in curve], [getattr(point, name) for point in curve], label=name)
    axes.set(xlabel="step", ylabel="loss, nats per token", title="radixmesh demo model")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder with what prepare.py wrote, for the model's files too"
    )
    parser.add_argument("--record", type=Path, help="folder for record.json and loss.png; --out if not given")
    parser.add_argument("--minutes", type=float, default=1.4, help="training time, unless --steps is given")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--attention", choices=("cudnn", "xla"), default="xla")
    for field in (*fields(Shape), *fields(Recipe)):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    return parser.parse_args()


def main() -> None:
    given = options()
    shape = Shape(**{field.name: getattr(given, field.name) for field in fields(Shape)})
    recipe = Recipe(**{field.name: getattr(given, field.name) for field in fields(Recipe)})
    out, record = given.out, given.record or given.out
    for folder in (out, record):
        folder.mkdir(parents=True, exist_ok=True)

    text = Text.load(out)
    print(f"{text.documents} documents, {len(text.train)} + {len(text.valid)} tokens", flush=True)
    weights, curve, figures = fit(
        recipe, shape, text, attention=given.attention, minutes=given.minutes, steps=given.steps
    )
    sha256 = checkpoint.save(out, weights, shape)
    plot(curve, record / "loss.png")
    story = {
        "python": {"text": text.python, "training": platform.python_version()},
        "packages": {name: version(name) for name in PACKAGES},
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "attention": given.attention,
        "shape": asdict(shape),
        "recipe": asdict(recipe),
        "corpus": {
            "documents": text.documents,
            "train_bytes": text.train_bytes,
            "train_tokens": len(text.train),
            "valid_bytes": text.valid_bytes,
            "valid_tokens": len(text.valid),
        },
        **figures,
        "weights_bytes": (out / checkpoint.WEIGHTS).stat().st_size,
        "weights_sha256": sha256,
        "curve": [asdict(point) for point in curve],
    }
    (record / "record.json").write_text(json.dumps(story, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
