"""The stages before a search, in order. Each makes a typed value, or reads what is there for the same inputs: that is
the whole resume mechanism."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch

from llmprune.baselines.methods import check_methods
from llmprune.blocks.library import BlockLibrary, build_library, load_library, stored_layers
from llmprune.blocks.statistics import few_tokens_warning
from llmprune.choices.space import Space
from llmprune.core.errors import RunDirectoryError
from llmprune.core.files import exists, read_json, write_json
from llmprune.core.recipe import Recipe
from llmprune.core.recipe_inputs import ModelRecipe
from llmprune.data.store import load_token_splits, save_token_splits
from llmprune.data.tokens import TokenSplits, build_token_splits
from llmprune.formats.limits import check_parent, check_precision, cut, merging_helps, rounding_warning
from llmprune.measure.quality.agreement import MOST_DRAFTED, worth_of_drafts
from llmprune.measure.record import QUOTED
from llmprune.measure.speed.host import fingerprint
from llmprune.measure.speed.llamacpp_engine import check_engine
from llmprune.measure.speed.throughput import Workload, check_compiler
from llmprune.measure.speed.turns import timing
from llmprune.measure.speed.verifying import VerifyCosts, verify_costs
from llmprune.models.licence import stated_licence
from llmprune.models.loading import dtype_of, outline_model
from llmprune.models.parent import Parent, check_choices, check_lengths, load_parent, outline_parent
from llmprune.models.placement import is_spread, resolve_device
from llmprune.pipeline.own_text import forget_parts, in_parents_words
from llmprune.pipeline.resizing import is_asked, parent_of_run, resized_parent, sizes_of
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import hash_of
from llmprune.tables.allocate import Scores
from llmprune.tables.block_tables import BlockTables, build_tables
from llmprune.tables.reach import Reach, check_reach, described, measure_reach, reach_from_json, reach_to_json
from llmprune.tables.shrinkage import Shrinkage

PACKAGES = ("llmprune", "torch", "transformers", "accelerate", "datasets", "optuna", "numpy")


@dataclass(frozen=True, eq=False)
class Ground:
    """What a run stands on: the parent, what may be made of it, and what it is timed at."""

    parent: Parent
    parent_hash: str
    space: Space
    workload: Workload


@dataclass(frozen=True, eq=False)
class Stock(Ground):
    """And what children are cut from and judged on."""

    tokens: TokenSplits
    library: BlockLibrary

    @property
    def quoted_hashes(self) -> list[str]:
        """Of the tokens that quoted figures are of."""
        return [self.tokens[name].hash for name in QUOTED if name in self.tokens.splits]


@dataclass(frozen=True, eq=False)
class Prepared(Stock):
    """And what every choice loses and saves."""

    tables: BlockTables
    shrinkage: Shrinkage

    @cached_property
    def scores(self) -> Scores:
        """What a knapsack minimises: the tables' nats, held to what choices cost together, and shrunk."""
        return self.shrinkage.apply(self.tables.joint_nats, self.space.shape.architecture)


def prepare(run: Run, ground: Ground | None = None) -> Prepared:
    """All stages before the search."""
    return score_choices(run, stock_up(run, ground))


def stock_up(run: Run, ground: Ground | None = None) -> Stock:
    """The stages before the tables: all that an export needs."""
    ground = ground or lay_ground(run)
    tokens = cut_text(run, ground)
    return Stock(**vars(ground), tokens=tokens, library=solve_blocks(run, ground, tokens))


def lay_ground(run: Run) -> Ground:
    """Load the parent, choose its vocabulary and hidden size where the recipe names some, and cut the space to what can
    be served. What cannot be served is refused here."""
    parent, parent_hash = _parent(run)
    workload = _workload(run.recipe, parent, parent.device)
    if is_asked(run.recipe):
        whole = parent
        parent = resized_parent(run, whole, parent_hash, workload)
        if parent is not whole:
            parent_hash = parent.hash
            if not run.joined:
                run.directory.note(resized={"hash": parent_hash})
            check_parent(parent, run.recipe.deploy, run.recipe.space.size)
    return _ground(run, parent, parent_hash, workload)


def outline_ground(run: Run) -> Ground:
    """The ground of a forecast: the parent is an outline, of which no weight is read. Its hash is the one that the run
    has noted, "" if none; sizes of the whole model are those that the run has chosen, until then the parent's own.

    Raises as `lay_ground` does, but for what is wrong with weights.
    """
    known = run.directory.read_provenance()
    with run.show("reading the parent's config"):
        model = _settled(run.recipe.model, known)
        needed = "gguf" in run.recipe.deploy.formats or bool(run.recipe.space.vocabulary)
        parent = outline_parent(model, with_tokenizer=needed)
    device = device_of(model)
    check_recipe(parent, run.recipe, device)
    parent_hash = known.get("parent", {}).get("hash", "")
    if is_asked(run.recipe) and run.directory.resized_facts.is_file():
        whole = parent
        parent = parent_of_run(run, whole, outline_model)
        if parent is not whole:
            parent_hash = known.get("resized", {}).get("hash", "")
            check_parent(parent, run.recipe.deploy, run.recipe.space.size)
    return _ground(run, parent, parent_hash, _workload(run.recipe, parent, device))


