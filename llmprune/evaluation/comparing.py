"""Children side by side: what they keep, what was measured of them, and where they behave unlike their parent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.errors import ArchitectureError, ModelError
from llmprune.core.files import read_json
from llmprune.core.progress import Show
from llmprune.core.recipe_inputs import SplitName
from llmprune.evaluation.behaviour import behaviour
from llmprune.evaluation.bench import check_tokenizer
from llmprune.evaluation.evaluate import split_of
from llmprune.evaluation.subjects import Subject, find_subjects
from llmprune.measure.record import Record, engine_of, text_of
from llmprune.models.checkpoint import METADATA_FILE, exits_problem

LONGEST = 60
"""Characters of a passage that a terminal is shown."""


def compare(
    models: Sequence[str],
    parent: str | None,
    *,
    data: Path | None,
    split: SplitName,
    most: int,
    device: str,
    dtype: str,
    show: Show,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Exported children, as JSON: structure and stored figures of each, and its behaviour beside the parent on a split.

    Behaviour is left out, and why is said, where the parent is not known. Raises LlmpruneError; ModelError for a
    checkpoint that is no export of ours.
    """
    subjects = find_subjects(models, parent, device=device, dtype=dtype, say=say)
    children = [subject for subject in subjects if subject.role != "parent"]
    rows = [_stored(subject) for subject in children]
    found: dict[str, Any] = {"models": rows, "differing_layers": differing_layers(rows)}
    if subjects[0].role == "parent":
        found["behaviour"] = _behaviour(subjects[0], children, data, split, most, show)
    return found


def _stored(subject: Subject) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    file = None if subject.directory is None else subject.directory / METADATA_FILE
    if file is None or not file.is_file():
        raise ModelError(f"{subject.name} is no export of llmprune (no {METADATA_FILE}); use llmprune eval for it")
    metadata = read_json(file)
    if problem := exits_problem(file.parent, metadata, "compare"):
        raise ModelError(problem)
    try:
        record = Record.from_json(metadata["figures"])
        architecture = Architecture.from_json(metadata["architecture"])
        whole = ParentShape(**metadata["parent"]["shape"]).architecture
    except (KeyError, TypeError, ValueError, ArchitectureError) as error:
        raise ModelError(f"{file} is damaged ({type(error).__name__}: {error}); export the child again") from error
    return {
        "model": subject.name,
        "id": record.id,
        "architecture": architecture.to_json(),
        "parents_architecture": whole.to_json(),
        "structure": structure(architecture),
        "figures": record.to_json(),
    }


def structure(architecture: Architecture) -> dict[str, int]:
    """Layers, blocks and units that an architecture has left."""
    kept = {kind: [c.units for _, c in architecture.blocks() if c.kind == kind and c.units] for kind in BLOCK_KINDS}
    return {
        "layers": len(architecture.kept_layers),
        "attention_blocks": len(kept["attention"]),
        "kv_groups": sum(kept["attention"]),
        "ffn_blocks": len(kept["ffn"]),
        "ffn_width": sum(kept["ffn"]),
    }


