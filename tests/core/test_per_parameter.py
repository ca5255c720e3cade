"""Hyperparameters that are trees: a value for each parameter, or for each of its elements."""

from typing import NamedTuple

import pytest
import torch
from catalogue import CATALOGUE, HYPERPARAMETERS, SHAPES, assert_close, loss, make_params, step, train

import functorch_optim as fo

# What cannot differ between parameters, and why.
REFUSED = {
    ("scale_by_schedule", "gamma"): "is a tree, and here one number is needed",
    **{
        (name, "initial_accumulator_value"): "A state begins with the value"
        for name in ("scale_by_rss", "adagrad_decay")
    },
    ("yogi", "initial_accumulator_value"): "A state begins with the value",
    **{("sophia", name): "is a tree, and here one number is needed" for name in ("beta2", "rho", "eps")},
    ("adai", "beta2"): "keeps mean_exp_avg_sq once for all",
    **{(name, "lr"): "A state begins with the value" for name in ("scale_by_rprop", "rprop")},
    **{(name, "beta1"): "keeps mu_product once for all" for name in ("scale_by_nadam", "nadam", "nadam_decoupled")},
    **{(name, "momentum_decay"): "keeps mu_product once for all" for name in ("scale_by_nadam", "nadam")},
    **{("asgd", name): "keeps (eta|mu) once for all" for name in ("lr", "lambd", "alpha", "t0")},
    **{(name, "lr"): "is a tree, and here one number is needed" for name in ("lbfgs", "lbfgs_search")},
    ("reduce_on_plateau", "factor"): "is a tree, and here one number is needed",
    **{("zclip", name): "is a tree, and here one number" for name in ("alpha", "z_thresh", "eps", "clip_factor")},
    **{("autoclip", name): "is a tree, and here one number is needed" for name in ("percentile", "eps")},
    **{("add_noise", name): "is a tree, and here one number is needed" for name in ("eta", "gamma")},
    ("schedule_free", "momentum"): "is a tree, and here one number is needed",
    **{("schedule_free", name): "keeps (weight_sum|lr_max) once for all" for name in ("lr", "r")},
    ("schedule_free_adamw", "lr"): "keeps (weight_sum|lr_max) once for all",
    **{("schedule_free_sgd", name): "keeps (weight_sum|lr_max) once for all" for name in ("lr", "warmup_steps", "r")},
    **{("schedule_free_corrected", name): "keeps (weight_sum|lr_max) once for all" for name in ("lr", "warmup_steps")},
    ("schedule_free_sgd", "momentum"): "is a tree, and here one number is needed",
    ("schedule_free_corrected", "beta1"): "is a tree, and here one number is needed",
    ("gpa", "mu_y"): "is a tree, and here one number is needed",
    ("polynomial_average", "gamma"): "is a tree, and here one number is needed",
    **{(f"ema_weights{kind}", "decay"): "is a tree, and here one number is needed" for kind in ("", "_corrected")},
    **{
        (row, name): "is a tree, and here one number is needed|keeps (d|loss_avg) once for all"
        for row, names in {
            "prodigy": ("lr", "d0", "beta2", "d_coef"),
            "prodigy_options": ("lr", "d0", "beta1", "beta2", "beta3", "growth_rate"),
            "dadapt_adam": ("lr", "d0", "beta2", "eps"),
            "dadapt_adam_options": ("lr", "d0", "beta1", "beta2", "eps", "growth_rate"),
            "dadapt_sgd": ("lr", "d0"),
            "dog": ("eps", "reps_rel"),
            "dowg": ("eps", "d0_squared"),
            "polyak": ("f_min", "c", "eps"),
            "polyak_bounded": ("max_lr",),
            "momo": ("lr", "weight_decay", "beta", "lb"),
            "momo_bounded": ("lr", "weight_decay", "beta"),
            "momo_adam": ("lr", "weight_decay", "beta1", "eps", "lb"),
            "momo_adam_bounded": ("lr", "weight_decay", "beta1", "eps"),
            "cocob": ("eps",),
        }.items()
        for name in names
    },
}
ACCEPTED = [(row, name) for row, name in HYPERPARAMETERS if (row.name, name) not in REFUSED]
accepted = pytest.mark.parametrize(("row", "name"), ACCEPTED, ids=[f"{row.name}-{name}" for row, name in ACCEPTED])
INDEPENDENT = [(row, name) for row, name in ACCEPTED if not any(link.rule.sees_tree for link in row()._links)]
refused = pytest.mark.parametrize(
    ("row", "name"), [(row, name) for row, name in HYPERPARAMETERS if (row.name, name) in REFUSED]
)
X = torch.ones(3, dtype=torch.float64)


