"""A kind of choice lives in one place: what all kinds answer for, and one that this file alone knows."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from closeness import assert_close
from families import CASES, IDS, Slices, masked, overwritten, tiny_parent, tokens
from test_run import changed
from tiny import paired_by_bytes, tiny_recipe
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmprune
from llmprune.baselines.flap import params_per_unit
from llmprune.blocks.library import build_library
from llmprune.choices import kinds
from llmprune.choices.architecture import Architecture
from llmprune.choices.choice import Choice, Kept, Orders, Projection, RefitWork
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind, Dimensions, SizeWord
from llmprune.choices.ffn import FfnChoice
from llmprune.choices.kv_groups import AttentionChoice
from llmprune.choices.merged import MergedChoice
from llmprune.choices.rows import part_rows
from llmprune.choices.solving import chain_work, solve_chain
from llmprune.choices.space import Space
from llmprune.choices.stored import StoredAttention, StoredFfn
from llmprune.core.budgets import parse_pick
from llmprune.core.errors import ArchitectureError, UnsupportedModelError
from llmprune.core.recipe import ImportanceRecipe, SpaceRecipe
from llmprune.data.tokens import SourceTokens, Split
from llmprune.models import checkpoint, modeling_pruned
from llmprune.models.modeling_pruned import input_axis
from llmprune.models.parent import Parent
from llmprune.models.sizes import parameter_count, size_of
from llmprune.models.surgery import prune
from llmprune.pipeline.commands import export, front, search
from llmprune.pipeline.prepare import Stock, prepare, stock_up
from llmprune.pipeline.run import Run
from llmprune.pipeline.run_directory import RunDirectory
from llmprune.search import judging
from llmprune.tables import block_tables, reach


@dataclass(frozen=True, slots=True)
class FirstChannels(Choice):
    """A toy: the FFN's first channels stay, whatever they are worth."""

    count: int

    kind: ClassVar[BlockKind] = "ffn"

    @classmethod
    def ladder(cls, shape: Dimensions, rules: SpaceRecipe) -> Sequence[FirstChannels]:
        return [cls(shape.ffn_width // 4), cls(3 * shape.ffn_width // 4)]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> FirstChannels | None:
        return cls(data["first_channels"]) if "first_channels" in data else None

    def to_json(self) -> dict[str, int]:
        return {"first_channels": self.count}

    @property
    def units(self) -> int:
        return self.count

    @property
    def label(self) -> str:
        return f"first{self.count}"

    def problem(self, shape: Dimensions) -> str | None:
        return None if 0 < self.count < shape.ffn_width else f"{shape.ffn_width} channels"

    def sizes(self, shape: Dimensions) -> Mapping[SizeWord, int]:
        return {"ffn_width": self.count}

    def inputs(self, shape: Dimensions) -> int:
        return self.count

    def rows(self, shape: Dimensions) -> int:
        return self.count

    def kept(self, orders: Orders, shape: Dimensions) -> Kept:
        return Kept(torch.arange(self.count))

    @classmethod
    def solve(cls, choices: Sequence[FirstChannels], projection: Projection) -> Iterator[tuple[str, torch.Tensor]]:
        for choice in choices:
            yield from solve_chain([choice], torch.arange(choice.count), projection)

    @classmethod
    def refit_work(cls, choices: Sequence[FirstChannels], shape: Dimensions) -> RefitWork:
        works = [chain_work([choice], shape.ffn_width, shape) for choice in choices]
        return RefitWork(sum(work.flops for work in works), max(work.numbers for work in works))


EVERY: tuple[type[Choice], ...] = (*kinds.KINDS, FirstChannels)


@pytest.fixture
def with_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "KINDS", EVERY)


@cache
def parent_of(case_id: str) -> Parent:
    return tiny_parent(CASES[IDS.index(case_id)])


def ladder_of(kind: type[Choice], shape: Dimensions) -> list[Choice]:
    """Of all a search could choose, what leaves something and not everything."""
    several = shape.kv_groups > 1
    rules = SpaceRecipe(size="large", ffn_step=shape.ffn_width // 3, merge_kv=several)
    ladder = kind.ladder(shape, rules) if several or kind is not MergedChoice else ()
    full = (AttentionChoice(shape.kv_groups), FfnChoice(shape.ffn_width))
    return [choice for choice in ladder if choice.units and choice not in full]


@dataclass(frozen=True)
class Ordered(Slices):
    """Slices of the parent, in orders drawn by chance."""

    def kept(self, layer: int, choice: Choice) -> Kept:
        shape, generator = self.parent.shape, torch.Generator().manual_seed(layer)
        orders = {
            "order": torch.randperm(shape.units(choice.kind), generator=generator),
            "query_order": torch.rand(shape.kv_groups, shape.queries_per_group, generator=generator).argsort(dim=1),
        }
        return choice.kept(orders, shape)

    def kept_units(self, layer: int, choice: Choice) -> torch.Tensor:
        return self.kept(layer, choice).units_U

    def kept_queries(self, layer: int, choice: Choice) -> torch.Tensor | None:
        return self.kept(layer, choice).queries_UQ


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens()).logits


@pytest.mark.parametrize("case_id", IDS)
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
@pytest.mark.usefixtures("with_the_toy")
def test_what_a_kind_offers_is_legal_and_has_one_text(kind: type[Choice], case_id: str) -> None:
    shape = parent_of(case_id).shape
    for choice in ladder_of(kind, shape):
        assert type(choice) is kind and choice.problem(shape) is None
        architecture = shape.architecture.with_choice(1, choice)
        shape.check(architecture)
        assert Architecture.from_json(json.loads(architecture.canonical_json)) == architecture
        full = shape.full(kind.kind)
        assert 0 < choice.rows(shape) < full.rows(shape) and 0 < choice.inputs(shape) <= full.inputs(shape)
        assert choice.sizes(shape).keys() == full.sizes(shape).keys()
    others = [choice for other in EVERY if other.kind == kind.kind for choice in ladder_of(other, shape)]
    assert len({choice.label for choice in others}) == len({str(choice.to_json()) for choice in others}) == len(others)


@pytest.mark.parametrize("case_id", IDS)
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_sizes_inputs_and_tensors_of_a_choice_are_its_childs(kind: type[Choice], case_id: str) -> None:
    parent, shape = parent_of(case_id), parent_of(case_id).shape
    for choice in ladder_of(kind, shape):
        architecture, library = shape.architecture.with_choice(1, choice), Ordered(parent)
        if kind is MergedChoice and parent.family.kv_heads is None:
            with pytest.raises(UnsupportedModelError, match=r"is a .* model, whose config has no number of KV heads"):
                prune(parent, architecture, library)
            continue
        child = prune(parent, architecture, library)
        columns = choice.columns(library.kept(1, choice), shape)
        assert len(columns) == choice.inputs(shape) and torch.equal(columns, columns.sort().values)
        names = parent.names(choice.kind)
        block = child.get_submodule(".".join(filter(None, (parent.family.layers, "1", names.module))))
        output: Any = block.get_submodule(names.output)
        assert output.weight.shape[input_axis(output)] == choice.inputs(shape)
        left = parameter_count(parent.model) - parameter_count(child)
        rows = shape.full(choice.kind).rows(shape) - choice.rows(shape)
        if choice.kind == "ffn":
            assert left == rows * params_per_unit(parent, "ffn")
        else:
            # Biases and norms of the heads leave as well.
            assert rows * shape.hidden_size <= left <= rows * (shape.hidden_size + 2)
        fewer = shape.full("attention").sizes(shape)["kv_heads"] - choice.sizes(shape).get("kv_heads", shape.kv_groups)
        of_parent, of_child = (
            size_of(model, shape, a).kv_bytes_per_token
            for model, a in ((parent.model, shape.architecture), (child, architecture))
        )
        assert of_parent - of_child == 2 * fewer * shape.head_dim * 4


@pytest.mark.parametrize("case_id", IDS)
@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_a_sliced_child_is_the_parent_that_the_choice_speaks_of(kind: type[Choice], case_id: str) -> None:
    parent, library = parent_of(case_id), Ordered(parent_of(case_id))
    if kind is MergedChoice and parent.family.kv_heads is None:
        pytest.skip("a family that cannot say it")
    ladder = ladder_of(kind, parent.shape)
    for choice in dict.fromkeys((*ladder[:1], *ladder[-1:])):
        architecture = parent.shape.architecture.with_choices((layer, choice) for layer in (1, 2))
        if choice.own_inputs:
            assert isinstance(choice, MergedChoice)
            expected = logits_of(overwritten(parent, dict.fromkeys((1, 2), choice.kv_groups)).model)
        else:
            with masked(parent, architecture, library) as oracle:
                expected = logits_of(oracle)
        assert_close(logits_of(prune(parent, architecture, library)), expected)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.usefixtures("with_the_toy")
def test_a_library_holds_an_output_for_every_choice_of_every_kind(refit: bool) -> None:
    parent = parent_of("llama-biased")
    split = Split("calibration", {"a": SourceTokens(tokens(4, 16), torch.full((4,), 16))}, {"a": 1.0}, 16, bos=False)
    space = Space.of(parent.shape, 1, 16, size="large", merge_kv=True)
    library = build_library(parent, split, ImportanceRecipe(refit=refit), space)
    found = [choice for kind in BLOCK_KINDS for choice in space.ladder(kind)]
    # What is stored in a type of its own is solved as the plain choice.
    assert {type(choice) for choice in found} == set(EVERY) - {StoredAttention, StoredFfn}
    for choice in found:
        if not choice.units or choice == parent.shape.full(choice.kind):
            continue
        weight, bias = library.output(2, choice, parent.output_weight(2, choice.kind))
        assert weight.shape == (parent.shape.hidden_size, choice.inputs(parent.shape)) and bias is not None
        own = parent.output_weight(2, choice.kind)[:, choice.columns(library.kept(2, choice), parent.shape)]
        assert torch.equal(weight, own) != refit


def test_layouts_are_read_as_the_modeling_file_reads_them() -> None:
    for case_id in IDS:
        shape = parent_of(case_id).shape
        assert part_rows(shape) == modeling_pruned.part_rows(shape.queries_per_group, shape.head_dim)


def test_a_choice_of_the_other_half_is_none_of_this_one() -> None:
    layer = {"layer": 0, "attention": {"ffn_width": 3}, "ffn": {"ffn_width": 3}}
    with pytest.raises(ArchitectureError, match=r"no choice for the attention block of a layer is said so"):
        Architecture.from_json({"layers": [layer]})


def test_kinds_are_known_by_their_own_modules() -> None:
    """Merged KV groups by one, their format's limits aside; and nobody asks of what class a choice is."""
    package = Path(llmprune.__file__).parent
    sources = {path.relative_to(package).as_posix(): path.read_text() for path in package.rglob("*.py")}
    knowing = {name for name, text in sources.items() if "MergedChoice" in text}
    assert knowing == {"choices/merged.py", "choices/kinds.py", "formats/limits.py"}
    names = {kind.__name__ for kind in kinds.KINDS}
    for module, text in sources.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                assert not any(name in ast.unparse(node.args[1]) for name in names), module


def test_a_kind_that_llmprune_does_not_know_is_searched_exported_and_reloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (judging, block_tables, reach):
        monkeypatch.setattr(module, "measure_paired", paired_by_bytes)
    # All that can change is FFNs, to what the toy has to offer.
    recipe = changed(
        tiny_recipe(tmp_path),
        *("space.drop=false", "space.kv_groups_step=2", "space.ffn_step=32", "search.targets=[1.1]"),
        *("front.checkpoints=none", "front.baselines=[uniform, milp, random]", "export.pick=decode_speedup>=1.05"),
    )
    with monkeypatch.context() as patch, RunDirectory(tmp_path / "run").locked():
        patch.setattr(kinds, "KINDS", EVERY)
        run = Run.start(tmp_path / "run", recipe)
        search(run)
        front(run)
        once, again = prepare(run), prepare(Run.open(tmp_path / "run"))
        assert once.space.ffn == (FirstChannels(8), FirstChannels(24), FfnChoice(32))
        assert again.tables == once.tables and again.library.hash == once.library.hash
        # Proven in a fresh process, which knows nothing of llmprune.
        export(run, parse_pick(recipe.export.pick), tmp_path / "child")
        metadata = json.loads((tmp_path / "child" / checkpoint.METADATA_FILE).read_text())
        architecture = Architecture.from_json(metadata["architecture"])
        found = [layer.ffn for layer in architecture.layers]
        assert any(isinstance(choice, FirstChannels) for choice in found)
        expected = logits_of(cut_by_hand(stock_up(run), found))
    child = AutoModelForCausalLM.from_pretrained(tmp_path / "child")
    assert_close(logits_of(child.eval()), expected)
    with pytest.raises(ArchitectureError, match=r"no choice for the ffn block of a layer is said so: .*first_channels"):
        Architecture.from_json(metadata["architecture"])


def cut_by_hand(stock: Stock, choices: list[Choice]) -> PreTrainedModel:
    """The parent at full size, that reads the first channels alone, through what was solved for them."""
    model = copy.deepcopy(stock.parent.model)
    for layer, choice in enumerate(choices):
        if isinstance(choice, FirstChannels):
            weight = model.get_submodule(f"model.layers.{layer}.mlp.down_proj").get_parameter("weight").data
            weight[:] = 0
            weight[:, : choice.count] = stock.library.output(layer, choice, stock.parent.output_weight(layer, "ffn"))[0]
    return model
