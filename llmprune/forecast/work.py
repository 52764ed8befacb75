"""What the block library and the estimate cost, from shapes alone: floating point operations and bytes.

A multiply-add counts as two operations. Lower-order terms (scores, permutations, biases) are left out.
Shapes: D outputs and I inputs of an output projection, S inputs that a choice keeps, C columns of a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from llmprune.blocks.solve import merged_choices, thinned_queries
from llmprune.choices.architecture import BLOCK_KINDS, AttentionChoice, BlockChoice, BlockKind, ParentShape
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe

_HEADER_BYTES = 256
_HEADER_BYTES_A_TENSOR = 96
"""What safetensors' header says of a file (two hashes), and of each tensor (name, dtype, shape, place)."""


@dataclass(frozen=True)
class SolverFlops:
    """Operations in float64; the parts run at rates of their own."""

    inverses: int = 0
    """Cholesky factor, its inverse, and their product: I^3 / 3 + I^3 + 2 I^3."""
    eliminations: int = 0
    """Updates of weight and inverse while units leave: 2 I^3 / 3 + D I^2, whatever the batch."""
    refits: int = 0
    """For each chain of nested choices one factor S^3 / 3 and its right-hand side, then S^2 D a choice; where KV groups
    merge I^3 / 3 and 4 I^2 D a choice."""

    @property
    def total(self) -> int:
        return self.inverses + self.eliminations + self.refits

    def __add__(self, other: SolverFlops) -> SolverFlops:
        return SolverFlops(
            self.inverses + other.inverses, self.eliminations + other.eliminations, self.refits + other.refits
        )

    def times(self, count: int) -> SolverFlops:
        return SolverFlops(self.inverses * count, self.eliminations * count, self.refits * count)


def inputs_of(shape: ParentShape, kind: BlockKind) -> int:
    """I: inputs of the block's output projection."""
    return shape.inputs(shape.full(kind))


def stored_choices(space: Space, kind: BlockKind) -> list[BlockChoice]:
    """The choices that have an output projection of their own: neither a drop nor the parent's."""
    return [choice for choice in space.ladder(kind) if choice.units and choice != space.shape.full(kind)]


