"""What people read is plain English: phrases that were translated word by word, and old names of things, stay away.

People read documents, templates, settings and units, and in code the docstrings, comments and strings. Blocks of
documents that show what commands print are left out, because the code that prints it is read. So is what people do
not read: tags, style sheets, what templates and texts fill in, and strings of one word, which are names.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("common", "client", "server", "deploy", "docs", "examples", "benchmarks")
PROSE = {".md", ".jinja", ".toml", ".yaml", ".service"}
FILES = sorted(
    path
    for path in [*ROOT.glob("*.md"), ROOT / "Makefile", *(each for room in ROOMS for each in (ROOT / room).rglob("*"))]
    if path.suffix in PROSE | {".py"} or path.name in ("Makefile", "Dockerfile")
)

# A regular expression each, in any case; a space stands for any white space. Then what to write instead.
PHRASES = (
    # Idioms and word order of another language.
    ("is no ", "is not a ..., has no ..."),
    ("are no ", "are not ..., have no ..."),
    ("(tell|tells|told|telling) of", "list, reveal, say"),
    ("(they|it|can|would) tells? which", "identifies"),
    ("(goes|go|went|going) on where", "resumes"),
    ("here to stay", "never move them off this machine"),
    ("(stand|stands|stood) twice", "duplicate"),
    ("but for ", "except"),
    ("to the last (bit|digit|letter)", "bit-identical, exactly"),
    ("(speak|speaks|spoke) of", "belongs to, mentions"),
    ("ended without a word", "exited without an error message"),
    ("nobody can tell", "unknown"),
    ("each other ones", "each a different one"),
    ("with some word", "that contain a given word"),
    ("somebody's part", "one owner's share"),
    ("(take|takes) no more room", "fills the same size"),
    ("that (they|it) (is|are) made of", "that it derives from"),
    ("set-up included", "including setup"),
    ("so many (owners|of)", "this many, at most, at least"),
    # The vocabulary.
    ("(it|that|who|which|one) cheats?", "a malicious coordinator"),
    ("cheating", "malicious"),
    ("conspir(e|es|ing)", "collude"),
    ("knobs?", "hyperparameter"),
    ("figures?", "metric"),
    ("methods? of (several|one) (sums?|steps?)", "multi-round method, single-round method"),
)
# Where a phrase is right.
ALLOWED = (
    "there (is|are) no ",
    "(is|are) no (longer|more|less|fewer|better|worse|larger|smaller|different)",
    r"figure \d|\.figure|figures?\.(Figure|subplots)",  # of a paper, of matplotlib
    r"replaces `figures",  # the changelog names the key of the version before
)


def expression(phrase: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{phrase})".replace(" ", r"\s+") + ("" if phrase[-1] == " " else r"\b"), re.IGNORECASE)


PATTERNS = [(expression(phrase), better) for phrase, better in PHRASES]
LET_THROUGH = [expression(phrase) for phrase in ALLOWED]


NOT_PROSE = {
    ".md": re.compile(r"^```(console)?\n.*?^```$", re.MULTILINE | re.DOTALL),
    ".jinja": re.compile(r"<style>.*?</style>|<[^>]*>|\{\{.*?\}\}|\{%.*?%\}", re.DOTALL),
}


def passages(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of all that people read in a file."""
    text = path.read_text()
    if path.suffix == ".py":
        yield from strings(text)
        yield from comments(text)
    else:
        yield 1, NOT_PROSE[".jinja" if ".jinja" in path.name else ".md"].sub(blank, text)


def blank(match: re.Match[str]) -> str:
    return " " + "\n" * match[0].count("\n")


def strings(source: str) -> Iterator[tuple[int, str]]:
    """Docstrings and every other text of a module; what is put into a text at run time is left out."""
    inside: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            inside.update(id(part) for part in node.values)
            parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
            yield node.lineno, "".join(str(part) for part in parts)
        elif isinstance(node, ast.Constant) and id(node) not in inside and " " in str(node.value):
            yield node.lineno, str(node.value)


def comments(source: str) -> Iterator[tuple[int, str]]:
    """Comments, those on lines one below the other as one."""
    first, last, words = 0, 0, ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] != last + 1 and words:
                yield first, words
                words = ""
            if not words:
                first = token.start[0]
            last = token.start[0]
            words += token.string.lstrip("# ") + "\n"
    if words:
        yield first, words


def found(text: str, first_line: int = 1) -> Iterator[str]:
    """One line for each phrase in a text."""
    right = [match.span() for pattern in LET_THROUGH for match in pattern.finditer(text)]
    for pattern, better in PATTERNS:
        for match in pattern.finditer(text):
            if not any(start <= match.start() and match.end() <= end for start, end in right):
                around = " ".join(text[max(0, match.start() - 30) : match.end() + 30].split())
                yield f"line {first_line + text.count(chr(10), 0, match.start())}: ...{around}... -> {better}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_reads_as_plain_english(path: Path) -> None:
    lines = [line for start, text in passages(path) for line in found(text, start)]
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        "it is no known key",
        "The names\nare no keys",
        "the result does not tell of all models",
        "It goes on where it was",
        "secret and here to stay",
        "a label stands twice",
        "even if it cheats",
        "everybody but for hotel",
        "its figures",
    ],
)
def test_a_phrase_is_found(text: str) -> None:
    assert list(found(text))


@pytest.mark.parametrize(
    "text",
    [
        "it is no longer needed",
        "there is no server",
        "the sum is no larger",
        "Bonawitz et al., figure 4",
        "the method goes on",
        "so that a stranger understands it",
    ],
)
def test_plain_english_is_let_through(text: str) -> None:
    assert not list(found(text))


def test_comments_and_strings_of_a_module_are_read() -> None:
    source = 'x = f"a {y} label " "stands twice"  # is no\n# key\n"""A doc."""\nz = "key"\n'
    assert {text for _, text in [*strings(source), *comments(source)]} == {
        "a ... label stands twice",
        "is no\nkey\n",
        "A doc.",
    }
