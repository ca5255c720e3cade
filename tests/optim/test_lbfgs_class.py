"""fo.optim.LBFGS against torch.optim.LBFGS: construction, numbers, options, closures."""

import copy
import inspect

import pytest
import torch
from lbfgs_problems import DOUBLE, WOLFE, Training, assert_same, bowl, deviation, log_barrier, make_pair, rosenbrock
from torch_like_cases import outcome

import functorch_optim as fo


def make_params(dtype=torch.float64):
    """A vector, a scalar, an empty one, and a matrix."""
    return [torch.randn(shape, dtype=dtype) for shape in ((3,), (), (0, 2), (2, 2))]


# Construction. --------------------------------------------------------------------------------------------------------


def test_signatures():
    ours, theirs = fo.optim.LBFGS, torch.optim.LBFGS
    assert inspect.signature(ours) == inspect.signature(theirs)
    mine, torchs = [inspect.signature(kind.step).parameters.values() for kind in (ours, theirs)]
    assert [(p.name, p.kind, p.default) for p in mine] == [(p.name, p.kind, p.default) for p in torchs]
    assert issubclass(ours, theirs)


@pytest.mark.parametrize(
    "arrange", [list, iter, lambda params: [("a", params[0])], lambda params: [{"params": params, "lr": 0.1, "my": 1}]]
)
def test_defaults_groups_and_text(arrange):
    params = [torch.ones(2, requires_grad=True)]
    ours, theirs = [module.LBFGS(arrange(params), 0.5, 4) for module in (fo.optim, torch.optim)]
    assert (ours.defaults, repr(ours)) == (theirs.defaults, repr(theirs))
    assert [*map(str, ours.param_groups)] == [*map(str, theirs.param_groups)]
    assert ours.param_groups[0]["params"][0] is params[0]
    assert ours.state_dict() == theirs.state_dict()


BAD = [
    lambda p: (([p], -1.0), {}),
    lambda p: (([p], torch.ones(2)), {}),
    lambda p: (([{"params": [p]}, {"params": [torch.ones(2)]}],), {}),
    lambda p: (([],), {}),
    lambda p: ((p,), {}),
    lambda p: (([3.0],), {}),
    lambda p: (([p.exp()],), {}),
    lambda p: (([p],), {"momentum": 0.9}),
    lambda p: (([p],), {"lr": "fast"}),
]


@pytest.mark.parametrize("make", BAD)
def test_construction_errors_are_torchs(make):
    args, options = make(torch.ones(2, requires_grad=True))
    expected = outcome(torch.optim.LBFGS, *args, **options)
    assert expected is not None
    assert outcome(fo.optim.LBFGS, *args, **options) == expected


# Numbers. -------------------------------------------------------------------------------------------------------------

OPTIONS = [
    {},
    WOLFE,
    {"max_iter": 1},
    {"max_iter": 1, **WOLFE},
    {"max_iter": 0},
    {"max_iter": 1e1, "lr": 0.1},
    {"lr": 0.03, "max_iter": 7},
    {"lr": 5.0, "max_iter": 3, **WOLFE},
    {"lr": 0.0},
    {"lr": torch.tensor(0.3, **DOUBLE), "max_iter": 4},
    {"lr": torch.tensor(0.1), "max_iter": 4},
    {"lr": torch.tensor([0.5], **DOUBLE), "max_iter": 3, **WOLFE},
    {"max_eval": 4},
    {"max_eval": 1},
    {"max_eval": 3, **WOLFE},
    {"max_eval": float("inf"), "max_iter": 5, **WOLFE},
    {"history_size": 1, "max_iter": 6},
    {"history_size": 2, "max_iter": 6, **WOLFE},
    {"tolerance_grad": 1.0},
    {"tolerance_grad": 1.0, **WOLFE},
    {"tolerance_grad": 0, "tolerance_change": 0, "max_iter": 8, **WOLFE},
    {"tolerance_change": 0.1, "lr": 0.5},
    {"tolerance_change": 0.1, **WOLFE},
]
each = pytest.mark.parametrize("options", OPTIONS, ids=[str(list(o.items())) for o in OPTIONS])