def tree_of(value, factor=0.99):
    """Make a tree of slightly different values, shaped like the parameters."""
    values = [torch.tensor(value * factor**i, dtype=torch.float64) for i in range(5)]
    return {"layer": dict(zip(SHAPES, values, strict=False)), "rest": [values[4]]}


@pytest.mark.sampled
@accepted
def test_a_tree_of_equal_values_is_one_value(row, name):
    expected = train(row(), make_params(), X, steps=2)
    for prefix in (
        tree_of(row.hyperparameters[name], 1),
        {"layer": row.hyperparameters[name], "rest": lambda count: row.hyperparameters[name]},
    ):
        torch.manual_seed(0)
        actual = train(row(**{name: prefix}), make_params(), X, steps=2)
        # A state that keeps hyperparameters has each number of the tree. Parameters alone are compared then.
        compared = slice(1) if row.keeps_hyperparameters else slice(None)
        assert_close(actual[compared], expected[compared], rtol=1e-12, atol=1e-13)


@pytest.mark.sampled
@pytest.mark.parametrize(("row", "name"), INDEPENDENT, ids=[f"{row.name}-{name}" for row, name in INDEPENDENT])
def test_a_tree_of_values_is_a_transformation_for_each_parameter(row, name, device):
    """But for a norm of the whole tree, which is the same for all."""
    values = tree_of(row.hyperparameters[name])
    tx, params = row(**{name: values}), make_params(device=device)
    labels = fo.tree.map(lambda path: path, {"layer": {name: name for name in SHAPES}, "rest": ["rest"]})
    parts = fo.partition(
        {
            label: row(**{name: value})
            for label, value in zip(fo.tree.flatten(labels)[0], fo.tree.flatten(values)[0], strict=True)
        },
        labels,
    )
    state, expected_state = tx.init(params), parts.init(params)
    for _ in range(3):
        grads = fo.tree.map(torch.randn_like, params)
        updates, state = step(tx, grads, state, params)
        expected, expected_state = step(parts, grads, expected_state, params)
        assert_close(updates, expected)


@refused
def test_some_hyperparameters_cannot_be_trees(row, name):
    with pytest.raises(TypeError, match=REFUSED[row.name, name]):
        train(row(**{name: tree_of(row.hyperparameters[name])}), make_params(), X)


def test_a_number_kept_once_cannot_be_chosen_by_a_tree():
    tree = {"w": 0.5, "b": 2.0}

    class Kept(NamedTuple):
        rate: float = 1.0

    def scalars(step, kept):
        rate = max(fo.at(tree, step), 1.0)
        return rate, Kept(rate)

    tx = fo.leafwise(None, lambda u, state, p, rate: (u * rate, state), scalars=scalars, carry=Kept)
    params = {"w": torch.ones(2), "b": torch.ones(1)}
    with pytest.raises(TypeError, match="chosen by a hyperparameter that is a tree"):
        tx.update(params, tx.init(params), params)


@pytest.mark.sampled
@accepted
def test_derivatives_equal_finite_differences(row, name):
    def outer(values):
        trained, _ = train(fo.chain(row(**{name: values}), fo.scale(0.1)), params, X, steps=2)
        return loss(trained, X)

    # A factor of 0.99 makes one of these values 1, where clipping of a tensor of one element begins.
    factor = 0.98 if (row.name, name) == ("adafactor_t5", "d") else 0.99
    params, values = make_params(), tree_of(row.hyperparameters[name], factor)
    gradient = torch.func.grad(outer)(values)
    direction = fo.tree.map(lambda value: value * torch.randn_like(value), values)
    up, down = [outer(fo.tree.map(lambda v, d: v + by * d, values, direction)) for by in (1e-5, -1e-5)]
    pairs = zip(fo.tree.flatten(gradient)[0], fo.tree.flatten(direction)[0], strict=True)
    torch.testing.assert_close(sum(g * d for g, d in pairs), (up - down) / 2e-5, rtol=1e-6, atol=1e-9)
    forward = torch.func.jvp(outer, (values,), (direction,))[1]
    torch.testing.assert_close(forward, (up - down) / 2e-5, rtol=1e-6, atol=1e-9)


