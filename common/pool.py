"""The pool: public rows without labels on which owners' models predict (common/merge_methods/distill.py).

One JSON Lines file, an object a row. The agreement pins its SHA-256, because whoever could choose the rows could ask
about one person's. A party that holds another file refuses. Only the pinned bytes are ever parsed.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import DataError
from common.text import SURROGATE, alike

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from common.merge_methods.distill import DistillTable

MAX_BYTES = 1_000_000_000
MAX_ROW_CHARACTERS = 100_000
MAKE_IT_AGAIN = "correct the file, and complete the draft again: amalgram draft"


@dataclass(frozen=True)
class Pool:
    """`texts`: for each row its text, or its two texts if rows are pairs."""

    texts: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.texts)

    def tokens(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> tuple[dict[str, Any], ...]:
        """What a model reads of each row, cut to `max_tokens`, not padded. Raises DataError if that is nothing."""
        texts, *pairs = (list(column) for column in zip(*self.texts, strict=True))
        encoded = tokenizer(texts, *pairs, truncation=True, max_length=min(max_tokens, tokenizer.model_max_length))
        empty = next((number for number, tokens in enumerate(encoded["input_ids"], 1) if not tokens), None)
        if empty is not None:
            raise DataError(f"pool: row {empty} gives the model no token", hint=MAKE_IT_AGAIN)
        return tuple({name: values[row] for name, values in encoded.items()} for row in range(len(self)))


def in_one_form(texts: Sequence[str]) -> str:
    """A row such that rows that say the same are equal: without regard to case, width, white space, and characters that
    nobody sees, which most tokenizers drop.
    """
    return "\n".join(" ".join(_seen(alike(text)).split()) for text in texts)


def _seen(text: str) -> str:
    if text.isprintable():
        return text
    kept = (each for each in text if each.isspace() or unicodedata.category(each)[0] != "C")
    return "".join(kept)  # check: unseen-characters-do-not-count


def pool_path(own_copy: Path | None, home: Path, table: DistillTable, agreement_path: Path) -> Path:
    """A party's copy of the pool, relative to its settings in `home`, or else the file beside the agreement."""
    return agreement_path.parent / (table.pool or "") if own_copy is None else home / own_copy


def read_pool(path: Path, table: DistillTable) -> Pool:
    """The agreed pool. Raises DataError for any other file, and for a row that is missing, empty or said twice."""
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if digest != table.pool_sha256:  # check: pool-is-the-agreed-one
        raise DataError(
            f"pool {path}: its SHA-256 is {digest[:16]}..., the agreement's is {(table.pool_sha256 or 'none')[:16]}...",
            hint="get the file that was agreed on; whoever chooses its rows chooses what is asked about",
        )
    pool = _parsed(path, content, table)
    if len(pool) != table.rows:
        raise DataError(f"pool {path}: has {len(pool)} rows, the agreement says {table.rows}", hint=MAKE_IT_AGAIN)
    return pool


def pin_pool(path: Path, table: DistillTable) -> DistillTable:
    """The table with the SHA-256 and the number of rows of the file, where it left them out. Raises DataError."""
    content = _read(path)
    found = {"pool_sha256": hashlib.sha256(content).hexdigest(), "rows": len(_parsed(path, content, table))}
    pinned = table.model_copy(update={name: getattr(table, name) or value for name, value in found.items()})
    read_pool(path, pinned)
    return pinned


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(
            f"pool {path}: cannot be read ({error.strerror})",
            hint='put the agreed file beside the agreement, or name your copy in your settings: pool = "..."',
        ) from None
    if len(content) > MAX_BYTES:
        raise DataError(f"pool {path}: a pool has at most {MAX_BYTES} bytes", hint=MAKE_IT_AGAIN)
    return content


def _parsed(path: Path, content: bytes, table: DistillTable) -> Pool:
    columns = [table.text, *filter(None, [table.text_pair])]
    rows = tuple(_rows(path, content, columns))
    if not rows:
        raise DataError(f"pool {path}: has no rows", hint=MAKE_IT_AGAIN)
    first: dict[str, int] = {}
    for number, texts in enumerate(rows, 1):
        said = in_one_form(texts)
        if first.setdefault(said, number) != number:  # check: pool-rows-are-said-once
            raise DataError(
                f"pool {path}: row {number} says what row {first[said]} says; what is asked twice counts twice",
                hint=MAKE_IT_AGAIN,
            )
    return Pool(rows)


def _rows(path: Path, content: bytes, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for number, line in zip(count(1), content.splitlines()):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError(f"pool {path}: line {number} is not JSON", hint=MAKE_IT_AGAIN) from None
        texts = [row.get(column) if isinstance(row, dict) else None for column in columns]
        for column, text in zip(columns, texts, strict=True):
            if not _is_text(text):
                raise DataError(
                    f"pool {path}: line {number}: {column!r} must be a text of 1 to {MAX_ROW_CHARACTERS} characters",
                    hint=MAKE_IT_AGAIN,
                )
        yield tuple(map(str, texts))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value.strip()) <= MAX_ROW_CHARACTERS and not SURROGATE.search(value)