@pytest.mark.sampled
@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_double_precision(options, dtype):
    """The same to the bit on this machine; another may round sums otherwise, by an ulp."""
    ours, theirs = make_pair(make_params(dtype), **options)
    for _ in range(4):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
    if options.get("max_iter") != 0 and options.get("lr") != 0:
        assert theirs.state["n_iter"] > 0
        assert deviation(ours, Training(torch.optim.LBFGS, make_params(dtype))) > 0.1


@pytest.mark.sampled(pool="long")
@pytest.mark.parametrize(("tolerance_change", "dtype"), [(0, torch.float64), (0.5, torch.complex128)])
def test_a_line_search_has_a_tolerance_of_its_own(tolerance_change, dtype):
    """torch.optim's ends when parameters change by 1e-9 over the bracket, whatever `tolerance_change` is."""
    for _ in range(12):
        options = {"tolerance_change": tolerance_change, "tolerance_grad": 0, "max_iter": 8, **WOLFE}
        ours, theirs = make_pair(make_params(dtype), **options)
        for _ in range(4):
            ours.step()
            theirs.step()
            assert_same(ours, theirs)


@each
def test_single_precision(options):
    ours, theirs = make_pair(make_params(torch.float32), **options)
    for _ in range(4):
        ours.step()
        theirs.step()
        assert deviation(ours, theirs) < 1e-5
    assert all(y.dtype == torch.float32 for y in ours.state.get("old_dirs", ()))


@pytest.mark.parametrize(
    "options", [{"lr": 0.301}, {"max_iter": 4}, {"history_size": 1}, WOLFE, {"max_eval": 3}, {"tolerance_grad": 50.0}]
)
def test_the_comparison_can_fail(options):
    ours, theirs = make_pair(make_params(), lr=0.3, max_iter=5)
    ours.optimizer.param_groups[0].update(options)
    for _ in range(3):
        ours.step()
        theirs.step()
    with pytest.raises(AssertionError):
        assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{"max_iter": 3, "lr": 0.1}, {"max_iter": 3, **WOLFE}])
def test_parameters_without_gradients_are_moved_by_the_history(options):
    """A gradient of zero is what they have, to torch and to us."""
    params = [*make_params(), torch.randn(2, **DOUBLE)]
    ours, theirs = make_pair(params, **options)
    for steps in range(4):
        before = ours.params[0].detach().clone()
        for some in (ours, theirs):
            some.loss = (lambda params: bowl(params[1:])) if steps > 1 else (lambda params: bowl(params[:-1]))
            some.step()
        assert ours.params[0].grad is None or steps <= 1
        assert not torch.equal(ours.params[0], before)
        assert_same(ours, theirs)


@pytest.mark.parametrize("options", [{"max_iter": 4, "lr": 0.1}, {"max_iter": 4, **WOLFE}])
def test_sparse_gradients(options):
    entries = torch.tensor([0, 2, 2])

    def loss(params):
        rows = torch.nn.functional.embedding(entries, params[0], sparse=True)
        return bowl([rows, params[1]])

    ours, theirs = make_pair([torch.randn(5, 2, **DOUBLE), torch.randn(3, **DOUBLE)], loss, **options)
    for _ in range(3):
        ours.step()
        theirs.step()
        assert_same(ours, theirs)
    assert ours.params[0].grad.is_sparse


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
@pytest.mark.parametrize("options", [{"lr": 0.1, "max_iter": 5}, {"max_iter": 5, **WOLFE}])
def test_mixed_dtypes(dtypes, options):
    """torch rounds the float32 parameters after every iteration, we only where the closure sees them."""
    ours, theirs = make_pair([torch.randn(3, dtype=dtype) for dtype in dtypes], **options)
    for _ in range(3):
        ours.step()
        theirs.step()
        assert deviation(ours, theirs) < 1e-5
    assert [p.dtype for p in ours.params] == list(dtypes)
    assert ours.state["d"].dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"lr": 0.1}, WOLFE])
