"""Instruction data for a language model: conversations, or prompts with their completions. Only what the model should
say is judged: it is trained to say that, and its likelihood is measured there.

A conversation is written out by the base's own chat template. Few templates mark what the assistant says, so it is
found by comparison: the text up to a turn of the assistant and the text up to its end must both begin the whole text.
A template that rewrites earlier turns, as some do with what a model thought, breaks this, and its rows are refused.

All tokens are measured, those of prompts too, because the layers run on them in use; padding is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.settings import Data
from common.errors import DataError, first_line
from common.text import SURROGATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "user", "assistant")
A_TURN = 'a turn is {"role": "user", "content": "..."}'

Spans = list[tuple[int, int]]  # the first character of each stretch, and the one after its last


@dataclass(frozen=True)
class Written:
    """One row as the model reads it. `said`: the stretches that the model should say. `content`: the words of the row
    alone, without what a template adds.
    """

    text: str
    said: Spans
    content: str
    has_special_tokens: bool


def chat_columns(data: Data) -> list[str]:
    """The columns of instruction data, none for plain texts."""
    if data.messages is not None:
        return [data.messages]
    return [data.prompt, data.completion] if data.prompt is not None else []


def write_out(path: Path, found: Sequence[Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> list[Written]:
    """Every row. `found`: the values of `chat_columns`. Raises DataError, which names the row and quotes none of it."""
    rows = []
    for number, values in enumerate(zip(*found, strict=True), 1):
        where = f"{path}: row {number}"
        if len(values) == 1:
            rows.append(_conversation(where, _turns(where, values[0]), 0, tokenizer))
        elif all(isinstance(value, list) for value in values):
            prompt, completion = (_turns(where, value) for value in values)
            rows.append(_conversation(where, [*prompt, *completion], len(prompt), tokenizer))
        else:
            rows.append(_completion(where, values[0], values[1], tokenizer))
    return rows


def _conversation(where: str, turns: list[dict[str, str]], first: int, tokenizer: PreTrainedTokenizerBase) -> Written:
    """A conversation in which the assistant's turns from `first` on are judged."""
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: is a conversation, but the base's tokenizer has no chat template",
            hint="agree on a base with a chat_template, or name a prompt and a completion column",
        )
    judged = [index for index in range(first, len(turns)) if turns[index]["role"] == "assistant"]
    if not judged:
        raise DataError(f"{where}: has no turn of the assistant", hint="leave the row out")
    if judged[0] == 0:
        raise DataError(
            f"{where}: begins with the assistant", hint="begin with what the user says, or leave the row out"
        )
    whole = _templated(where, turns, tokenizer)
    said = []
    for index in judged:
        before = _templated(where, turns[:index], tokenizer, add_generation_prompt=True)
        until = _templated(where, turns[: index + 1], tokenizer)
        if not (until.startswith(before) and whole.startswith(until)):
            raise DataError(
                f"{where}: the base's chat template writes a turn differently once others follow, so what the "
                "assistant says cannot be told from the rest",
                hint="give the last turn as the completion and all before it as the prompt, both lists of turns",
            )
        said.append((len(before), len(until)))
    return Written(whole, said, "\n".join(turn["content"] for turn in turns), has_special_tokens=True)


def _completion(where: str, prompt: Any, completion: Any, tokenizer: PreTrainedTokenizerBase) -> Written:
    """A prompt, what the model should say to it, and the end-of-text token."""
    for value in (prompt, completion):
        if not isinstance(value, str):
            raise DataError(
                f"{where}: its prompt or completion is {type(value).__name__}, not text",
                hint="both are texts, or both are lists of turns",
            )
        _check_text(where, value)
    if not completion:
        raise DataError(f"{where}: its completion is empty", hint="leave the row out")
    text = prompt + completion + (tokenizer.eos_token or "")
    return Written(text, [(len(prompt), len(text))], f"{prompt}\n{completion}", has_special_tokens=False)


def _templated(where: str, turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: bool) -> str:
    try:
        written = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except Exception as error:  # a template can raise anything, and often does where it takes no system turn
        raise DataError(
            f"{where}: the base's chat template does not take this conversation: {first_line(error)[:200]}",
            hint="check the order of its roles; some templates take no system turn",
        ) from None
    return str(written)


def _turns(where: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        raise DataError(f"{where}: its conversation is {type(value).__name__}, not a list of turns", hint=A_TURN)
    return [_turn(f"{where}, turn {number}", turn) for number, turn in enumerate(value, 1)]


def _turn(where: str, turn: dict[str, Any]) -> dict[str, str]:
    if turn.get("tool_calls"):
        raise DataError(f"{where}: calls a tool, which is not supported", hint="leave the row out")
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        raise DataError(f"{where}: its role is none of {', '.join(ROLES)}", hint=A_TURN)
    if isinstance(content, list):  # parts, of which only text can be used
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise DataError(f"{where}: has a part that is not text", hint="leave the row out")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: its content is {type(content).__name__}, not text", hint=A_TURN)
    _check_text(where, content)
    return {"role": role, "content": content}


def _check_text(where: str, text: str) -> None:
    if SURROGATE.search(text):  # check: chats-are-unicode
        raise DataError(
            f"{where}: holds half of a surrogate pair", hint="write the whole character, or remove the half"
        )


def content_of(value: Any) -> str:
    """What a cell of instruction data says, whether or not it is well formed."""
    if not isinstance(value, list):
        return str(value)
    turns = (turn if isinstance(turn, dict) else {"content": turn} for turn in value)
    return "\n".join(f"{turn.get('role', '')} {turn.get('content', '')}" for turn in turns)
