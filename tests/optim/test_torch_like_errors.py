"""Our classes raise the errors of torch.optim, in the same words."""

import copy
import inspect
import itertools
import re

import pytest
import torch
from torch import nn
from torch_like_cases import (
    MODULES,
    WITH_FUSED,
    assert_same,
    draw_gradient,
    each,
    make_params,
    outcome,
    outcomes,
    parameters,
)

# torch's own tables. --------------------------------------------------------------------------------------------------


def info_of(name):
    """Look an optimizer up in torch's tests, which take seconds to import."""
    from torch.testing._internal.common_optimizers import optim_db

    [info] = [info for info in optim_db if info.optim_cls.__name__ == name]
    return info


@each
def test_error_inputs_of_torchs_own_tests(name):
    cases = info_of(name).optim_error_inputs_func(device="cpu", dtype=torch.float64)
    assert len(cases) >= 6
    for case in cases:
        given = case.optimizer_error_input

        def run(module, given=given):
            params = make_params(name) if given.params is None else given.params
            optimizer = getattr(module, name)(copy.deepcopy(params), **given.kwargs)
            if case.error_on.name == "STEP_ERROR":
                for p, q in zip(parameters(optimizer), params, strict=True):
                    p.grad = q.grad
                optimizer.step()

        ours, theirs = outcomes(run)
        assert theirs is not None, given.desc
        assert theirs[0] is case.error_type
        assert re.search(case.error_regex, theirs[1])
        assert ours == theirs


@pytest.mark.sampled
@each
@pytest.mark.parametrize("flag", [None, "foreach", "differentiable", "fused"])
def test_inputs_of_torchs_own_tests(name, flag, double):
    info = info_of(name)
    if flag == "fused" and "cpu" not in info.supports_fused_on:
        pytest.skip("torch has no fused kernel for this")
    if flag not in (None, *info.supported_impls):
        pytest.skip("torch.optim does not take this flag")
    flags = {flag: True} if flag else {}
    params = make_params(name)
    if flag == "differentiable":  # for tensors that autograd does not forbid to write to
        params = [p.detach() for p in params]
    cases = info.optim_inputs_func(device="cpu", dtype=torch.float64)
    assert len(cases) >= 4
    for case in cases:
        options = {**case.kwargs, **flags}
        if isinstance(options.get("lr"), torch.Tensor):
            options["lr"] = options["lr"].double()  # torch.optim computes in float32 with a float32 tensor, we do not
            if name in ("Adam", "AdamW") and flag == "foreach":
                continue
        ours, theirs = [getattr(module, name)(copy.deepcopy(params), **options) for module in MODULES]
        for _ in range(10):
            for several in zip(*map(parameters, (ours, theirs)), strict=True):
                g = draw_gradient(ours, several[0])
                for p in several:
                    p.grad = g.clone()
            ours.step()
            theirs.step()
        if flag == "fused":  # float32 in torch.optim, whatever the default dtype
            for state in itertools.chain(ours.state.values(), theirs.state.values()):
                state.update({key: value.double() for key, value in state.items() if key == "step"})
        assert_same(ours, theirs)


# Constructors. --------------------------------------------------------------------------------------------------------

VALUES = [
    *(-1.0, 2.0, float("nan"), "text", None, True, object),
    *((), (0.5,), (-0.1, 0.5), (0.5, 1.0), (1.0, 0.5), (2.0, 3.0), (0.5, 0.5, 0.5)),
    *(torch.tensor([0.1, 0.1]), torch.tensor(-1.0), torch.tensor(0.1), (torch.tensor(0.5), 0.5)),
    *((torch.tensor(0.5), torch.tensor(0.5)), (torch.tensor([0.5, 0.5]), torch.tensor(0.5))),
]
REFUSED = {"SGD": 37, "Adam": 66, "Muon": 40, "SparseAdam": 40}  # at least


@each
def test_values_of_all_arguments(name):
    """Many kinds of values, right and wrong, for every argument."""
    params = make_params(name)
    refused = 0
    for key in [*list(inspect.signature(getattr(torch.optim, name)).parameters)[1:], "unknown"]:
        for value in VALUES:
            ours, theirs = outcomes(lambda module: getattr(module, name)(params, **{key: value}))
            assert ours == theirs
            refused += theirs is not None
    assert refused >= REFUSED.get(name, 40)


@each
def test_combinations_of_flags(name):
    known = inspect.signature(getattr(torch.optim, name)).parameters
    flags = [flag for flag in ("foreach", "fused", "differentiable", "capturable") if flag in known]
    params = make_params(name)
    refused = 0
    for lr in (0.1, torch.tensor(0.1)):
        for values in itertools.product([False, True, None], repeat=len(flags)):
            options = dict(zip(flags, values, strict=True))
            ours, theirs = outcomes(lambda module: getattr(module, name)(params, lr=lr, **options))
            assert ours == theirs
            refused += theirs is not None
    assert (refused > 0) == (name in WITH_FUSED)


