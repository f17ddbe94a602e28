"""Base of what an owner writes to its own files."""

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Frozen, strict, and without unknown keys, so that it is read back exactly or refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
