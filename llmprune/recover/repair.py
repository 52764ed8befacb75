"""What was done to a child since it was cut: tensors in place of its own, named by what they are, kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import atomic_path
from llmprune.models.proof import digests
from llmprune.models.stored import store_again

REFIT, DISTIL = "refit", "distil"
TRAINED = "trained"
"""Elsewhere, by whatever means."""


@dataclass(frozen=True, eq=False)
class Repair:
    """Tensors by the names of the child's parameters, and how they came about."""

    name: str
    """What was done, and the first eight hex digits of a hash over the tensors."""
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON."""

    @classmethod
    def of(cls, what: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Repair:
        named = json.dumps(sorted(digests(tensors).items()))
        return cls(f"{what}-{hashlib.sha256(named.encode()).hexdigest()[:8]}", tensors, facts)

    def apply(self, child: PreTrainedModel) -> None:
        """Put the tensors in place of the child's own, whose storage, which may be the parent's, is not written to.
        What the child stores in a type of its own is rounded again."""
        places = child.state_dict()
        alike = {name: value.to(places[name]) for name, value in self.tensors.items()}
        _, unexpected = child.load_state_dict(alike, strict=False, assign=True)
        assert not unexpected, f"no parameters of the child: {unexpected}"
        child.tie_weights()
        store_again(child)
        child.requires_grad_(False)

    def write(self, path: Path, key: str) -> None:
        """Keep it; `key` is a hash of what it was made from."""
        metadata = {"key": key, "name": self.name, "facts": json.dumps(dict(self.facts))}
        with atomic_path(path) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in self.tensors.items()}, temporary, metadata)

    @staticmethod
    def facts_in(path: Path) -> dict[str, Any]:
        """How the repair that is kept there came about: its tensors are not read. Raises RunDirectoryError on a damaged
        file."""
        try:
            with safe_open(path, "pt") as file:
                facts = json.loads(file.metadata()["facts"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise RunDirectoryError(f"{path} is damaged ({type(error).__name__}); delete it") from error
        assert isinstance(facts, dict), "as it was written"
        return facts

    @classmethod
    def read(cls, path: Path, key: str | None = None) -> Repair | None:
        """What `write` has kept, under this key if one is given; None if there is nothing. Raises RunDirectoryError on
        a damaged file."""
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if key is not None and metadata.get("key") != key:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found = cls.of(metadata["name"].rpartition("-")[0], tensors, json.loads(metadata["facts"]))
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise RunDirectoryError(f"{path} is damaged ({type(error).__name__}); delete it") from error
        if found.name != metadata["name"]:
            raise RunDirectoryError(f"{path} is damaged (its tensors are not those it names); delete it")
        return found


def with_own_tensors(child: PreTrainedModel) -> PreTrainedModel:
    """The child, its tensors no longer the parent's, in float32."""
    for module in child.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().float().clone(), requires_grad=False))
    child.tie_weights()
    return child
