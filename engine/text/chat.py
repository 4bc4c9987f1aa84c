"""Conversations to tokens, by the template that comes with a model's tokenizer.

transformers renders it in a sandbox that can't reach Python's objects or change what it is given. Here it gets a bound
on its time and on the size of what it makes: a template is data of a checkpoint, and what it loops over is a client's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.text.deadline import Deadline
from engine.text.tokenizer import Tokenizer

MAX_CHARS = 32 << 20
"""Of a rendered conversation: four times the default bound of a request's body."""
MAX_SECONDS = 3.0
"""Of rendering. It is also what bounds the text that a template keeps to itself, in a macro or a variable."""


def render(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Ids of a conversation, up to where the assistant's answer begins.

    messages: {"role": ..., "content": ...} each.
    Raises InvalidRequest naming the field: no messages, a message without a role, a model without a template, or a
    conversation that its template refuses, takes too long for or makes too much of.
    """
    from jinja2 import TemplateError

    if not messages:
        raise InvalidRequest("messages: is empty; give at least one message", field="messages")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages.{i}: must be a mapping with a role", field=f"messages.{i}")
    if not tokenizer.inner.chat_template:
        raise InvalidRequest("messages: this model has no chat template; give a prompt instead", field="messages")
    try:
        with Deadline(MAX_SECONDS):
            text = _text(tokenizer.inner, [dict(m) for m in messages])
    except TimeoutError as error:
        raise InvalidRequest(
            f"messages: the chat template is not done with them after {MAX_SECONDS:g} s", field="messages"
        ) from error
    except (TemplateError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError, MemoryError) as error:
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidRequest(f"messages: the chat template refuses them: {cause}", field="messages") from error
    try:
        return tokenizer.encode(text, special=False)
    except InvalidRequest as error:
        raise InvalidRequest(str(error).replace("prompt", "messages", 1), field="messages") from error


def _text(inner: Any, messages: list[dict[str, Any]]) -> str:
    """The conversation as the model's template writes it."""
    from transformers.utils import chat_template_utils

    # The template that is about to be rendered, from transformers' cache of compiled ones: jinja joins what it makes by
    # a function of its environment. It is the only way to stop a template before all of its text is made.
    compiled = getattr(chat_template_utils, "_compile_jinja_template", None)
    if compiled is not None:
        compiled(inner.get_chat_template()).environment.concat = _join
    text = str(inner.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    return _join((text,))


def _join(pieces: Iterable[str]) -> str:
    """The pieces as one text. Raises InvalidRequest past MAX_CHARS, before the rest is made."""
    out, size = [], 0
    for piece in pieces:
        size += len(piece)
        if size > MAX_CHARS:
            raise InvalidRequest(
                f"messages: the chat template makes over {MAX_CHARS} characters of them", field="messages"
            )
        out.append(piece)
    return "".join(out)
