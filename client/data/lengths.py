"""How many tokens an owner's texts are, how many texts are cut, and how many another tokenizer would read differently.

`amalgram check` and `amalgram agree` say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.data.chat import chat_columns, write_out
from client.data.columns import columns_of
from client.settings import Data
from common.agreement import Task
from common.data.files import read_columns
from common.metrics import LOOK_TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LOOK_ROWS = LOOK_TEXTS  # drawn from a file
MOST = 0.99  # of the texts, for which a longer limit is proposed


def cut_texts(data: Data, task: Task, paths: Iterable[Path], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """For each of an owner's files of which texts are cut: its name, and how many, in words."""
    for path in dict.fromkeys(paths):
        if words := cut_in_words(token_lengths(data, task, path, tokenizer), task.max_tokens):
            yield f"{path.name}: {words}"


def count_cut(data: Data, task: Task, path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many texts of a file are cut, of how many that were looked at."""
    lengths = token_lengths(data, task, path, tokenizer)
    return int((lengths > task.max_tokens).sum()), len(lengths)


def token_lengths(data: Data, task: Task, path: Path, tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """(rows,): how many tokens the inputs of some rows of a file have, drawn from all of them."""
    encode = _encoder(data, task, path, tokenizer)
    return np.array([len(tokens) for tokens in encode(tokenizer)])


def count_read_differently(
    data: Data, task: Task, path: Path, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> tuple[int, int]:
    """How many texts of a file the two tokenizers split differently, of how many that were looked at. A vocabulary does
    not say how a tokenizer lowers case, strips accents or splits words.
    """
    encode = _encoder(data, task, path, tokenizer)
    pairs = list(zip(encode(tokenizer), encode(other), strict=True))
    return sum(one != two for one, two in pairs), len(pairs)


def _encoder(
    data: Data, task: Task, path: Path, tokenizer: PreTrainedTokenizerBase
) -> Callable[[PreTrainedTokenizerBase], list[list[int]]]:
    """What gives the tokens of some rows of a file, drawn from all of them. `tokenizer` writes conversations out."""
    words, options = task.kind == "token-classification", dict[str, Any]()
    if task.kind == "causal-lm" and (chat := chat_columns(data)):
        found = read_columns(path, chat, LOOK_ROWS)
        texts = [[row.text for row in write_out(path, [found[column] for column in chat], tokenizer)]]
        options = {"add_special_tokens": False}
    else:
        columns = columns_of(data, task.kind)
        found = read_columns(path, columns if words else columns[: 2 if data.text_pair else 1], LOOK_ROWS)
        texts, options = list(found.values())[: 1 if words else None], {"is_split_into_words": words}
    return lambda each: list(each(*texts, verbose=False, **options)["input_ids"])


def cut_in_words(lengths: Sequence[int] | NDArray[np.int64], max_tokens: int) -> str:
    """How many texts are cut, and to what limit most would fit; empty if none is cut."""
    lengths = np.asarray(lengths)
    cut = int((lengths > max_tokens).sum())
    if not cut:
        return ""
    enough = int(np.quantile(lengths, MOST, method="higher"))
    fit = f"; {MOST:.0%} have at most {enough:,}" if enough > max_tokens else ""
    are, longest = "is" if cut == 1 else "are", int(lengths.max())
    return (
        f"{cut:,} of {len(lengths):,} texts {are} longer than max_tokens = {max_tokens:,} and {are} cut; "
        f"the longest has {longest:,} tokens{fit}"
    )