def test_half_precision_is_computed_in_float32(dtype, options):
    """torch.optim's float16 overflows here, to NaN or an error."""
    params = [p.to(dtype) for p in make_params()]
    ours, exact = [Training(fo.optim.LBFGS, some, **options) for some in (params, [p.double() for p in params])]
    for _ in range(6):
        ours.step()
        exact.step()
    assert deviation(ours, exact) < 2 * torch.finfo(dtype).eps
    assert {p.dtype for p in ours.params} == {dtype}
    assert {ours.state[key].dtype for key in ("d", "prev_flat_grad", "H_diag")} == {torch.float32}


def test_gradients_that_are_not_contiguous_and_parameters_that_are_all_empty():
    """torch.optim cannot."""
    params = [torch.randn(3, 2, **DOUBLE).t(), torch.randn(6, **DOUBLE)[::2]]
    ours, theirs = make_pair(params, lambda params: bowl([params[0].t(), params[1]]), **WOLFE)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs.step()
    _, theirs = make_pair([params[0].t().contiguous(), params[1]], **WOLFE)
    ours.step()
    theirs.step()
    torch.testing.assert_close(ours.params[0].t(), theirs.params[0], rtol=1e-12, atol=1e-12)
    empty, _ = make_pair([torch.zeros(0, 2)], lambda params: params[0].sum() + 1)
    assert empty.step() == 1
    assert empty.state == {"func_evals": 1, "n_iter": 0}


def test_without_a_line_search_it_goes_on_with_nan_as_torch_does():
    ours, theirs = make_pair(
        [torch.tensor([3.0, 0.5], **DOUBLE)], lambda params: log_barrier({"x": params[0]}), lr=20.0
    )
    for _ in range(3):
        assert torch.equal(ours.step().isnan(), theirs.step().isnan())
        torch.testing.assert_close(ours.params, theirs.params, rtol=1e-9, atol=0, equal_nan=True)
        assert [ours.state[key] for key in ("n_iter", "func_evals")] == [
            theirs.state[key] for key in ("n_iter", "func_evals")
        ]
    assert torch.tensor(ours.state["prev_loss"]).isnan()


def test_a_line_search_turns_back_where_the_loss_is_not_finite():
    loss = lambda params: log_barrier({"x": params[0]})
    ours, theirs = make_pair([torch.tensor([3.0, 0.5], **DOUBLE)], loss, lr=20.0, **WOLFE)
    for _ in range(5):
        ours.step()
        theirs.step()
    torch.testing.assert_close(ours.params[0].detach(), torch.full((2,), 0.1, **DOUBLE), rtol=1e-4, atol=0)
    assert loss(theirs.params).isnan()


def test_a_step_that_stands_still_for_lack_of_evaluations_warns():
    loss = lambda params: rosenbrock({"x": params[0]})
    params = [torch.tensor([-1.2, 1.0], **DOUBLE)]
    ours, theirs = make_pair(params, loss, max_iter=1, **WOLFE)
    for _ in range(3):
        with pytest.warns(UserWarning, match=r"no lower loss in max_eval=1 evaluations.*LBFGS\(params, max_eval=25"):
            ours.step()
        theirs.step()
        assert_same(ours, theirs)
    assert torch.equal(ours.params[0], params[0])
    more, _ = make_pair(params, loss, max_iter=1, max_eval=25, **WOLFE)
    assert loss(more.params) == more.step() > loss(more.params)


@pytest.mark.parametrize("options", [{}, WOLFE])
def test_at_a_minimum_nothing_moves(options):
    ours, theirs = make_pair([torch.zeros(3)], lambda params: params[0].square().sum(), **options)
    for _ in range(2):
        assert ours.step() == theirs.step() == 0
    assert not ours.params[0].any()
    assert ours.state == theirs.state == {"func_evals": 2, "n_iter": 0}