def layer_solver_flops(space: Space, recipe: ImportanceRecipe) -> SolverFlops:
    """Orders and refits of one layer, both blocks."""
    total = SolverFlops()
    for kind in BLOCK_KINDS:
        inputs, outputs = inputs_of(space.shape, kind), space.shape.hidden_size
        if recipe.method == "obs":
            # Where query heads can leave, they are ordered by themselves too.
            orders = 2 if kind == "attention" and _has_queries(space) else 1
            once = SolverFlops(10 * inputs**3 // 3, 2 * inputs**3 // 3 + outputs * inputs**2)
            total += once.times(orders)
        if recipe.refit:
            total += SolverFlops(refits=sum(_refit_flops(space, counts, kind) for counts in _chains(space, kind)))
            if kind == "attention":
                total += SolverFlops(refits=inputs**3 // 3 + 4 * inputs**2 * outputs).times(len(merged_choices(space)))
    return total


def _refit_flops(space: Space, counts: list[int], kind: BlockKind) -> int:
    inputs, outputs, most = inputs_of(space.shape, kind), space.shape.hidden_size, max(counts)
    shared = most**3 // 3 + 2 * most * inputs * outputs + most**2 * outputs
    return shared + sum(count**2 * outputs for count in counts)


def _chains(space: Space, kind: BlockKind) -> Iterator[list[int]]:
    """Inputs kept by the choices that are solved from one factor: those with as many query heads a group."""

    def queries(choice: BlockChoice) -> int:
        return thinned_queries(choice, space.shape)

    nested = [choice for choice in stored_choices(space, kind) if space.shape.merges(choice) == 1]
    for _, chain in groupby(sorted(nested, key=queries), key=queries):
        yield [space.shape.inputs(choice) for choice in chain]


def _has_queries(space: Space) -> bool:
    return any(thinned_queries(choice, space.shape) for choice in space.attention)


def gram_flops_per_token(shape: ParentShape, merged: Sequence[AttentionChoice] = ()) -> int:
    """Multiplying out the inputs of one layer's output projections, in float32: 2 I^2 a block. Each of the choices that
    merge KV groups (see `gathered_choices`) is run, and multiplied out twice."""
    beside = sum(_merged_flops(shape, choice) + 4 * shape.inputs(choice) ** 2 for choice in merged)
    return sum(2 * inputs_of(shape, kind) ** 2 for kind in BLOCK_KINDS) + beside


def _merged_flops(shape: ParentShape, choice: AttentionChoice) -> int:
    """The projections of a merged attention block, for one token, but for the one of its output."""
    return 2 * shape.hidden_size * (shape.inputs(choice) + 2 * choice.kv_groups * shape.head_dim)


def estimate_flops_per_token(space: Space, *, anywhere: bool = False) -> int:
    """Local products of one layer in the one-backward estimate at the parent: 2 D S a choice, in the model's dtype, and
    the projections of choices that merge KV groups.

    `anywhere` else, at most: the parent's own choices are weighed as well.
    """
    choices = [choice for kind in BLOCK_KINDS for choice in stored_choices(space, kind)]
    choices += [space.shape.full(kind) for kind in BLOCK_KINDS] if anywhere else []
    products = sum(2 * space.shape.hidden_size * space.shape.inputs(choice) for choice in choices)
    return products + sum(_merged_flops(space.shape, choice) for choice in merged_choices(space))


def layer_library_bytes(
    space: Space, dtype_bytes: int, biased: frozenset[BlockKind] = frozenset(), method: str = "obs"
) -> int:
    """One layer's file: orders in int64, and weight (and bias, where the parent has one) of every stored choice; for
    "flap" also scores of units and means of inputs in float64."""
    shape = space.shape
    total, tensors = _HEADER_BYTES, 0
    for kind in BLOCK_KINDS:
        choices = stored_choices(space, kind)
        weights = sum(shape.inputs(choice) for choice in choices) * shape.hidden_size
        biases = len(choices) * shape.hidden_size if kind in biased else 0
        total += dtype_bytes * (weights + biases) + 8 * shape.units(kind)
        tensors += 1 + len(choices) * (2 if kind in biased else 1)
        if method == "flap":
            total += 8 * (shape.units(kind) + inputs_of(shape, kind))
            tensors += 2
    if _has_queries(space):
        total += 8 * shape.kv_groups * shape.queries_per_group
        tensors += 1
    return total + _HEADER_BYTES_A_TENSOR * tensors


def solving_bytes(space: Space, recipe: ImportanceRecipe, dtype_bytes: int) -> int:
    """The most that solving one layer holds at once beside its statistics: scratch in float64, the solved weights of
    every choice, twice while they are put in order, copied and written, and those of the block that came before."""
    solved = {kind: _solved_bytes(space, kind, dtype_bytes) for kind in BLOCK_KINDS}
    # Blocks are solved in this order; the first one's weights wait for the second's.
    waiting, most = 0, 2 * sum(solved.values())
    for kind in BLOCK_KINDS:
        scratch = max(_order_bytes(space, recipe, kind), _refit_bytes(space, recipe, kind, dtype_bytes))
        most = max(most, waiting + max(scratch, 2 * solved[kind]))
        waiting += solved[kind]
    return most


def _solved_bytes(space: Space, kind: BlockKind, dtype_bytes: int) -> int:
    """Output weights of all choices of a block."""
    inputs = sum(space.shape.inputs(choice) for choice in stored_choices(space, kind))
    return dtype_bytes * space.shape.hidden_size * inputs


def _order_bytes(space: Space, recipe: ImportanceRecipe, kind: BlockKind) -> int:
    """For OBS H, its factor, an identity, its root and a copy, (I, I) each; later H and two inverses, and weights."""
    inputs, outputs = inputs_of(space.shape, kind), space.shape.hidden_size
    weight = 8 * inputs * outputs
    return 5 * 8 * inputs**2 + weight if recipe.method == "obs" else 2 * weight


def _refit_bytes(space: Space, recipe: ImportanceRecipe, kind: BlockKind, dtype_bytes: int) -> int:
    """Of the widest chain: H (I, I), its rows (S, I) and factor (S, S) or, later, two copies of the factor and the
    right-hand sides (S, D); and all weights solved so far. Choices that merge KV groups hold five of (I, I)."""
    if not recipe.refit:
        return 0
    inputs, outputs = inputs_of(space.shape, kind), space.shape.hidden_size
    most = max((max(counts) for counts in _chains(space, kind)), default=0)
    factored = inputs**2 + most * inputs + 2 * most**2
    substituted = inputs**2 + 3 * most**2 + 4 * most * outputs
    scratch = inputs * outputs + max(factored, substituted)
    if kind == "attention" and merged_choices(space):
        scratch = max(scratch, 5 * inputs**2 + 3 * inputs * outputs)
    return 8 * scratch + _solved_bytes(space, kind, dtype_bytes)


def graph_bytes_per_token(shape: ParentShape, dtype_bytes: int, merged: int = 0) -> int:
    """What all layers keep of a token for the backward pass, roughly: weights are frozen, so no inputs of theirs, but
    those of norms (in float32), of attention and of the gate, and what the estimate keeps of each block: for each of so
    many choices that merge KV groups its own inputs of the output projection."""
    attention = inputs_of(shape, "attention")
    norms = 2 * (4 + dtype_bytes) * shape.hidden_size
    blocks = (
        (3 + merged) * attention + 2 * shape.kv_groups * shape.head_dim + 4 * shape.ffn_width + 2 * shape.hidden_size
    )
    return shape.layers * (norms + dtype_bytes * blocks)
