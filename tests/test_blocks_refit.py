"""Orders and refits against closed forms, brute force and least squares on the data itself."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmprune.blocks.importance import (
    ImportanceMethod,
    eliminate,
    flap_scores,
    inverse,
    magnitude_scores,
    obs_order,
    removal_order,
    wanda_sp_scores,
)
from llmprune.blocks.statistics import BlockStatistics
from llmprune.numerics.refit import (
    damped_gram,
    flap_bias,
    reconstruction_loss,
    refit,
    refit_nested,
    refit_towards,
    unit_columns,
)

METHODS: tuple[ImportanceMethod, ...] = ("obs", "magnitude", "wanda-sp", "flap")
DAMP = 0.01


class Problem(NamedTuple):
    weight: Tensor
    bias: Tensor
    data: Tensor
    statistics: BlockStatistics
    unit_size: int


def problem(units: int, unit_size: int = 1, outputs: int = 5, samples: int = 200, seed: int = 0) -> Problem:
    """A float64 projection, and correlated inputs with means away from zero."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = units * unit_size
    data = normal(samples, inputs) @ (normal(inputs, inputs) * 0.5 + torch.eye(inputs)) + normal(inputs)
    statistics = BlockStatistics(data.mT @ data / samples, data.mean(dim=0), samples)
    return Problem(normal(outputs, inputs), normal(outputs), data, statistics, unit_size)


problems = st.builds(
    problem,
    units=st.integers(2, 12),
    unit_size=st.integers(1, 4),
    outputs=st.integers(1, 8),
    samples=st.sampled_from([3, 40, 300]),
    seed=st.integers(0, 10_000),
)


@settings(max_examples=30, deadline=None)
@given(p=problems, batch=st.integers(1, 4), centred=st.booleans())
def test_elimination_ends_at_the_closed_form_and_its_losses_add_up(p: Problem, batch: int, centred: bool) -> None:
    hessian = damped_gram(p.statistics.gram_II, DAMP, p.statistics.mean_I if centred else None)
    order = obs_order(p.weight, hessian, p.unit_size, batch=batch)
    weight, hessian_inverse, loss = p.weight, inverse(hessian), 0.0
    active = torch.arange(p.weight.shape[1])
    for leaving in order[:-1].split(batch):
        columns = torch.isin(active, unit_columns(leaving, p.unit_size))
        weight, hessian_inverse, step_loss = eliminate(weight, hessian_inverse, columns.nonzero().flatten())
        active = active[~columns]
        loss += float(step_loss)
        closed, _ = refit(p.weight, p.statistics.gram_II, active, DAMP, mean_I=p.statistics.mean_I if centred else None)
        torch.testing.assert_close(weight, closed, rtol=1e-10, atol=1e-10 * float(p.weight.abs().max()))
        assert loss == pytest.approx(reconstruction_loss(p.weight, hessian, active, closed), rel=1e-8)