# Closures. ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"lr": 0.1}, WOLFE])
def test_closures_are_called_with_grad_and_the_first_loss_is_returned(options):
    for some in make_pair(make_params(), **options):
        losses = []

        def closure(some=some, losses=losses):
            losses.append(some.closure())
            return losses[-1]

        with torch.no_grad():
            assert some.optimizer.step(closure) is losses[0]
        assert len(losses) > 3
        assert all(some.calls)
        assert some.state["func_evals"] == len(losses)


def test_losses_may_be_numbers():
    ours, theirs = make_pair(make_params(), **WOLFE)
    results = [some.optimizer.step(lambda some=some: some.closure().item()) for some in (ours, theirs)]
    assert results[0] == results[1]
    assert type(results[0]) is float
    assert_same(ours, theirs)


def test_a_closure_is_needed():
    ours, theirs = make_pair(make_params())
    assert outcome(ours.optimizer.step) == outcome(theirs.optimizer.step) is not None


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("options", [{"lr": 0.01, "max_iter": 6}, {"lr": 0.001, "max_iter": 3, **WOLFE}])
@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("begun", [False, True])
def test_a_closure_that_raises_changes_nothing(options, when, begun):
    """It does with torch.optim, from the second call on; one that had not begun cannot step again."""
    for some in make_pair(make_params(), **options):
        if begun:
            some.step()
        before = copy.deepcopy((some.params, dict(some.state)))
        last = len(some.calls) + when

        def closure(some=some, last=last):
            loss = some.closure()
            if len(some.calls) == last:
                raise Interrupted
            return loss

        with pytest.raises(Interrupted):
            some.optimizer.step(closure)
        stayed = all(torch.equal(p, q) for p, q in zip(some.params, before[0], strict=True))
        if type(some.optimizer) is torch.optim.LBFGS:
            assert stayed == (when == 1)
            if when > 1 and not begun:
                with pytest.raises(TypeError):
                    some.step()
            continue
        assert stayed
        torch.testing.assert_close(dict(some.state), before[1], rtol=0, atol=0)
        some.step()
        expected = Training(fo.optim.LBFGS, before[0], **options)
        expected.state.update(before[1])
        expected.step()
        assert deviation(some, expected) == 0


# Options that are wrong. ----------------------------------------------------------------------------------------------


def test_an_unknown_line_search_is_torchs_error_but_before_the_closure_is_called():
    ours, theirs = make_pair(make_params(), line_search_fn="bogus")
    assert outcome(ours.step) == outcome(theirs.step) == (RuntimeError, "only 'strong_wolfe' is supported")
    assert (len(ours.calls), len(theirs.calls)) == (0, 1)
    assert not ours.state


@pytest.mark.parametrize("history_size", [0, -1])
def test_a_history_that_holds_nothing_is_an_error(history_size):
    ours, _ = make_pair(make_params(), history_size=history_size)
    with pytest.raises(ValueError, match=f"Invalid history_size: {history_size}; it needs an integer >= 1"):
        ours.step()
    assert not ours.calls


def test_a_second_group_is_an_error_at_once():
    """torch.optim takes it, and raises at every step from then on."""
    ours, theirs = make_pair(make_params())
    group = {"params": [torch.ones(1, requires_grad=True)]}
    with pytest.raises(ValueError, match=r"LBFGS doesn't support per-parameter options \(parameter groups\)"):
        ours.optimizer.add_param_group(group)
    ours.step()
    theirs.optimizer.add_param_group(group)
    with pytest.raises(AssertionError, match="Expected exactly one param_group, but got 2"):
        theirs.step()


# torch.compile. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"lr": 0.02, "max_iter": 4}, {"max_iter": 4, **WOLFE}])
@pytest.mark.parametrize("whole", [False, True], ids=["step", "a function around it"])
def test_in_a_compiled_function_it_steps_as_ever(options, whole):
    ours, theirs = make_pair(make_params(), **options)
    hooked = []
    ours.optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    compiled = torch.compile(ours.step if whole else ours.optimizer.step, backend="eager")
    for t in range(4):
        loss = compiled() if whole else compiled(ours.closure)
        assert loss == theirs.step()
        assert_same(ours, theirs)
        assert len(hooked) == t + 1
