"""A model card from a checkpoint's own files alone: what was pruned, what was measured, how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.resources import files
from math import isfinite
from typing import Any

import jinja2
import yaml
from huggingface_hub import ModelCardData

from llmprune.choices.architecture import Architecture, ParentShape
from llmprune.choices.dimensions import BLOCK_KINDS
from llmprune.core.errors import PushError
from llmprune.measure.record import Record, engine_of
from llmprune.measure.resized import Resized
from llmprune.measure.speed.throughput import Spread
from llmprune.models.checkpoint import METADATA_FILE
from llmprune.models.licence import Licence
from llmprune.publish.contents import EVALUATION_FILE, PICTURES, Contents
from llmprune.publish.evaluations import Comparison, Evaluation, Metric, perplexity_result, read_evaluation

BAR_WIDTH = 12


def model_card(contents: Contents, repo: str, licence: Licence) -> str:
    """README.md for `repo` ("user/name"): metadata and text. The same contents give the same text, byte for byte.

    Raises PushError if an evaluation lies there that is not this checkpoint's, or `llmprune.json` lacks a figure.
    """
    evaluation_file = contents.file(EVALUATION_FILE)
    child, parent = _figures(contents)
    evaluation = read_evaluation(evaluation_file, child.id) if evaluation_file else None
    name = repo.partition("/")[2]
    try:
        text = _text(contents, repo, child, parent, evaluation)
        header = _card_data(contents, name, licence, child, evaluation).to_yaml(line_break="\n")
    except (KeyError, TypeError, jinja2.UndefinedError) as error:
        raise _not_as_written(error) from error
    return f"---\n{header}\n---\n\n{text}"


def _figures(contents: Contents) -> tuple[Record, Record]:
    """The child's record and the parent's."""
    try:
        return Record.from_json(contents.metadata["figures"]), Record.from_json(contents.metadata["parent"]["figures"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_as_written(error) from error


def _not_as_written(error: Exception) -> PushError:
    return PushError(
        f"{METADATA_FILE} is not as llmprune export wrote it ({type(error).__name__}: {error}); write it again"
    )


def _text(contents: Contents, repo: str, child: Record, parent: Record, evaluation: Evaluation | None) -> str:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files(__package__).joinpath("card.md.jinja").read_text(encoding="utf-8"))
    metadata = contents.metadata
    return template.render(
        name=repo.partition("/")[2],
        repo=repo,
        parent_link=_parent_link(contents),
        child=child,
        parent=parent,
        engine=engine_of(child.measured_on.workload),
        host=_host(child.measured_on.host),
        resized=Resized.from_json(metadata["resized"]) if "resized" in metadata else None,
        evaluation=evaluation,
        quality=list(evaluation.quality()) if evaluation else [],
        rows=list(evaluation.rows()) if evaluation else [],
        kept=_kept(child.architecture),
        architecture_map=architecture_map(child.architecture, ParentShape(**metadata["parent"]["shape"])),
        pictures={name: told for name, told in PICTURES.items() if contents.file(name)},
        samples=metadata.get("samples", []),
        has_code=contents.has_code,
        gguf_files=contents.gguf_files,
        has_vllm=contents.has_vllm,
        has_torchao=contents.has_torchao,
        recipe=metadata["recipe"],
        sources=list(_sources(metadata)),
        provenance=list(_provenance(metadata)),
        recipe_yaml=yaml.safe_dump(metadata["recipe"], sort_keys=False, allow_unicode=True).rstrip(),
        number="{:,}".format,
        percent="{:.1%}".format,
        times=_times,
        metric=metric_text,
        difference=difference_text,
    )


def architecture_map(architecture: Architecture, shape: ParentShape) -> str:
    """A line for each layer of the parent: KV groups, query heads and FFN width that stayed, drawn as bars; and types
    of weights, where blocks have their own."""
    typed = 8 if any(choice.stored for _, choice in architecture.blocks()) else 0
    lines = [f"layer  {'KV groups':<{BAR_WIDTH + 10 + typed}}{'query heads':<14}FFN width"]
    for index, layer in enumerate(architecture.layers):
        sizes = {**layer.attention.sizes(shape), **layer.ffn.sizes(shape)}
        groups, queries, width = (sizes.get(word, 0) for word in ("kv_heads", "heads", "ffn_width"))
        types = [f" {choice.stored}" if choice.stored else "" for choice in layer.blocks]
        attention = f"{_bar(groups, shape.kv_groups)} {groups}/{shape.kv_groups}" if groups else "attention dropped"
        heads = f"{queries}/{shape.kv_groups * shape.queries_per_group}" if groups else ""
        ffn = f"{_bar(width, shape.ffn_width)} {width}/{shape.ffn_width}" if width else "FFN dropped"
        line = f"{index:>5}  {attention + types[0]:<{BAR_WIDTH + 10 + typed}}{heads:<14}{ffn}{types[1]}"
        lines.append(f"{index:>5}  layer dropped" if layer.is_gone else line)
    if stored := architecture.vocabulary.stored:
        lines.append(f"embedding and output head in {stored}")
    return "\n".join(lines)


def _kept(architecture: Architecture) -> str:
    stay = [architecture.layers[layer] for layer in architecture.kept_layers]
    attention, ffn = (sum(layer.block(kind).units == 0 for layer in stay) for kind in BLOCK_KINDS)
    return (
        f"Of {len(architecture.layers)} layers {len(stay)} stay, {attention} of them without attention and {ffn} "
        "without FFN"
    )


def _bar(kept: int, of: int) -> str:
    # What is kept at all is drawn, and what lacks anything is not drawn whole.
    cells = kept * BAR_WIDTH // of
    cells = max(cells, 1)
    return "█" * cells + "░" * (BAR_WIDTH - cells)


def _card_data(
    contents: Contents, name: str, licence: Licence, child: Record, evaluation: Evaluation | None
) -> ModelCardData:
    recipe = contents.metadata["recipe"]
    results = [
        perplexity_result(on.ppl, {**on.to_json(), "split": split})
        for split, on in child.quoted.items()
        if isfinite(on.ppl)
    ]
    if evaluation:
        results += evaluation.results()
    tags = ["pruned", "llmprune", "structured-pruning", *(["gguf"] if contents.gguf_files else [])]
    return ModelCardData(
        license=licence.id,
        license_name=licence.name,
        license_link=licence.link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*tags, *(["custom_code"] if contents.has_code else [])],
        datasets=list(dict.fromkeys(source["dataset"] for source in recipe["data"]["sources"] if source["dataset"]))
        or None,
        model_name=name,
        eval_results=results,
        base_model=contents.parent_id,
        # The Hub has no word for a pruned child; with none given it would take GGUF files for a sign of `quantized`.
        base_model_relation="finetune" if contents.parent_id else None,
    )


def _parent_link(contents: Contents) -> str:
    known = contents.parent_id
    return f"[{known}](https://huggingface.co/{known})" if known else f"`{contents.parent_name}`"


def _times(speedup: Spread) -> str:
    return f"{speedup.median:.2f} times as fast ({speedup.low:.2f} to {speedup.high:.2f})"


def metric_text(metric: Metric | None) -> str:
    """A figure with its standard error."""
    if metric is None:
        return ""
    return f"{metric.value:.4f}" + ("" if metric.stderr is None else f" ± {metric.stderr:.4f}")


def difference_text(comparison: Comparison | None) -> str:
    """A difference with its interval and test, and how many answers went from right to wrong or back."""
    if comparison is None:
        return ""
    bounded = comparison.low is not None and comparison.high is not None
    interval = f" [{comparison.low:+.4f}, {comparison.high:+.4f}]" if bounded else ""
    p = "" if comparison.p is None else f", p = {comparison.p:.3g}"
    flips = "" if comparison.flips is None else f", {comparison.flips} answers changed"
    return f"{comparison.difference:+.4f}{interval} ({comparison.test}{p}{flips})"


def _host(host: Mapping[str, Any]) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in host.items())


def _sources(metadata: Mapping[str, Any]) -> Iterator[str]:
    identities = metadata["provenance"].get("data", {}).get("sources", {})
    texts = metadata["recipe"]["data"]
    for source in (*texts["sources"], *texts.get("unseen", ())):
        known = identities.get(source["name"], {})
        if source["dataset"]:
            facts = {key: known.get(key, source[key]) for key in ("config", "split", "revision")}
            where = f"[{source['dataset']}](https://huggingface.co/datasets/{source['dataset']})"
        else:
            facts = {"SHA-256": known.get("sha256")}
            where = f"`{source['path']}`"
        told = ", ".join(f"{key} `{value}`" for key, value in facts.items() if value)
        role = "for figures only" if source in texts.get("unseen", ()) else f"weight {source['weight']:g}"
        yield f"{source['name']}: {where}{', ' + told if told else ''}, {role}"


def _provenance(metadata: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    known = metadata["provenance"]
    yield "child", f"`{metadata['figures']['id']}`"
    yield "architecture", f"`{metadata['hash']}`"
    yield "parent", f"`{known['parent']['model']}`"
    if known["parent"].get("revision"):
        yield "parent's revision", f"`{known['parent']['revision']}`"
    yield "parent's weights", f"SHA-256 `{known['parent']['hash']}`"
    yield "largest difference of a logit after a reload", f"{metadata['proof']['max_logit_difference']:.1e}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items())
    yield "searched on", _host(known.get("host", {}))
