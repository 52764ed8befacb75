"""A checkpoint that was trained or changed elsewhere since it was exported: proven and judged anew, under a name of its
own, so that it can be pushed like any other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmprune.core.errors import DataError, ExportError
from llmprune.core.files import read_json, sha256_file, write_json
from llmprune.core.progress import Show
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.store import load_token_splits
from llmprune.data.tokens import TokenSplits
from llmprune.measure.quality.perplexity import Quality, score
from llmprune.measure.record import QUOTED, Quoted, Record, child_id, figures_of
from llmprune.measure.value import schema_problem
from llmprune.models import modeling_pruned
from llmprune.models.checkpoint import METADATA_FILE, exits_problem, proof_facts
from llmprune.models.expected import Expected
from llmprune.models.expected import prove as prove_files
from llmprune.models.loading import load_model, stored_dtype
from llmprune.models.samples import continuations
from llmprune.models.sizes import parameter_count
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.publish.contents import EVALUATION_FILE, PROVEN_SUFFIXES, VLLM_DIRECTORY
from llmprune.recover.repair import TRAINED, Repair


def prove_anew(directory: Path, data: Path | None, show: Show, *, trust_remote_code: bool = False) -> dict[str, Any]:
    """Hold a changed checkpoint to itself in a fresh process, judge it on its run's text, and write what it is now into
    its `llmprune.json`; returns that record's JSON, and the proof's.

    Its weights may be others; its shape, parameter for parameter, is that of the child that was exported. `data` is the
    run directory whose text it is judged on; by default the one that it lies in. Code beside the weights that is not
    this llmprune's own runs with `trust_remote_code` only. Raises ExportError or DataError, before anything is written.
    """
    metadata = _metadata(directory)
    splits = _splits(directory, data)
    before, parent = Record.from_json(metadata["figures"]), Record.from_json(metadata["parent"]["figures"])
    _check_company(directory)
    if not trust_remote_code:
        _check_code(directory)
    with show("loading the checkpoint"):
        # In the dtype of its files, since a proof is about those, and mapped from them: it takes no memory of its own.
        model, tokenizer = load_model(_as_stored(directory))
    if (found := parameter_count(model)) != before.params:
        raise ExportError(
            f"{directory} has {found:,} parameters, the child that was exported {before.params:,}; what has another "
            "shape is another child"
        )
    with show("proving it in a fresh process"):
        proof = prove_files(Expected.of(model, tokenizer), directory)
    files = {file.relative_to(directory).as_posix(): sha256_file(file) for file in _files(directory)}
    after = before
    if _weights(files) != _weights(metadata["files"]):
        with show("judging it on the text of its run"):
            after = _judged(before, parent, model, splits, metadata["library"])
    written = {**metadata, "id": after.id, "figures": after.stored(), "proof": proof_facts(proof), "files": files}
    if told := metadata.get("samples"):
        own = continuations(model, tokenizer, [sample["prompt"] for sample in told])
        written["samples"] = [{**sample, "child": text} for sample, text in zip(told, own, strict=True)]
    write_json(directory / METADATA_FILE, written)
    return {"directory": str(directory), "id": after.id, "proof": proof_facts(proof), "figures": after.to_json()}


def _as_stored(directory: Path) -> ModelRecipe:
    recipe = ModelRecipe(path=str(directory), device="cpu")
    return ModelRecipe.model_validate({**recipe.model_dump(), "dtype": stored_dtype(recipe)})


def _metadata(directory: Path) -> dict[str, Any]:
    file = directory / METADATA_FILE
    if not file.is_file():
        raise ExportError(f"{directory} holds no {METADATA_FILE}: it is no checkpoint that llmprune export wrote")
    metadata = read_json(file)
    if isinstance(metadata, dict) and (problem := exits_problem(directory, metadata, "prove")):
        raise ExportError(problem)
    if not isinstance(metadata, dict) or not all(key in metadata for key in ("figures", "parent", "files", "library")):
        raise ExportError(
            f"{file} is damaged, or of an older llmprune; write the checkpoint again with llmprune export"
        )
    if problem := schema_problem(metadata["figures"], "write it again with llmprune export"):
        raise ExportError(f"{file} {problem}")
    return metadata


def _splits(directory: Path, data: Path | None) -> TokenSplits:
    places = [data] if data is not None else directory.expanduser().resolve().parents
    run = next((RunDirectory(place) for place in places if RunDirectory(place).tokens.is_file()), None)
    if run is None:
        where = data if data is not None else directory
        raise DataError(f"{where} is in no run directory whose text a child is judged on; name one with --data")
    return load_token_splits(run.tokens)


def _check_company(directory: Path) -> None:
    """Raises ExportError over what was made of the weights as they were."""
    stale = [*directory.glob("*.gguf"), directory / VLLM_DIRECTORY, directory / EVALUATION_FILE]
    if found := sorted(path.name for path in stale if path.exists()):
        raise ExportError(
            f"{directory} holds {', '.join(found)}, made of its weights as they were; take that away, and convert and "
            "evaluate again afterwards"
        )


def _check_code(directory: Path) -> None:
    """Raises ExportError over code that a fresh process would run and that is not what an export writes."""
    own = Path(modeling_pruned.__file__)
    for file in directory.rglob("*.py"):
        if file.name != own.name or file.read_bytes() != own.read_bytes():
            raise ExportError(
                f"{file} is not the modeling file of this llmprune, and the proof would run it; if you trust it, add "
                "--trust-remote-code"
            )
    for file in (directory / "config.json", directory / "tokenizer_config.json"):
        named = read_json(file).get("auto_map", {}) if file.is_file() else {}
        # A name may be that of another repository's code.
        if any(not str(value).startswith(f"{own.stem}.") for value in named.values()):
            raise ExportError(
                f"{file} names code in auto_map that is not {own.name}, and the proof would run it; if you trust it, "
                "add --trust-remote-code"
            )


def _files(directory: Path) -> list[Path]:
    """What a loader reads. Other files, of a trainer say, are no part of the checkpoint."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.suffix in PROVEN_SUFFIXES)
    return sorted(path for path in files if path.name != METADATA_FILE and not path.name.startswith("."))


def _weights(files: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if name.endswith(".safetensors")}


def _judged(before: Record, parent: Record, model: PreTrainedModel, splits: TokenSplits, library: str) -> Record:
    """The record with the figures of other weights; size and speed are those of its shape."""
    name = Repair.of(TRAINED, model.state_dict(), {}).name
    done = (*before.done, name)
    own = score(model, splits["validation"])
    _check_text(own, before.measured_on.dataset, before.measured_on.tokens)
    quoted: dict[str, Quoted] = {}
    for split, theirs in parent.quoted.items():
        quality = score(model, splits[split])
        _check_text(quality, theirs.dataset, theirs.tokens)
        quoted[split] = Quoted.beside(quality, theirs)
    return before.model_copy(
        update={
            "id": child_id(before.hash, library, done),
            "done": done,
            **figures_of(own, parent.ppl),
            **{split: quoted.get(split) for split in QUOTED},
        }
    )


def _check_text(quality: Quality, dataset: str, tokens: int) -> None:
    if (quality.dataset, quality.tokens) != (dataset, tokens):
        raise DataError(
            f"the run's {quality.split} text is {quality.tokens:,} tokens of {quality.dataset}, and the child that was "
            f"exported was judged on {tokens:,} of {dataset}; name its own run with --data"
        )
