"""Derivatives at corners, ties, branches and signs, where an algorithm has none; the same in both modes."""

import pytest
import torch

import functorch_optim as fo

pytestmark = pytest.mark.smoke

INF = float("inf")


def double(x):
    return torch.tensor(x, dtype=torch.float64)


def updated(tx, g, p=None, **state):
    """Transform one tensor, at the second step where some of the state is given; return the update and the state."""
    old = tx.init(g if p is None else p)
    return tx.update(g, old._replace(step=torch.tensor(1), **state) if state else old, p)


def clip(g, c):
    return updated(fo.clip(c), g)[0]


def clip_by_norm(g, c):
    return updated(fo.clip_by_norm(c), g)[0]


def clip_by_global_norm(g, c):
    return updated(fo.clip_by_global_norm(c), g)[0]


def clip_by_largest(g, c):
    return updated(fo.clip_by_norm(c, INF), g)[0]


def clip_by_sum(g, c):
    return updated(fo.clip_by_norm(c, 1.0), g)[0]


def clip_by_rms(g, c):
    return updated(fo.clip_by_block_rms(c), g)[0]


def clip_by_units(g, p, c, eps):
    return updated(fo.adaptive_grad_clip(c, eps), g, p)[0]


def trust_ratio(g, p, least):
    return updated(fo.scale_by_trust_ratio(least), g, p)[0]


def nonnegative(g, p):
    return updated(fo.keep_params_nonnegative(), g, p)[0]


def across(g, p):
    return updated(fo.orthogonalize_against_params(), g, p)[0]


def max_of_amsgrad(largest, v, g):
    tx = fo.scale_by_adam((0.9, 0.5), amsgrad=True)
    return updated(tx, g, exp_avg_sq=v, max_exp_avg_sq=largest)[1].max_exp_avg_sq


def max_of_adamax(u, g, beta2, eps):
    return updated(fo.scale_by_adamax((0.9, beta2), eps), g, exp_inf=u)[1].exp_inf


def rprop(h, d, g, etaminus, etaplus, smallest, largest):
    return updated(fo.scale_by_rprop(0.1, (etaminus, etaplus), (smallest, largest)), g, prev=h, step_size=d)[0]


def adafactor(lr, eps1, eps2, d):
    return updated(fo.adafactor(lr, eps=(eps1, eps2), d=d), double([2.0, 2.0]), double([4.0, 4.0]))[0][0]


def muon(g, eps):
    """Divide by the norm, with one step of the iteration that returns what it is given."""
    return updated(fo.scale_by_muon(0.0, False, (1.0, 0.0, 0.0), eps, 1, ns_dtype=None), g[None])[0][0]


def mu_of_asgd(t0):
    return fo.tree.get(updated(fo.asgd(t0=t0), double(1.0), double(1.0))[1], "mu")


def centered(v, m, g):
    return updated(fo.scale_by_rms(0.5, 0.1, centered=True), g, square_avg=v, grad_avg=m)[0]


def radam(beta2):
    """Take the fifth step, before which m = v = 1."""
    tx = fo.scale_by_radam((0.0, beta2))
    state = tx.init(beta2)._replace(step=torch.tensor(4), exp_avg_sq=torch.ones_like(beta2))
    return tx.update(torch.ones_like(beta2), state)[0]


def plateau(factor, min_scale):
    tx = fo.reduce_on_plateau(factor, patience=0, min_scale=min_scale)
    _, state = tx.update(factor, tx.init(factor), value=1.0)
    return tx.update(factor, state, value=1.0)[1].scale


def lbfgs(lr):
    """Minimize x^2 / 2 from x = 1: with lr = 1 the first iteration ends in the minimum, and is the last."""
    tx, x = fo.lbfgs(lr, max_iter=3), double([1.0])
    return tx.update(x, tx.init(x), x, value_fn=lambda x: x.square().sum() / 2)[0][0]


EYE = [[1.0, 0.0], [0.0, 1.0]]
ETAS = [0.5, 1.5]