def is_independent(row):
    """Tell whether every element has an update of its own."""
    return all(link.rule.elementwise and not link.rule.sees_tree for link in row()._links)


def keeps_numbers(row):
    """Tell whether hyperparameters are kept in the state, which has room for one number each; test_injection.py."""
    return row.name.startswith("inject_hyperparams")


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.complex128)
NAMES = {row.name: [name for other, name in ACCEPTED if other is row] for row, _ in ACCEPTED if is_independent(row)}
ELEMENTWISE = [
    pytest.param(row, names, dtype, id=f"{row.name}-{'-'.join(names)}-{dtype}")
    for row in CATALOGUE
    for dtype in DTYPES
    if row.name in NAMES and not keeps_numbers(row) and (row.complex or not dtype.is_complex)
    for names in ([[name] for name in NAMES[row.name]] if dtype == torch.float64 else [NAMES[row.name]])
]


@pytest.mark.sampled
@pytest.mark.parametrize(("row", "names", "dtype"), ELEMENTWISE)
def test_a_tree_of_tensors_has_a_value_for_each_element(row, names, dtype, device):
    """Each hyperparameter alone in float64, all of them at once in the other dtypes."""
    params = make_params(dtype, device)
    one = {name: row.hyperparameters[name] for name in names}
    two = {name: 0.9 * value for name, value in one.items()}
    first = fo.tree.map(lambda p: torch.rand(p.shape, device=device) < 0.5, params)

    def mixed(one, two):
        return fo.tree.map(lambda f: torch.where(f, torch.tensor(one, dtype=torch.float64), two), first)

    tx, ones, twos = row(**{name: mixed(one[name], two[name]) for name in names}), row(**one), row(**two)
    states = [each.init(params) for each in (tx, ones, twos)]
    for _ in range(3):
        grads = fo.tree.map(torch.randn_like, params)
        (updates, *others), states = zip(
            *[step(each, grads, state, params) for each, state in zip((tx, ones, twos), states, strict=True)],
            strict=True,
        )
        assert_close(updates, fo.tree.map(torch.where, first, *others), rtol=1e-6, atol=1e-6)


def test_a_tensor_broadcasts_to_its_parameter():
    params = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}
    lr = {"w": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([3.0])}
    tx = fo.sgd(lr)
    updates, _ = tx.update(fo.tree.map(torch.ones_like, params), tx.init(params), params)
    assert_close(updates, {"w": torch.tensor([[-1.0] * 3, [-2.0] * 3]), "b": torch.tensor([-3.0, -3.0])})


def test_sparse_gradients_take_the_values_of_their_entries():
    params, lr = {"w": torch.zeros(4, 2)}, {"w": torch.arange(8.0).reshape(4, 2)}
    grad = torch.sparse_coo_tensor([[3, 1]], torch.ones(2, 2), (4, 2))
    tx = fo.sgd(lr)
    updates, _ = tx.update({"w": grad}, tx.init(params), params)
    expected = torch.zeros(4, 2)
    expected[[1, 3]] = -lr["w"][[1, 3]]
    assert_close(updates["w"].to_dense(), expected)


def test_vmap_over_trees_of_learning_rates():
    lrs = fo.tree.map(lambda value: value * torch.tensor([1.0, 2.0, 3.0]).double(), tree_of(0.1))
    params = make_params()
    batched = torch.vmap(lambda lr: train(fo.adam(lr), params, X)[0])(lrs)
    for i in range(3):
        expected = train(fo.adam(fo.tree.map(lambda lr: lr[i], lrs)), params, X)[0]
        assert_close(fo.tree.map(lambda leaf: leaf[i], batched), expected)


@pytest.mark.sampled(pool="compiled")
def test_compiles_whole():
    def objective(params):
        return (params["a"]["w"] * params["b"][0].sin()).square().sum()

    def outer(lr):
        tx = fo.chain(fo.clip_by_global_norm({"a": 0.5, "b": lr["b"]}), fo.sgd(lr, momentum=0.9))
        updates, _ = tx.update(torch.func.grad(objective)(params), tx.init(params), params)
        return objective(fo.apply_updates(params, updates))

    params = {"a": {"w": torch.randn(2, 2).double()}, "b": [torch.randn(2).double()]}
    lr = {"a": {"w": torch.tensor([[0.1], [0.2]]).double()}, "b": [torch.tensor(0.3).double()]}
    compiled = torch.compile(torch.func.grad(outer), backend="eager", fullgraph=True)
    assert_close(compiled(lr), torch.func.grad(outer)(lr))


