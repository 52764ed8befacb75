"""What every section of a recipe is: strict, frozen, and told apart by the keys that figures depend on."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path holds no NUL character")
    return text


PathText = Annotated[str, AfterValidator(_no_nul)]


class Section(BaseModel):
    """A section of a recipe."""

    # Strict, lest `trials: true` is 1 and `trust_remote_code: "yes"` is true; integers still do for floats.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)

    free: ClassVar[frozenset[str]] = frozenset()
    """Keys that no figure depends on: they may change in a run that exists."""
    retired: ClassVar[frozenset[str]] = frozenset()
    """Keys that recipes of older versions have and no figure depended on: they are read, and say nothing."""

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, data: Any) -> Any:
        """YAML and JSON have no tuples."""
        if not isinstance(data, dict):
            return data
        known = {key: value for key, value in data.items() if key not in cls.retired}
        return {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}

    def decisive(self) -> dict[str, Any]:
        """All other keys, as JSON values."""
        return self.model_dump(mode="json", exclude=set(self.free))
