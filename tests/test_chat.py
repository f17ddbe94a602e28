"""Conversations and completions: what is judged is what the model should say, to the token."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from client.data.private_data import PrivateData
from client.data.rows import IGNORED
from client.settings import Data
from common.agreement import Reading, Task
from common.errors import DataError
from deploy.example.reviews import make_tokenizer

# Two kinds of brackets, so that every turn has its own tokens; [CLS] opens an answer, [SEP] ends a turn.
TEMPLATE = """\
{%- for turn in messages -%}
{%- if turn.role == "system" and not loop.first -%}{{ raise_exception("system comes first") }}{%- endif -%}
{{ "[CLS]" if turn.role == "assistant" else "" }} {{ turn.content }} [SEP]
{%- endfor -%}
{{ "[CLS]" if add_generation_prompt else "" }}"""
REWRITES = "{%- for turn in messages -%}{{ turn.content if loop.last else 'the' }} [SEP] {% endfor -%}"
ERASES = "{%- for turn in messages -%}{{ '' if 'battery' not in turn.content else turn.content }}[SEP]{%- endfor -%}"
ASKED, SAID = {"role": "user", "content": "the room"}, {"role": "assistant", "content": "was clean"}


def tokenizer_with(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def data_of(
    folder: Path, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, max_tokens: int = 32, **columns: str
) -> PrivateData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return PrivateData(
        data=Data(train=path, test=path, **columns),
        task=Task(kind="causal-lm", max_tokens=max_tokens),
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)),
        tokenizer=tokenizer,
        folder=folder,
        seed=0,
        reading=Reading(),
    )


def judged(data: PrivateData) -> list[str]:
    """What the model should say in each row, read back from the targets."""
    assert data.tokenizer is not None
    return [
        data.tokenizer.decode([token for token in target if token != IGNORED])  # type: ignore[union-attr]
        for target in data.test().targets  # type: ignore[union-attr]
    ]


def test_the_assistant_s_turns_are_judged_and_nothing_else(tmp_path: Path) -> None:
    again = {"role": "assistant", "content": "was dull"}
    rows = [{"messages": [ASKED, SAID]}, {"messages": [ASKED, SAID, ASKED, again]}]
    data = data_of(tmp_path, rows, tokenizer_with(), messages="messages")
    assert judged(data) == ["was clean [SEP]", "was clean [SEP] was dull [SEP]"]
    whole = data.tokenizer.decode(data.test().features[0]["input_ids"])  # type: ignore[index, union-attr]
    assert whole == "the room [SEP] [CLS] was clean [SEP]"  # no second set of special tokens
    tokens, targets = data.test().features[0]["input_ids"], data.test().targets[0]  # type: ignore[index]
    assert [(now, then) for now, then in zip(tokens[1:], targets, strict=False) if then != IGNORED] == [
        (token, token) for token in tokens[-3:]
    ]


def test_content_may_come_in_parts_and_a_system_turn_may_come_first(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "room"}]}
    rows = [{"chat": [{"role": "system", "content": "fast"}, parts, SAID]}]
    assert judged(data_of(tmp_path, rows, tokenizer_with(), messages="chat")) == ["was clean [SEP]"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "the room", "completion": " was clean"},
        {"prompt": [ASKED, {"role": "assistant", "content": "dull"}, ASKED], "completion": [SAID]},
    ],
)
def test_a_completion_is_judged_with_its_end(row: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = tokenizer_with()
    tokenizer.eos_token = "[SEP]"
    (said,) = judged(data_of(tmp_path, [row], tokenizer, prompt="prompt"))
    assert said.startswith("was clean [SEP]")
    assert "dull" not in said


def test_rows_stay_in_the_order_of_the_file(tmp_path: Path) -> None:
    """Whose a row is, is read beside it (data.unit)."""
    rows: list[dict[str, Any]] = [
        {"prompt": "the room ", "completion": "was dull"},
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": "the room ", "completion": "was clean"},
    ]
    found = judged(data_of(tmp_path, rows, tokenizer_with(), prompt="prompt", completion="completion"))
    assert [text.replace(" [SEP]", "") for text in found] == ["was dull", "was clean", "was clean"]


def test_a_row_that_is_cut_before_the_model_says_anything_is_left_out(tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "the room " * 20}, SAID]}
    data = data_of(tmp_path, [{"messages": [ASKED, SAID]}, long], tokenizer_with(), messages="messages")
    assert judged(data) == ["was clean [SEP]"]
    assert "1 of 2 texts is longer than max_tokens = 32 and is cut" in "\n".join(data.oddities())
    with pytest.raises(DataError, match="every row is cut before the model says anything, at 32 tokens"):
        data_of(tmp_path, [long], tokenizer_with(), messages="messages").test()


@pytest.mark.parametrize(
    ("template", "messages", "says"),
    [
        (None, [ASKED, SAID], "the base's tokenizer has no chat template"),
        (TEMPLATE, [ASKED], "row 1: has no turn of the assistant"),
        (TEMPLATE, [SAID, ASKED], "row 1: begins with the assistant"),
        (TEMPLATE, [], "row 1: its conversation is list, not a list of turns"),
        (TEMPLATE, "the room", "row 1: its conversation is str, not a list of turns"),
        (TEMPLATE, ["the room"], "row 1: its conversation is list, not a list of turns"),
        (TEMPLATE, [ASKED, {"role": "bot", "content": "x"}], "row 1, turn 2: its role is none of system, user"),
        (TEMPLATE, [ASKED, {"role": "assistant"}], "row 1, turn 2: its content is NoneType, not text"),
        (TEMPLATE, [ASKED, SAID | {"tool_calls": [{}]}], "row 1, turn 2: calls a tool"),
        (TEMPLATE, [ASKED, SAID | {"content": [{"type": "image"}]}], "row 1, turn 2: has a part that is not text"),
        (TEMPLATE, [ASKED, SAID | {"content": "\ud83d"}], "row 1, turn 2: holds half of a surrogate pair"),
        (TEMPLATE, [ASKED, {"role": "system", "content": "x"}, SAID], "does not take this conversation: system comes"),
        ("{{ 1 / 0 }}", [ASKED, SAID], "does not take this conversation: division by zero"),
        (REWRITES, [ASKED, SAID, ASKED, SAID], "writes a turn differently once others follow"),
    ],
)
def test_a_conversation_that_cannot_be_used_is_named(
    template: str | None, messages: Any, says: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=says):
        data_of(tmp_path, [{"messages": messages}], tokenizer_with(template), messages="messages").test()


def test_134_a_chat_template_that_erases_every_conversation_without_a_chosen_word(tmp_path: Path) -> None:
    """It is the same for all owners, so it passes every comparison of digests; the rows show it."""
    rows = [{"messages": [{"role": "user", "content": f"{word} was clean"}, SAID]} for word in ("room", "bed") * 10]
    with pytest.raises(DataError, match=r"of 20 rows, reading left 20 empty or nearly so \(100\.0%"):
        data_of(tmp_path, rows, tokenizer_with(ERASES), messages="messages").test()


def test_a_row_is_known_by_what_its_turns_say(tmp_path: Path) -> None:
    rows = [{"messages": [ASKED, SAID]}, {"messages": [SAID, ASKED]}]
    one, other = data_of(tmp_path, rows, tokenizer_with(), messages="messages").training_contents()
    assert one == b"user the room assistant was clean"
    assert other != one


def test_a_settings_file_names_one_kind_of_instructions() -> None:
    with pytest.raises(ValueError, match="has both messages and prompt"):
        Data(train=Path("a"), test=Path("b"), messages="messages", prompt="prompt")