@pytest.mark.parametrize("named", [True, False])
def test_the_stateful_form_takes_trees(named):
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    given = model.named_parameters() if named else model.parameters()
    values = {"weight": torch.rand(2, 3), "bias": 0.5}
    opt = fo.Optimizer(given, fo.sgd, lr=values if named else list(values.values()))
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - values[name] * p.grad)
    saved = opt.state_dict()
    opt.param_groups[0]["lr"] = fo.tree.map(lambda value: 0.0, opt.param_groups[0]["lr"])
    after = model.weight.detach().clone()
    opt.step()
    assert torch.equal(model.weight, after)
    opt.load_state_dict(saved)
    opt.step()
    assert not torch.equal(model.weight, after)


def test_schedules_in_trees_are_left_out_of_the_state_dict():
    model = torch.nn.Linear(1, 1)
    opt = fo.Optimizer(model.named_parameters(), fo.sgd, lr={"weight": fo.schedules.constant(0.1), "bias": 0.1})
    assert "lr" not in opt.state_dict()["param_groups"][0]


PARAMS = {"w": torch.zeros(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("error", "message", "lr"),
    [
        (
            ValueError,
            r"a hyperparameter do not fit the parameters: at the root they have \['w'\]",
            {"w": 0.1},
        ),
        (
            ValueError,
            r"for 'w' has shape \(2,\), but the parameter has \(2, 3\); give one number",
            {"w": torch.ones(2), "b": 0.1},
        ),
        (ValueError, "has no value for the parameter 'b'", {"w": 0.1, "b": None}),
        (ValueError, r"for 'b' has shape \(1, 2\), but", {"w": 0.1, "b": torch.ones(1, 2)}),
        (ValueError, r"Invalid learning rate at 'b': -0.1; it needs value >= 0", {"w": 0.1, "b": -0.1}),
        (TypeError, r"Invalid learning rate at 'b': 'x' is a str", {"w": 0.1, "b": "x"}),
        (ValueError, r"got a tensor of shape \(2,\).* For a value for each parameter.* give a tree", torch.ones(2)),
    ],
)
def test_errors(error, message, lr):
    with pytest.raises(error, match=message):
        fo.sgd(lr).update(PARAMS, fo.sgd(0.1).init(PARAMS))


@pytest.mark.parametrize(
    "make", [lambda value: fo.muon(momentum={"w": value}), lambda value: fo.clip_by_norm({"w": value})]
)
def test_a_rule_that_sees_its_tensor_whole_takes_one_number_for_it(make):
    params, tx = {"w": torch.ones(2, 3)}, make(torch.full((2, 3), 0.9))
    with pytest.raises(ValueError, match=r"for 'w' has shape \(2, 3\), but this one cannot differ between elements"):
        tx.update(params, tx.init(params), params)


def test_a_single_tensor_is_a_tree():
    params, lr = torch.ones(2, 3), torch.rand(2, 3)
    tx = fo.sgd(lr)
    assert_close(tx.update(params, tx.init(params))[0], -lr)


def test_functions_of_the_step_may_return_trees():
    tx = fo.scale(lambda count: {"w": 2.0 + count, "b": 3.0})
    updates, state = tx.update(PARAMS, tx.init(PARAMS))
    updates, _ = tx.update(fo.tree.map(torch.ones_like, PARAMS), state)
    assert_close(updates, {"w": torch.full((2, 3), 3.0), "b": torch.full((2,), 3.0)})


def test_no_value_is_needed_where_there_is_no_parameter():
    params = {"w": torch.ones(2), "none": None}
    tx = fo.sgd(fo.tree.map(lambda p: torch.full_like(p, 0.5), params))
    assert_close(tx.update(params, tx.init(params))[0]["w"], torch.full((2,), -0.5))


def test_a_part_of_the_parameters_may_have_a_value_for_each_of_all():
    """A tree is a prefix of all parameters, in masks and partitions too."""
    labels, lr = {"w": "a", "b": "b"}, {"w": 0.5, "b": None}
    tx = fo.partition({"a": fo.sgd(lr), "b": fo.sgd(1.0)}, labels)
    updates, _ = tx.update(fo.tree.map(torch.ones_like, PARAMS), tx.init(PARAMS))
    assert_close(updates, {"w": torch.full((2, 3), -0.5), "b": torch.full((2,), -1.0)})
