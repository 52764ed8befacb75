"""A measured value with JSON of its own, which says its `schema` where it is stored by itself."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from llmprune.core.errors import RunDirectoryError, quoted

SCHEMA = 2
"""Of what is stored. llmprune 0.1 stored records without an id, and said no schema."""


def newer_schema(data: Any) -> str | None:
    """Why what was stored is beyond this llmprune, to be read after a file's name; None if it is not."""
    schema = _schema_of(data)
    if type(schema) is int and schema > SCHEMA:
        return f"is of schema {schema}, and this llmprune reads schema {SCHEMA}; upgrade llmprune"
    return None


def schema_problem(data: Any, remedy: str) -> str | None:
    """The same of any schema but ours; `remedy` says what to do about an older or damaged one."""
    schema = _schema_of(data)
    if schema == SCHEMA and type(schema) is int:
        return None
    said = "no schema" if schema is None else f"schema {quoted(schema)}"
    older = f"is damaged, or of an older llmprune ({said}, this one reads schema {SCHEMA}); {remedy}"
    return newer_schema(data) or older


def _schema_of(data: Any) -> Any:
    return data.get("schema") if isinstance(data, dict) else None


class Value(BaseModel):
    """A typed value with JSON of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not there has no key, and an infinite figure is null."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """Inverse of `to_json`, and of `stored`. Raises ValueError, naming the key, on anything else."""
        if isinstance(data, dict):
            data = {key: value for key, value in data.items() if key != "schema"}
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, problem['loc'])) or 'all of it'}: {problem['msg']}") from None

    def stored(self) -> dict[str, Any]:
        """JSON values of what is stored by itself."""
        return {"schema": SCHEMA, **self.to_json()}

    @classmethod
    def read(cls, data: Any, origin: object, remedy: str) -> Self:
        """Inverse of `stored`. Raises RunDirectoryError, naming `origin`, both schemas or the key that is wrong, and
        what to do: `remedy`, or to upgrade."""
        if problem := schema_problem(data, remedy):
            raise RunDirectoryError(f"{origin} {problem}")
        try:
            return cls.from_json(data)
        except ValueError as error:
            raise RunDirectoryError(f"{origin} is damaged ({error}); {remedy}") from None
