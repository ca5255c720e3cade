"""Branches and loops: decided where values are known, masked where they are not, with the same numbers."""

from typing import NamedTuple

import pytest
import torch

import functorch_optim as fo
from functorch_optim._control import cond, select, while_loop


class Point(NamedTuple):
    t: torch.Tensor
    f: torch.Tensor
    g: torch.Tensor
    gtd: torch.Tensor


def test_known_conditions_run_one_branch_and_unknown_ones_both():
    ran = []

    def branch(name, result):
        def run(x):
            ran.append(name)
            return x + result

        return run

    def both(x):
        return cond(x > 0, branch("true", 1.0), branch("false", -1.0), x)

    assert both(torch.tensor(2.0)) == 3
    assert ran == ["true"]
    torch.func.grad(both)(torch.tensor(-2.0))
    assert ran == ["true", "false"]
    assert torch.vmap(both)(torch.tensor([2.0, -2.0])).tolist() == [3.0, -3.0]
    assert ran == ["true", "false", "true", "false"]


def test_loops_end_early_where_they_can_with_the_same_numbers():
    turns = []

    def halve(x):
        def body(carry):
            turns.append(1)
            return carry[0] / 2, (carry[1][0] + 1,)

        return while_loop(lambda carry: carry[0] > 1, body, (x, (torch.zeros(()),)), 10)

    x = torch.tensor([5.0, 0.5, 8.0])
    each = [halve(row) for row in x]
    assert len(turns) == 6
    batched = torch.vmap(halve)(x)
    assert len(turns) == 6 + 10
    compiled = torch.compile(torch.vmap(halve), fullgraph=True, backend="eager")(x)
    for result in (batched, compiled):
        assert torch.equal(result[0], torch.stack([row for row, _ in each]))
        assert result[1][0].tolist() == [3.0, 0.0, 3.0]
    assert torch.func.jacfwd(lambda x: halve(x)[0])(x[0]) == torch.func.grad(lambda x: halve(x)[0])(x[0]) == 0.125


def test_select_keeps_types_and_leaves_what_is_the_same():
    a, b = torch.ones(2), torch.zeros(2)
    point = Point(a, a, a, a)
    assert select(True, point, None) is point
    picked = torch.vmap(lambda c: select(c, point, point._replace(f=b)))(torch.tensor([True, False]))
    assert type(picked) is Point
    assert picked.f.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_branches_of_trees_are_picked_from():
    def both(x):
        doubled = fo.cond(
            x > 0, lambda t: {"a": [2 * t["a"][0]], "b": None}, lambda t: {"a": [-t["a"][0]], "b": None}, {"a": [x]}
        )
        assert doubled["b"] is None
        return doubled["a"][0]

    x = torch.tensor([2.0, -3.0])
    expected = torch.tensor([4.0, 3.0])
    assert torch.equal(torch.stack([both(one) for one in x]), expected)
    assert torch.equal(torch.vmap(both)(x), expected)
    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert torch.equal(torch.stack([compiled(one) for one in x]), expected)
    slopes = torch.tensor([2.0, -1.0])
    assert torch.equal(torch.vmap(torch.func.grad(both))(x), slopes)
    assert torch.equal(torch.func.vmap(torch.func.jacfwd(both))(x), slopes)


@pytest.mark.parametrize(
    ("on_true", "on_false", "error", "message"),
    [
        (lambda x: {"a": x}, lambda x: {"b": x}, ValueError, "the result of on_false and the result of on_true"),
        (lambda x: {"a": x}, lambda x: {"a": x[None]}, ValueError, r"differ at 'a': \(\) of torch.float32 and \(1,\)"),
        (lambda x: x, lambda x: x.double(), ValueError, r"differ: \(\) of torch.float32 and \(\) of torch.float64"),
        (lambda x: [x], lambda x: [1.0], TypeError, r"has 1.0, a float, at '0' where .* torch.as_tensor\(1.0\)"),
    ],
)
def test_results_that_cannot_be_picked_from_are_errors(on_true, on_false, error, message):
    def both(x):
        return fo.cond(x > 0, on_true, on_false, x)

    with pytest.raises(error, match=message):
        torch.vmap(both)(torch.tensor([1.0, -1.0]))
    both(torch.tensor(1.0))  # one function runs


def test_a_condition_is_one_value():
    with pytest.raises(TypeError, match="The condition of cond is 1, a int; give a bool or a 0-dim tensor"):
        fo.cond(1, torch.neg, torch.exp, torch.ones(()))
    with pytest.raises(ValueError, match=r"has shape \(2,\), and one value is needed; .* torch.where"):
        fo.cond(torch.tensor([True, False]), torch.neg, torch.exp, torch.ones(2))
