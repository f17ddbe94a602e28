"""A model's parameters in groups by how deep they are, for what is chosen group by group."""

from collections.abc import Iterable, Sequence


def by_depth(names: Iterable[str], blocks: Sequence[str], count: int | None = None) -> tuple[tuple[str, ...], ...]:
    """What comes before the transformer blocks, the blocks, and what follows them, such as a head: each a group.

    `names`: parameters in the model's own order; `blocks`: the names of its blocks, in order. With `count`, blocks next
    to each other share that many groups, and the first has what comes before them. Empty groups are left out.
    """
    number_of = {block: number for number, block in enumerate(blocks)}
    shared = len(blocks) if count is None else min(count, len(blocks))
    groups: list[list[str]] = [[] for _ in range(shared + 2)]
    is_before = True
    for name in names:
        block = next((number_of[start] for start in _beginnings(name) if start in number_of), None)
        if block is not None:
            is_before = False
            groups[1 + block * shared // len(blocks)].append(name)
        else:
            groups[0 if is_before else -1].append(name)
    if count is not None:
        first = groups.pop(0)
        groups[0] = first + groups[0]
    return tuple(tuple(group) for group in groups if group)


def _beginnings(name: str) -> Iterable[str]:
    """`a` and `a.b` of `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:length]) for length in range(1, len(parts)))
