"""`radixmesh generate`: complete prompts, on one backend or on both to see that they agree."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from radixmesh.commands import options

PROMPTS = ("def fibonacci(n):\n", "class Stack:\n", "import os\n\n\ndef ")
"""What is completed when no prompt is given."""
COMPARED = ("jax", "torch")


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; a few of Python's if left out.")] = None,
    model: options.Model = None,
    backend: options.Backend = None,
    mesh: options.Mesh = None,
    dtype: options.Dtype = None,
    deterministic: options.Deterministic = False,
    config: options.File = None,
    pairs: options.Set = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the model's chat template.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Run on jax and on torch; exit 1 if they differ.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens are made.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="-1 is off.")] = -1,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="64-bit; drawn if left out.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the text; may be repeated.")] = None,
    stop_token_ids: Annotated[list[int] | None, typer.Option(help="An id that ends the text; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the model's end of text.")] = False,
    min_new_tokens: Annotated[int, typer.Option(help="Before so many nothing stops.")] = 0,
    logit_bias: Annotated[
        list[str] | None, typer.Option(metavar="ID=VALUE", help="-100 to 100 for a token id; may be repeated.")
    ] = None,
    allowed_token_ids: Annotated[list[int] | None, typer.Option(help="Nothing else is made; may be repeated.")] = None,
    bad_words: Annotated[list[str] | None, typer.Option(help="A text that is never made; may be repeated.")] = None,
    logprobs: Annotated[int | None, typer.Option(help="Show logprobs, with so many alternatives.")] = None,
    prompt_logprobs: Annotated[int | None, typer.Option(help="Likewise of the prompt.")] = None,
    logprob_start_len: Annotated[int, typer.Option(help="The first token of the prompt that is listed.")] = 0,
    special: Annotated[bool, typer.Option("--special", help="Show special tokens.")] = False,
    no_stop_trim: Annotated[bool, typer.Option("--no-stop-trim", help="Keep what stopped the text.")] = False,
    n: Annotated[int, typer.Option("--n", "-n", help="Answers to each prompt.")] = 1,
    as_json: options.Json = False,
) -> None:
    """Complete prompts and print the text and how fast it came."""
    params = _params(locals())
    given = options.flags(model, backend, mesh, dtype, pairs, deterministic)
    names: list[str | None] = [None]
    if compare:
        # Two arithmetics agree to the token in float32; sampled tokens do when they share a seed.
        names, given = [*COMPARED], {"dtype": "float32"} | given
        params["seed"] = 0 if seed is None else seed
    texts = list(prompts or PROMPTS)
    done = [_run(name, config, given, texts, params, chat) for name in names]
    agreed = differences(done)
    if as_json:
        print(json.dumps({"runs": [r.plain() for r in done], **({"differences": agreed} if compare else {})}))
    else:
        _show(texts, done, agreed)
    if agreed:
        raise typer.Exit(1)


def _params(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that are sampling parameters, and n. Raises InvalidRequest before anything is opened."""
    from engine.sampling import SamplingParams

    params = {f.name: flags[f.name] for f in fields(SamplingParams) if f.name in flags}
    params |= {"logit_bias": options.read_bias(flags["logit_bias"]), "skip_special_tokens": not flags["special"]}
    SamplingParams.of(params)
    return params | {"n": flags["n"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One backend's answers. start: seconds until ready; seconds: to complete all prompts together."""

    backend: str
    device: str
    dtype: str
    start: float
    seconds: float
    results: Sequence[Mapping[str, Any]]

    @property
    def tokens(self) -> int:
        return sum(r["meta_info"]["completion_tokens"] for r in self.results)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "backend": self.backend,
            "device": self.device,
            "dtype": self.dtype,
            "start_seconds": self.start,
            "tokens_per_second": self.tokens / self.seconds,
            "results": self.results,
        }


def _run(
    backend: str | None,
    config: Path | None,
    given: Mapping[str, Any],
    texts: Sequence[str],
    params: Mapping[str, Any],
    chat: bool,
) -> Ran:
    from engine.text.chat import render
    from radixmesh.engine import Engine

    began = time.perf_counter()
    with Engine(file=config, **(dict(given) | ({"backend": backend} if backend else {}))) as engine:
        ready = time.perf_counter()
        assert engine.tokenizer is not None
        if chat:
            ids = [render(engine.tokenizer, [{"role": "user", "content": text}]) for text in texts]
            results = engine.generate(token_ids=ids, sampling_params=params, return_text_in_logprobs=True)
        else:
            results = engine.generate(texts, sampling_params=params, return_text_in_logprobs=True)
        assert isinstance(results, list)
        return Ran(
            backend=engine.resolved.backend,
            device=engine.status().device,
            dtype=engine.resolved.dtype,
            start=ready - began,
            seconds=time.perf_counter() - ready,
            results=results,
        )


def differences(done: Sequence[Ran]) -> list[dict[str, Any]]:
    """Where runs differ from the first one: prompt, position of the first token that differs, each one's token."""
    from backends.api.ties import first_difference

    out = []
    for other in done[1:]:
        for i, (a, b) in enumerate(zip(done[0].results, other.results, strict=True)):
            left, right = a["output_ids"], b["output_ids"]
            at = first_difference(left, right)
            if at is not None:
                tokens = {done[0].backend: left[at : at + 1], other.backend: right[at : at + 1]}
                out.append({"prompt": i, "position": at, "tokens": tokens})
    return out


def scores(meta: Mapping[str, Any]) -> list[str]:
    """A line for each token whose logprob was asked for: its logprob, itself, and the likeliest with theirs."""
    lines = []
    for name in ("input", "output"):
        own = meta.get(f"{name}_token_logprobs", ())
        likeliest = meta.get(f"{name}_top_logprobs") or [None] * len(own)
        for (logprob, _, text), top in zip(own, likeliest, strict=True):
            beside = "  ".join(f"{other!r} {p:.4f}" for p, _, other in top or ())
            value = f"{'':>9}" if logprob is None else f"{logprob:9.4f}"
            lines.append(f"{value}  {text!r}  {beside}".rstrip())
    return lines


def _show(texts: Sequence[str], done: Sequence[Ran], differences: Sequence[Mapping[str, Any]]) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
    for ran in done:
        n = len(ran.results) // len(texts)
        for i, result in enumerate(ran.results):
            console.rule(f"{ran.backend}, {ran.device}, {ran.dtype}", align="left")
            console.print(texts[i // n], style="bold", end="", markup=False)
            console.print(result["text"], markup=False)
            for line in scores(result["meta_info"]):
                console.print(line, style="dim", markup=False)
        console.print(
            f"[{ran.backend}] {ran.tokens} tokens in {ran.seconds:.2f} s, {ran.tokens / ran.seconds:.0f} tokens/s "
            f"(ready after {ran.start:.1f} s)",
            markup=False,
        )
    for d in differences:
        console.print(f"prompt {d['prompt']} differs at token {d['position']}: {d['tokens']}", markup=False)
    if len(done) > 1 and not differences:
        console.print(f"{' and '.join(r.backend for r in done)} agree: {done[0].tokens} tokens, all the same")
