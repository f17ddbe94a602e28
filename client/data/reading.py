"""What reading did to an owner's rows, measured before anything leaves (`[reading]` in the agreement).

All parties read with the base's files, so a base whose tokenizer erases almost every text passes any comparison of
digests, while the total is about the few rows that it spared. Here every owner counts its own rows that were lost. A
tokenizer that loses less than that is not found: see SECURITY.md, i4. An image processor can lose images too: it may
make one of all of them, or multiply what distinguishes them by nearly zero.
"""

import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.agreement import Reading
from common.data.images import as_array
from common.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

WORDS_PER_TOKEN = 2  # the tokenizers that we know read a word as one token or more
FEW_TOKENS = 8  # in a shorter row, one token may well be most of it
LEAST_DIFFERENCE = 0.1  # of two images' own, in numbers from 0 to 1; usual processors leave 0.5 to 5 times as much
FEW_ROWS = 2  # a pair of equal rows shows nothing, even if there are few rows


def check_texts(
    path: Path,
    texts: Sequence[Any],
    tokens: Sequence[Sequence[int]],
    tokenizer: "PreTrainedTokenizerBase",
    max_tokens: int,
    bounds: Reading,
) -> None:
    """Raise DataError if reading lost too many rows. `texts`: each row's text, pair of texts or list of words."""
    special, unknown = _special_tokens(tokenizer)
    empty = uniform = 0
    equal = _EqualRows()
    for text, row in zip(texts, tokens, strict=True):
        equal.add(tuple(row), text)
        kept = [token for token in row if token not in special]
        empty += _is_empty(text, kept, max_tokens)
        uniform += _is_uniform(kept, unknown)
    counts = {
        "max_empty": ("empty or nearly so", empty, bounds.max_empty),
        "max_equal": ("equal to a row with another text", equal.count(), bounds.max_equal),
        "max_unknown": ("mostly unknown or of one repeated token", uniform, bounds.max_unknown),
    }
    _check_counts(path, len(tokens), counts, "tokenizer")


class _EqualRows:
    """Counts the rows of which reading makes the same as of a row that says something else."""

    def __init__(self) -> None:
        self._first: dict[int, Any] = {}  # what reading makes -> what the first such row says
        self._read: list[int] = []
        self._shared: set[int] = set()

    def add(self, read: Hashable, says: Any) -> None:
        key = hash(read)
        if self._first.setdefault(key, says) != says:
            self._shared.add(key)
        self._read.append(key)

    def count(self) -> int:
        return sum(key in self._shared for key in self._read)


class LostImages:
    """Counts images that preparation made nearly the same as the one before, although they are not, or exactly the same
    as any other.

    Two images are compared, because a processor can paint the same contrast on all of them: a frame, or colours.
    """

    def __init__(self) -> None:
        self._total = self._alike = 0
        self._before: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
        self._equal = _EqualRows()

    def count(self, image: "Image", prepared: NDArray[np.float32]) -> None:
        """Count one image. `prepared`: (channels, height, width)."""
        seen = as_array(image, *prepared.shape)
        before, self._before = self._before or (seen, prepared), (seen, prepared)
        kept = float(np.linalg.norm(prepared - before[1]))
        self._total += 1
        if not kept >= LEAST_DIFFERENCE * np.linalg.norm(seen - before[0]):  # check: prepared-images-differ
            self._alike += 1
        self._equal.add(prepared.tobytes(), hashlib.sha256(seen.tobytes()).digest())

    def check(self, path: Path, bounds: Reading) -> None:
        """Raise DataError if preparation lost too many of the images."""
        counts = {
            "max_empty": ("nearly equal to the image before", self._alike, bounds.max_empty),
            "max_equal": ("equal to another image", self._equal.count(), bounds.max_equal),
        }
        _check_counts(path, self._total, counts, "image processor")


def _check_counts(path: Path, total: int, counts: Mapping[str, tuple[str, int, float]], reader: str) -> None:
    """Raise DataError for too large a count. `counts`: by bound, what was lost, how often, and which share may be."""
    for bound, (_, count, share) in counts.items():
        if count > max(share * total, FEW_ROWS):  # check: reading-kept-the-rows
            found = ", ".join(
                f"{each} {what} ({each / total:.1%}, at most {most:.1%})" for what, each, most in counts.values()
            )
            raise DataError(
                f"{path}: of {total} rows, reading left {found}; nothing has left",
                hint=f"ask who chose the base, because its {reader} loses what these rows say; if the rows themselves "
                f"are like this, agree on a higher reading.{bound}",
            )


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[set[int], int | None]:
    """The tokens that stand for no text, and the one for unknown text, if it has a token of its own."""
    ends = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.cls_token, tokenizer.sep_token)
    unknown = None if tokenizer.unk_token in ends else tokenizer.unk_token_id
    return set(tokenizer.all_special_ids) - {unknown}, unknown


def _is_empty(text: Any, kept: Sequence[int], max_tokens: int) -> bool:
    """Whether the row has no token, or far too few for its words. A text of blanks was empty before."""
    words = text.split() if isinstance(text, str) else [word for part in text for word in part.split()]
    # A long text is cut, and special tokens may take some of the room that is left.
    return len(kept) * WORDS_PER_TOKEN < min(len(words), max_tokens // 2)


def _is_uniform(kept: Sequence[int], unknown: int | None) -> bool:
    """Whether more than half of the row is the unknown token, or in a longer row any one token."""
    if not kept:
        return False
    token, count = Counter(kept).most_common(1)[0]
    return 2 * count > len(kept) and (token == unknown or len(kept) >= FEW_TOKENS)
