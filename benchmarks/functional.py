"""Steps as functions of gradients, state and parameters, against TorchOpt and optax."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

import functorch_optim as fo
from benchmarks.measure import Comparison
from benchmarks.shapes import ALL, LARGE, Setting, Shapes

Step = Callable[[Any, Any, Any], tuple[Any, Any]]  # (grads, state, params) -> (params, state)
LR = 1e-3
ADAM = partial(fo.adam, LR)


def functional(setting: Setting) -> Iterator[Comparison]:
    """`update` and `apply_updates` of Adam without derivatives, against the fastest of TorchOpt."""
    for case, shapes in setting.shapes(*ALL):
        peers = {
            "TorchOpt": partial(torchopt_adam, setting, shapes, inplace=False),
            "TorchOpt, in place": partial(torchopt_adam, setting, shapes, inplace=True),
            "TorchOpt, accelerated, in place": partial(torchopt_adam, setting, shapes, inplace=True, accelerated=True),
        }
        yield Comparison("update, apply_updates", case, partial(ours, updated, setting, shapes), peers, 0.5)


def donated(setting: Setting) -> Iterator[Comparison]:
    """`step_` of Adam, fused, that writes in place, against optax under jax.jit, its memory donated or not.

    XLA's code for the CPU can be slower where memory is donated; whichever is faster counts.
    """
    for case, shapes in setting.shapes(*LARGE):
        peers = {
            "optax, donated": partial(optax_adam, setting, shapes, donate=True),
            "optax": partial(optax_adam, setting, shapes, donate=False),
        }
        yield Comparison("fo.step_, fused", case, partial(ours, fused_in_place, setting, shapes), peers, 1.0)


def pure(setting: Setting) -> Iterator[Comparison]:
    """`step` of Adam under torch.compile, against optax under jax.jit."""
    for case, shapes in setting.shapes(*LARGE):
        peers = {"optax": partial(optax_adam, setting, shapes, donate=False)}
        yield Comparison("fo.step, torch.compile", case, partial(ours, compiled, setting, shapes), peers, 1.0)


# Ours. ----------------------------------------------------------------------------------------------------------------


def ours(
    step: Callable[[fo.GradientTransformation], Step],
    setting: Setting,
    shapes: Shapes,
    make: Callable[[], fo.GradientTransformation] = ADAM,
) -> Callable[[], None]:
    """Return the next step of a transformation, which is Adam unless another is made."""
    params, grads = named(setting, shapes), named(setting, shapes)
    tx = make()
    return repeated(step(tx), grads, tx.init(params), params)


def updated(tx: fo.GradientTransformation) -> Step:
    """Return a step of its two parts."""

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return fo.apply_updates(params, updates), state

    return step


def fused_in_place(tx: fo.GradientTransformation) -> Step:
    """Return the step that is given its memory."""
    return partial(fo.step_, tx, fused=True)


def compiled(tx: fo.GradientTransformation) -> Step:
    """Return the pure step, compiled as a user would; what was compiled before it is forgotten, and not looked up."""
    torch._dynamo.reset()
    return torch.compile(partial(fo.step, tx), fullgraph=True)


def named(setting: Setting, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Return random tensors by names, as the parameters of a module are."""
    return {f"layer{place}": tensor for place, tensor in enumerate(setting.tensors(shapes))}


def repeated(step: Step, grads: Any, state: Any, params: Any) -> Callable[[], None]:
    """Return a function that does the next step."""

    def run() -> None:
        nonlocal state, params
        params, state = step(grads, state, params)

    return run


# Theirs. --------------------------------------------------------------------------------------------------------------


def torchopt_adam(setting: Setting, shapes: Shapes, *, inplace: bool, accelerated: bool = False) -> Callable[[], None]:
    """Return the next step of TorchOpt's Adam."""

    def make(torchopt: Any) -> Any:
        return torchopt.adam(LR, use_accelerated_op=accelerated)

    return of_torchopt(make, setting, shapes, inplace=inplace)


def of_torchopt(make: Callable[[Any], Any], setting: Setting, shapes: Shapes, *, inplace: bool) -> Callable[[], None]:
    """Return the next step of a transformation that is made with the module of TorchOpt."""
    import torchopt  # noqa: PLC0415

    params, grads = named(setting, shapes), named(setting, shapes)
    tx = make(torchopt)

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params=params, inplace=inplace)
        return torchopt.apply_updates(params, updates, inplace=inplace), state

    return repeated(step, grads, tx.init(params), params)


def optax_adam(setting: Setting, shapes: Shapes, *, donate: bool) -> Callable[[], None]:
    """Return the next step of optax's Adam, compiled."""
    return of_optax(lambda optax: optax.adam(LR), setting, shapes, donate=donate)


def of_optax(make: Callable[[Any], Any], setting: Setting, shapes: Shapes, *, donate: bool) -> Callable[[], None]:
    """Return the next step of a transformation that is made with the module of optax, compiled."""
    import jax  # noqa: PLC0415
    import optax  # noqa: PLC0415

    arrays = [{name: jax.numpy.array(t.numpy()) for name, t in named(setting, shapes).items()} for _ in range(2)]
    params, grads = arrays
    tx = make(optax)

    def step(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    fast = jax.jit(step, donate_argnums=(1, 2) if donate else ())
    return repeated(lambda *given: jax.block_until_ready(fast(*given)), grads, tx.init(params), params)
