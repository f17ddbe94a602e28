"""Words and numbers as people read them, on pages and in sentences."""

from collections.abc import Sequence

from common.text import shown


def capitalised(text: str) -> str:
    """The first letter as a heading has it; the others stay."""
    return text[:1].upper() + text[1:]


def percent(share: float) -> str:
    return f"{100 * share:.1f}\u00a0%"


def size(count: float) -> str:
    """Bytes, as people read them."""
    for unit, bytes_per_unit in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= bytes_per_unit:
            return f"{count / bytes_per_unit:.1f}\u00a0{unit}"
    return f"{count:.0f}\u00a0bytes"


def safe(value: object) -> object:
    """What a template fills in, so that no text of another party hides or moves what is around it."""
    return shown(value) if type(value) is str else value


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
