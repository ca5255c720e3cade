"""Operations that torch differentiates wrongly get right derivatives, in all modes, orders, and under vmap."""

import warnings

import pytest
import torch
from nested_derivatives import difference, dot, nestings, point
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F  # noqa: N812

import functorch_optim as fo

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


MEAN, VAR = normal(3), normal(3).square() + 1
SPREAD = normal(4, 4) + 4 * torch.eye(4, dtype=torch.float64)
MASK = torch.tensor([[True, False, True], [False, True, True], [False, False, False], [True, True, True]])
TARGET = torch.tensor([2, 0, 1, 2])
# The functions, and their arguments.
CASES = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (3,), w, b), normal(4, 3), normal(3), normal(3)),
    "layer_norm of two dimensions": (lambda x, w: torch.layer_norm(x, [4, 3], w), normal(2, 4, 3), normal(4, 3)),
    "layer_norm without weights": (lambda x: F.layer_norm(x, (3,), eps=0.1), normal(4, 3)),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        normal(4, 3),
        normal(3),
        normal(3),
    ),
    "batch_norm of images": (lambda x, w: F.batch_norm(x, None, None, w, training=True), normal(2, 3, 2, 2), normal(3)),
    "batch_norm in eval mode": (lambda x, w, b: F.batch_norm(x, MEAN, VAR, w, b), normal(4, 3), normal(3), normal(3)),
    "instance_norm": (lambda x, w, b: F.instance_norm(x, None, None, w, b), normal(2, 3, 4), normal(3), normal(3)),
    "instance_norm in eval mode": (
        lambda x, w: F.instance_norm(x, MEAN, VAR, w, use_input_stats=False),
        normal(2, 3, 4),
        normal(3),
    ),
    "weight_norm": (torch._weight_norm, normal(4, 3), normal(4, 1)),
    "weight_norm of columns": (lambda v, g: torch._weight_norm(v, g, 1), normal(4, 3), normal(1, 3)),
    "weight_norm of all": (lambda v, g: torch._weight_norm(v, g, -1), normal(4, 3), normal()),
    "attention": (F.scaled_dot_product_attention, normal(2, 4, 5), normal(2, 3, 5), normal(2, 3, 2)),
    "attention with a mask": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, MASK, scale=0.3),
        normal(1, 2, 4, 5),
        normal(1, 2, 3, 5),
        normal(1, 2, 3, 2),
    ),
    "attention with a bias": (
        lambda q, k, v, bias: F.scaled_dot_product_attention(q, k, v, bias),
        normal(1, 2, 4, 5),
        normal(1, 2, 3, 5),
        normal(1, 2, 3, 2),
        normal(4, 3),
    ),
    "causal attention of groups": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        normal(1, 4, 3, 2),
        normal(1, 2, 3, 2),
        normal(1, 2, 3, 2),
    ),
    "cdist": (torch.cdist, normal(4, 3), normal(2, 3)),
    "cdist of order 3": (lambda x, y: torch.cdist(x, y, p=3.0), normal(4, 3), normal(2, 3)),
    "pdist": (F.pdist, normal(4, 3)),
    "huber_loss": (F.huber_loss, normal(5), normal(5)),
    "huber_loss of each": (
        lambda x, y, w: F.huber_loss(x, y, "none", 0.3, w),
        normal(5),
        normal(5),
        normal(5).square(),
    ),
    "soft_margin_loss": (lambda x: F.soft_margin_loss(x, torch.sign(MEAN), reduction="sum"), normal(3)),
    "mse_loss": (lambda x: F.mse_loss(x, MEAN), VAR),
    "hardsigmoid": (F.hardsigmoid, normal(5)),
    "glu": (lambda x: F.glu(x, 0), normal(4, 3)),
    "select_scatter": (lambda x, y: torch.select_scatter(x, y, -1, -2), normal(2, 3), normal(2)),
    "cholesky_inverse": (lambda a: torch.cholesky_inverse(a.tril()), SPREAD),
    "cholesky_inverse of an upper triangle": (lambda a: torch.cholesky_inverse(a.triu(), upper=True), SPREAD),
    "solve": (torch.linalg.solve, SPREAD, normal(4, 2)),
    "solve for a vector": (torch.linalg.solve, SPREAD, normal(4)),
    "solve from the right": (lambda a, b: torch.linalg.solve(a, b, left=False), SPREAD, normal(2, 4)),
    "det": (torch.det, SPREAD[:3, :3] / 4),
    "slogdet": (lambda a: torch.linalg.slogdet(-a[:3, :3]), SPREAD),
    "logdet": (lambda a: a.logdet(), SPREAD),
    "multi_head_attention": (
        lambda x, w: F.multi_head_attention_forward(
            x, x, x, 4, 2, w, None, None, None, False, 0.0, torch.eye(4, dtype=torch.float64), None, need_weights=False
        )[0],
        normal(3, 4),
        normal(12, 4),
    ),
}
if hasattr(nn, "LinearCrossEntropyOptions"):  # from torch 2.13 on
    CASES["linear_cross_entropy"] = (
        lambda x, w: F.linear_cross_entropy(x, w, TARGET, options=nn.LinearCrossEntropyOptions(batch_chunk_size=2)),
        normal(4, 2),
        normal(3, 2),
    )
