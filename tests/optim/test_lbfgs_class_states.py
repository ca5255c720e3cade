"""fo.optim.LBFGS as an optimizer: state dicts from and to torch.optim, copies, hooks, schedulers."""

import copy

import pytest
import torch
from hooks import calls_of_hooks
from lbfgs_problems import DOUBLE, WOLFE, Training, assert_same, bowl, deviation, make_pair
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from torch_like_cases import outcome

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file, through_pickle

SOME = [{"max_iter": 3, "lr": 0.03, "history_size": 5}, {"max_iter": 2, **WOLFE}, {"max_iter": 1, "lr": 0.03}]
each = pytest.mark.parametrize("options", SOME, ids=["fixed", "wolfe", "single"])
MODULES = {"ours": fo.optim, "torchs": torch.optim}


def make_params(dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype) for shape in ((3,), (), (2, 2))]


def resumed(module, trained, loss=bowl):
    """Make a new optimizer that goes on, with options of its own until the saved ones are loaded."""
    new = Training(module.LBFGS, trained.params, loss, lr=7.0, max_iter=1)
    new.optimizer.load_state_dict(through_a_file(trained.optimizer.state_dict()))
    return new


# State dicts. ---------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("way", ["torchs-ours-torchs", "ours-torchs-ours", "ours-ours-torchs"])
def test_training_goes_on_from_a_file(options, steps, way):
    kinds = [MODULES[name] for name in way.split("-")]
    params = make_params()
    trained, theirs = [Training(module.LBFGS, params, **options) for module in (kinds[0], torch.optim)]
    for module in kinds:
        trained = trained if module is kinds[0] and not trained.calls else resumed(module, trained)
        theirs.calls.clear()
        trained.calls.clear()
        for _ in range(steps):
            trained.step()
            theirs.step()
            assert_same(trained, theirs)
        assert trained.optimizer.param_groups[0].items() >= options.items()
    for _ in range(3):
        trained.step()
        theirs.step()
    assert_same(trained, theirs)


@each
def test_saved_states_are_torchs(options):
    ours, theirs = make_pair(make_params(), **options)
    for steps in range(4):
        saved = [some.optimizer.state_dict() for some in (ours, theirs)]
        assert saved[0]["param_groups"] == saved[1]["param_groups"]
        assert list(saved[0]["state"]) == list(saved[1]["state"]) == ([0] if steps else [])
        for some in (ours, theirs):
            some.step()
    assert set(ours.state) - {"al"} == set(theirs.state) - {"al"}
    assert len(ours.state["al"]) == options.get("history_size", 100)


@each
def test_a_loaded_state_is_no_longer_tied_to_where_it_came_from(options):
    """torch.optim modifies `prev_flat_grad` in place."""
    ours, _ = make_pair(make_params(), **options)
    ours.step()
    saved = copy.deepcopy(ours.optimizer.state_dict())
    expected = copy.deepcopy(saved["state"])
    new = Training(fo.optim.LBFGS, ours.params)
    new.optimizer.load_state_dict(saved)
    for _ in range(3):
        new.step()
    torch.testing.assert_close(saved["state"], expected, rtol=0, atol=0)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_is_cast_to_the_dtype_of_the_parameters_as_torch_does(options, dtype):
    other = torch.float64 if dtype == torch.float32 else torch.float32
    trained = Training(fo.optim.LBFGS, make_params(other), **options)
    for _ in range(3):
        trained.step()
    ours, theirs = make_pair([p.to(dtype) for p in trained.params])
    for some in (ours, theirs):
        some.optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    for _ in range(2):
        assert_same(ours, theirs, 1e-12 if dtype == torch.float64 else 1e-5)
        assert {y.dtype for y in (ours.state["d"], *ours.state["old_dirs"])} == {dtype}
        ours.step()
        theirs.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.complex128])
