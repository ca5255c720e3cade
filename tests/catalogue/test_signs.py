"""Whether updates go downhill is known of every transformation, for wrappers that compare them with gradients."""

import pytest
import torch
from catalogue import rows

import functorch_optim as fo
from functorch_optim._core.rule import TreeRule


@rows
def test_a_rule_that_turns_its_update_says_so(row):
    """The first update is along the gradient, or against it; parameters are nearly zero, so that decay is, too."""
    tx = row()
    if any(isinstance(link.rule, TreeRule) or link.rule.hold is not None for link in tx._links):
        pytest.skip("it is a function of the whole tree, or has steps that are left out")
    generator = torch.Generator().manual_seed(0)
    params = {name: torch.full((3, 2), 1e-9, dtype=torch.float64) for name in ("a", "b")}
    params = {"layer": params, "rest": [torch.full((3,), 1e-9, dtype=torch.float64)]}
    grads = fo.tree.map(lambda p: torch.rand(p.shape, dtype=torch.float64, generator=generator) + 0.5, params)
    try:
        updates, _ = tx.update(grads, tx.init(params), params)
    except (ValueError, TypeError):
        pytest.skip("it is for other parameters, or needs more than a gradient")
    leaves = fo.tree.flatten(params)[0]
    active = fo._core.links.select(tx._links, params)
    for i, u in enumerate(fo.tree.flatten(updates)[0]):
        turns = sum(link.rule.turns for link, on in zip(tx._links, active, strict=True) if on[i])
        if bool((u > 0).all()) or bool((u < 0).all()):  # else it does not go one way
            assert bool((u < 0).all()) == (turns % 2 == 1), (row.name, i, leaves[i].shape)
