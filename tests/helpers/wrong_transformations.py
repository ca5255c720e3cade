"""Transformations that lack a property each, for the test kit to find."""

from typing import Any, NamedTuple

import optree
import torch

import functorch_optim as fo


class Count(NamedTuple):
    count: Any
    m: Any


def zeros(params):
    return Count(torch.zeros((), dtype=torch.int64), fo.tree.map(torch.zeros_like, params))


def momentum(lr, beta=0.9, *, begin=zeros, mean=lambda m, g, beta: beta * m + g, out=lambda m, lr: -lr * m):
    """Make momentum of whole trees, of which parts may be replaced by wrong ones."""

    def update(updates, state, params):
        step = (state.count + 1).double()
        m = fo.tree.map(lambda m, g: m if g is None else mean(m, g, fo.at(beta, step)), state.m, updates)
        return fo.tree.map(lambda g, m: out(m, fo.at(lr, step)), updates, m), Count(state.count + 1, m)

    return fo.GradientTransformation(begin, update)


def in_place(lr):
    def mean(m, g, beta):
        return m.mul_(beta).add_(g)

    return momentum(lr, mean=mean)


def in_a_closure(lr):
    kept = {}

    def update(updates, state, params):
        grads, structure = fo.tree.flatten(updates)
        for i, g in enumerate(grads):
            if g is not None:
                kept[i, g.shape] = 0.9 * kept.get((i, g.shape), 0.0) + g.detach().double()
        moved = [None if g is None else -lr * kept[i, g.shape].to(g.dtype) for i, g in enumerate(grads)]
        return fo.tree.unflatten(structure, moved), state

    return fo.GradientTransformation(lambda params: (), update)


def with_item(lr):
    def update(g, state, p, lr):
        return -lr * g / max(g.abs().sum().item(), 1.0), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step))


def with_branch(lr):
    def update(g, state, p, lr):
        return (-lr * g if g.sum() > 0 else -2 * lr * g), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step))


def debiased(lr, beta, exponent=lambda count: count):
    def update(updates, state, params):
        count = state.count + 1
        m = fo.tree.map(lambda m, g: m if g is None else beta * m + (1 - beta) * g, state.m, updates)
        return fo.tree.map(lambda g, m: (-lr * m / (1 - beta ** exponent(count))).to(g.dtype), updates, m), Count(
            count, m
        )

    return fo.GradientTransformation(zeros, update)


def rounded_scalars(lr):
    return fo.leafwise(None, lambda g, state, p, s: (-s * g, state), lambda step: (fo.at(lr, step) * step).float())


def rounded_constant(lr):
    scale = torch.tensor(0.3)
    return fo.chain(fo.scale(scale), fo.scale_by_learning_rate(lr))


def detached_momentum(lr):
    return momentum(lr, mean=lambda m, g, beta: beta * m.detach() + g)


def detached_number(lr):
    return momentum(lr, out=lambda m, lr: -(lr.detach() if isinstance(lr, torch.Tensor) else lr) * m)


def by_order(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        return fo.tree.unflatten(structure, [g if g is None else -lr * g / (i + 1) for i, g in enumerate(leaves)])

    return fo.stateless(function)


def by_name(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        sizes = [0.5 if "a" in path else 1.0 for path in fo.tree.paths(updates)]
        return fo.tree.unflatten(structure, [g if g is None else -s * g for s, g in zip(sizes, leaves, strict=True)])

    return fo.stateless(function)


def in_single_precision(lr):
    def begin(params):
        return Count(torch.zeros((), dtype=torch.int64), fo.tree.map(lambda p: torch.zeros_like(p).float(), params))

    return momentum(lr, begin=begin, out=lambda m, lr: (-lr * m).double())


def narrow_updates(lr):
    return fo.stateless(lambda updates, params: fo.tree.map(lambda g: (-lr * g).half(), updates))


def growing_state(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), (*state, torch.zeros(()))

    return fo.GradientTransformation(lambda params: (), update)


def python_count(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g / (1 + state), updates), state + 1

    return fo.GradientTransformation(lambda params: 0, update)


def with_buffer(lr):
    def function(updates, params):
        def moved(g):
            buffer = torch.zeros(g.shape, dtype=g.dtype, device=g.device)
            return buffer.sub_(0.1 * g)

        return fo.tree.map(moved, updates)

    return fo.stateless(function)


@optree.dataclasses.dataclass(namespace="functorch_optim")
class Hidden:
    m: Any


def hidden_state(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), state

    return fo.GradientTransformation(lambda params: Hidden(fo.tree.map(torch.zeros_like, params)), update)


def forgetful(lr):
    """Keep the state of those parameters only that have a gradient."""

    def begin(params):
        return {"m": dict(zip(fo.tree.paths(params), map(torch.zeros_like, fo.tree.flatten(params)[0]), strict=True))}

    def update(updates, state, params):
        grads = dict(zip(fo.tree.paths(updates), fo.tree.flatten(updates)[0], strict=True))
        left = {path: m for path, m in state["m"].items() if grads[path] is not None}
        return fo.tree.map(lambda g: -lr * g, updates), {"m": left}

    return fo.GradientTransformation(begin, update)


def decaying_without_gradient(lr):
    def update(updates, state, params):
        m = fo.tree.map(lambda m, g: 0.9 * m if g is None else 0.9 * m + g, state, updates)
        return fo.tree.map(lambda g, m: -lr * m, updates, m), m

    return fo.GradientTransformation(lambda params: fo.tree.map(torch.zeros_like, params), update)


def zero_without_gradient(lr):
    def function(updates, params):
        leaves, structure = fo.tree.flatten(updates)
        of = fo.tree.flatten(params)[0]
        pairs = zip(leaves, of, strict=True)
        return fo.tree.unflatten(structure, [torch.zeros_like(p) if g is None else -g for g, p in pairs])

    return fo.stateless(function)


def unsafe_root(lr):
    def update(g, state, p, lr):
        return -lr * g / (g.square().sqrt() + 0.1), state

    return fo.leafwise(None, update, lambda step: fo.at(lr, step), elementwise=True)


def one_step_late(lr):
    return fo.leafwise(None, lambda g, state, p, lr: (-lr * g, state), lambda step: fo.at(lr, step + 1))


def for_numbers_only(lr):
    size = float(lr) if isinstance(lr, torch.Tensor) else lr
    return fo.scale(-size) if not callable(size) else fo.scale_by_learning_rate(lr)


def other_structure(lr):
    return fo.trace(0.9) if isinstance(lr, float) else fo.chain(fo.trace(0.9))


def local_class():
    class Local(NamedTuple):
        m: Any

    return Local


LOCAL = local_class()


def not_to_be_pickled(lr):
    def update(updates, state, params):
        return fo.tree.map(lambda g: -lr * g, updates), LOCAL(state.m + 1)

    return fo.GradientTransformation(lambda params: LOCAL(torch.zeros(())), update)


def not_elementwise(lr):
    return fo.leafwise(None, lambda g, state, p, s: (-0.1 * g / (1 + g.abs().sum()), state), elementwise=True)


def forgotten(lr):
    return momentum(0.1)
