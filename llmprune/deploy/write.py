"""Add further formats to a checkpoint directory, each whole and proven, or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmprune.deploy.contents import VLLM_DIRECTORY
from llmprune.deploy.formats import check_child
from llmprune.deploy.vllm import write_vllm
from llmprune.recipe import DeployRecipe


def write_formats(
    child: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rules: DeployRecipe,
    directory: Path,
    *,
    force: bool = False,
) -> list[dict[str, Any]]:
    """Write the recipe's formats, but for the Hugging Face ones that the directory is itself; says what each became.

    All are checked before any is written. Raises ExportError if a format cannot hold the child, its place is taken
    (unless `force`), or its proof fails.
    """
    for name in rules.formats:
        check_child(child.config, name, rules)
    written = []
    if "vllm" in rules.formats:
        write_vllm(child, tokenizer, directory / VLLM_DIRECTORY, force=force)
        written.append({"format": "vllm", "file": VLLM_DIRECTORY, "proof": "config and shapes read back; not run"})
    return written
