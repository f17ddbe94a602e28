"""Typed tables for the numbers behind a page, written as JSON, with a schema that describes each field."""

import json
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Size = Annotated[float, Field(ge=0)]  # a norm, a duration, a ratio of norms
Share = Annotated[float, Field(ge=0, le=1)]


class Table(BaseModel):
    """Base of every part of a report: frozen, strict, finite numbers, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def as_json(table: Table) -> str:
    """One table, and the tables in it."""
    return json.dumps(table.model_dump(mode="json"), indent=2, ensure_ascii=False, allow_nan=False)


def schema_of(kind: type[Table], title: str) -> str:
    """The JSON schema of `as_json`, with every description."""
    made = kind.model_json_schema(mode="serialization")
    return (
        json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **made, "title": title}, indent=2) + "\n"
    )
