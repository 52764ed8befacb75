"""The stage that chooses sizes of the whole model, vocabulary and hidden size, before blocks are cut: each is measured
on the same text, and the one that is taken is a parent like any other to all stages that follow."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmprune.core.errors import RecipeError, RunDirectoryError
from llmprune.core.files import read_json, write_json
from llmprune.core.progress import Steps
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import ModelRecipe, SplitName
from llmprune.core.recipe_text import parse_section
from llmprune.data.documents import Documents, read_source, read_texts
from llmprune.data.tokens import IntArray, TokenSplits, build_token_splits
from llmprune.formats.served_size import served_size
from llmprune.measure.quality.text_nats import OfText, pieces_of, text_nats, tokens_of
from llmprune.measure.record import QUOTED
from llmprune.measure.resized import Resized, Rung, described, fastest
from llmprune.measure.speed.throughput import Spread, Workload, measure_paired
from llmprune.measure.speed.turns import scoring, timing
from llmprune.models.checkpoint import move_into_place, save_proven, staging_beside
from llmprune.models.loading import dtype_of, load_model
from llmprune.models.parent import Parent, make_parent
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, hash_of
from llmprune.resize.hidden import Way, config_problem, cut_hidden, rotation_problem, size_problem
from llmprune.resize.rows import cut_vocabulary
from llmprune.resize.token_ids import named_ids
from llmprune.resize.tokenizers import cut_tokenizer, vocabulary_problem
from llmprune.resize.tokens import kept_tokens, least_size, token_counts

AUTO_SHARES = (0.75, 0.625, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
ROWS_STEP = 256
"""Of sizes that are given as shares: kernels like round numbers."""
LARGEST_PIECE_SHARE = 1 / 2
"""Of a source's text in a split that one document may be: one long article is no sample of Wikipedia."""

Size = tuple[int, int]
"""Rows of the vocabulary, and hidden size."""
Pieces = Mapping[SplitName, Mapping[str, list[str]]]


def is_asked(recipe: Recipe) -> bool:
    """Whether a recipe names sizes of the whole model."""
    return bool(recipe.space.vocabulary or recipe.space.hidden_size)


def sizes_of(recipe: Recipe, parent: Parent) -> list[Size]:
    """The sizes that a recipe names, the parent's own apart; those of one hidden size together, the largest first.

    Raises RecipeError, before anything is measured, on a size or model that cannot be cut so.
    """
    whole = whole_size(parent)
    hidden = sorted({whole[1], *recipe.space.hidden_size}, reverse=True)
    for size in hidden[1:]:
        if problem := config_problem(parent) or size_problem(parent, size):
            raise RecipeError(f"space.hidden_size cuts the residual stream of {parent.source}: {problem}")
    if hidden[0] > whole[1]:
        raise RecipeError(f"space.hidden_size must be below {parent.source}'s {whole[1]}; got {hidden[0]}")
    rows = [whole[0]]
    if recipe.space.vocabulary:
        assert parent.tokenizer is not None, "a parent that was loaded has a tokenizer"
        if problem := vocabulary_problem(parent.tokenizer):
            raise RecipeError(f"space.vocabulary cuts {parent.source}'s vocabulary, and {problem}")
        least = least_size(parent.tokenizer, also=named_ids(parent.model))
        rows += rows_of(recipe.space.vocabulary, whole[0], least)
    return [(count, width) for width, count in product(hidden, rows) if (count, width) != whole]


def rows_of(rungs: str | Sequence[float], whole: int, least: int) -> list[int]:
    """Vocabularies that a recipe names, largest first. Raises RecipeError on one that is not smaller than the parent's,
    or too small for what must stay."""
    if isinstance(rungs, str):
        found = {_round(share * whole) for share in AUTO_SHARES}
        return sorted((rows for rows in found if least <= rows < whole), reverse=True)
    named = {_round(rung * whole) if isinstance(rung, float) else rung for rung in rungs}
    for rows in named:
        if not least <= rows < whole:
            raise RecipeError(
                f"space.vocabulary must be from {least:,} rows, which bytes and special tokens need, to below the "
                f"parent's {whole:,}; got {rows:,}"
            )
    return sorted(named, reverse=True)


