"""The engine in this process: prompts in, text out."""

from __future__ import annotations

import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

from backends.api.protocol import Status
from engine.config import load
from engine.errors import InvalidRequest
from engine.run.answer import Answer, several
from engine.run.client import Streams
from engine.run.local import LocalClient
from engine.run.messages import Flush, Load, Submit
from engine.run.start import decide, start
from engine.sampling import SamplingParams, scoring
from engine.sched.admission import check_request, deadline
from engine.sched.request import Request
from engine.text.tokenizer import Tokenizer

DEMO = Path(__file__).resolve().parent / "demo"
"""The model that comes with the package."""
MOST = 1024
"""Answers to one prompt."""

Params: TypeAlias = SamplingParams | Mapping[str, Any] | None
Result: TypeAlias = dict[str, Any]


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
        decided = decide(load(file, config | given), DEMO)
        self.spec, self.resolved, self.decisions = decided.spec, decided.resolved, decided.decisions
        self.tokenizer = None if skip_tokenizer else Tokenizer.open(decided.path)
        words = None if self.tokenizer is None else self.tokenizer.words
        self._client = LocalClient(partial(start, decided, lambda: words))
        self._streams = Streams(self._client)
        self._finalizer = weakref.finalize(self, self._client.shutdown)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Stop and free the device. Harmless when it was done; a request afterwards raises BackendLost."""
        self._finalizer()

    def update_weights(self, path: str | Path) -> int:
        """Take the weights in another folder, of the same model, between two steps: what runs goes on with them, and
        nothing that the old ones made is matched any more. Gives their version, as meta_info's weight_version has it.

        Raises ModelError naming what is not the same or the tensor at fault; then the old ones serve on.
        """
        rid = f"load-{uuid4().hex}"
        self._streams.open(Load(rid=rid, path=str(path)), rid)
        (output,) = self._streams.read(rid)
        if output.error is not None:
            raise output.error
        return output.version

    def status(self) -> Status:
        """How the backend stands: device, programs compiled, bytes."""
        return self._client.carrier.loop.backend.status()

    @property
    def steps(self) -> int:
        """Steps that were run."""
        return self._client.carrier.loop.steps

    def flush_cache(self) -> None:
        """Forget all prefixes. Raises InvalidRequest while requests are open."""
        rid = uuid4().hex
        self._streams.open(Flush(rid=rid), rid)
        for output in self._streams.read(rid):
            if output.error is not None:
                raise output.error

    def generate(
        self,
        prompts: str | Sequence[str] | None = None,
        token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        sampling_params: Params | Sequence[Params] = None,
        *,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        return_text_in_logprobs: bool = False,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Result | list[Result]:
        """Complete one prompt, or a list of them together.

        prompts or token_ids: one, or a list. sampling_params: SGLang's names, one for all or a list with one each; a
        mapping may hold `n`, answers to each prompt, which stand side by side in the list that comes back.
        return_logprob, top_logprobs_num, logprob_start_len, return_text_in_logprobs: SGLang's way to ask for logprobs;
        -1 is none of the prompt. cache_salt: keeps the prefix cache of those who give it apart. timeout: seconds after
        which whatever has not ended ends with what it has made, waiting or running; its finish_reason is an abort.
        Gives a dict for one answer and a list of dicts for several: text (not with skip_tokenizer), output_ids and
        meta_info: id, prompt_tokens, completion_tokens, cached_tokens, seed, weight_version and finish_reason, which is
        {"type": "length", "length": n}, {"type": "stop", "matched": id or string} or {"type": "abort", "message": why};
        with logprobs also input_token_logprobs and output_token_logprobs, (logprob, id, text or None) each, and
        input_top_logprobs and output_top_logprobs.

        Raises InvalidRequest (ContextOverflow) naming the field before anything of the list is enqueued.
        """
        scores, _ = scoring(return_logprob, logprob_start_len, top_logprobs_num)
        spell = self._spell(return_text_in_logprobs)
        answers, many = self._answers(prompts, token_ids, sampling_params, scores, cache_salt, timeout)
        by_rid = {answer.request.rid: answer for answer in answers}
        with closing(self._streams.gather([Submit(request=answer.request) for answer in answers])) as outputs:
            for output in outputs:
                by_rid[output.rid].take(output)
        results = [answer.result(spell) for answer in answers]
        return results if many else results[0]

    def stream(
        self,
        prompt: str | None = None,
        token_ids: Sequence[int] | None = None,
        sampling_params: Params = None,
        *,
        return_logprob: bool = False,
        logprob_start_len: int = -1,
        top_logprobs_num: int = 0,
        return_text_in_logprobs: bool = False,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> Iterator[Result]:
        """Complete one prompt and give what there is after each step, as `generate` would; n is 1.

        As SGLang has it, text and output_ids are all of the answer so far, not what is new; text is never taken back.
        finish_reason is None until the last. Closing the iterator early aborts the request.
        """
        if isinstance(sampling_params, (list, tuple)):
            raise InvalidRequest("sampling_params: must be a mapping or SamplingParams", field="sampling_params")
        scores, _ = scoring(return_logprob, logprob_start_len, top_logprobs_num)
        answers, many = self._answers(prompt, token_ids, sampling_params, scores, cache_salt, timeout)
        if len({a.request.tokens for a in answers}) < len(answers):
            raise InvalidRequest("n: stream gives one answer; use generate for several", field="n")
        if many:
            raise InvalidRequest("prompt: stream takes one prompt; use generate for a list", field="prompt")
        return self._stream(answers[0], self._spell(return_text_in_logprobs))

    def _stream(self, answer: Answer, spell: Callable[[int], str] | None) -> Iterator[Result]:
        self._streams.open(Submit(request=answer.request), answer.request.rid)
        with closing(self._streams.read(answer.request.rid)) as outputs:
            for output in outputs:
                answer.take(output)
                yield answer.result(spell)

    def _spell(self, wanted: bool) -> Callable[[int], str] | None:
        """What gives the texts beside logprobs. Raises InvalidRequest without a tokenizer."""
        tokenizer = self.tokenizer
        if not wanted:
            return None
        if tokenizer is None:
            raise InvalidRequest("return_text_in_logprobs: there is no tokenizer", field="return_text_in_logprobs")
        return lambda token: tokenizer.piece(token)[0]

    def _answers(
        self,
        prompts: Any,
        token_ids: Any,
        sampling_params: Any,
        scores: Mapping[str, Any],
        salt: str,
        timeout: float | None,
    ) -> tuple[list[Answer], bool]:
        """Everything that is asked, checked, and whether it is a list."""
        now = time.monotonic()
        until = deadline(timeout, now)
        ids, many = self._prompts(prompts, token_ids)
        if isinstance(sampling_params, (list, tuple)):
            if not many or len(sampling_params) != len(ids):
                raise InvalidRequest(
                    f"sampling_params: a list of {len(sampling_params)} for {len(ids)} prompts; give one each",
                    field="sampling_params",
                )
            params = [_wanted(p, scores) for p in sampling_params]
        else:
            params = [_wanted(sampling_params, scores)] * len(ids)
        answers: list[Answer] = []
        for i, (tokens, (one, n)) in enumerate(zip(ids, params, strict=True)):
            request = replace(self._request(tokens, one, salt), arrival=now, deadline=until)
            try:
                check_request(request, self._client.info.limits, self._client.info.room, ())
            except InvalidRequest as error:
                if not many:
                    raise
                raise type(error)(f"{error} (in prompt {i} of the list)", field=error.field) from error
            answers += [Answer.of(r, self.tokenizer) for r in several(request, n)]
        return answers, many or len(answers) > 1

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

    def _request(self, tokens: tuple[int, ...], params: SamplingParams, salt: str) -> Request:
        if self.tokenizer is None and params.stop:
            raise InvalidRequest("stop: there is no tokenizer (skip_tokenizer); use stop_token_ids", field="stop")
        words = () if self.tokenizer is None else self.tokenizer.sequences(params.bad_words)
        return Request(
            rid=uuid4().hex,
            tokens=tokens,
            params=params,
            seed=secrets.randbits(64) if params.seed is None else params.seed,
            eos=frozenset(self._client.info.eos),
            namespace=(salt,) if salt else (),
            bad_words=words,
        )


def _wanted(given: Params, scores: Mapping[str, Any]) -> tuple[SamplingParams, int]:
    """The parameters of a prompt, and how many answers it wants. Raises InvalidRequest."""
    n: Any = 1
    if isinstance(given, Mapping):
        n = 1 if given.get("n") is None else given["n"]
        if type(n) is not int or not 1 <= n <= MOST:
            raise InvalidRequest(f"n: must be an integer between 1 and {MOST}, not {n!r}", field="n")
        given = {name: value for name, value in given.items() if name != "n"}
    return replace(SamplingParams.of(given), **scores), n


def _integers(values: Any) -> tuple[int, ...]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if set(map(type, values)) <= {int}:
        return tuple(values)
    for v in values:
        if isinstance(v, bool) or not hasattr(v, "__index__"):
            raise InvalidRequest(f"token_ids: must be integers, not {v!r}", field="token_ids")
    return tuple(int(v) for v in values)
