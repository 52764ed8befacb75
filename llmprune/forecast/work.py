"""What the block library and the estimate cost, from shapes alone: floating point operations and bytes.

A multiply-add counts as two operations. Lower-order terms (scores, permutations, biases) are left out.
Shapes: D outputs and I inputs of an output projection, S inputs that a choice keeps, C columns of a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmprune.blocks.solve import offers_types, own_input_choices, refitted
from llmprune.choices.architecture import ParentShape
from llmprune.choices.choice import Choice, RefitWork
from llmprune.choices.dimensions import BLOCK_KINDS, BlockKind
from llmprune.choices.kinds import by_kind
from llmprune.choices.space import Space
from llmprune.core.recipe import ImportanceRecipe

_HEADER_BYTES = 256
_HEADER_BYTES_A_TENSOR = 76
"""What safetensors' header says of a file (two hashes), and of each tensor (name, dtype, shape, place)."""


@dataclass(frozen=True)
class SolverFlops:
    """Operations in float64; the parts run at rates of their own."""

    inverses: int = 0
    """Cholesky factor, its inverse, and their product: I^3 / 3 + I^3 + 2 I^3."""
    eliminations: int = 0
    """Updates of weight and inverse while units leave: 2 I^3 / 3 + D I^2, whatever the batch."""
    refits: int = 0
    """What each kind of choice takes (see their `refit_work`)."""

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


def refit_works(space: Space, kind: BlockKind) -> list[RefitWork]:
    """What each kind of choice takes in such a block."""
    return [own.refit_work(choices, space.shape) for own, choices in by_kind(refitted(space, kind))]