def resized_parent(run: Run, whole: Parent, whole_hash: str, workload: Workload) -> Parent:
    """The parent with the sizes that the run stands on, chosen and written to RUN/resized the first time; the whole
    one, if that is the choice. What was chosen when a run began holds to its end, on whatever machine."""
    recipe, directory = run.recipe, run.directory
    if not run.joined:
        asked = [recipe.space.vocabulary, recipe.space.hidden_size, recipe.vocabulary.model_dump(mode="json")]
        key = hash_of(whole_hash, recipe.data.identity(), *asked, recipe.search.phase)
        if not directory.is_done("resized", key, directory.resized_facts):
            made = _Sizes.of(run, whole, workload).settled()
            write_json(directory.resized_facts, made.stored())
            directory.mark_done("resized", key)
    return parent_of_run(run, whole)


def parent_of_run(run: Run, whole: Parent, read: Callable[[ModelRecipe], Any] = load_model) -> Parent:
    """The parent that a run stands on, its sizes having been chosen, as `read` gives model and tokenizer. Raises
    RunDirectoryError if it is missing."""
    facts = read_resized(run.directory)
    if facts is None:
        raise RunDirectoryError(f"{run.directory.resized_facts} is missing; copy it from the run of llmprune search")
    run.say(described(facts, run.recipe.search.phase))
    if facts.is_whole:
        return whole
    where = {"path": str(run.directory.resized), "dtype": dtype_of(whole.model), "device": run.recipe.model.device}
    return make_parent(*read(parse_section(ModelRecipe, where)), source=whole.source)


def read_resized(directory: RunDirectory) -> Resized | None:
    """What was measured of the sizes that a run may have; None where it has its parent's."""
    file = directory.resized_facts
    return Resized.read(read_json(file), file, "delete it, and it is measured again") if file.is_file() else None


def whole_size(parent: Parent) -> Size:
    """The parent's own."""
    return parent.model.config.get_text_config().vocab_size, parent.shape.hidden_size


