"""Read a TOML settings file into a frozen, validated object, or say in one line what is wrong with it.

The agreement and every party's own settings are such files. Reading is strict: an unknown key is an error, and a string
is never read as a number. Every message names the file, the key, the value and what is allowed.
"""

import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.errors import RuleError, SettingsError, unreadable
from common.names import NAME_PATTERN, NAME_RULE
from common.text import MAX_LINE, MAX_PARAGRAPH, flaw, shown

MAX_FILE_BYTES = 16_000_000
# What pydantic's types of problems mean to whoever wrote the file. The names in braces are pydantic's.
IN_WORDS = {
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be finite",
    "literal_error": "must be {expected}",
    "string_type": "must be text in quotes",
    "string_too_short": "is too short, the minimum length is {min_length}",
    "string_too_long": "is too long, the maximum length is {max_length}",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "tuple_type": "must be a list",
    "too_short": "has too few entries, the minimum is {min_length}",
    "too_long": "has too many entries, the maximum is {max_length}",
    "model_type": "must be a table",
    "missing": "is missing",
    "extra_forbidden": "is an unknown key",
    "union_tag_invalid": "must have {discriminator} = one of {expected_tags}",
    # The JSON is ours (parse_settings): only a string that is not Unicode keeps it from being read.
    "json_invalid": "a string holds half of a surrogate pair, which is not a character",
}


def matching(pattern: str, form: str) -> AfterValidator:
    """Restrict a string to a regular expression, which messages describe as `form`."""
    compiled = re.compile(pattern)

    def check(text: str) -> str:
        if compiled.fullmatch(text) is None:
            raise RuleError(f"must be {form}")
        return text

    return AfterValidator(check)


def one_line(longest: int) -> AfterValidator:
    """Restrict a string to one line of text that shows (text.py), of at most `longest` characters."""

    def check(text: str) -> str:
        found = flaw(text, longest)
        if found:  # check: text-from-others-is-one-line
            raise RuleError(found)
        return text

    return AfterValidator(check)


def _check_name(name: str) -> str:
    if re.fullmatch(NAME_PATTERN, name) is None:
        similar = re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_")[:32]
        raise RuleError(f"must be {NAME_RULE}", hint=f'for example "{similar}"' if similar else "")
    return name


def _check_whole_bytes(text: str) -> str:
    if len(text) % 2:
        raise RuleError("must be bytes in hexadecimal")
    return text


# Every string that another party writes is one of these, a name, or a choice.
Line = Annotated[str, one_line(MAX_LINE)]
Paragraph = Annotated[str, one_line(MAX_PARAGRAPH)]
Name = Annotated[str, AfterValidator(_check_name)]
FileName = Annotated[str, matching(r"([A-Za-z0-9_-]+/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", "a file's name")]
HEX_64 = matching("[0-9a-f]{64}", "64 hexadecimal digits")
Digest = Annotated[str, HEX_64]
# Not "([0-9a-f]{2})*", which notes where each of thousands of groups begins.
Hex = Annotated[str, matching("[0-9a-f]*", "bytes in hexadecimal"), AfterValidator(_check_whole_bytes)]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of every settings object: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


S = TypeVar("S", bound=Settings)


def load_settings(path: Path, kind: type[S]) -> S:
    """Read `path` as TOML into `kind`. Raises SettingsError."""
    return parse_settings(read_toml(path), kind, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises SettingsError if the file is missing, too large or malformed."""
    return parse_toml(read_bytes(path), str(path))


def read_bytes(path: Path) -> bytes:
    """What a settings file holds. Raises SettingsError if it is missing or too large."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise unreadable(path, error) from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{path}: a settings file has at most {MAX_FILE_BYTES} bytes")
    return content


def parse_toml(content: bytes, where: str) -> dict[str, Any]:
    """The tables of TOML that came from a file, which messages call `where`. Raises SettingsError."""
    try:
        return tomllib.loads(content.decode("utf-8-sig"))  # editors on Windows begin a file with a mark
    except RecursionError:
        raise SettingsError(f"{where}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise SettingsError(f"{where}: not valid TOML: {error}", hint=_toml_hint(content, error)) from None


def _toml_hint(content: bytes, error: ValueError) -> str:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "save the file as UTF-8; it is UTF-16"
    if isinstance(error, UnicodeDecodeError):
        return "save the file as UTF-8"
    if "Unescaped" in str(error) or "hex value" in str(error):
        return r"a Windows path stands in single quotes, 'C:\data\train.csv', or has forward slashes"
    return 'text stands in quotes, lists in [ ]; true and false are lower-case: base = "base", alphas = [0.5]'


def parse_settings(tables: dict[str, Any], kind: type[S], where: str) -> S:
    """Validate the tables of a file, which messages call `where`. Raises SettingsError."""
    try:
        # Through JSON, because strict JSON reads an array as a tuple and a string as a path, and nothing else loosely.
        return kind.model_validate_json(json.dumps(tables, default=str))
    except ValidationError as error:
        message, hint = _in_words(error, kind, where)
        raise SettingsError(message, hint=hint) from None


def write_settings(path: Path, settings: Settings) -> None:
    """Write settings as TOML, which reads back to the same settings."""
    path.write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))


