"""Ask each library what README's table says of it, by running it: `python benchmarks/features.py`.

Prints the table of all libraries that are installed. The derivatives are those of the outcome of three steps; they are
compared with central differences of the same library's steps, in double precision.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import functorch_optim as fo

STEPS = 3


def optional(name: str) -> Any:
    """Import a module if it is installed, else return None."""
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


torchopt, higher, optax, jax = [optional(name) for name in ("torchopt", "higher", "optax", "jax")]
if jax:
    jax.config.update("jax_enable_x64", True)
CLASSES = [
    *("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"),
    *("Adafactor", "Muon", "SparseAdam", "LBFGS"),
]
EXACT, ABSENT = "exact", "none"


def make_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets, and the 13 parameters of a network with three hidden units."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 2), (6,), (13,))
    x, y, w = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return x, y, 0.7 * w


X, Y, START = make_problem()


def loss(w: Tensor, dead: bool = False, x: Tensor = X) -> Tensor:
    """Return the squared error of the network; with `dead`, of ReLUs of which one never fires."""
    shift = torch.tensor([-100.0 if dead else 0.0, 0.0, 0.0])
    hidden = x @ w[:6].reshape(2, 3) + w[6:9] + shift
    hidden = torch.relu(hidden) if dead else torch.tanh(hidden)
    return (hidden @ w[9:12] + w[12] - Y).square().mean()


def outcome(w: Any) -> Any:
    """Return one number that depends on all parameters."""
    return (w * w * w).sum() + w.sum()


# How each library trains: (kind, w, numbers, options of the loss) -> w. The kinds: "sgd" with momentum, "adam", and
# "clip", which is SGD after clipping by a global norm.


def ours(kind: str, w: Tensor, numbers: dict[str, Any], **options: Any) -> Tensor:
    """Train with functorch_optim."""
    lr, betas = numbers.get("lr", 0.1), (numbers.get("beta1", 0.9), numbers.get("beta2", 0.99))
    tx = {
        "sgd": lambda: fo.sgd(lr, momentum=0.9),
        "adam": lambda: fo.adam(lr, betas),
        "clip": lambda: fo.chain(fo.clip_by_global_norm(0.5), fo.sgd(lr)),
    }[kind]()
    trained: Tensor = fo.meta.unroll(lambda w, _: loss(w, **options), tx, w, range(STEPS)).params
    return trained


def with_torch(kind: str, w: Tensor, numbers: dict[str, Any], **options: Any) -> Tensor:
    """Train with torch.optim, as its own tests of `differentiable=True` do."""
    w, lr, betas = w.clone(), numbers.get("lr", 0.1), (0.9, 0.99)
    if "beta2" in numbers:  # torch takes two numbers or two tensors
        betas = torch.tensor(0.9, dtype=torch.float64), numbers["beta2"]
    opt: torch.optim.Optimizer = (
        torch.optim.Adam([w], lr=lr, betas=betas, differentiable=True)
        if kind == "adam"
        else torch.optim.SGD([w], lr=lr, momentum=0.9 if kind == "sgd" else 0.0, differentiable=True)
    )
    for _ in range(STEPS):
        w.grad = torch.func.grad(lambda w: loss(w, **options))(w.clone())
        if kind == "clip":
            torch.nn.utils.clip_grad_norm_([w], 0.5)
        opt.step()
    return w


def with_torchopt(kind: str, w: Tensor, numbers: dict[str, Any], **options: Any) -> Tensor:
    """Train with TorchOpt's functions, out of place."""
    lr, betas = numbers.get("lr", 0.1), (numbers.get("beta1", 0.9), numbers.get("beta2", 0.99))
    tx = {
        "sgd": lambda: torchopt.sgd(lr, momentum=0.9, moment_requires_grad=True),
        "adam": lambda: torchopt.adam(lr, betas),
        "clip": lambda: torchopt.chain(torchopt.clip.clip_grad_norm(0.5), torchopt.sgd(lr)),
    }[kind]()
    state = tx.init(w)
    for _ in range(STEPS):
        grads = torch.func.grad(lambda w: loss(w, **options))(w)
        updates, state = tx.update(grads, state, params=w, inplace=False)
        w = torchopt.apply_updates(w, updates, inplace=False)
    return w


LEAF = torch.zeros_like(START).requires_grad_()
LIVE = {"adam": torch.optim.Adam([LEAF], lr=0.1, betas=(0.9, 0.99)), "sgd": torch.optim.SGD([LEAF], 0.1, 0.9)}