cases = pytest.mark.parametrize("name", CASES)


def number_of(function):
    """Add up what the function returns, each number with a weight of its own."""

    def number(*xs):
        outputs = function(*xs)
        total = torch.zeros((), dtype=torch.float64)
        for output in outputs if isinstance(outputs, tuple) else (outputs,):
            weights = torch.arange(1.0, 1 + output.numel(), dtype=torch.float64).sin()
            total = total + (weights.reshape(output.shape) * output.square()).sum()
        return total

    return number


@cases
def test_values_are_those_of_torch(name):
    function, *xs = CASES[name]
    with fo.meta.exact_derivatives():
        exact = function(*xs)
    torch.testing.assert_close(exact, function(*xs), rtol=1e-12, atol=1e-12)


@pytest.mark.sampled(size=4)
@cases
def test_derivatives_are_those_of_finite_differences(name):
    function, *xs = CASES[name]
    at, number = point(xs), fo.meta.exact_derivatives()(number_of(function))
    for nesting in nestings(number, at):
        if (name, nesting.name) == ("det", "third derivative"):
            continue  # NaN in torch, which is left to it: it has a first derivative at singular matrices
        expected, doubt = difference(nesting.function, at)
        assert doubt < 1e-5 * (1 + abs(expected)), (nesting.name, expected, doubt)
        assert float(nesting.value()) == pytest.approx(expected, rel=1e-6, abs=1e-7), nesting.name


# In modules, and by the functions that are exact by themselves. ------------------------------------------------------


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(4, 1))

    def forward(self, x):
        return self.head(self.layer(x)).mean((1, 2))


def network(make):
    torch.manual_seed(0)
    module = make().double()
    return module, fo.stop_gradient(dict(module.named_parameters()))


NETWORKS = {
    "transformer": (Transformer, normal(2, 5, 3, 4)),
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)),
        normal(2, 5, 4),
    ),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), normal(2, 5, 4)),
}
networks = pytest.mark.parametrize("name", NETWORKS)


def training_loss(module, params, x):
    return functional_call(module, params, (x,)).sin().square().mean()