def _in_words(error: ValidationError, kind: type[Settings], where: str) -> tuple[str, str]:
    """(message, hint) for the first problem of a file."""
    problems = error.errors(include_url=False)
    # An unknown key first: a misspelt one is both unknown and missing, and the misspelling is what to correct.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    key = shown(_dotted(first["loc"]))  # check: unknown-keys-are-one-line
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    hint = _hint(first, kind)
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {key}{more}", hint
    if first["type"] == "missing":
        return f"{where}: {key} is missing{more}", hint
    reason = reason_in_words(first)
    if not key:  # a rule about several keys together
        return f"{where}: {reason}{more}", hint
    value = repr(first["input"])
    return f"{where}: {key} = {value if len(value) <= 80 else value[:77] + '...'}: {reason}{more}", hint


def _hint(problem: Mapping[str, Any], kind: type[Settings]) -> str:
    """What to write instead, as far as the problem shows it; empty if it does not."""
    *before, last = problem["loc"] or ("",)
    value, context = problem["input"], problem.get("ctx", {})
    rule = context.get("error")
    if isinstance(rule, RuleError):
        return rule.hint
    match problem["type"]:
        case "extra_forbidden":
            return _where_a_key_belongs(kind, before, str(last))
        case "missing":
            table = f"below [{_dotted(tuple(before))}]" if before else "at the top of the file"
            return _how_to_add_a_table(_type_at(kind, problem["loc"]), str(last)) or f"write {last} = ... {table}"
        case "literal_error":
            return did_you_mean(str(value), re.findall(r"'([^']+)'", str(context["expected"])))
        case "tuple_type" if isinstance(value, str | int | float):
            return f"write {last} = [{json.dumps(value)}]"
        case "model_type" if isinstance(last, int) and before:
            return f"write one [[{_dotted(tuple(before))}]] table for each, with its keys below it"
        case "model_type":
            return f"write [{_dotted(problem['loc'])}], with its keys below it"
        case "int_type" | "float_type" | "bool_type" if isinstance(value, str) and _is_bare(value):
            return f"write {last} = {value}, without quotes"
        case "string_type" if isinstance(value, bool | int | float) and isinstance(last, str):
            return f'write {last} = "{json.dumps(value)}"'
    return ""


def did_you_mean(written: str, known: Iterable[str]) -> str:
    """A question that names the closest of the `known` words; empty if none is close."""
    close = get_close_matches(written, list(known), n=1, cutoff=0.7)
    return f"did you mean {close[0]}?" if close else ""


def _where_a_key_belongs(kind: type[Settings], table: Sequence[str | int], key: str) -> str:
    allowed = sorted(_settings_at(kind, table).model_fields)
    if table and key in kind.model_fields:
        return f"{key} belongs at the top of the file, before the first [table]"
    close = did_you_mean(key, allowed)
    if table and close:  # say alphas below [regmean_plus_plus], which has one alpha
        return close
    for name in kind.model_fields:
        if any(key in each.model_fields for each in _settings_in(kind.model_fields[name].annotation)):
            return f"{key} belongs below [{name}]"
    return close or f"allowed here: {', '.join(allowed)}"


def _how_to_add_a_table(annotation: Any, key: str) -> str:
    if not list(_settings_in(annotation)):
        return ""
    return f"write [{key}], with its keys below it" if isinstance(annotation, type) else f"write [[{key}]] for each"


def _is_bare(text: str) -> bool:
    """Whether a text would be a number, true or false without its quotes."""
    return re.fullmatch(r"true|false|[+-]?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", text) is not None


def reason_in_words(problem: Mapping[str, Any]) -> str:
    """What is wrong with a value, from one entry of `ValidationError.errors()`."""
    words = IN_WORDS.get(problem["type"])
    if words is None:
        return str(problem["msg"]).removeprefix("Value error, ")
    bounds = {name: _short(value) for name, value in problem.get("ctx", {}).items()}
    return words.format(**bounds)


def _short(value: Any) -> Any:
    """A bound without a fraction of zero."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _dotted(location: tuple[str | int, ...]) -> str:
    key = ""
    for step in location:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else step
    return key


def _settings_at(kind: type[Settings], location: Sequence[str | int]) -> type[Settings]:
    """The settings class that the key at `location` belongs to."""
    for step in location:
        if isinstance(step, str):
            kind = next(_settings_in(kind.model_fields[step].annotation))
    return kind


def _settings_in(annotation: Any) -> Iterator[type[Settings]]:
    """The settings classes that a key's type is made of: itself, or what it is a list or a choice of."""
    for each in (annotation, *get_args(annotation)):
        if isinstance(each, type) and issubclass(each, Settings):
            yield each


def _type_at(kind: type[Settings], location: Sequence[str | int]) -> Any:
    """The annotation of the key at `location`."""
    *before, last = location
    return _settings_at(kind, before).model_fields[str(last)].annotation
