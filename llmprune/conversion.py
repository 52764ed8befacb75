"""Write a checkpoint that is there in further formats, whoever made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmprune.deploy.formats import check_child
from llmprune.deploy.write import write_formats
from llmprune.errors import ExportError
from llmprune.models.loading import load_model
from llmprune.models.parent import check_config
from llmprune.models.surgery import is_stock
from llmprune.progress import Show
from llmprune.recipe import DeployRecipe, ModelRecipe


def convert(model: ModelRecipe, rules: DeployRecipe, to: Path | None, show: Show, *, force: bool) -> dict[str, Any]:
    """Write `rules.formats` of a checkpoint into its own directory, or into `to`; returns what was written.

    Raises UnsupportedModelError or ExportError, before any weight is read, if a format cannot hold the model; and
    ExportError if `to` is missing where the model is no directory, or a place is taken and not to be replaced.
    """
    place = to or Path(model.path)
    if not place.is_dir() and to is None:
        raise ExportError(f"{model.path} is not a directory that files could be added to; name one with --to")

    def holds(config: Any) -> None:
        if is_stock(config):
            check_config(config, origin=model.path)
        for name in rules.formats:
            check_child(config, name, rules)

    with show("loading"):
        loaded, tokenizer = load_model(model, check=holds)
    with show(f"writing {', '.join(rules.formats)}"):
        written = write_formats(loaded, tokenizer, rules, place, force=force)
    return {"directory": str(place), "formats": written}
