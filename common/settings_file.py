"""Read a TOML settings file into a frozen, validated object, or say in one line what is wrong with it.

The agreement and every party's own settings are such files. Reading is strict: an unknown key is an error, and a string
is never read as a number. Every message names the file, the key, the value and what is allowed.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from common.errors import RuleError, SettingsError
from common.names import NAME_PATTERN, NAME_RULE
from common.text import MAX_LINE, MAX_PARAGRAPH, flaw

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


# Every string that another party writes is one of these, a name, or a choice.
Line = Annotated[str, one_line(MAX_LINE)]
Paragraph = Annotated[str, one_line(MAX_PARAGRAPH)]
Name = Annotated[str, matching(NAME_PATTERN, NAME_RULE)]
FileName = Annotated[str, matching(r"([A-Za-z0-9_-]+/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", "a file's name")]
HEX_64 = matching("[0-9a-f]{64}", "64 hexadecimal digits")
Digest = Annotated[str, HEX_64]
Count = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """Base of every settings object: frozen, strict, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


S = TypeVar("S", bound=Settings)


def load_settings(path: Path, kind: type[S]) -> S:
    """Read `path` as TOML into `kind`. Raises SettingsError."""
    return parse_settings(read_toml(path), kind, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises SettingsError if the file is missing, too large or malformed."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_FILE_BYTES:
        raise SettingsError(f"{path}: a settings file has at most {MAX_FILE_BYTES} bytes")
    try:
        return tomllib.loads(content.decode())
    except RecursionError:
        raise SettingsError(f"{path}: not valid TOML: nested too deeply") from None
    except ValueError as error:  # of TOML, of UTF-8, or a number of thousands of digits
        raise SettingsError(f"{path}: not valid TOML: {error}") from None


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
    key = _dotted(first["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(sorted(_settings_at(kind, first["loc"][:-1]).model_fields))
        return f"{where}: unknown key {key}{more}", f"allowed here: {allowed}"
    if first["type"] == "missing":
        return f"{where}: {key} is missing{more}", ""
    rule = first.get("ctx", {}).get("error")
    hint = rule.hint if isinstance(rule, RuleError) else ""
    reason = reason_in_words(first)
    if not key:  # a rule about several keys together
        return f"{where}: {reason}{more}", hint
    value = repr(first["input"])
    return f"{where}: {key} = {value if len(value) <= 80 else value[:77] + '...'}: {reason}{more}", hint


def reason_in_words(problem: Mapping[str, Any]) -> str:
    """What is wrong with a value, from one entry of `ValidationError.errors()`."""
    words = IN_WORDS.get(problem["type"])
    if words is None:
        return str(problem["msg"]).removeprefix("Value error, ")
    return words.format(**problem.get("ctx", {}))


def _dotted(location: tuple[str | int, ...]) -> str:
    key = ""
    for step in location:
        key += f"[{step}]" if isinstance(step, int) else f".{step}" if key else step
    return key


def _settings_at(kind: type[Settings], location: tuple[str | int, ...]) -> type[Settings]:
    """The settings class that the key at `location` belongs to."""
    for step in location:
        if isinstance(step, str):
            annotation: Any = kind.model_fields[step].annotation
            candidates = [annotation, *get_args(annotation)]
            kind = next(c for c in candidates if isinstance(c, type) and issubclass(c, Settings))
    return kind