def test_other_dtypes_go_on_from_a_file(dtype):
    """In 16 bits the state is of float32, and stays so."""
    trained = Training(fo.optim.LBFGS, make_params(dtype), max_iter=3, **WOLFE)
    trained.step()
    new = resumed(fo.optim, trained)
    assert new.state["d"].dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
    for _ in range(5):
        new.step()
        trained.step()
    assert deviation(new, trained) == 0
    assert new.state["d"].dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)


def test_a_state_is_rounded_on_request():
    trained = Training(fo.optim.LBFGS, make_params(torch.bfloat16), max_iter=3)
    trained.step()
    theirs, saved = Training(torch.optim.LBFGS, trained.params), copy.deepcopy(trained.optimizer.state_dict())
    trained.optimizer.load_state_dict(saved, cast=True)
    theirs.optimizer.load_state_dict(saved)
    assert trained.state["d"].dtype == theirs.state["d"].dtype == torch.bfloat16
    assert torch.equal(trained.state["d"], theirs.state["d"])


def test_parameters_in_another_order_are_refused():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    saved = fo.optim.LBFGS([("a", a), ("b", b)]).state_dict()
    fo.optim.LBFGS([("module.a", a), ("module.b", b)]).load_state_dict(saved)
    with pytest.raises(ValueError, match="saved parameters are a, b, in another order than these, b, a, and"):
        fo.optim.LBFGS([("b", b), ("a", a)]).load_state_dict(saved)


def test_options_that_an_older_state_dict_lacks_stay():
    ours, theirs = make_pair(make_params(), max_iter=3)
    saved = theirs.optimizer.state_dict()
    for name in ("line_search_fn", "max_eval"):
        del saved["param_groups"][0][name]
    new = Training(fo.optim.LBFGS, ours.params, max_iter=5, max_eval=4, **WOLFE)
    new.optimizer.load_state_dict(saved)
    [group] = new.optimizer.param_groups
    assert (group["max_iter"], group["max_eval"], group["line_search_fn"]) == (3, 4, "strong_wolfe")
    new.step()


def trained_state(**changes):
    params = make_params()
    trained = Training(torch.optim.LBFGS, params, **SOME[0])
    trained.step()
    saved = copy.deepcopy(trained.optimizer.state_dict())
    for key, value in changes.items():
        if value is None:
            del saved["state"][0][key]
        else:
            saved["state"][0][key] = value
    return saved


def state_of_adam():
    params = [p.requires_grad_() for p in make_params()]
    optimizer = torch.optim.Adam(params)
    bowl(params).backward()
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: trained_state(d=torch.ones(7)), r"is for 7 numbers, but the parameters have 8; .* for another model"),
        (lambda: trained_state(old_dirs=[torch.ones(9)]), "is for 9 numbers, but the parameters have 8"),
        (lambda: trained_state(prev_flat_grad=torch.ones(2)), "is for 2 numbers, but the parameters have 8"),
        (lambda: trained_state(ro=None), "lacks 'ro', which LBFGS keeps after the first iteration"),
        (lambda: trained_state(momentum_buffer=torch.ones(8)), "has 'momentum_buffer', which LBFGS does not keep"),
        (state_of_adam, "has 'step', which LBFGS does not keep; another optimizer saved it"),
    ],
)
def test_states_of_others_are_errors_and_change_nothing(make, message):
    ours, theirs = make_pair(make_params(), **SOME[1])
    ours.step()
    theirs.step()
    with pytest.raises(ValueError, match=message):
        ours.optimizer.load_state_dict(make())
    ours.step()
    theirs.step()
    assert_same(ours, theirs)


def test_groups_that_do_not_fit_are_torchs_errors():
    ours, theirs = make_pair(make_params())
    one = torch.ones(1, requires_grad=True)
    for other in (torch.optim.LBFGS([one]), torch.optim.SGD([{"params": [one]}, {"params": [one.clone().detach()]}])):
        saved = other.state_dict()
        expected = outcome(theirs.optimizer.load_state_dict, saved)
        assert outcome(ours.optimizer.load_state_dict, saved) == expected is not None


