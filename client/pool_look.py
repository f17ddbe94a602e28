"""A look at the public pool before consent: what it is, some of its rows, and how near they come to the owner's own.

Texts and words are compared by the words that they share, in a script without blanks by characters. Images are compared
in 16 by 16 shades of grey: that finds an owner's own image although it was saved anew, in another size or light, or
with a few pixels changed. It does not find one that was turned, mirrored or cropped. Nobody can see an image in a
terminal, so those that are named lie in a sheet.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from common.data.images import ImageFile
from common.lazy import lazy_module
from common.pool import ImagePool, Pool, in_one_form
from common.private_file import create

if TYPE_CHECKING:
    from PIL import Image, ImageDraw
else:
    Image, ImageDraw = lazy_module("PIL.Image"), lazy_module("PIL.ImageDraw")

SHOWN = 10
BLOCK = 256  # pool rows that are compared with all own rows at once
SAME_IMAGE = 0.85  # nearness of images that look the same
LEAST_CONTRAST = 1e-3  # so that what rounding leaves of two blank images does not make them differ
LEAST_WORDS = 3  # of a row whose variants are counted: shorter ones are alike by chance
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")  # scripts without blanks: Thai to Khmer, kana, Han
TILES, TILE, CAPTION = 5, 160, 12  # images in a line of a sheet; pixels on a side of each, and below it


@dataclass(frozen=True, kw_only=True)
class PoolLook:
    """`drawn`: some rows of the pool; `nearest`: those that are nearest to an own row, and how near, from 0 to 1.

    `own_rows`: how many rows of the pool say what an own row says, or look like one; `near_own_rows`: how many differ
    from an own row in one word at most, or look like one. `variants`: how many rows of the pool are nearly one and the
    same, and `varied` one of these. `drawn_rows`, `nearest_rows`: their numbers, from 1.
    """

    rows: int
    drawn: tuple[str, ...]
    nearest: tuple[tuple[str, float], ...]
    own_rows: int
    near_own_rows: int = 0
    variants: int = 1
    varied: str = ""
    drawn_rows: tuple[int, ...] = ()
    nearest_rows: tuple[int, ...] = ()


def look_at_pool(pool: Pool, own: Sequence[str]) -> PoolLook:
    """`own`: what the owner's rows say, of all splits.

    Rows are drawn anew each time: whoever made the pool cannot know which ones are shown.
    """
    rows = [_as_read([" ".join(row)] if pool.has_words else row) for row in pool.texts]
    mine = list(dict.fromkeys(form for text in own for form in _as_read(text.split("\n"))))
    forms, starts = [form for row in rows for form in row], np.cumsum([0, *map(len, rows)])[:-1]
    variants, varied = most_varied([row[0] for row in rows])
    written, known = pool.written(), set(mine)
    return _look(
        np.maximum.reduceat(overlap(forms, mine), starts),
        written,
        own_rows=sum(not known.isdisjoint(row) for row in rows),
        near_own_rows=int(np.logical_or.reduceat(are_variants(forms, mine), starts).sum()),
        variants=variants,
        varied=written[varied],
    )


def look_at_images(pool: ImagePool, own: Sequence[NDArray[np.float32]]) -> PoolLook:
    """`own`: thumbnails of the owner's images, of all splits, (256,) each."""
    near, alike = nearness(pool.thumbnails, np.stack(own)), _alike(pool.thumbnails)
    named = [_name_of(pool, row) for row in range(len(pool))]
    same = int((near >= SAME_IMAGE).sum())
    return _look(
        near,
        named,
        own_rows=same,
        near_own_rows=same,
        variants=int(alike.max()),
        varied=named[int(alike.argmax())],
    )


def _look(
    near: NDArray[np.float64],
    written: Sequence[str],
    *,
    own_rows: int,
    near_own_rows: int,
    variants: int,
    varied: str,
) -> PoolLook:
    nearest = [int(row) for row in np.argsort(-near, kind="stable")[:SHOWN]]
    drawn = sorted(secrets.SystemRandom().sample(range(len(written)), min(SHOWN, len(written))))
    return PoolLook(
        rows=len(written),
        drawn=tuple(written[row] for row in drawn),
        nearest=tuple((written[row], float(near[row])) for row in nearest),
        own_rows=own_rows,
        near_own_rows=near_own_rows,
        variants=variants,
        varied=varied,
        drawn_rows=tuple(row + 1 for row in drawn),
        nearest_rows=tuple(row + 1 for row in nearest),
    )


# --- texts and words ---


def _as_read(texts: Sequence[str]) -> tuple[str, ...]:
    """The words of a row as tokenizers read it: BERT's drop what does not show, SentencePiece makes it a blank."""
    dropped, blank = in_one_form(texts), in_one_form(texts, unseen=" ")  # check: unseen-blanks-hide-no-own-row
    return tuple(dict.fromkeys(_words_alone(_without_accents(form)) for form in (dropped, blank)))


def _without_accents(text: str) -> str:
    """As tokenizers without case read it. A row in other accents would ask the same."""
    if text.isascii():
        return text
    letters = (each for each in unicodedata.normalize("NFD", text) if unicodedata.category(each) != "Mn")
    return "".join(letters)  # check: accents-hide-no-own-row


def _words_alone(text: str) -> str:
    """Without punctuation, which says little. Where a script has no blanks, each character is a word."""
    return " ".join(WORD.findall(text)) or text  # check: punctuation-hides-no-own-row


