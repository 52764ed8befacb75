"""What a model says of its licence: in its card on the Hub or on disk, or in the header of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

from llmprune.core.files import expanded

# Of a card's metadata; a GGUF file has them as general.license, general.license.name and general.license.link.
_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Licence:
    """A licence as the Hub names it: an id; where that is `other`, a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """What a person calls it, and acknowledges."""
        return self.name if self.id == "other" and self.name else self.id

    def is_called(self, label: str) -> bool:
        return label.strip().casefold() == self.label.casefold()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Licence:
        """Inverse of `to_json`."""
        return cls(data["id"], data.get("name"), data.get("link"))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Licence | None:
        """From a model card's metadata; None if it states none."""
        values = (metadata.get(key) for key in _KEYS)
        # A card is anybody's file: what is no text, or no list of texts, may be of any size once it is written out.
        texts = (value if isinstance(value, list) else [value] for value in values)
        stated, name, link = (", ".join(text for text in every if isinstance(text, str)) or None for every in texts)
        return None if stated is None else cls(stated, name, link)


def stated_licence(path: str) -> Licence | None:
    """What a local model - a directory with a card, or a GGUF file - states. None for a Hub id: nothing is fetched."""
    local = expanded(path)
    if path.endswith(".gguf"):
        return _gguf_licence(local)
    card = local / "README.md"
    if not card.is_file():
        return None
    try:
        return Licence.from_metadata(metadata_load(card) or {})
    except (OSError, ValueError, yaml.YAMLError):
        # A card that cannot be read states nothing; it is no reason not to prune.
        return None


def _gguf_licence(file: Path) -> Licence | None:
    from gguf import GGUFReader

    reader = GGUFReader(file)
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    fields = {key: reader.get_field(name) for key, name in keys.items()}
    return Licence.from_metadata({key: str(field.contents()) for key, field in fields.items() if field})