def _ground(run: Run, parent: Parent, parent_hash: str, workload: Workload) -> Ground:
    if warning := rounding_warning(run.recipe):
        run.say(warning)
    # Which types rows can be stored in, their length says, which is the hidden size.
    check_precision(parent, run.recipe)
    return Ground(parent, parent_hash, space_of(parent, run.recipe), workload)


def device_of(recipe: ModelRecipe) -> torch.device:
    """Where a loaded model's tensors would say that they are: "cuda:0" for "cuda". Raises ModelError."""
    return torch.empty(0, device=resolve_device(recipe.device)).device


def _workload(recipe: Recipe, parent: Parent, device: torch.device) -> Workload:
    rules = recipe.workload
    if rules.graphs == "auto" and is_spread(parent.model):
        # Between the parts of a spread model accelerate's hooks move activations, which no graph holds.
        rules = rules.model_copy(update={"graphs": False})
    return Workload.from_recipe(rules, dtype_of(parent.model), str(device), recipe.deploy.gguf_type)


def _settled(recipe: ModelRecipe, known: Mapping[str, Any]) -> ModelRecipe:
    """What auto meant when the run began, it means to its end, on whatever device it goes on."""
    noted = known.get("parent", {}).get("dtype", "auto")
    return recipe.model_copy(update={"dtype": noted}) if recipe.dtype == "auto" else recipe


def _parent(run: Run) -> tuple[Parent, str]:
    """The parent and its hash, noted in the run's provenance."""
    recipe = run.recipe
    with run.show("loading the parent"):
        provenance = run.directory.read_provenance()
        known = provenance.get("parent", {})
        parent = load_parent(_settled(recipe.model, provenance))
        parent_hash = parent.hash
    check_recipe(parent, recipe, parent.device)
    if run.joined:
        return parent, parent_hash
    if known.get("hash", parent_hash) != parent_hash:
        raise RunDirectoryError(
            f"{recipe.model.path} is not the model this run was made with (its weights have changed); use another --out"
        )
    if "licence" not in known:
        # Once a run: the header of a GGUF file takes seconds.
        licence = stated_licence(recipe.model.path)
        known["licence"] = licence and licence.to_json()
    run.directory.note(
        parent={
            "model": parent.source,
            "revision": recipe.model.revision,
            "hash": parent_hash,
            "dtype": dtype_of(parent.model),
            "on_hub": not exists(recipe.model.path),
            "licence": known["licence"],
        },
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        host=fingerprint(),
    )
    return parent, parent_hash


def check_recipe(parent: Parent, recipe: Recipe, device: torch.device) -> None:
    """Refuse a recipe that can do nothing with a parent, which may be an outline, on a device. Raises as `lay_ground`
    does."""
    check_lengths(parent, recipe)
    check_parent(parent, recipe.deploy, recipe.space.size)
    if recipe.workload.compile:
        check_compiler(device)
    if recipe.workload.engine == "llamacpp":
        check_engine(parent, recipe.deploy.gguf_type, recipe.space.size, recipe.workload.cache_type)
        check_methods(recipe.front.baselines, parent, recipe.workload.engine, "front.baselines")
    if not recipe.space.hidden_size:
        check_precision(parent, recipe)
    if is_asked(recipe):
        sizes_of(recipe, parent)


def space_of(parent: Parent, recipe: Recipe) -> Space:
    """What a recipe lets a search choose among, as far as it can be served."""
    rules = recipe.space
    whole = Space.of(
        parent.shape,
        rules.kv_groups_step,
        rules.ffn_step,
        drop=rules.drop,
        size=rules.size,
        merge_kv=rules.merge_kv or merging_helps(parent, recipe.deploy, rules.size),
        precision=rules.precision,
    )
    check_choices(parent, (*whole.attention, *whole.ffn))
    return cut(whole, parent, recipe.deploy, recipe.workload.engine)


def time_reach(run: Run, ground: Ground) -> Reach:
    """What the space can reach at all, which takes seconds to know: no library is needed."""
    file, space = run.directory.reach, ground.space
    ladders = [[choice.to_json() for choice in ladder] for ladder in space.ladders.values()]
    key = hash_of(ground.parent_hash, space.size, ladders, ground.workload.to_json(), fingerprint())
    if not run.directory.is_done("reach", key, file):
        with run.show("timing what the space can reach"):
            write_json(file, reach_to_json(measure_reach(ground.parent, space, ground.workload)))
        run.directory.mark_done("reach", key)
    try:
        return reach_from_json(read_json(file))
    except (KeyError, TypeError) as error:
        raise RunDirectoryError(f"{file} is damaged ({type(error).__name__}: {error}); delete it") from error