def differing_layers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The parent's layers that the models do not keep alike, with what each keeps of them; and likewise the
    vocabulary."""
    every = [row["architecture"]["layers"] for row in rows]
    if len({len(layers) for layers in every}) > 1:
        return []  # Children of several parents have no layers in common.
    found: list[dict[str, Any]] = [
        {"layer": number, "kept": [{kind: layer[kind] for kind in BLOCK_KINDS} for layer in layers]}
        for number, layers in enumerate(zip(*every, strict=True))
        if any(layer != layers[0] for layer in layers)
    ]
    vocabularies = [row["architecture"].get("vocabulary", {}) for row in rows]
    if any(own != vocabularies[0] for own in vocabularies):
        found.append({"layer": "vocabulary", "kept": [{"vocabulary": own} for own in vocabularies]})
    return found


def _behaviour(
    parent: Subject, children: Sequence[Subject], data: Path | None, split: SplitName, most: int, show: Show
) -> dict[str, Any]:
    own, tokenizer = parent.load(show)
    text = split_of(children[0], data, split)
    check_tokenizer(own, tokenizer, parent.name, text)
    found = {}
    for child in children:
        model, childs = child.load(show)
        check_tokenizer(model, childs, child.name, text)
        with show(f"reading the {split} split with {child.name} and its parent") as advance:
            found[child.name] = asdict(behaviour(own, model, tokenizer, text, most=most, progress=advance))
    measured_on = {"dataset": text.dataset, "split": split, "seq_len": text.seq_len, "bos": text.bos}
    return {"parent": parent.name, "measured_on": measured_on, "models": found}


def comparison_tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """The same for people."""
    yield _figures(result["models"])
    if result["differing_layers"]:
        yield _layers(result)
    if "behaviour" in result:
        yield from _behaviours(result["behaviour"])


def _figures(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Side by side", caption=measured_on(rows), caption_justify="left")
    table.add_column("")
    for row in rows:
        table.add_column(f"{row['model']}\n{row['id']}", justify="right", overflow="fold")
    for name, cells in figure_rows(rows):
        table.add_row(name, *cells)
    return table


def figure_rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    """Name and, model by model, text of every figure that was stored of them."""
    records = [Record.from_json(row["figures"]) for row in rows]
    yield "parameters", [f"{record.params / 1e6:.1f}M" for record in records]
    yield "bytes", [f"{record.bytes / 1e6:.0f}M ({record.stored_as})" for record in records]
    for phase in ("decode", "prefill"):
        speeds = (getattr(record, f"{phase}_speedup") for record in records)
        yield f"{phase} speed-up", [f"{s.median:.2f}x ({s.low:.2f}-{s.high:.2f})" for s in speeds]
    for name in dict.fromkeys(name for record in records for name in record.quoted):
        quoted = (record.quoted.get(name) for record in records)
        yield f"{name}: nats lost, PPL", [f"{q.nats_lost:+.3f}, {q.ppl:.2f}" if q else "-" for q in quoted]
    for key in rows[0]["structure"]:
        told = key.replace("_", " ").replace("kv", "KV").replace("ffn", "FFN")
        yield told, [f"{row['structure'][key]:,}" for row in rows]
    yield "repairs", [", ".join(record.done) or "none" for record in records]


def measured_on(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the stored figures must not be quoted without."""
    records = [Record.from_json(row["figures"]) for row in rows]
    told = dict.fromkeys(text_of(name, on) for record in records for name, on in record.quoted.items())
    engines = dict.fromkeys(engine_of(record.measured_on.workload) for record in records)
    return f"As measured when each was made, speeds in {' and '.join(engines)}. {'; '.join(told)}."


def _layers(result: Mapping[str, Any]) -> Table:
    table = Table(title="Layers that differ", caption="KV groups and FFN width that stay.", caption_justify="left")
    table.add_column("layer", justify="right")
    for row in result["models"]:
        table.add_column(str(row["model"]), justify="right", overflow="fold")
    for layer in result["differing_layers"]:
        table.add_row(str(layer["layer"]), *kept_of(layer))
    return table


def kept_of(layer: Mapping[str, Any]) -> list[str]:
    """Units that each model keeps of a layer they differ in, and the types that have been chosen for them."""
    values = [[value for choice in one.values() for value in choice.values()] for one in layer["kept"]]
    return [", ".join(n if isinstance(n, str) else f"{n:,}" for n in own) or "as the parent's" for own in values]


def read_on(on: Mapping[str, Any]) -> str:
    """The text that behaviour was looked for in."""
    return f"{on['dataset']}, {on['split']} split, windows of {on['seq_len']}, {'with' if on['bos'] else 'no'} BOS"


def alike(told: Mapping[str, Any]) -> str:
    """How alike a child is to its parent, in a sentence's part."""
    return (
        f"the same likeliest token before {told['same_top']:.1%} of them, KL {told['kl']:.3f} nats a token, "
        f"{told['nats_lost']:+.3f} nats lost"
    )


def _behaviours(found: Mapping[str, Any]) -> Iterator[Table]:
    where = read_on(found["measured_on"])
    for name, told in found["models"].items():
        table = Table(
            title=f"{name} beside {found['parent']}",
            caption=f"{told['tokens']:,} tokens of {where}: {alike(told)}. Most divergent first.",
            caption_justify="left",
        )
        for column in ("", "source", "after", "in truth", "parent", "child", "KL"):
            justify: Literal["left", "right"] = "right" if column == "KL" else "left"
            table.add_column(column, overflow="fold", justify=justify, no_wrap=column in ("", "KL"))
        for label, places in (("token", told["worst_tokens"]), ("passage", told["worst_passages"])):
            for place in places:
                before = place["before"][-LONGEST:]
                cells = (before, place["text"][:LONGEST], place["parents"], place["childs"])
                table.add_row(label, place["source"], *map(_plain, cells), f"{place['kl']:.2f}")
        yield table


def _plain(text: str) -> str:
    """One line, whose brackets are no markup."""
    return text.replace("\n", "⏎").replace("[", "\\[")
