"""YAML that a user gives, read within bounds: it is refused before it costs more than any recipe is worth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.nodes import MappingNode, Node, ScalarNode

from llmprune.core.errors import RecipeError, quoted, shortened

MAX_BYTES = 2**16
MAX_NODES = 4_000
"""Values and keys, counting what an alias stands for each time it is named."""
MAX_DEPTH = 20

# What PyYAML's constructors raise on values that their tags do not fit: a month 13, `!!bool maybe`, an integer of
# thousands of digits.
_MISFITS = (ValueError, TypeError, AttributeError, LookupError, ArithmeticError)


def read_yaml_file(path: Path) -> Any:
    """The data of a YAML file. Raises RecipeError if it cannot be read, is no YAML, or is beyond the bounds."""
    name = shortened(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise RecipeError(f"cannot read recipe {name}: {cause}") from None
    try:
        # A character that was cut in two is no reason to call a file that is too long something else.
        text = content.decode("utf-8", errors="ignore" if len(content) > MAX_BYTES else "strict")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{name} is not YAML in UTF-8: {error.reason} at byte {error.start}; re-encode it") from None
    return read_yaml(text, name)


def read_yaml(text: str, what: str) -> Any:
    """The data of a YAML text, which errors call `what`. Raises RecipeError as `read_yaml_file` does."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", errors="replace")) > MAX_BYTES:
        raise RecipeError(f"{what} is longer than {MAX_BYTES:,} bytes, which no recipe needs to be; shorten it")
    try:
        # A loader of our own, derived from the safe one: it constructs nothing but plain data.
        return yaml.load(text, _BoundedLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        said = shortened(error.problem or error.context or "")
        raise RecipeError(f"{what} is not YAML: {where}{said}") from None
    except (yaml.YAMLError, *_MISFITS) as error:
        said = shortened(" ".join(str(error).split()))
        raise RecipeError(f"{what} is not YAML: a value cannot be read ({said}); correct or quote it") from None


class _BoundedLoader(yaml.SafeLoader):
    """Counts nodes while they are composed, before anything is made of them, and refuses a key that is there twice."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[Node, int] = {}

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            assert node is not None
            if node not in self._sizes:
                raise ComposerError(None, None, "an alias stands inside of what it names", mark)
            self._count(self._sizes[node], mark)
            return node
        before = self._nodes
        self._count(1, mark)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ComposerError(None, None, f"values are nested more than {MAX_DEPTH} deep", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        self._sizes[node] = self._nodes - before
        return node

    def compose_mapping_node(self, anchor: Any) -> MappingNode:
        node: MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, ScalarNode):
                continue
            if (key.tag, key.value) in seen:
                raise ComposerError(None, None, f"the key {quoted(key.value)} is there twice", key.start_mark)
            seen.add((key.tag, key.value))
        return node

    def _count(self, nodes: int, mark: Any) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            raise ComposerError(None, None, f"it has more than {MAX_NODES:,} values, aliases written out", mark)