P, Q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3))
PARAMS = {
    "tensor": lambda: P,
    "set": lambda: {P, Q},
    "set in a group": lambda: [{"params": {P}}],
    "none": lambda: None,
    "number": lambda: 3,
    "text": lambda: "text",
    "empty list": list,
    "empty iterator": lambda: iter([]),
    "dict": lambda: {"params": [P]},
    "dict of tensors": lambda: {"a": P},
    "module": lambda: nn.Linear(2, 2),
    "no tensor": lambda: [P, 3],
    "list in the list": lambda: [[P], [Q]],
    "empty tuple": lambda: [()],
    "name without tensor": lambda: [("a", 3)],
    "no leaf": lambda: [P * 2],
    "no leaf in a later group": lambda: [{"params": [P]}, {"params": [Q * 2]}],
    "twice in a group": lambda: [P, P],
    "twice in a group with names": lambda: [("a", P), ("b", P)],
    "twice, in two groups": lambda: [{"params": [P]}, {"params": [P]}],
    "names for some": lambda: [("a", P), Q],
    "names for some, the first not": lambda: [P, ("a", Q)],
    "names for one group": lambda: [{"params": [("a", P)]}, {"params": [Q]}],
    "names for the second group": lambda: [{"params": [P]}, {"params": [("a", Q)]}],
    "group without params": lambda: [{"lr": 0.1}],
    "tensor after a group": lambda: [{"params": [P]}, Q],
    "group after a tensor": lambda: [P, {"params": [Q]}],
    "empty group": lambda: [{"params": []}],
    "unknown option in a group": lambda: [{"params": [P], "unknown": 3}],
    "not checked in a group": lambda: [{"params": [P], "lr": -1}],
    "no grad wanted": lambda: [torch.ones(2, 2)],
    "integers": lambda: [torch.ones(2, 2, dtype=torch.long)],
    "complex": lambda: [torch.ones(2, 2, dtype=torch.complex64)],
    "vector": lambda: [torch.ones(3)],
    "sparse": lambda: [torch.ones(3, 3).to_sparse()],
    "sparse in a later group": lambda: [{"params": [P]}, {"params": [Q, torch.ones(3, 3).to_sparse()]}],
}


@each
@pytest.mark.parametrize("case", PARAMS)
def test_parameters(name, case):
    ours, theirs = outcomes(lambda module: getattr(module, name)(PARAMS[case]()))
    assert ours == theirs


def test_parameters_are_refused():
    """A control: the table is made of what is refused, and of little else."""
    refused = [case for case in PARAMS if outcome(torch.optim.Adam, PARAMS[case]())]
    assert len(refused) == 26
    assert outcome(torch.optim.Adam, PARAMS["twice in a group"]())[0] is UserWarning


@each
@pytest.mark.parametrize("case", PARAMS)
def test_groups_that_are_added(name, case):
    """The error is the same; and where there is one in ours, the groups are as in torch.optim."""
    added = {"params": PARAMS[case]()} if case != "tensor after a group" else Q
    results = []
    for module in MODULES:
        optimizer = getattr(module, name)([nn.Parameter(torch.ones(2, 2))])
        group = copy.copy(added)
        if case == "empty iterator":
            group = {"params": iter([])}
        results.append((outcome(optimizer.add_param_group, group), len(optimizer.param_groups)))
    assert results[0] == results[1]


def test_a_parameter_twice_in_a_group():
    """A warning. Then both of its updates are added: torch.optim makes the second one after the first."""
    moved = []
    for module in MODULES:
        p = nn.Parameter(torch.ones(2))
        with pytest.warns(UserWarning, match="a parameter group with duplicate parameters") as caught:
            optimizer = module.SGD([p, p], lr=0.25)
        assert len(caught) == 1
        p.grad = torch.ones(2)
        optimizer.step()
        moved.append(p.tolist())
    assert moved == [[0.5, 0.5]] * 2


@each
def test_state_dicts_that_do_not_fit(name):
    def load(module, edit):
        optimizer = getattr(module, name)(make_params(name))
        saved = copy.deepcopy(optimizer.state_dict())
        edit(saved)
        optimizer.load_state_dict(saved)

    edits = {
        "no group": lambda saved: saved["param_groups"].clear(),
        "too many groups": lambda saved: saved["param_groups"].append({"params": []}),
        "too few parameters": lambda saved: saved["param_groups"][0]["params"].pop(),
        "no groups": lambda saved: saved.pop("param_groups"),
    }
    for edit in edits.values():
        ours, theirs = outcomes(lambda module: load(module, edit))
        assert theirs is not None
        assert ours == theirs