def layer_solver_flops(space: Space, recipe: ImportanceRecipe) -> SolverFlops:
    """Orders and refits of one layer, both blocks."""
    total = SolverFlops()
    for kind in BLOCK_KINDS:
        inputs, outputs, works = inputs_of(space.shape, kind), space.shape.hidden_size, refit_works(space, kind)
        if recipe.method == "obs":
            once = SolverFlops(10 * inputs**3 // 3, 2 * inputs**3 // 3 + outputs * inputs**2)
            total += once.times(1 + sum(work.orders for work in works))
        if recipe.refit:
            total += SolverFlops(refits=sum(work.flops for work in works))
    return total


def gram_flops_per_token(shape: ParentShape, own: Sequence[Choice] = ()) -> int:
    """Multiplying out the inputs of one layer's output projections, in float32: 2 I^2 a block. Each of the choices with
    inputs of their `own` (see `gathered_choices`) is run, and multiplied out twice."""
    beside = sum(_own_flops(shape, choice) + 4 * shape.inputs(choice) ** 2 for choice in own)
    return sum(2 * inputs_of(shape, kind) ** 2 for kind in BLOCK_KINDS) + beside


def _own_flops(shape: ParentShape, choice: Choice) -> int:
    """The projections of a block that a choice runs for itself, for one token, but for the one of its output."""
    return 2 * shape.hidden_size * _entering_rows(shape, choice)


def _entering_rows(shape: ParentShape, choice: Choice) -> int:
    """Of these projections; those of an FFN that runs for itself are two, a gate's and one that it lets through."""
    plain = choice.plain
    return 2 * plain.units if plain.kind == "ffn" else shape.rows(plain) - shape.inputs(plain)


def rounded_numbers(space: Space) -> int:
    """Numbers of the blocks of one layer as each type of weights has them."""
    shape = space.shape
    own = [choice for choice in own_input_choices(space) if choice.stored is not None]
    return sum((_entering_rows(shape, choice) + shape.inputs(choice)) * shape.hidden_size for choice in own)


def estimate_flops_per_token(space: Space, *, anywhere: bool = False) -> int:
    """Local products of one layer in the one-backward estimate at the parent: 2 D S a choice, in the model's dtype, and
    the projections of choices that have inputs of their own.

    `anywhere` else, at most: the parent's own choices are weighed as well.
    """
    choices = [choice for kind in BLOCK_KINDS for choice in refitted(space, kind)]
    choices += [space.shape.full(kind) for kind in BLOCK_KINDS] if anywhere else []
    products = sum(2 * space.shape.hidden_size * space.shape.inputs(choice) for choice in choices)
    return products + sum(_own_flops(space.shape, choice) for choice in own_input_choices(space))


def layer_library_bytes(
    space: Space, dtype_bytes: int, biased: frozenset[BlockKind] = frozenset(), method: str = "obs"
) -> int:
    """One layer's file: orders in int64, what each refitted choice changes (and its bias, where the parent has one);
    for "flap" also scores of units and means of inputs in float64."""
    shape = space.shape
    total, tensors = _HEADER_BYTES, 0
    for kind in BLOCK_KINDS:
        choices = refitted(space, kind)
        biases = len(choices) * shape.hidden_size if kind in biased else 0
        total += _changes_bytes(space, kind) + dtype_bytes * biases + 8 * shape.units(kind)
        tensors += 1 + len(choices) * (4 if kind in biased else 3)
        for work in refit_works(space, kind):
            total += 8 * work.order_numbers
            tensors += work.orders
        if offers_types(space):
            total += 8 * (shape.hidden_size + inputs_of(shape, kind))
            tensors += 2
        if method == "flap":
            total += 8 * (shape.units(kind) + inputs_of(shape, kind))
            tensors += 2
    return total + _HEADER_BYTES_A_TENSOR * tensors


def _changes_bytes(space: Space, kind: BlockKind) -> int:
    """What all choices of a block change of the output weight: a byte a number, and scales of rows and columns."""
    hidden = space.shape.hidden_size
    inputs = [space.shape.inputs(choice) for choice in refitted(space, kind)]
    return sum(hidden * count + 4 * (hidden + count) for count in inputs)


def solving_bytes(space: Space, recipe: ImportanceRecipe, dtype_bytes: int) -> int:
    """The most that solving one layer holds at once beside its statistics: scratch in float64 and the solved weights of
    every choice of a block, or these and their changes, one of them in float32 three times; and the changes of the
    block that came before."""
    waiting = most = 0
    for kind in BLOCK_KINDS:
        scratch = max(_order_bytes(space, recipe, kind), _refit_bytes(space, recipe, kind, dtype_bytes))
        widest = max((space.shape.inputs(choice) for choice in refitted(space, kind)), default=0)
        storing = _solved_bytes(space, kind, dtype_bytes) + _changes_bytes(space, kind)
        storing += 3 * 4 * space.shape.hidden_size * widest
        most = max(most, waiting + max(scratch, storing))
        waiting += _changes_bytes(space, kind)
    return most


def _solved_bytes(space: Space, kind: BlockKind, dtype_bytes: int) -> int:
    """Output weights of all choices of a block."""
    inputs = sum(space.shape.inputs(choice) for choice in refitted(space, kind))
    return dtype_bytes * space.shape.hidden_size * inputs


def layer_numbers(shape: ParentShape) -> int:
    """Weights of one layer, with a gate in its FFN."""
    attention = shape.full("attention")
    return shape.hidden_size * (shape.rows(attention) + 3 * shape.ffn_width)


def choices_numbers(space: Space) -> int:
    """Output weights of all refitted choices of a layer."""
    return sum(space.shape.hidden_size * space.shape.inputs(c) for kind in BLOCK_KINDS for c in refitted(space, kind))


def _order_bytes(space: Space, recipe: ImportanceRecipe, kind: BlockKind) -> int:
    """For OBS H, its factor, an identity, its root and a copy, (I, I) each; later H and two inverses, and weights."""
    inputs, outputs = inputs_of(space.shape, kind), space.shape.hidden_size
    weight = 8 * inputs * outputs
    return 5 * 8 * inputs**2 + weight if recipe.method == "obs" else 2 * weight


def _refit_bytes(space: Space, recipe: ImportanceRecipe, kind: BlockKind, dtype_bytes: int) -> int:
    """Of the kind that takes most: its scratch, H and weight at the least; and all weights solved so far."""
    if not recipe.refit:
        return 0
    inputs, outputs = inputs_of(space.shape, kind), space.shape.hidden_size
    scratch = max([inputs**2 + inputs * outputs, *(work.numbers for work in refit_works(space, kind))])
    return 8 * scratch + _solved_bytes(space, kind, dtype_bytes)


def graph_bytes_per_token(shape: ParentShape, dtype_bytes: int, own: Sequence[Choice] = ()) -> int:
    """What all layers keep of a token for the backward pass, roughly: weights are frozen, so no inputs of theirs, but
    those of norms (in float32), of attention and of the gate, and what the estimate keeps of each block: for each of
    the choices with inputs of their `own` those."""
    attention = inputs_of(shape, "attention") * 3 + sum(shape.inputs(choice) for choice in own)
    norms = 2 * (4 + dtype_bytes) * shape.hidden_size
    blocks = attention + 2 * shape.kv_groups * shape.head_dim + 4 * shape.ffn_width + 2 * shape.hidden_size
    return shape.layers * (norms + dtype_bytes * blocks)
