"""The engine in this process: prompts in, text out."""

from __future__ import annotations

import secrets
import time
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

from backends import open_backend
from backends.api.protocol import Backend, Status
from backends.probe import probe
from engine.config import Config, Resolved, load
from engine.errors import BackendLost, InvalidRequest
from engine.model.checkpoint import Checkpoint
from engine.model.registry import read_spec
from engine.model.spec import ModelSpec
from engine.resolve import Decision, resolve
from engine.run.local import LocalClient
from engine.sampling import SamplingParams
from engine.sched.request import Output, Request
from engine.sched.scheduler import Scheduler
from engine.sched.stop import Finish
from engine.text.detokenize import StopStrings, TextStream
from engine.text.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "demo"
"""The model that comes with the package."""

Params: TypeAlias = SamplingParams | Mapping[str, Any] | None
Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided:
    """A configuration and what came of it, before anything is allocated."""

    path: Path
    spec: ModelSpec
    resolved: Resolved
    decisions: tuple[Decision, ...]


def decide(config: Config) -> Decided:
    """Look at the model and the device and decide everything. Raises ModelError or ConfigError."""
    path = Path(config.model.path) if config.model.path is not None else DEMO
    spec = read_spec(path)
    resolved, decisions = resolve(config, spec, probe(config.backend.name, config.backend.platform))
    return Decided(path=path, spec=spec, resolved=resolved, decisions=tuple(decisions))


class Engine:
    """A model, ready to complete prompts. A context manager; `shutdown` frees the device.

    model: folder in Hugging Face's form; None is the demo model that comes with the package. backend: "auto" is torch
    on NVIDIA and AMD GPUs, jax on TPUs and CPUs. mesh: "tp=2" and so on. dtype: "auto", "float32", "bfloat16".
    skip_tokenizer: take and give token ids only. file: a TOML configuration, under the other arguments.
    config: any other key, flat or dotted: page=32, cache_tokens=4096, **{"sched.slots": 8}.

    Raises ConfigError or ModelError, one line with cause and fix.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        backend: str = "auto",
        mesh: str = "",
        dtype: str = "auto",
        skip_tokenizer: bool = False,
        *,
        file: str | Path | None = None,
        **config: Any,
    ) -> None:
        given = {
            "model": None if model is None else str(model),
            "backend": None if backend == "auto" else backend,
            "mesh": mesh or None,
            "dtype": None if dtype == "auto" else dtype,
        }
        decided = decide(load(file, config | given))
        self.spec, self.resolved, self.decisions = decided.spec, decided.resolved, decided.decisions
        self.tokenizer = None if skip_tokenizer else Tokenizer.open(decided.path)
        weights = Checkpoint(decided.path, decided.spec)
        self._backend = _open(self.spec, self.resolved, weights)
        self._scheduler = Scheduler(self._backend.limits, policy=self.resolved.policy, radix=self.resolved.radix)
        self._client = LocalClient(self._scheduler, self._backend)
        self._finalizer = weakref.finalize(self, _close, self._client, self._backend)
        eos = self.tokenizer.eos if self.tokenizer is not None else None
        self._eos = frozenset(self.spec.eos if eos is None else (*self.spec.eos, eos))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop and free the device. Harmless when it was done; a request afterwards raises BackendLost."""
        self._finalizer()

    def status(self) -> Status:
        """How the backend stands: device, programs compiled, bytes."""
        return self._backend.status()

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        sampling_params: Params | Sequence[Params] = None,
    ) -> Result | list[Result]:
        """Complete one prompt, or a list of them together.

        prompts or token_ids: one, or a list. sampling_params: SGLang's names, one for all or a list with one each.
        Gives a dict for one prompt and a list of dicts for a list: text (not with skip_tokenizer), output_ids and
        meta_info: id, prompt_tokens, completion_tokens, cached_tokens, seed and finish_reason, which is
        {"type": "length", "length": n}, {"type": "stop", "matched": id or string} or {"type": "abort", "message": why}.

        Raises InvalidRequest (ContextOverflow) naming the field before anything of the list is enqueued.
        """
        answers, many = self._answers(prompts, token_ids, sampling_params)
        unread: list[str] = []
        try:
            for answer in answers:
                self._client.submit(answer.request)
                unread.append(answer.request.rid)
            for answer in answers:
                unread.remove(answer.request.rid)
                self._read(answer)
        finally:
            for rid in unread:  # interrupted
                self._client.abort(rid)
                deque(self._client.outputs(rid), maxlen=0)
        results = [answer.result() for answer in answers]
        return results if many else results[0]

    def stream(
        self,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        sampling_params: Params = None,
    ) -> Iterator[Result]:
        """Complete one prompt and give what there is after each step, as `generate` would.

        As SGLang has it, text and output_ids are all of the answer so far, not what is new; text is never taken back.
        finish_reason is None until the last. Closing the iterator early aborts the request.
        """
        if isinstance(sampling_params, (list, tuple)):
            raise InvalidRequest("sampling_params: must be a mapping or SamplingParams", field="sampling_params")
        answers, many = self._answers(prompt, token_ids, sampling_params)
        if many:
            raise InvalidRequest("prompt: stream takes one prompt; use generate for a list", field="prompt")
        return self._stream(answers[0])

    def _stream(self, answer: Answer) -> Iterator[Result]:
        self._client.submit(answer.request)
        with closing(self._client.outputs(answer.request.rid)) as outputs:
            for output in outputs:
                answer.take(output)
                yield answer.result()

    def _read(self, answer: Answer) -> None:
        """Take all that a request makes; an interrupt aborts it."""
        with closing(self._client.outputs(answer.request.rid)) as outputs:
            for output in outputs:
                answer.take(output)

    def _answers(self, prompts: Any, token_ids: Any, sampling_params: Any) -> tuple[list[Answer], bool]:
        """Everything that is asked, checked, and whether it was a list."""
        ids, many = self._prompts(prompts, token_ids)
        if isinstance(sampling_params, (list, tuple)):
            if not many or len(sampling_params) != len(ids):
                raise InvalidRequest(
                    f"sampling_params: a list of {len(sampling_params)} for {len(ids)} prompts; give one each",
                    field="sampling_params",
                )
            params = [SamplingParams.of(p) for p in sampling_params]
        else:
            params = [SamplingParams.of(sampling_params)] * len(ids)
        answers = [self._answer(i, p) for i, p in zip(ids, params, strict=True)]
        for i, answer in enumerate(answers):
            try:
                self._scheduler.check(answer.request)
            except InvalidRequest as error:
                if not many:
                    raise
                raise type(error)(f"{error} (in prompt {i} of the list)", field=error.field) from error
        return answers, many

    def _prompts(self, prompts: Any, token_ids: Any) -> tuple[list[tuple[int, ...]], bool]:
        """The token ids of each prompt, and whether it was a list."""
        if (prompts is None) == (token_ids is None):
            raise InvalidRequest("prompts: give either prompts or token_ids", field="prompts")
        if token_ids is not None:
            given = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
            if not isinstance(given, (list, tuple)):
                raise InvalidRequest(f"token_ids: must be a list of integers, not {given!r}", field="token_ids")
            many = bool(given) and all(isinstance(g, (list, tuple)) or hasattr(g, "tolist") for g in given)
            return [_integers(g) for g in given] if many else [_integers(given)], many
        if self.tokenizer is None:
            raise InvalidRequest("prompts: there is no tokenizer (skip_tokenizer); give token_ids", field="prompts")
        many = isinstance(prompts, (list, tuple))
        texts = list(prompts) if many else [prompts]
        if not texts:
            raise InvalidRequest("prompts: the list is empty", field="prompts")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise InvalidRequest(f"prompts: must be a string that is not empty, not {text!r}", field="prompts")
        return [tuple(self.tokenizer.encode(text)) for text in texts], many

    def _answer(self, tokens: tuple[int, ...], params: SamplingParams) -> Answer:
        stopper, text = None, None
        if self.tokenizer is not None:
            stop = () if params.no_stop_trim else params.stop
            text = TextStream(self.tokenizer, stop, params.skip_special_tokens)
            stopper = StopStrings(self.tokenizer, params.stop, params.skip_special_tokens) if params.stop else None
        elif params.stop:
            raise InvalidRequest("stop: there is no tokenizer (skip_tokenizer); use stop_token_ids", field="stop")
        request = Request(
            rid=uuid4().hex,
            tokens=tokens,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            eos=self._eos,
            stopper=stopper,
            arrival=time.monotonic(),
        )
        return Answer(request=request, stream=text)