def most_varied(texts: Sequence[str]) -> tuple[int, int]:
    """How many of the texts are one text with at most one word changed; and the index of one of these."""
    keys = [_keys(text) for text in texts]
    found, counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *keys]), return_counts=True)
    if not len(found):
        return 1, 0
    most = found[counts.argmax()]
    return int(counts.max()), next(index for index, each in enumerate(keys) if most in each)


def are_variants(texts: Sequence[str], own: Sequence[str]) -> NDArray[np.bool_]:
    """Which of the texts are one of `own` with at most one word changed, added or left out; (texts,)."""
    mine = np.unique(np.concatenate([np.zeros(0, np.uint64), *map(_keys, own)]))
    found = [np.isin(_keys(text), mine).any() for text in texts]  # check: variants-of-own-rows-are-counted
    return np.array(found, bool)


def _keys(text: str) -> NDArray[np.uint64]:
    """What a text has in common with each text that differs from it in one word: its words, and all but one of them.

    A key is the sum of the hashes of the words, in any order: those of a long text take no longer than its words.
    """
    words = text.split()
    if len(words) < LEAST_WORDS:
        return np.zeros(0, np.uint64)
    hashes = np.array([hash(word) for word in words], np.int64).view(np.uint64)
    whole = hashes.sum(dtype=np.uint64)
    return np.unique(np.append(whole - hashes, whole))


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


# --- images ---


def nearness(theirs: NDArray[np.float32], mine: NDArray[np.float32]) -> NDArray[np.float64]:
    """For each of their thumbnails, how near the nearest one of mine is, (theirs,): 1 is equal. See `_near`."""
    blocks = range(0, len(mine), BLOCK)
    found = np.stack([_near(theirs, mine[start : start + BLOCK]).max(axis=1) for start in blocks])
    nearest: NDArray[np.float64] = found.max(axis=0)  # check: own-images-are-recognised
    return nearest


def _alike(thumbnails: NDArray[np.float32]) -> NDArray[np.int64]:
    """(rows,): of how many of the pool's images each is one that look the same, itself included."""
    blocks = range(0, len(thumbnails), BLOCK)
    counts = [(_near(thumbnails, thumbnails[start : start + BLOCK]) >= SAME_IMAGE).sum(axis=0) for start in blocks]
    return np.concatenate(counts)


def _near(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    """1 - |a - b| / (|a - mean of a| + |b - mean of b|), in 2-norms, for each pair: (one, other). At least 0.

    The same again after each is brought to one brightness and contrast, which models hardly see; the larger counts.
    """
    left, right = one.astype(np.float64), other.astype(np.float64)
    in_one_light = _nearness_of(_in_one_light(left), _in_one_light(right))  # check: brightness-hides-no-own-image
    near: NDArray[np.float64] = np.maximum(_nearness_of(left, right), in_one_light)
    return near


def _in_one_light(thumbnails: NDArray[np.float64]) -> NDArray[np.float64]:
    """With mean 0 and norm 1; NaN for blank ones, which have no other contrast."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    spread = np.linalg.norm(centred, axis=1, keepdims=True)
    found: NDArray[np.float64] = np.divide(
        centred, spread, out=np.full_like(centred, np.nan), where=spread > LEAST_CONTRAST
    )
    return found


def _nearness_of(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1)[None] - 2 * left @ right.T
    spreads = [np.linalg.norm(each - each.mean(axis=1, keepdims=True), axis=1) for each in (left, right)]
    contrast = np.maximum(spreads[0][:, None] + spreads[1][None], LEAST_CONTRAST)
    near = 1 - np.sqrt(np.maximum(squares, 0)) / contrast
    found: NDArray[np.float64] = np.maximum(np.nan_to_num(near), 0.0)
    return found


def _name_of(pool: ImagePool, row: int) -> str:
    image = pool.images[row]
    size = image.shape if isinstance(image, np.ndarray) else image.size()
    return f"image {row + 1}, {' by '.join(map(str, size))}"


def write_sheet(pool: ImagePool, rows: Sequence[int], path: Path) -> None:
    """Write one PNG with these images of the pool, by number from 1: five to a line, each drawn anew from its pixels,
    so that no byte of the pool's files is in it. Only this user can read it.
    """
    lines = -(-len(rows) // TILES)
    sheet = Image.new("RGB", (TILES * TILE, lines * (TILE + CAPTION)), "white")
    for place, row in enumerate(rows):
        left, top = place % TILES * TILE, place // TILES * (TILE + CAPTION)
        image = _pixels(pool.images[row - 1]).convert("RGB")
        scale = (TILE - 8) / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        sheet.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX), (left, top))
        ImageDraw.Draw(sheet).text((left, top + TILE - 6), f"image {row}", fill="black")
    path.unlink(missing_ok=True)
    with create(path) as file:
        sheet.save(file, "PNG")


def _pixels(image: ImageFile | NDArray[np.generic]) -> Image.Image:
    if isinstance(image, ImageFile):
        return image.pixels()
    numbers = np.asarray(image, np.float32)
    span = float(numbers.max() - numbers.min()) or 1.0
    grey = (255 * (numbers - numbers.min()) / span).astype(np.uint8)
    return Image.fromarray(grey if grey.ndim == 2 else grey[0] if len(grey) != 3 else grey.transpose(1, 2, 0))
