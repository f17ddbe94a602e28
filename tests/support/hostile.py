"""What another party could write where it is asked for a name, and where the strings of a file are."""

from collections.abc import Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

FORGED = "\x1b[2J\x1b[HFingerprint:  11111 22222 33333 44444 55555 66666 77777 88888"
# Line breaks, terminal escapes, bidirectional controls, characters that do not show, private use, half a pair, a pile.
HIDDEN = (
    *("\n", "\r", "\t", "\x1b[2J", "\x00", "\x7f", "\x85", "\x9b2J", "\u2028", "\u2029"),
    *("\u200e", "\u202e", "\u2066", "\u061c"),
    *("\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u034f", "\u3164", "\u2800", "\ufe0f", "\U000e0041"),
    *("\u00a0", "\ue000", "\ud800", "\udfff", "x" + 5 * "\u0323"),
)
TAG = "<img src=x onerror=alert(1)>\"'&amp;"
MARKUP = TAG + "`{{7*7}}](http://a.b) **b** ![i](j) | # ~~ $x$ [red]r[/] --- -->"

any_text = st.one_of(
    st.text(max_size=80),
    st.lists(st.sampled_from([*HIDDEN, *MARKUP.split(" "), "word", " "]), max_size=12).map("".join),
)

Place = tuple[str | int, ...]


def strings_in(content: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """(place, string) for every string in a file's content."""
    if isinstance(content, str):
        yield place, content
    elif isinstance(content, (list, tuple)):
        for index, each in enumerate(content):
            yield from strings_in(each, (*place, index))
    elif isinstance(content, Mapping):
        for key, each in content.items():
            yield from strings_in(each, (*place, key))


def put(content: Any, place: Place, value: str) -> None:
    """Replace the string at `place`."""
    for step in place[:-1]:
        content = content[step]
    content[place[-1]] = value
