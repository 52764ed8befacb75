"""The stage that hands over a draft: its checkpoint, what decoding with it really gives, and how it is served."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from llmprune.core.budgets import Pick, pick_record
from llmprune.core.errors import RecipeError
from llmprune.data.tokens import Split
from llmprune.measure.quality.agreement import NGRAM
from llmprune.measure.record import Front, Record
from llmprune.measure.speed.speculative import Lookup, PassCosts, Speculated, pass_costs, speculate
from llmprune.measure.speed.turns import timing
from llmprune.models.own_text import ends_of
from llmprune.models.waiting import come_home
from llmprune.pipeline.exports import child_of, export_pick
from llmprune.pipeline.judges import Judges
from llmprune.pipeline.run import Run


def check_objective(run: Run) -> None:
    """Raises RecipeError unless the run's children are judged as drafts."""
    if run.recipe.search.objective != "draft":
        raise RecipeError(
            f"{run.directory.path} was searched with search.objective={run.recipe.search.objective}, so that nothing "
            "is known of its children as drafts; start a run with llmprune compress MODEL --recipe draft"
        )


def export_draft(
    run: Run, judges: Judges, front: Front, pick: Pick, to: Path, *, prompts: int, new_tokens: int, force: bool
) -> dict[str, Any]:
    """Write the picked child to `to`, proven as any child is; then let its parent write with it and without.

    `prompts` are the beginnings of so many windows of the test text. Raises as `export_pick` does, and RecipeError as
    `speculate` does.
    """
    record = pick_record(front.children, pick)
    written = export_pick(run, judges, front, pick, to, force=force)
    assert record.draft is not None, "it was judged as a draft"
    engines = commands_for(judges.stock.parent.source, to, max(1, record.draft.drafted), written["formats"])
    lookup = front.lookup.drafted if front.lookup else 0
    decoding = decode_with(run, judges, record, prompts, new_tokens, max(1, lookup))
    return {**written, "decoding": decoding, "commands": engines}


def decode_with(
    run: Run, judges: Judges, record: Record, prompts: int, new_tokens: int, looked_up: int
) -> dict[str, Any]:
    """What greedy decoding of test prompts gives, in the run's engine: with the draft, and with prompt lookup of
    `looked_up` tokens a round; and what the rounds that came about foretell by passes that are measured beside them."""
    stock, repeats = judges.stock, run.recipe.front.repeats
    assert record.draft is not None, "it was judged as a draft"
    workload, drafted = stock.workload, max(1, record.draft.drafted)
    texts, ends = prompts_of(stock.tokens["test"], prompts), ends_of(stock.parent.model)
    parent, child = stock.parent.model, child_of(run, judges, record)
    # Decoding needs both: if there is no room, that is said now.
    come_home(parent)
    with run.show("decoding test prompts with the draft and without") as advance, timing(workload.device):
        costs, lookup_costs = pass_costs(parent, child, workload, drafted, looked_up, repeats)
        advance(1, 3)
        with_draft = speculate(parent, child, workload, texts, new_tokens, drafted, ends)
        advance(2, 3)
        del child
        with_lookup = speculate(parent, Lookup(NGRAM), workload, texts, new_tokens, looked_up, ends)
        advance(3, 3)
    return {
        **_figures(with_draft, costs),
        "prompts": len(texts),
        "new_tokens": new_tokens,
        "lookup": _figures(with_lookup, lookup_costs),
    }


def prompts_of(split: Split, count: int) -> list[list[int]]:
    """The beginnings of windows behind which the parent wrote, of each source in turn."""
    assert split.own_after is not None, "the parent wrote it"
    of_sources = ([ids_T[: split.own_after].tolist() for ids_T in source.windows] for source in split.sources.values())
    in_turn = chain.from_iterable(zip_longest(*of_sources))
    return [prompt for prompt in in_turn if prompt is not None][:count]


def _figures(found: Speculated, costs: PassCosts) -> dict[str, Any]:
    alone, with_draft = (sum(one.decode_s for one in way) for way in (found.plain, found.speculative))
    tokens, written = (sum(len(one.ids) for one in way) for way in (found.plain, found.speculative))
    return {
        "drafted": found.drafted,
        "speedup": asdict(found.speedup),
        "mean_speedup": (written / with_draft) / (tokens / alone),
        "foretold_speedup": costs.speedup(found),
        "costs": asdict(costs),
        "tokens_per_s_alone": tokens / alone,
        "tokens_a_round": written / sum(len(one.drafted) for one in found.speculative),
        "identical": len(found.plain) - len(found.divergences),
        "ties": sum(one.is_tie for one in found.divergences),
        "differ": sum(not one.is_tie for one in found.divergences),
    }


def commands_for(parent: str, to: Path, drafted: int, formats: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By engine, what to run or to write, for each that the draft was written for."""
    loaded = f"AutoModelForCausalLM.from_pretrained({str(to)!r}, trust_remote_code=True)"
    found = {"transformers": f"parent.generate(**inputs, do_sample=False, assistant_model={loaded})"}
    files = {written["format"]: to / written["file"] for written in formats}
    if "gguf" in files:
        file = shlex.quote(str(files["gguf"]))
        found["llama.cpp"] = f"llama-server -m PARENT.gguf -md {file} --spec-draft-n-max {drafted}"
    if "vllm" in files:
        config = {"method": "draft_model", "model": str(files["vllm"]), "num_speculative_tokens": drafted}
        found["vLLM"] = f"vllm serve {shlex.quote(parent)} --speculative-config {shlex.quote(json.dumps(config))}"
    return found