def tell_reach(run: Run, ground: Ground) -> None:
    """Say what the space can reach, and what a draft of it would have to. Raises RecipeError on a target that is beyond
    it."""
    reach = time_reach(run, ground)
    warnings = check_reach(reach, run.recipe)
    of_drafts: list[str] = []
    if run.recipe.search.objective == "draft":
        decode = reach["decode"]
        of_drafts = worth_of_drafts(time_verification(run, ground).medians, decode.halved, decode.fastest)
    for line in (described(reach), *of_drafts, *warnings):
        run.say(line)


def time_verification(run: Run, ground: Ground) -> VerifyCosts:
    """What the parent's passes over several tokens take, which verify what a draft wrote."""
    file = run.directory.verify
    key = hash_of(ground.parent_hash, ground.workload.to_json(), fingerprint(), MOST_DRAFTED)
    if run.joined and not file.is_file():
        raise RunDirectoryError(f"a worker needs {file}; copy it from the run directory of llmprune search")
    if not run.joined and not run.directory.is_done("verify", key, file):
        with run.show("timing how the parent verifies"), timing(ground.workload.device):
            costs = verify_costs(ground.parent.model, ground.workload, MOST_DRAFTED, run.recipe.workload.repeats)
        write_json(file, costs.to_json())
        run.directory.mark_done("verify", key)
    try:
        return VerifyCosts.from_json(read_json(file))
    except (KeyError, TypeError, ValueError) as error:
        raise RunDirectoryError(f"{file} is damaged ({type(error).__name__}: {error}); delete it") from error


def cut_text(run: Run, ground: Ground) -> TokenSplits:
    """The recipe's text as token splits."""
    path, tokenizer = run.directory.tokens, ground.parent.tokenizer
    if run.joined:
        if not path.is_file():
            raise RunDirectoryError(f"a worker needs {path}; copy it from the run directory of llmprune search")
        return load_token_splits(path)
    key = hash_of(run.recipe.data.identity(), ground.parent_hash)
    if not run.directory.is_done("tokens", key, path):
        assert tokenizer is not None, "a parent that was loaded has a tokenizer"
        with run.show("cutting text into token splits"):
            splits = build_token_splits(run.recipe.data, tokenizer)
        if (prompt_tokens := run.recipe.data.own_text_after) is not None:
            splits = in_parents_words(run, ground.parent, splits, prompt_tokens)
        save_token_splits(splits, path)
        forget_parts(run)
        run.directory.note(data=dict(splits.provenance))
        run.directory.mark_done("tokens", key)
    return load_token_splits(path)


def library_inputs(ground: Ground, tokens: TokenSplits) -> str:
    """Hash of what the run's libraries are made from, beside recipe and space."""
    return hash_of(ground.parent_hash, tokens["calibration"].hash)


def solve_blocks(run: Run, ground: Ground, tokens: TokenSplits) -> BlockLibrary:
    """Order and refit every block for every choice."""
    split, rules, where = tokens["calibration"], run.recipe.importance, run.directory.library
    input_hash = library_inputs(ground, tokens)
    if run.joined:
        return load_library(where, rules, ground.space, input_hash=input_hash)
    built = stored_layers(where, rules, ground.space, input_hash=input_hash)
    few = few_tokens_warning(ground.parent.shape, split.tokens)
    if few and rules.refit and built < ground.parent.shape.layers:
        run.say(few)
    with run.show("ordering and refitting blocks") as advance:
        return build_library(
            ground.parent,
            split,
            rules,
            ground.space,
            where,
            input_hash=input_hash,
            progress=advance,
        )


def score_choices(run: Run, stock: Stock) -> Prepared:
    """What every choice loses and saves, in the tables."""
    tables = _tables(run, stock)
    return Prepared(
        **vars(stock), tables=tables, shrinkage=Shrinkage.of(tables.joint_nats, run.recipe.tables.shrinkage)
    )


def _tables(run: Run, stock: Stock) -> BlockTables:
    path, rules = run.directory.tables, run.recipe.tables
    if run.joined:
        # Whose tables a worker proposes from is the search's affair, also on another of several like GPUs.
        if not path.is_file():
            raise RunDirectoryError(f"a worker needs {path}; copy it from the run directory of llmprune search")
        return BlockTables.from_json(stock.space, read_json(path))
    estimated, repeats = stock.tokens["estimate"], run.recipe.workload.repeats
    made_of = [stock.library.hash, estimated.hash, stock.workload.to_json(), fingerprint()]
    key = hash_of(*made_of, rules.tokens, rules.exact, rules.caution, rules.together)
    if not run.directory.is_done("tables", key, path):
        tables = build_tables(stock.parent, estimated, stock.library, stock.workload, repeats, rules, show=run.show)
        write_json(path, tables.to_json())
        run.directory.mark_done("tables", key)
    return BlockTables.from_json(stock.space, read_json(path))