# Copies. --------------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("make_copy", [copy.deepcopy, through_pickle])
@pytest.mark.parametrize("begun", [False, True])
def test_copies_train_on(options, make_copy, begun):
    """With torch.optim they cannot step."""
    ours, theirs = make_pair(make_params(), **options)
    if begun:
        ours.step()
        theirs.step()
    twin = make_copy(ours)
    assert repr(twin.optimizer) == repr(ours.optimizer)
    assert [*map(id, twin.optimizer.param_groups[0]["params"])] == [*map(id, twin.params)]
    assert twin.optimizer._numel() == 8
    before = copy.deepcopy((ours.params, dict(ours.state)))
    twin.step()
    torch.testing.assert_close((ours.params, dict(ours.state)), before, rtol=0, atol=0)
    theirs.step()
    assert_same(twin, theirs)
    with pytest.raises(AttributeError):
        make_copy(theirs).step()


# Hooks. ---------------------------------------------------------------------------------------------------------------


def test_hooks():
    ours, theirs = [calls_of_hooks(some.optimizer, some.closure) for some in make_pair(make_params(), max_iter=2)]
    assert ours == theirs


def test_a_hook_may_replace_the_closure():
    results = []
    for some in make_pair(make_params(), max_iter=2):
        some.optimizer.register_step_pre_hook(lambda optimizer, args, kwargs, f=some.closure: ((optimizer, f), kwargs))
        results.append(some.optimizer.step(None).item())
    assert results[0] == results[1]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    ours, _ = make_pair(make_params())
    ours.step()
    ours.optimizer.zero_grad(set_to_none)
    assert all(p.grad is None if set_to_none else not p.grad.any() for p in ours.params)


# Learning rates. ------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("lr", [0.05, torch.tensor(0.05, **DOUBLE)], ids=["number", "tensor"])
def test_schedulers(options, lr):
    """torch takes the tensor that a scheduler modifies for the length of the last step, and so gets another Hessian."""
    params = make_params()
    ours = Training(fo.optim.LBFGS, params, **{**options, "lr": copy.deepcopy(lr)})
    theirs = Training(torch.optim.LBFGS, params, **{**options, "lr": 0.05})
    schedulers = [StepLR(some.optimizer, 1, gamma=0.5) for some in (ours, theirs)]
    for _ in range(4):
        for some, scheduler in zip((ours, theirs), schedulers, strict=True):
            some.step()
            scheduler.step()
        assert_same(ours, theirs)
        assert ours.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
    assert float(ours.optimizer.param_groups[0]["lr"]) == pytest.approx(0.05 / 16)


def test_plateaus():
    ours, theirs = make_pair(make_params(), lr=0.2, max_iter=5)
    lrs = []
    for some in (ours, theirs):
        scheduler = ReduceLROnPlateau(some.optimizer, factor=0.5, patience=0, threshold=0.01, threshold_mode="abs")
        lrs.append([])
        for _ in range(8):
            scheduler.step(some.step().detach())
            lrs[-1].append(some.optimizer.param_groups[0]["lr"])
    assert lrs[0] == lrs[1]
    assert len({*lrs[0]}) > 1
    assert_same(ours, theirs)


# Subclasses. ----------------------------------------------------------------------------------------------------------


def test_subclasses():
    """Users' classes that do something around the step, and use torch's methods."""

    def subclass(module):
        class Mine(module.LBFGS):
            def step(self, closure):
                return super().step(closure), self._gather_flat_grad()

        return Mine

    params = make_params()
    ours, theirs = [Training(subclass(module), params, **WOLFE) for module in (fo.optim, torch.optim)]
    for _ in range(2):
        torch.testing.assert_close(ours.step(), theirs.step(), rtol=1e-9, atol=1e-9)
    assert_same(ours, theirs)
