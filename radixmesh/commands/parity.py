"""`radixmesh parity`: the same token ids through several subjects, layer by layer and logit by logit."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import ConfigError
from radixmesh.bench import record
from radixmesh.commands import options
from radixmesh.parity import page, texts
from radixmesh.parity.read import Settings, read_texts
from radixmesh.parity.readings import ORACLE, Reading
from radixmesh.parity.report import Outcome, Text, as_json, assess
from radixmesh.parity.show import show
from radixmesh.parity.subjects import WHAT, Subject, choose
from radixmesh.parity.thresholds import FILE, kept, thresholds


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(parity)


def parity(
    model: options.Model = None,
    backends: Annotated[
        str, typer.Option(help=f"Subjects, each {WHAT}; the judge is hf, else the first.")
    ] = "jax,torch,reference,hf",
    a: Annotated[str | None, typer.Option("--a", help="The judge, instead of a list.")] = None,
    b: Annotated[list[str] | None, typer.Option("--b", help="A subject beside it; may be repeated.")] = None,
    prompt: options.Texts = None,
    tokens: options.Ids = 0,
    seed: options.Seed = 0,
    cache_dtype: Annotated[
        str | None, typer.Option(help="Of keys and values on every backend, such as fp8; as cache.dtype.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Greedy tokens to compare.")] = 32,
    limits: options.Thresholds = FILE,
    html: options.Html = None,
    out: options.Out = None,
    file: options.File = None,
    pairs: options.Set = None,
    as_json_: options.Json = False,
) -> None:
    """Where do backends, dtypes or meshes first differ, and by how much? Exit code 1 past a threshold."""
    judge, subjects = choose(backends, a, b or [])
    if prompt and tokens:
        raise ConfigError("prompt, tokens: give one of them", field="tokens")
    given = options.read_set(pairs) | ({"cache.dtype": cache_dtype} if cache_dtype else {})
    settings = Settings(path=model, count=max_new_tokens, file=file, pairs=given)
    first = next((s for s in (judge, *subjects) if s.backend != ORACLE), None)
    decided = settings.decide(first or Subject(name="reference", backend="reference"))
    sides = {s.name: _side(s, settings) for s in (judge, *subjects)}  # refused before anything is computed
    allowed = {s.name: thresholds(sides[judge.name], sides[s.name], limits) for s in subjects}
    fed = texts.pick(decided, prompt, tokens, seed, max_new_tokens)
    judged = read_texts(judge, settings, [t.ids for t in fed])
    outcomes = []
    for subject in subjects:
        readings = read_texts(subject, settings, [t.ids for t in fed])
        pinned = _pin(judge, settings, fed, judged, readings)
        outcomes.append(
            assess(subject, allowed[subject.name], fed, pinned or judged, readings, judged if pinned else None)
        )
    _write(str(decided.path), judge, fed, outcomes, max_new_tokens, as_json_, out, html)
    sys.exit(0 if all(o.ok for o in outcomes) else 1)


def _side(subject: Subject, settings: Settings) -> str:
    """A subject as thresholds have it. Raises ConfigError for what is refused."""
    if subject.backend == ORACLE:
        return subject.dtype
    return kept(subject.dtype, settings.decide(subject).resolved.cache_dtype)


def _pin(
    judge: Subject, settings: Settings, fed: Sequence[Text], judged: Sequence[Reading], readings: Sequence[Reading]
) -> list[Reading] | None:
    """The judge once more, with the subject's experts, where there are any and the judge can be told."""
    if judge.backend != ORACLE or not any(r.routing for r in readings):
        return None
    once = read_texts(judge, replace(settings, count=1), [t.ids for t in fed], [r.routing for r in readings])
    return [replace(a, tokens=b.tokens, margins=b.margins) for a, b in zip(once, judged, strict=True)]


def _write(
    path: str,
    judge: Subject,
    fed: Sequence[Text],
    outcomes: Sequence[Outcome],
    made: int,
    json_: bool,
    out: Path | None,
    html: Path | None,
) -> None:
    report = as_json(Path(path).name, judge, fed, outcomes, made) | {"made": record.made()}
    for target, text in ((out, json.dumps(report, indent=1) + "\n"), (html, page.make(report))):
        if target is not None:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    if json_:
        print(json.dumps(report))
    else:
        show(path, judge, fed, outcomes)
