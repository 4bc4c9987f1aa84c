"""Conversations to tokens, by the template that comes with a model's tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from engine.errors import InvalidRequest
from engine.text.tokenizer import Tokenizer


def render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None
) -> list[int]:
    """Ids of a conversation, up to where the assistant's answer begins.

    messages: {"role": ..., "content": ...} each. tools: JSON schemas of functions, as OpenAI writes them.
    Raises InvalidRequest naming the field: no messages, a message without a role, a model without a template, or a
    conversation that its template refuses.
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
        ids = tokenizer.inner.apply_chat_template(
            [dict(m) for m in messages],
            tools=[dict(t) for t in tools] if tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        cause = " ".join(str(error).split())[:200]
        raise InvalidRequest(f"messages: the chat template refuses them: {cause}", field="messages") from error
    return [int(i) for i in ids]