def with_higher(kind: str, w: Tensor, numbers: dict[str, Any], **options: Any) -> Tensor:
    """Train with higher's differentiable optimizers, which are made of live ones of torch.optim."""
    if kind == "clip":
        raise NotImplementedError
    override = {"lr": [numbers["lr"]]} if "lr" in numbers else {}
    if "beta2" in numbers:
        override["betas"] = [(0.9, numbers["beta2"])]
    opt = higher.optim.get_diff_optim(LIVE[kind], [LEAF], override=override)
    w = w + 0 * LEAF  # so that it requires grad, without asking for that inside of a transform
    for _ in range(STEPS):
        [w] = opt.step(loss(w, **options), params=[w])
    return w


def with_optax(kind: str, w: Any, numbers: dict[str, Any], dead: bool = False, x: Any = None) -> Any:
    """Train with optax; w, numbers and x are JAX's."""
    jnp = jax.numpy
    x = jnp.asarray(X.numpy()) if x is None else x
    shift = jnp.array([-100.0 if dead else 0.0, 0.0, 0.0])
    lr, betas = numbers.get("lr", 0.1), (numbers.get("beta1", 0.9), numbers.get("beta2", 0.99))

    def loss(w: Any) -> Any:
        hidden = x @ w[:6].reshape(2, 3) + w[6:9] + shift
        hidden = jax.nn.relu(hidden) if dead else jnp.tanh(hidden)
        return ((hidden @ w[9:12] + w[12] - jnp.asarray(Y.numpy())) ** 2).mean()

    tx = {
        "sgd": lambda: optax.sgd(lr, momentum=0.9),
        "adam": lambda: optax.adam(lr, *betas),
        "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(lr)),
    }[kind]()
    state = tx.init(w)
    for _ in range(STEPS):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        w = optax.apply_updates(w, updates)
    return w


# What is asked. -------------------------------------------------------------------------------------------------------


def differences(function: Callable[[Tensor], float], z: Tensor, h: float = 1e-5) -> Tensor:
    """Return central differences of fourth order."""
    f = lambda d: function(z + d)  # noqa: E731 - four calls of it in a line
    offsets = h * torch.eye(z.numel(), dtype=torch.float64).reshape(-1, *z.shape)
    return torch.tensor([(8 * (f(d) - f(-d)) - (f(2 * d) - f(-2 * d))) / (12 * h) for d in offsets]).reshape(z.shape)


