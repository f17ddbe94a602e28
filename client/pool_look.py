"""A look at the public pool before consent: what it is, some of its rows, and how near they come to the owner's own."""

from __future__ import annotations

import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from common.pool import Pool, in_one_form

SHOWN = 10
BLOCK = 256  # pool rows that are compared with all own rows at once


@dataclass(frozen=True, kw_only=True)
class PoolLook:
    """`drawn`: some rows of the pool; `nearest`: those that share most words with an own row, and which share of the
    words of both; `own_rows`: how many rows of the pool say what an own row says.
    """

    rows: int
    drawn: tuple[str, ...]
    nearest: tuple[tuple[str, float], ...]
    own_rows: int


def look_at_pool(pool: Pool, own: Sequence[str]) -> PoolLook:
    """`own`: what the owner's rows say, of all splits.

    Rows are drawn anew each time: whoever made the pool cannot know which ones are shown.
    """
    texts = [_without_accents(in_one_form(row)) for row in pool.texts]
    mine = list(dict.fromkeys(_without_accents(in_one_form(text.split("\n"))) for text in own))
    overlaps = overlap(texts, mine)
    nearest = np.argsort(-overlaps, kind="stable")[:SHOWN]
    drawn = secrets.SystemRandom().sample(range(len(pool)), min(SHOWN, len(pool)))
    return PoolLook(
        rows=len(pool),
        drawn=tuple(" / ".join(pool.texts[row]) for row in sorted(drawn)),
        nearest=tuple((" / ".join(pool.texts[row]), float(overlaps[row])) for row in nearest),
        own_rows=len(set(texts) & set(mine)),
    )


def _without_accents(text: str) -> str:
    """As tokenizers without case read it. A row in other accents would ask the same."""
    if text.isascii():
        return text
    letters = (each for each in unicodedata.normalize("NFD", text) if unicodedata.category(each) != "Mn")
    return "".join(letters)  # check: accents-hide-no-own-row


def overlap(texts: Sequence[str], own: Sequence[str]) -> NDArray[np.float64]:
    """For each text, the largest share of words that it has in common with one of `own` (Jaccard index), (texts,)."""
    numbers: dict[str, int] = {}
    theirs, mine = (_words(each, numbers) for each in (texts, own))
    theirs, mine = (_as_matrix(each, len(numbers)) for each in (theirs, mine))  # (texts, words), (own, words)
    counts, own_counts = (np.asarray(each.sum(axis=1)).ravel() for each in (theirs, mine))
    found = np.zeros(len(texts))
    for start in range(0, len(texts) if len(own) else 0, BLOCK):
        block = slice(start, start + BLOCK)
        shared = (theirs[block] @ mine.T).toarray()  # (block, own)
        either = counts[block, None] + own_counts[None] - shared
        found[block] = (shared / np.maximum(either, 1)).max(axis=1)
    return found


def _words(texts: Sequence[str], numbers: dict[str, int]) -> list[list[int]]:
    return [[numbers.setdefault(word, len(numbers)) for word in dict.fromkeys(text.split())] for text in texts]


def _as_matrix(words: list[list[int]], columns: int) -> csr_matrix:
    """1 where a text has a word."""
    ends = np.cumsum([0, *map(len, words)])
    flat = np.fromiter((number for each in words for number in each), np.int64, int(ends[-1]))
    return csr_matrix((np.ones(len(flat), np.float32), flat, ends), shape=(len(words), columns))
