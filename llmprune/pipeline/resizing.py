"""The stage that chooses how many tokens the parent knows, before anything is cut from it: each size is measured on the
same text, and the one that is taken is a parent like any other to all stages that follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from llmprune.core.errors import RecipeError, RunDirectoryError
from llmprune.core.files import read_json, write_json
from llmprune.core.progress import Steps
from llmprune.core.recipe_inputs import ModelRecipe, SplitName
from llmprune.data.documents import Documents, read_source, read_texts
from llmprune.data.tokens import IntArray, TokenSplits, build_token_splits
from llmprune.formats.served_size import served_size
from llmprune.measure.quality.text_nats import pieces_of, text_nats, tokens_of
from llmprune.measure.record import QUOTED
from llmprune.measure.resized import OfText, Resized, Rung, described, fastest
from llmprune.measure.speed.throughput import Spread, Workload, measure_paired
from llmprune.measure.speed.turns import scoring, timing
from llmprune.models.checkpoint import move_into_place, prove, save_files, staging_beside
from llmprune.models.loading import dtype_of, load_model
from llmprune.models.parent import Parent, make_parent
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory, hash_of
from llmprune.resize.rows import cut_vocabulary
from llmprune.resize.token_ids import named_ids
from llmprune.resize.tokenizers import cut_tokenizer, vocabulary_problem
from llmprune.resize.tokens import kept_tokens, least_size, token_counts

AUTO_SHARES = (0.75, 0.625, 0.5, 0.375, 0.25, 0.1875, 0.125, 0.0625)
ROWS_STEP = 256
"""Of sizes that are given as shares: kernels like round numbers."""
LARGEST_PIECE_SHARE = 1 / 8
"""Of a source's text in a split that one document may be: three long articles are no sample of Wikipedia."""

Pieces = Mapping[SplitName, Mapping[str, list[str]]]


def check_vocabulary(parent: Parent, rungs: str | Sequence[float]) -> None:
    """Raises RecipeError unless the parent's vocabulary can be cut to these sizes."""
    assert parent.tokenizer is not None, "a parent that was loaded has a tokenizer"
    if problem := vocabulary_problem(parent.tokenizer):
        raise RecipeError(f"space.vocabulary cuts {parent.source}'s vocabulary, and {problem}")
    sizes_of(rungs, _rows(parent), least_size(parent.tokenizer, also=named_ids(parent.model)))


def sizes_of(rungs: str | Sequence[float], whole: int, least: int) -> list[int]:
    """The sizes that a recipe names, largest first. Raises RecipeError on one that is not smaller than the parent's, or
    too small for what must stay."""
    if isinstance(rungs, str):
        found = {_round(share * whole) for share in AUTO_SHARES}
        return sorted((rows for rows in found if least <= rows < whole), reverse=True)
    sizes = {_round(rung * whole) if isinstance(rung, float) else rung for rung in rungs}
    for rows in sizes:
        if not least <= rows < whole:
            raise RecipeError(
                f"space.vocabulary must be between {least:,} rows, which bytes and special tokens need, and the "
                f"parent's {whole:,}; got {rows:,}"
            )
    return sorted(sizes, reverse=True)


def resized_parent(run: Run, whole: Parent, whole_hash: str, workload: Workload) -> Parent:
    """The parent with the vocabulary that the run stands on, chosen and written to RUN/resized the first time; the
    whole one, if that is the choice. What was chosen when a run began holds to its end, on whatever machine."""
    recipe, directory = run.recipe, run.directory
    if not run.joined:
        rules = recipe.vocabulary.model_dump(mode="json")
        key = hash_of(whole_hash, recipe.data.identity(), recipe.space.vocabulary, rules, recipe.search.objective)
        if not directory.is_done("resized", key, directory.resized_facts):
            made = _Sizes.of(run, whole, workload).settled()
            write_json(directory.resized_facts, made.stored())
            directory.mark_done("resized", key)
    return parent_of_run(run, whole)


def parent_of_run(run: Run, whole: Parent) -> Parent:
    """The parent that a run stands on, its vocabulary having been chosen. Raises RunDirectoryError if it is missing."""
    facts = read_resized(run.directory)
    if facts is None:
        raise RunDirectoryError(f"{run.directory.resized_facts} is missing; copy it from the run of llmprune search")
    run.say(described(facts, run.recipe.search.objective))
    if facts.is_whole:
        return whole
    recipe = ModelRecipe(path=str(run.directory.resized), dtype=dtype_of(whole.model), device=run.recipe.model.device)
    return make_parent(*load_model(recipe), source=whole.source)


def read_resized(directory: RunDirectory) -> Resized | None:
    """What was measured of the vocabularies that a run may have; None where it has its parent's."""
    file = directory.resized_facts
    return Resized.read(read_json(file), file, "delete it, and it is measured again") if file.is_file() else None


