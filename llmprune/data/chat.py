"""Chats as text: messages rendered through a tokenizer's own chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Render = Callable[[Any], str]
"""From the messages of a row to its text. Raises ValueError, saying what is wrong with them."""


def chat_renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    """Renders messages - a list of mappings with a `role` and a `content`, both strings - through the template.

    A BOS that the template writes is taken off: whether windows open with it is for `data.bos` to say. Raises
    ValueError if the tokenizer has no template.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            "messages are rendered through the tokenizer's chat template, and this tokenizer has none; name the "
            "tokenizer of a chat model, or a source with a text_field"
        )

    def render(messages: Any) -> str:
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"messages must be a list of {{role, content}}, got {messages!r:.80}")
        for message in messages:
            if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
                raise ValueError(f"every message must have a role and a content, both strings; got {message!r:.80}")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError, KeyError) as error:
            raise ValueError(f"the chat template refuses these messages: {error!s:.120}") from error
        assert isinstance(text, str)
        bos = tokenizer.bos_token
        return text.removeprefix(bos) if isinstance(bos, str) and not _opens_turns(tokenizer, bos) else text

    return render


def _opens_turns(tokenizer: PreTrainedTokenizerBase, bos: str) -> bool:
    """Whether BOS stands before every turn, as <|im_start|> does for some: then it is part of the chat."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateError:
        return False
    return isinstance(text, str) and text.count(bos) > 1