@pytest.mark.sampled(size=2)
@networks
@pytest.mark.parametrize("checkpoint", [False, True])
def test_meta_gradients_of_tasks_at_once_are_those_of_tasks_in_turn(name, checkpoint):
    """And, for tasks in turn, those of finite differences."""
    make, x = NETWORKS[name]
    module, params = network(make)

    def after(params, x):
        def loss(params, _):
            return training_loss(module, params, x)

        trained = fo.meta.unroll(loss, fo.adam(0.01), params, range(2), checkpoint=checkpoint)
        return loss(trained.params, None) + trained.losses.sum()

    def in_turn(params):
        return after(params, x[0]) + after(params, x[1])

    expected = grad(in_turn)(params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = grad(lambda params: vmap(after, (None, 0))(params, x).sum())(params)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    leaves, structure = fo.tree.flatten(params)
    at = point(leaves)
    by_differences, doubt = difference(lambda *xs: in_turn(fo.tree.unflatten(structure, xs)), at)
    assert float(dot(fo.tree.flatten(expected)[0], at.v)) == pytest.approx(by_differences, abs=1e-6 + doubt)


def test_forward_grad_of_tasks_at_once():
    make, x = NETWORKS["layer norm"]
    module, params = network(make)

    def after(log_lr, x):
        def loss(params):
            return training_loss(module, params, x)

        stepped = fo.tree.map(lambda p, g: p - log_lr.exp() * g, params, grad(loss)(params))
        return loss(fo.tree.map(lambda p, g: p - log_lr.exp() * g, stepped, grad(loss)(stepped)))

    log_lr = torch.tensor(-2.0, dtype=torch.float64)
    found = fo.meta.forward_grad(lambda log_lr: vmap(after, (None, 0))(log_lr, x).sum())(log_lr)
    torch.testing.assert_close(found, grad(lambda log_lr: after(log_lr, x[0]) + after(log_lr, x[1]))(log_lr))


def test_inner_loop_of_a_transformer():
    """Its attention has no second derivative in torch, on CPU in float32."""
    module = Transformer()
    x = torch.randn(5, 3, 4)
    with fo.meta.inner_loop(module, fo.sgd(0.1)) as inner:
        inner.step(inner(x).square().mean())
        inner(x).square().mean().backward()

    def after(params):
        def loss(params):
            return training_loss_of_squares(module, params, x)

        return loss(fo.tree.map(lambda p, g: p - 0.1 * g, params, grad(loss)(params)))

    with fo.meta.exact_derivatives():
        expected = grad(after)(fo.stop_gradient(dict(module.named_parameters())))
    torch.testing.assert_close({name: p.grad for name, p in module.named_parameters()}, expected)


def training_loss_of_squares(module, params, x):
    return functional_call(module, params, (x,)).square().mean()


def test_second_derivatives_of_a_root_where_a_gradient_is_zero():
    """They take a third derivative of the loss."""
    x = normal(4, 3)

    def inner(w, t):
        return F.layer_norm(x + w, (3,), t).sin().sum() + 20 * w.square().sum()

    @fo.meta.custom_root(grad(inner), solve=fo.meta.solve_dense)
    def solver(w, t):
        for _ in range(40):
            w = w - 0.02 * grad(inner)(w, t)
        return w

    def gradient(t):
        return grad(lambda t: solver(torch.zeros(3, dtype=torch.float64), t).sin().sum())(t).sin().sum()

    at = point([torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64)])
    expected, doubt = difference(gradient, at)
    assert float(dot([grad(gradient)(*at.x)], at.v)) == pytest.approx(expected, rel=1e-5, abs=doubt)


# Where it stands. -----------------------------------------------------------------------------------------------------


def by_hand(w, x):
    x = x * w
    centered = x - x.mean(-1, keepdim=True)
    return (centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w).sin().sum()


def normalized(w, x):
    return F.layer_norm(x * w, (3,), w).sin().sum()


def meta_gradient(loss):
    def after(w, x):
        return loss(w - 0.1 * grad(loss)(w, x), x)

    return grad(lambda w: vmap(after, (None, 0))(w, X).sum())


W, X = normal(3), normal(2, 3)


def test_it_is_a_decorator_and_a_context():
    expected = meta_gradient(by_hand)(W)
    torch.testing.assert_close(meta_gradient(fo.meta.exact_derivatives()(normalized))(W), expected)
    with fo.meta.exact_derivatives():
        torch.testing.assert_close(meta_gradient(normalized)(W), expected)
        with fo.meta.exact_derivatives():
            torch.testing.assert_close(meta_gradient(normalized)(W), expected)