@settings(max_examples=15, deadline=None)
@given(p=problems)
def test_obs_order_is_the_greedy_one_of_brute_force(p: Problem) -> None:
    hessian = damped_gram(p.statistics.gram_II, DAMP)
    left = list(range(p.weight.shape[1] // p.unit_size))
    for unit in obs_order(p.weight, hessian, p.unit_size, batch=1)[:-1].tolist():
        losses = {}
        for candidate in left:
            kept = unit_columns(torch.tensor([u for u in left if u != candidate]), p.unit_size)
            weight, _ = refit(p.weight, p.statistics.gram_II, kept, DAMP)
            losses[candidate] = reconstruction_loss(p.weight, hessian, kept, weight)
        assert losses[unit] == pytest.approx(min(losses.values()), rel=1e-9)
        left.remove(unit)


@settings(max_examples=30, deadline=None)
@given(p=problems, method=st.sampled_from(METHODS), batch=st.integers(1, 40), centred=st.booleans())
def test_every_order_is_a_permutation(p: Problem, method: ImportanceMethod, batch: int, centred: bool) -> None:
    order = removal_order(
        method, p.weight.float(), p.statistics, p.unit_size, DAMP, centred=centred, channel_batch=batch
    )
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(p.weight.shape[1] // p.unit_size))


@settings(max_examples=30, deadline=None)
@given(p=problems, data=st.data(), with_bias=st.booleans())
def test_nested_refits_are_the_formula_for_every_prefix(p: Problem, data: st.DataObject, with_bias: bool) -> None:
    inputs = p.weight.shape[1]
    columns = torch.tensor(data.draw(st.permutations(range(inputs))))[: data.draw(st.integers(1, inputs))]
    counts = data.draw(st.lists(st.integers(0, len(columns)), min_size=1, max_size=4))
    mean = p.statistics.mean_I if with_bias else None
    bias = p.bias if with_bias else None
    hessian = damped_gram(p.statistics.gram_II, DAMP, mean)
    nested = refit_nested(p.weight, p.statistics.gram_II, columns, counts, DAMP, mean_I=mean, bias_D=bias)
    for count, (weight, new_bias) in zip(counts, nested, strict=True):
        kept = columns[:count]
        expected = p.weight @ hessian[:, kept] @ torch.linalg.inv(hessian[kept][:, kept])
        torch.testing.assert_close(weight, expected, rtol=1e-8, atol=1e-8)
        if bias is None or mean is None:
            assert new_bias is None
        else:
            assert new_bias is not None
            torch.testing.assert_close(new_bias + weight @ mean[kept], bias + p.weight @ mean)


@settings(max_examples=25, deadline=None)
@given(p=problems.filter(lambda p: len(p.data) == 300), data=st.data(), bias=st.sampled_from(["own", "none", "unused"]))
def test_a_refit_is_least_squares_on_the_data(p: Problem, data: st.DataObject, bias: str) -> None:
    inputs = p.weight.shape[1]
    kept = torch.tensor(sorted(data.draw(st.sets(st.integers(0, inputs - 1), min_size=1, max_size=inputs - 1))))
    own_bias = p.bias if bias == "own" else None
    mean = None if bias == "unused" else p.statistics.mean_I
    weight, new_bias = refit(p.weight, p.statistics.gram_II, kept, 1e-13, mean_I=mean, bias_D=own_bias)
    design = p.data[:, kept]
    if mean is not None:
        design = torch.cat([design, torch.ones(len(design), 1, dtype=torch.float64)], dim=1)
    target = p.data @ p.weight.mT + (0 if own_bias is None else own_bias)
    solution = torch.linalg.lstsq(design, target).solution.mT
    torch.testing.assert_close(weight, solution[:, : len(kept)], rtol=1e-6, atol=1e-6)
    if mean is None:
        assert new_bias is None
    else:
        torch.testing.assert_close(new_bias, solution[:, -1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_keeping_everything_is_bit_identical(dtype: torch.dtype) -> None:
    p = problem(12)
    weight, bias = p.weight.to(dtype), p.bias.to(dtype)
    kept = torch.arange(12)
    new_weight, new_bias = refit(weight, p.statistics.gram_II, kept, DAMP, mean_I=p.statistics.mean_I, bias_D=bias)
    assert torch.equal(new_weight, weight)
    assert new_bias is not None and torch.equal(new_bias, bias)
    part, part_bias = refit(weight, p.statistics.gram_II, kept[:5], DAMP, mean_I=p.statistics.mean_I, bias_D=bias)
    assert part_bias is not None and part.dtype == part_bias.dtype == dtype


def test_inputs_are_left_alone() -> None:
    p = problem(8)
    copies = [tensor.clone() for tensor in (p.weight, p.bias, p.statistics.gram_II, p.statistics.mean_I)]
    refit(p.weight, p.statistics.gram_II, torch.arange(4), DAMP, mean_I=p.statistics.mean_I, bias_D=p.bias)
    refit(p.weight, p.statistics.gram_II, torch.arange(4), DAMP)
    removal_order("obs", p.weight, p.statistics, 1, DAMP)
    for tensor, copy in zip((p.weight, p.bias, p.statistics.gram_II, p.statistics.mean_I), copies, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("units,unit_size", [(96, 1), (8, 12)])
def test_obs_with_refit_beats_magnitude_with_and_without(units: int, unit_size: int) -> None:
    p = problem(units, unit_size, outputs=32, samples=1000)

    def loss(method: ImportanceMethod, resolve: bool) -> float:
        order = removal_order(method, p.weight, p.statistics, unit_size, DAMP, channel_batch=8)
        kept = unit_columns(order[units // 2 :].sort().values, unit_size)
        weight = refit(p.weight, p.statistics.gram_II, kept, DAMP)[0] if resolve else p.weight[:, kept]
        return reconstruction_loss(p.weight, p.statistics.gram_II, kept, weight)

    assert loss("obs", True) < loss("magnitude", True) < loss("magnitude", False)


def test_scores_of_an_example_by_hand() -> None:
    # Units of two columns; the second unit's inputs are constant, so nothing of it fluctuates.
    weight = torch.tensor([[3.0, 0.0, 1.0, 0.0], [4.0, 2.0, 1.0, 6.0]])
    data = torch.tensor([[1.0, 2.0, 3.0, 1.0], [-1.0, 0.0, 3.0, 1.0]], dtype=torch.float64)
    statistics = BlockStatistics(data.mT @ data / 2, data.mean(dim=0), 2)
    torch.testing.assert_close(statistics.mean_square_I, torch.tensor([1.0, 2.0, 9.0, 1.0]).double())
    torch.testing.assert_close(statistics.variance_I, torch.tensor([1.0, 1.0, 0.0, 0.0]).double())
    torch.testing.assert_close(magnitude_scores(weight, 2), torch.tensor([5 + 2, 2**0.5 + 6]).double())
    torch.testing.assert_close(
        wanda_sp_scores(weight, statistics, 2), torch.tensor([3.5 + 1 * 2**0.5, 1 * 3 + 3]).double()
    )
    fluctuation = torch.tensor([25.0, 4.0, 0.0, 0.0]).double()
    standard = (fluctuation - fluctuation.mean()) / fluctuation.std()
    torch.testing.assert_close(flap_scores(weight, statistics, 2), standard.view(2, 2).mean(dim=1))
    assert removal_order("magnitude", weight, statistics, 2, DAMP).tolist() == [0, 1]
    assert removal_order("wanda-sp", weight, statistics, 2, DAMP).tolist() == [0, 1]
    assert removal_order("flap", weight, statistics, 2, DAMP).tolist() == [1, 0]


def test_flap_bias_keeps_the_mean_output() -> None:
    p = problem(10)
    kept = torch.tensor([1, 4, 7])
    for bias in (p.bias, None):
        new_bias = flap_bias(p.weight, p.statistics.mean_I, kept, bias)
        before = p.weight @ p.statistics.mean_I + (0 if bias is None else bias)
        torch.testing.assert_close(p.weight[:, kept] @ p.statistics.mean_I[kept] + new_bias, before)


def test_a_block_that_is_never_active_keeps_its_weights() -> None:
    weight = torch.randn(4, 6)
    silent = BlockStatistics(torch.zeros(6, 6, dtype=torch.float64), torch.zeros(6, dtype=torch.float64), 10)
    for method in METHODS:
        assert sorted(removal_order(method, weight, silent, 1, DAMP).tolist()) == list(range(6))
    kept = torch.tensor([0, 3])
    torch.testing.assert_close(refit(weight, silent.gram_II, kept, DAMP)[0], weight[:, kept])


def test_too_little_damping_is_an_error() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -1e-3])).double()
    with pytest.raises(torch.linalg.LinAlgError):
        refit(torch.ones(1, 2), indefinite, torch.arange(2), 1e-9)


@settings(max_examples=30, deadline=None)
@given(p=problems, other=st.integers(0, 10_000), with_bias=st.booleans())
def test_a_refit_towards_other_inputs_is_least_squares_with_rows_for_the_ridge(
    p: Problem, other: int, with_bias: bool
) -> None:
    x, inputs = p.data, p.data.shape[1]
    z = x + problem(inputs, samples=len(x), seed=other).data
    gram, cross, mean_z, mean_x = z.mT @ z / len(z), z.mT @ x / len(z), z.mean(dim=0), x.mean(dim=0)
    extra = {"means_2I": (mean_z, mean_x), "bias_D": p.bias} if with_bias else {}
    weight, bias = refit_towards(p.weight, gram, cross, DAMP, **extra)  # type: ignore[arg-type]
    if with_bias:
        x, z = x - mean_x, z - mean_z
    ridge = (DAMP * z.square().mean(dim=0).mean()).sqrt()
    system = torch.cat([z / len(z) ** 0.5, ridge * torch.eye(inputs)])
    expected = torch.linalg.lstsq(system, torch.cat([x @ p.weight.mT / len(x) ** 0.5, ridge * p.weight.mT])).solution.mT
    torch.testing.assert_close(weight, expected, rtol=1e-7, atol=1e-7 * float(p.weight.abs().max()))
    if with_bias:
        assert bias is not None
        torch.testing.assert_close(bias, p.bias + p.weight @ mean_x - expected @ mean_z, rtol=1e-6, atol=1e-6)
    else:
        assert bias is None


@settings(max_examples=30, deadline=None)
@given(p=problems, with_bias=st.booleans())
def test_a_refit_towards_the_same_inputs_is_the_parent(p: Problem, with_bias: bool) -> None:
    gram, mean = p.statistics.gram_II, p.statistics.mean_I
    extra = {"means_2I": (mean, mean), "bias_D": p.bias} if with_bias else {}
    weight, bias = refit_towards(p.weight, gram, gram, DAMP, **extra)  # type: ignore[arg-type]
    assert torch.equal(weight, p.weight)
    assert bias is None if not with_bias else torch.equal(bias, p.bias)  # type: ignore[arg-type]