# The arguments, and the derivative by each of them.
CASES = [
    # Inside and at the corners gradients count, and outside of them the threshold.
    (clip, [[1.0, -1.0], 1.0], [EYE, [0.0, 0.0]]),
    (clip, [[2.0, -2.0], 1.0], [[[0.0, 0.0]] * 2, [1.0, -1.0]]),
    (clip_by_norm, [[3.0, 4.0], 5.0], [EYE, [0.0, 0.0]]),
    (clip_by_norm, [[0.0, 0.0], 5.0], [EYE, [0.0, 0.0]]),
    (clip_by_norm, [[0.0, 0.0], 0.0], [EYE, [0.0, 0.0]]),
    (clip_by_global_norm, [[3.0, 4.0], 5.0], [EYE, [0.0, 0.0]]),
    (clip_by_global_norm, [[0.0, 0.0], 0.0], [EYE, [0.0, 0.0]]),
    # The largest elements share the derivative of their maximum; that of |0| is zero.
    (clip_by_largest, [[2.0, -2.0], 1.0], [[[0.25, 0.25], [0.25, 0.25]], [1.0, -1.0]]),
    (clip_by_sum, [[2.0, 0.0], 1.0], [[[0.0, 0.0], [0.0, 0.5]], [1.0, 0.0]]),
    (clip_by_rms, [[3.0, -3.0], 3.0], [EYE, [0.0, 0.0]]),
    (clip_by_rms, [[0.0, 0.0], 0.0], [EYE, [0.0, 0.0]]),
    # The unit's norm is the largest; then more, where the parameter's norm is eps.
    (clip_by_units, [[3.0, 4.0], [0.0, 10.0], 0.5, 1.0], [EYE, [[0.0, 0.0]] * 2, [0.0, 0.0], [0.0, 0.0]]),
    (
        clip_by_units,
        [[0.0, 5.0], [0.0, 2.0], 0.5, 2.0],
        [[[0.2, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.5]], [0.0, 2.0], [0.0, 0.0]],
    ),
    # The ratio is 1 where a norm is zero.
    (trust_ratio, [[3.0, 4.0], [0.0, 0.0], 0.0], [EYE, [[0.0, 0.0]] * 2, [0.0, 0.0]]),
    (trust_ratio, [[0.0, 0.0], [3.0, 4.0], 0.0], [EYE, [[0.0, 0.0]] * 2, [0.0, 0.0]]),
    # At p + g = 0 the update counts, below it the parameter.
    (nonnegative, [[-1.0, -2.0], [1.0, 1.0]], [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]]),
    # Along the parameter, and at zero.
    (across, [[2.0, 4.0], [1.0, 2.0]], [[[0.0, 0.0]] * 2] * 2),
    (across, [[0.0, 0.0], [1.0, 2.0]], [[[0.0, 0.0]] * 2] * 2),
    # At a tie both share.
    (max_of_amsgrad, [1.0, 1.0, 1.0], [0.5, 0.25, 0.5]),
    (max_of_adamax, [1.0, 0.25, 0.5, 0.25], [0.25, 0.5, 0.5, 0.5]),
    (max_of_adamax, [1.0, 0.0, 0.5, 0.75], [0.0, 0.0, 0.0, 1.0]),
    # Derivatives flow through the step sizes only: growing, within bounds and at them, and bounded.
    (rprop, [1.0, 0.5, 2.0, *ETAS, 0.1, 9.0], [0.0, 1.5, 0.0, 0.0, 0.5, 0.0, 0.0]),
    (rprop, [1.0, 0.5, 2.0, *ETAS, 0.1, 0.75], [0.0, 1.5, 0.0, 0.0, 0.5, 0.0, 0.0]),
    (rprop, [1.0, 0.5, 2.0, *ETAS, 0.75, 9.0], [0.0, 1.5, 0.0, 0.0, 0.5, 0.0, 0.0]),
    (rprop, [1.0, 0.5, 2.0, *ETAS, 0.1, 0.7], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]),
    (rprop, [1.0, 0.5, -2.0, *ETAS, 0.1, 9.0], [0.0] * 7),  # turned
    (rprop, [0.0, 0.5, 2.0, *ETAS, 0.1, 9.0], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),  # had turned
    (rprop, [1.0, 0.5, 0.0, *ETAS, 0.1, 9.0], [0.0] * 7),
    # The root mean square of a vector's first step is 1: with d = 1 it is clipped.
    (adafactor, [0.5, 1e-3, 1.0, 1.0], [-4.0, 0.0, 0.0, -2.0]),
    (adafactor, [0.5, 1e-3, 1.0, 1.5], [-4.0, 0.0, 0.0, 0.0]),
    (adafactor, [1.0, 1e-3, 1.0, 1.5], [-2.0, 0.0, 0.0, 0.0]),  # lr = 1 / sqrt(t): they share
    (adafactor, [0.5, 2.0, 1.0, 1.5], [-4.0, 0.0, 0.0, 0.0]),  # V = eps1^2
    (adafactor, [0.5, 1e-3, 4.0, 1.5], [-4.0, 0.0, 0.0, 0.0]),  # RMS(p) = eps2
    (muon, [[0.0, 5.0], 5.0], [[[0.2, 0.0], [0.0, 0.0]], [0.0, 0.0]]),
    (muon, [[0.0, 0.0], 5.0], [[[0.2, 0.0], [0.0, 0.2]], [0.0, 0.0]]),
    # At t = t0 + 1 it averages.
    (mu_of_asgd, [0.0], [1.0]),
    (mu_of_asgd, [0.5], [0.0]),
    # Where the variance is zero, or rounding makes it negative.
    (centered, [1.0, 1.0, 1.0], [0.0, 0.0, 10.0]),
    (centered, [0.9, 1.0, 1.0], [0.0, 0.0, 10.0]),
    # Before it is rectified.
    (radam, [0.99], [0.0]),
    (plateau, [0.5, 0.5], [1.0, 0.0]),
    # As if the number of iterations were given: a second one would go back to the minimum, with derivative zero.
    (lbfgs, [1.0], [-1.0]),
]


@pytest.mark.parametrize(("function", "arguments", "derivatives"), CASES, ids=[case[0].__name__ for case in CASES])
def test_the_convention_at_a_kink(function, arguments, derivatives):
    arguments = [double(argument) for argument in arguments]
    for number, derivative in enumerate(derivatives):
        for mode in (torch.func.jacrev, torch.func.jacfwd):
            found = mode(function, number)(*arguments)
            torch.testing.assert_close(found, double(derivative), rtol=1e-12, atol=1e-12)