@pytest.mark.sampled(pool="compiled")
@pytest.mark.parametrize("inside", [True, False])
def test_compiled_whole(inside):
    def unrolled(w):
        def loss(w, x):
            return normalized(w, x)

        def after(x):
            return fo.meta.unroll(loss, fo.sgd(0.1), w, [x]).params.sin().sum()

        return vmap(after)(X).sum()

    expected = grad(unrolled)(W)
    if inside:
        function = torch.compile(grad(unrolled), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(function(W), expected)
    compiled = torch.compile(meta_gradient(normalized), fullgraph=True, backend="aot_eager")
    with fo.meta.exact_derivatives():
        torch.testing.assert_close(compiled(W), meta_gradient(by_hand)(W))


def test_running_statistics_are_those_of_torch():
    for make in (nn.BatchNorm1d, lambda n: nn.InstanceNorm1d(n, track_running_stats=True)):
        ours, theirs = make(3).double(), make(3).double()
        for x in normal(3, 5, 3, 4):
            with fo.meta.exact_derivatives():
                exact = ours(x)
            torch.testing.assert_close(exact, theirs(x))
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
        with fo.meta.exact_derivatives():
            exact = ours.eval()(x)
        torch.testing.assert_close(exact, theirs.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_normalized_in_full(dtype):
    """More precisely than batch_norm in torch, which rounds the mean."""
    x, w = (300 + torch.randn(4, 64)).to(dtype), torch.randn(64).to(dtype)

    def both(x, w):
        return F.layer_norm(x, (64,), w), F.batch_norm(x, None, None, w, training=True)

    with fo.meta.exact_derivatives():
        exact = both(x, w)
    torch.testing.assert_close(exact, tuple(y.to(dtype) for y in both(x.double(), w.double())))


def test_dropout_of_attention_is_that_of_torch_and_in_autocast_too():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torch.manual_seed(0)
        expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    torch.manual_seed(0)
    with fo.meta.exact_derivatives():
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), expected)
    bias = torch.zeros(4, 4)
    with torch.autocast("cpu"):
        expected = F.scaled_dot_product_attention(q, k, v, bias)
        with fo.meta.exact_derivatives():
            found = F.scaled_dot_product_attention(q, k, v, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


WRONG = {
    "layer_norm": (lambda: F.layer_norm(torch.ones(2, 3), (4,)), "normalized_shape"),
    "layer_norm of other weights": (lambda: F.layer_norm(torch.ones(2, 3), (3,), torch.ones(1)), "weight"),
    "layer_norm of too few dimensions": (lambda: F.layer_norm(torch.ones(3), (2, 3)), "normalized_shape"),
    "batch_norm": (lambda: F.batch_norm(torch.ones(2, 3), None, None, torch.ones(1), training=True), "weight"),
    "batch_norm of one value": (lambda: F.batch_norm(torch.ones(1, 3), None, None, training=True), "more than 1 value"),
    "batch_norm of no channels": (
        lambda: torch.batch_norm(torch.ones(3), *[None] * 4, True, 0.1, 1e-5, False),
        "out of range",
    ),
    "instance_norm": (lambda: F.instance_norm(torch.ones(2, 3, 1)), "more than 1 spatial element"),
    "glu": (lambda: F.glu(torch.ones(3)), "Halving dimension"),
    "select_scatter": (lambda: torch.select_scatter(torch.ones(2, 3), torch.ones(3), 0, 2), "index"),
    "mse_loss": (lambda: F.mse_loss(torch.ones(2), torch.ones(2), reduction="product"), "not a valid value"),
    "huber_loss": (lambda: F.huber_loss(torch.ones(2), torch.ones(2), weight=torch.ones(3)), "same size"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_torch_refuses_is_refused_in_its_words(name):
    call, words = WRONG[name]
    with pytest.raises((RuntimeError, ValueError, IndexError), match=words) as theirs:
        call()
    with pytest.raises(theirs.type, match=words), fo.meta.exact_derivatives():
        call()


def test_distances_of_equal_points_have_finite_derivatives():
    x = torch.ones(2, 3, dtype=torch.float64)
    with fo.meta.exact_derivatives():
        for function in (lambda x: torch.cdist(x, x).sum(), lambda x: F.pdist(x).sum()):
            assert torch.func.hessian(function)(x).isfinite().all()


def test_what_is_right_in_torch_is_torchs():
    with fo.meta.exact_derivatives():
        assert torch.equal(torch.linalg.solve(SPREAD, MEAN.new_ones(4)), torch.linalg.solve(SPREAD, MEAN.new_ones(4)))
        torch.testing.assert_close(jvp(torch.logdet, (SPREAD,), (SPREAD,))[1], torch.tensor(4.0, dtype=torch.float64))