def array_of(train: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return what makes an array of the library's framework."""
    return jax.numpy.asarray if train is with_optax else torch.as_tensor


def derivative(train: Callable[..., Any], kind: str, by: str, **options: Any) -> str:
    """Compare the gradient by the initial parameters ("w") or a number with differences."""
    z = START if by == "w" else torch.tensor({"lr": 0.1, "beta2": 0.99}[by], dtype=torch.float64)
    to = array_of(train)

    def function(z: Any) -> Any:
        start, numbers = (z, {}) if by == "w" else (to(START.numpy()), {by: z})
        return outcome(train(kind, start, numbers, **options))

    expected = differences(lambda z: float(function(to(z.numpy()))), z)
    if train is with_optax:
        gradient = torch.tensor(jax.grad(function)(to(z.numpy())).tolist(), dtype=torch.float64)
    else:
        z = z.clone().requires_grad_()
        [gradient] = torch.autograd.grad(function(z), z)
    if gradient.isnan().any():
        return "NaN"
    error = ((gradient - expected).norm() / expected.norm()).item()
    return EXACT if error < 1e-6 else f"wrong by {error:.0%}" if error < 10 else f"wrong, {error:.0f} times"


def batched(train: Callable[..., Any], over: str) -> str:
    """Batch training over learning rates, or its gradient over tasks that share their initial parameters."""
    to = array_of(train)
    vmap, grad = (jax.vmap, jax.grad) if train is with_optax else (torch.vmap, torch.func.grad)
    start = to(START.numpy())
    if over == "learning rates":
        cases = torch.tensor([0.01, 0.1, 0.2], dtype=torch.float64)

        def function(case: Any) -> Any:
            return outcome(train("adam", start, {"lr": case}))
    else:
        cases = torch.stack([X, X + 1, X - 1])

        def function(case: Any) -> Any:
            return grad(lambda w: outcome(train("adam", w, {}, x=case)))(start)

    together = vmap(function)(to(cases.numpy()))
    alone = [function(to(case.numpy())) for case in cases]
    error = max(float(abs(one - other).max()) for one, other in zip(together, alone, strict=True))
    return "yes" if error < 1e-10 else "other numbers"


def compiled(train: Callable[..., Any]) -> str:
    """Compile the gradient by the learning rate, of training with Adam, as one graph."""
    if train is with_optax:
        start = jax.numpy.asarray(START.numpy())
        jax.jit(jax.grad(lambda lr: outcome(train("adam", start, {"lr": lr}))))(0.1)
        return "yes"
    torch._dynamo.reset()
    gradient = torch.func.grad(lambda lr: outcome(train("adam", START, {"lr": lr})))
    lr = torch.tensor(0.1, dtype=torch.float64)
    fast = torch.compile(gradient, fullgraph=True, backend="eager")(lr)
    return "yes" if abs(fast - gradient(lr)) < 1e-10 else "other numbers"


def scheduled(name: str) -> str:
    """Let a scheduler of torch drive the stateful form."""
    p = torch.nn.Parameter(torch.zeros(2))
    live = torch.optim.Adam([p], lr=0.1)
    make: dict[str, Callable[[], Any]] = {
        "functorch_optim": lambda: fo.Optimizer([p], fo.adam, lr=0.1),
        "torch.optim": lambda: live,
        "TorchOpt": lambda: torchopt.Adam([p], lr=0.1),
        "higher": lambda: higher.optim.get_diff_optim(live, [p]),
    }
    if name not in make:
        raise NotImplementedError
    torch.optim.lr_scheduler.StepLR(make[name](), 1)
    return "yes"


def algorithms(name: str) -> str:
    """Count the algorithms of torch.optim."""
    has: dict[str, Callable[[str], bool]] = {
        "functorch_optim": lambda kind: hasattr(fo.optim, kind),
        "torch.optim": lambda kind: hasattr(torch.optim, kind),
        "TorchOpt": lambda kind: hasattr(torchopt, kind.lower()),
        "higher": lambda kind: getattr(torch.optim, kind) in higher.optim._opt_mapping,
        "optax": lambda kind: hasattr(optax, kind.lower()) or hasattr(optax.contrib, kind.lower()),
    }
    return f"{sum(map(has[name], CLASSES))} of {len(CLASSES)}"


Train = Callable[..., Any]
LIBRARIES: dict[str, tuple[Any, Train]] = {  # name -> module, None where it is not installed; how it trains
    "functorch_optim": (fo, ours),
    "torch.optim": (torch, with_torch),
    "TorchOpt": (torchopt, with_torchopt),
    "higher": (higher, with_higher),
    "optax": (optax, with_optax),
}
QUESTIONS: dict[str, Callable[[str, Train], str]] = {
    "derivative through momentum SGD": lambda _, train: derivative(train, "sgd", "w"),
    "derivative through Adam, one ReLU dead": lambda _, train: derivative(train, "adam", "w", dead=True),
    "derivative through clipping by global norm": lambda _, train: derivative(train, "clip", "w"),
    "derivative by Adam's beta2": lambda _, train: derivative(train, "adam", "beta2"),
    "`vmap` over learning rates": lambda _, train: batched(train, "learning rates"),
    "`vmap` over tasks that share their start": lambda _, train: batched(train, "tasks"),
    "gradient of training, compiled whole": lambda _, train: compiled(train),
    "driven by torch's schedulers": lambda name, _: scheduled(name),
    "algorithms of torch.optim": lambda name, _: algorithms(name),
}


def installed() -> list[str]:
    """Return the names of the libraries that can be asked."""
    return [name for name, (module, _) in LIBRARIES.items() if module is not None]


def ask(question: str, name: str) -> tuple[str, str]:
    """Return the cell of the table for a library, and what was raised, if something was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return QUESTIONS[question](name, LIBRARIES[name][1]), ""
        except NotImplementedError:
            return ABSENT, ""
        except Exception as reason:
            return "raises", f"{name}, {question}: {type(reason).__name__}: {str(reason).splitlines()[0][:120]}"


def main() -> None:
    """Print the table, and what was raised."""
    torch.set_num_threads(1)
    names, reasons = installed(), []
    print(f"| | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
    for question in QUESTIONS:
        cells, raised = zip(*[ask(question, name) for name in names], strict=True)
        print(f"| {question} | {' | '.join(cells)} |", flush=True)
        reasons += filter(None, raised)
    print(*["", *reasons], sep="\n")


if __name__ == "__main__":
    main()
