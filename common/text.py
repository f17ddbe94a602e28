"""Text that comes from another party: what it may hold, and how any text is shown.

A title, a label or a name is aimed at whoever reads it. A line break and a terminal's escape sequence forge a line of
ours, a bidirectional control turns around what follows, and a character that does not show makes two equal-looking
labels differ. So text from others is one line of characters that show, in one form (`flaw`), and every place that shows
text escapes it once more (`shown`).
"""

import re
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from urllib.parse import urlsplit

MAX_LINE, MAX_PARAGRAPH = 200, 2000  # characters
MAX_NAMES = 12  # in a sentence
MAX_MARKS = 4  # on one letter; a taller pile covers the lines above and below
# Shown as nothing, or as a blank, although Unicode counts them among letters, marks and symbols: what has the property
# Default_Ignorable_Code_Point (UAX #44) and is not a control, and the empty Braille pattern.
BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
SURROGATE = re.compile("[\ud800-\udfff]")
HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?")


def flaw(text: str, longest: int) -> str:
    """What keeps `text` from being one line of text that shows, in words that begin with `must`; empty if nothing."""
    if not 0 < len(text) <= longest:
        return f"must have 1 to {longest} characters, not {len(text)}"
    hidden = None if _shows(text) else next(each for each in text if not _shows(each))
    if hidden is not None:  # check: text-shows
        return f"must not hold U+{ord(hidden):04X}, which breaks the line, does not show, or moves what is around it"
    if "  " in text or text != text.strip():  # check: text-is-not-padded
        return "must have one space between words, and none at its ends"
    if not unicodedata.is_normalized("NFC", text):  # check: text-is-normalised
        return "must be in Unicode's composed form (NFC): what looks the same must be the same"
    if _highest_pile(text) > MAX_MARKS:  # check: marks-do-not-pile-up
        return f"must have at most {MAX_MARKS} combining marks on a letter, and a letter under each"
    return ""


def as_line(text: str) -> str:
    """An honest party's text in the form that `flaw` asks for, as far as spaces and composed characters go."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def alike(text: str) -> str:
    """The same for texts that people could take for each other: without regard to case, width and ligatures."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def is_web_address(text: str) -> bool:
    """Whether `text` is an http or https address with a host, and without a name or password."""
    if flaw(text, MAX_PARAGRAPH) or " " in text:
        return False
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018 - raises ValueError
    except ValueError:
        return False
    is_anonymous = "@" not in parts.netloc
    return parts.scheme in ("http", "https") and is_anonymous and HOST.fullmatch(parts.hostname or "") is not None


def shown(text: str) -> str:
    """`text` as one line that is safe to show: what does not show itself, and a line break, is written `\\u202e`."""
    if _shows(text):
        return text
    # A space that does not break, as before a unit, is ours and harmless.
    return "".join(
        each if _shows(each) or each == "\u00a0" else each.encode("unicode_escape").decode() for each in text
    )


def some_of(names: Sequence[str]) -> str:
    """Names for a sentence: of many, the first few, and how many more there are."""
    if len(names) <= MAX_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:MAX_NAMES])} and {len(names) - MAX_NAMES:,} more"


def shown_lines(text: str) -> str:
    """Several lines of our own, each safe to show."""
    return "\n".join(map(shown, text.split("\n")))


def _shows(text: str) -> bool:
    # Python's isprintable leaves out control, format, private-use and unassigned characters, surrogates, and all
    # separators except the space.
    return text.isprintable() and not BLANK.search(text)


def _highest_pile(text: str) -> int:
    """The most combining marks in a row; one on nothing counts as too many."""
    if text.isascii():
        return 0
    highest = 0
    for word in text.split(" "):
        is_mark = [unicodedata.category(character).startswith("M") for character in word]
        if is_mark[:1] == [True]:
            return MAX_MARKS + 1
        highest = max(highest, *(len(list(run)) for mark, run in groupby(is_mark) if mark), 0)
    return highest