@dataclass(frozen=True, eq=False)
class _Sizes:
    """All sizes of one parent, on their way to a choice."""

    run: Run
    whole: Parent
    tokenizer: PreTrainedTokenizerBase
    workload: Workload
    kept: Mapping[int, IntArray]
    """Rows that stay, by their number."""
    cut: Mapping[int, PreTrainedTokenizerBase]
    pieces: Pieces
    kept_text: Mapping[str, list[str]]
    shares: Mapping[str, float]

    @classmethod
    def of(cls, run: Run, whole: Parent, workload: Workload) -> _Sizes:
        data, rules, tokenizer = run.recipe.data, run.recipe.vocabulary, whole.tokenizer
        assert tokenizer is not None, "a parent that was loaded has a tokenizer"
        with run.show("counting tokens"):
            splits = build_token_splits(data, tokenizer)
            documents = read_texts(data, tokenizer, splits)
            further = {source.name: read_source(source, data.seed, tokenizer) for source in rules.keep_text}
            counts = _shares_of_tokens(run, tokenizer, documents, further)
            named = named_ids(whole.model)
            sizes = sizes_of(run.recipe.space.vocabulary, _rows(whole), least_size(tokenizer, also=named))
            kept = {rows: kept_tokens(tokenizer, counts, rows, also=named) for rows in sizes}
            cut = {rows: cut_tokenizer(tokenizer, ids) for rows, ids in kept.items()}
            pieces = _pieces(documents, splits, [tokenizer, *cut.values()])
        return cls(run, whole, tokenizer, workload, kept, cut, pieces, further, data.weights_of("validation"))

    def settled(self) -> Resized:
        """Every size measured, one chosen and written."""
        whole = self._rung(self.whole, self.tokenizer, None)
        rungs = []
        with self.run.show("measuring vocabularies") as advance:
            for rows, ids in Steps(len(self.kept), advance).over(list(self.kept.items())):
                rungs.append(self._rung(self._parent(ids), self.cut[rows], whole))
        shares = dict(self.shares)
        found = Resized(
            whole=whole, rungs=tuple(rungs), rows=whole.rows, shares=shares, workload=self.workload.to_json()
        )
        rules = self.run.recipe
        rows = fastest(found, rules.search.objective, rules.vocabulary.most_loss).rows
        found = found.model_copy(update={"rows": rows})
        if found.is_whole:
            return found.model_copy(update={"whole": self._quoted(whole, self.whole, self.tokenizer)})
        chosen, tokenizer = self._parent(self.kept[rows]), self.cut[rows]
        quoted = self._quoted(found.chosen, chosen, tokenizer)
        with self.run.show("writing the parent with fewer rows"), staging_beside(self.run.directory.resized) as staging:
            save_files(chosen.model, tokenizer, staging)
            prove(chosen.model, tokenizer, staging)
            move_into_place(staging, self.run.directory.resized)
        return found.model_copy(
            update={
                "whole": self._quoted(whole, self.whole, self.tokenizer),
                "rungs": tuple(quoted if rung.rows == rows else rung for rung in rungs),
            }
        )

    def _parent(self, ids: IntArray) -> Parent:
        model, tokenizer = cut_vocabulary(self.whole.model, self.tokenizer, ids)
        return make_parent(model, tokenizer, source=self.whole.source)

    def _rung(self, parent: Parent, tokenizer: PreTrainedTokenizerBase, whole: Rung | None) -> Rung:
        timed = self.workload
        size = served_size(parent.model, parent.shape, parent.shape.architecture, timed.gguf_type, timed.cache_type)
        one = Spread(1.0, 1.0, 1.0)
        decode, prefill = one, one
        if whole is not None:
            with timing(timed.device):
                repeats = self.run.recipe.workload.repeats
                _, (speed,) = measure_paired(self.whole.model, [parent.model], timed, repeats)
            decode, prefill = speed.decode_speedup, speed.prefill_speedup
        return Rung(
            rows=_rows(parent),
            params=size.params,
            bytes=size.bytes,
            texts={"validation": self._figures("validation", parent, tokenizer)},
            decode_speedup=decode,
            prefill_speedup=prefill,
            kept_text={
                name: tokens_of(texts, tokenizer) / max(1, sum(len(text.encode()) for text in texts))
                for name, texts in self.kept_text.items()
            },
        )

    def _quoted(self, rung: Rung, parent: Parent, tokenizer: PreTrainedTokenizerBase) -> Rung:
        """With its figures on text that nothing is chosen on."""
        names = [name for name in QUOTED if name in self.pieces]
        more = {name: self._figures(name, parent, tokenizer) for name in names}
        return rung.model_copy(update={"texts": {**rung.texts, **more}})

    def _figures(self, split: SplitName, parent: Parent, tokenizer: PreTrainedTokenizerBase) -> dict[str, OfText]:
        with scoring(self.workload.device):
            scored = {name: text_nats(parent.model, tokenizer, texts) for name, texts in self.pieces[split].items()}
        return {
            name: OfText(bytes=one.bytes, tokens=one.tokens, nats_per_byte=one.nats_per_byte)
            for name, one in scored.items()
        }


def _shares_of_tokens(
    run: Run, tokenizer: PreTrainedTokenizerBase, documents: Documents, further: Mapping[str, list[str]]
) -> IntArray:
    """(V,) how often each token is used, by a milliard tokens of the mixture: no figure is of this text."""
    weights = {source.name: source.weight for source in (*run.recipe.data.sources, *run.recipe.vocabulary.keep_text)}
    counts = np.zeros(1 + max(tokenizer.get_vocab().values()), dtype=np.float64)
    for name, texts in {**documents.free, **further}.items():
        own = token_counts(tokenizer, texts)
        counts += weights[name] * own / max(1, own.sum())
    return np.round(1e9 * counts / max(weights.values())).astype(np.int64)


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


def _rows(parent: Parent) -> int:
    rows: int = parent.model.config.get_text_config().vocab_size
    return rows


def _round(rows: float) -> int:
    return max(1, round(rows / ROWS_STEP)) * ROWS_STEP