@dataclass(frozen=True, eq=False)
class _Sizes:
    """All sizes of one parent, on their way to a choice."""

    run: Run
    whole: Parent
    tokenizer: PreTrainedTokenizerBase
    workload: Workload
    sizes: Sequence[Size]
    splits: TokenSplits
    """In the whole vocabulary."""
    kept: Mapping[int, IntArray]
    """Ids that stay, by their number; those of the whole vocabulary are not listed."""
    tokenizers: Mapping[int, PreTrainedTokenizerBase]
    pieces: Pieces
    kept_text: Mapping[str, list[str]]
    _narrowed: dict[int, Parent] = field(default_factory=dict)
    """The parent of the hidden size that was made last: sizes of one come one after another."""

    @classmethod
    def of(cls, run: Run, whole: Parent, workload: Workload) -> _Sizes:
        data, rules, tokenizer = run.recipe.data, run.recipe.vocabulary, whole.tokenizer
        assert tokenizer is not None, "a parent that was loaded has a tokenizer"
        sizes = sizes_of(run.recipe, whole)
        with run.show("reading text, and what it needs of the vocabulary"):
            splits = build_token_splits(data, tokenizer)
            documents = read_texts(data, tokenizer, splits)
            further = {source.name: read_source(source, data.seed, tokenizer) for source in rules.keep_text}
            counts = _counts(run.recipe, tokenizer, documents, further)
            named = named_ids(whole.model)
            narrow = {rows for rows, _ in sizes} - {whole_size(whole)[0]}
            kept = {rows: kept_tokens(tokenizer, counts, rows, also=named) for rows in narrow}
            cut = {rows: cut_tokenizer(tokenizer, ids) for rows, ids in kept.items()}
            pieces = _pieces(documents, splits, [tokenizer, *cut.values()])
        tokenizers = {whole_size(whole)[0]: tokenizer, **cut}
        return cls(run, whole, tokenizer, workload, sizes, splits, kept, tokenizers, pieces, further)

    def settled(self) -> Resized:
        """Every size measured, one taken and written."""
        own = whole_size(self.whole)
        with self.run.show("measuring sizes of the whole model") as advance:
            steps = Steps(1 + len(self.sizes), advance)
            (whole,) = [self._measured(size) for size in steps.over([own])]
            rungs = tuple(self._measured(size) for size in steps.over(self.sizes))
        shares = self.run.recipe.data.weights_of("validation")
        found = Resized(whole=whole, rungs=rungs, taken=own, shares=shares, workload=self.workload.to_json())
        objective, most = self.run.recipe.search.phase, self.run.recipe.vocabulary.most_loss
        found = found.model_copy(update={"taken": fastest(found, objective, most).size})
        quoted = {size: self._quoted(rung) for size, rung in {own: whole, found.taken: found.chosen}.items()}
        # Last: what is written gives up its place on the device.
        if not found.is_whole:
            self._write(found.taken)
        rungs = tuple(quoted.get(rung.size, rung) for rung in rungs)
        return found.model_copy(update={"whole": quoted[own], "rungs": rungs})

    def _write(self, size: Size) -> None:
        parent, where = self._parent(size), self.run.directory.resized
        with self.run.show("writing the resized parent and proving it"), staging_beside(where) as staging:
            save_proven(parent.model, parent.tokenizer, staging)
            move_into_place(staging, where)

    def _parent(self, size: Size) -> Parent:
        rows, hidden = size
        narrowed = self._of_hidden_size(hidden)
        if rows not in self.kept:
            return narrowed
        model, tokenizer = cut_vocabulary(narrowed.model, self.tokenizer, self.kept[rows])
        return make_parent(model, tokenizer, source=self.whole.source)

    def _of_hidden_size(self, hidden: int) -> Parent:
        if hidden == self.whole.shape.hidden_size:
            return self.whole
        if hidden not in self._narrowed:
            self._narrowed.clear()
            way: Way = "channels" if rotation_problem(self.whole) else "rotation"
            cut = cut_hidden(self.whole, self.splits["calibration"], hidden, way=way)
            self._narrowed[hidden] = make_parent(cut.model, self.tokenizer, source=self.whole.source)
        return self._narrowed[hidden]

    def _measured(self, size: Size) -> Rung:
        parent, timed, tokenizer = self._parent(size), self.workload, self.tokenizers[size[0]]
        served = served_size(parent.model, parent.shape, parent.shape.architecture, timed.gguf_type, timed.cache_type)
        decode = prefill = Spread(1.0, 1.0, 1.0)
        if parent is not self.whole:
            with timing(timed.device):
                repeats = self.run.recipe.workload.repeats
                _, (speed,) = measure_paired(self.whole.model, [parent.model], timed, repeats)
            decode, prefill = speed.decode_speedup, speed.prefill_speedup
        return Rung(
            rows=size[0],
            hidden_size=size[1],
            params=served.params,
            bytes=served.bytes,
            texts={"validation": self._figures("validation", parent, tokenizer)},
            decode_speedup=decode,
            prefill_speedup=prefill,
            kept_text={
                name: tokens_of(texts, tokenizer) / max(1, sum(len(text.encode()) for text in texts))
                for name, texts in self.kept_text.items()
            },
        )

    def _quoted(self, rung: Rung) -> Rung:
        """With its figures on text that nothing is chosen on."""
        parent, tokenizer = self._parent(rung.size), self.tokenizers[rung.rows]
        more = {name: self._figures(name, parent, tokenizer) for name in QUOTED if name in self.pieces}
        return rung.model_copy(update={"texts": {**rung.texts, **more}})

    def _figures(self, split: SplitName, parent: Parent, tokenizer: PreTrainedTokenizerBase) -> dict[str, OfText]:
        with scoring(self.workload.device):
            return {name: text_nats(parent.model, tokenizer, texts) for name, texts in self.pieces[split].items()}


def _counts(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, documents: Documents, further: Mapping[str, list[str]]
) -> IntArray:
    """(V,) how often each token is used in the mixture, by a milliard tokens: no figure is of this text."""
    weights = {source.name: source.weight for source in (*recipe.data.sources, *recipe.vocabulary.keep_text)}
    counts = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.float64)
    for name, texts in {**documents.free, **further}.items():
        own = token_counts(tokenizer, texts)
        counts += weights[name] * own / max(1, own.sum())
    return np.round(1e9 * counts / sum(weights.values())).astype(np.int64)


def _pieces(documents: Documents, splits: TokenSplits, tokenizers: Sequence[PreTrainedTokenizerBase]) -> Pieces:
    """Of the splits that figures are of, about as many bytes of each source as their windows hold."""
    found: dict[SplitName, dict[str, list[str]]] = {}
    for name in ("validation", *QUOTED):
        if name not in splits.splits:
            continue
        split = splits[name]
        found[name] = {}
        for source, texts in documents.splits[name].items():
            wanted = int(split.sources[source].bytes.sum())
            most = max(1, int(wanted * LARGEST_PIECE_SHARE))
            found[name][source] = pieces_of([text[:most] for text in texts], tokenizers, split.seq_len, wanted)
    return found


def _round(rows: float) -> int:
    return max(1, round(rows / ROWS_STEP)) * ROWS_STEP