@dataclass(slots=True, kw_only=True)
class Answer:
    """What has come back of a request. stream: makes its text; None without a tokenizer."""

    request: Request
    stream: TextStream | None
    text: str = ""
    ids: list[int] = field(default_factory=list)
    cached: int = 0
    finish: Finish | None = None
    message: str = ""

    def take(self, output: Output) -> None:
        """Add what is new. Raises BackendLost when the engine is gone."""
        if isinstance(output.error, BackendLost):
            raise output.error
        self.ids += output.tokens
        self.cached, self.finish = output.cached_tokens, output.finish
        if output.error is not None:
            self.message = str(output.error)
        if self.stream is not None:
            self.text += self._piece(self.stream, output)

    def _piece(self, stream: TextStream, output: Output) -> str:
        """New text: without the id that stopped it, and up to the string that did, unless no_stop_trim."""
        if output.finish is None:
            return stream.feed(output.tokens)
        matched, trim = output.finish.matched, not self.request.params.no_stop_trim
        tokens = output.tokens[:-1] if trim and isinstance(matched, int) else output.tokens
        return stream.feed(tokens) + stream.finish(matched if trim and isinstance(matched, str) else None)

    def result(self) -> Result:
        """As SGLang's users know it."""
        text = {} if self.stream is None else {"text": self.text}
        return text | {
            "output_ids": list(self.ids),
            "meta_info": {
                "id": self.request.rid,
                "prompt_tokens": len(self.request.tokens),
                "completion_tokens": len(self.ids),
                "cached_tokens": self.cached,
                "finish_reason": self._reason(),
                "seed": self.request.seed,
            },
        }

    def _reason(self) -> dict[str, Any] | None:
        if self.finish is None:
            return None
        if self.finish.kind == "length":
            return {"type": "length", "length": len(self.ids)}
        if self.finish.kind == "stop":
            return {"type": "stop", "matched": self.finish.matched}
        return {"type": "abort", "message": self.message or "the request was aborted"}


def _integers(values: Any) -> tuple[int, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    for v in values:
        if isinstance(v, bool) or not hasattr(v, "__index__"):
            raise InvalidRequest(f"token_ids: must be integers, not {v!r}", field="token_ids")
    return tuple(int(v) for v in values)


def _open(spec: ModelSpec, resolved: Resolved, weights: Checkpoint) -> Backend:
    """A backend that is ready; nothing of it is left when it can't be."""
    backend = open_backend(resolved.backend, spec, resolved)
    try:
        backend.load(weights)
        backend.warmup()
    except BaseException:
        backend.close()
        raise
    return backend


def _close(client: LocalClient, backend: Backend) -> None:
    client.shutdown()
    backend.close()
