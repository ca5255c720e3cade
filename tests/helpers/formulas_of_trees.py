"""Formulas of papers in numpy, for all parameters together: each takes a run, and yields them after every step."""

import math
from typing import Any, NamedTuple

import numpy as np

SHAPES = [(4, 3), (3,), (), (2, 3, 2)]
STEPS = 12


class Run(NamedTuple):
    """What optimizers are run on: parameters, and for each step gradients and a loss."""

    params: list[Any]
    grads: list[list[Any]]
    losses: list[float]


def make_run(zeros=0, seed=0, shapes=SHAPES):
    """Make parameters and gradients of several magnitudes, the first steps zero if asked for."""
    random = np.random.default_rng(seed)
    params = [random.normal(size=shape) for shape in shapes]
    grads = [[random.normal(size=shape) * 10 ** random.uniform(-1, 0.5) for shape in shapes] for _ in range(STEPS)]
    for step in range(zeros):
        grads[step] = [np.zeros(shape) for shape in shapes]
    return Run(params, grads, [float(2 * abs(random.normal()) + 0.1) for _ in range(STEPS)])


# The formulas: each takes a run and hyperparameters, and yields parameters after each step. ---------------------------


def dot(xs, ys):
    return sum(float((x * y).sum()) for x, y in zip(xs, ys, strict=True))


def zeros_like(ps):
    return [np.zeros_like(p) for p in ps]


def prodigy(
    run,
    lr=1.0,
    betas=(0.9, 0.999),
    beta3=None,
    eps=1e-8,
    weight_decay=0.0,
    d0=1e-6,
    d_coef=1.0,
    growth_rate=math.inf,
    use_bias_correction=False,
    safeguard_warmup=False,
):
    x, (b1, b2), k = run.params, betas, 1
    b3 = math.sqrt(b2) if beta3 is None else beta3
    x0, s, m, v = x, zeros_like(x), zeros_like(x), zeros_like(x)
    d, d_max, r = d0, d0, 0.0
    for g in run.grads:
        bc = math.sqrt(1 - b2**k) / (1 - b1**k) if use_bias_correction else 1.0
        dlr = d * lr * bc
        new_r = b3 * r + d / d0 * dlr * dot(g, [a - b for a, b in zip(x0, x, strict=True)])
        m = [b1 * a + (1 - b1) * d * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * d**2 * b**2 for a, b in zip(v, g, strict=True)]
        s = [b3 * a + d / d0 * (d if safeguard_warmup else dlr) * b for a, b in zip(s, g, strict=True)]
        size = sum(float(np.abs(a).sum()) for a in s)
        if size > 0:
            r = new_r
            d_hat = d_coef * r / size
            if d == d0:
                d = max(d, d_hat)
            d_max = max(d_max, d_hat)
            d = min(d_max, d * growth_rate)
            m = [d * b for b in g] if b1 == 0 else m
            x = [
                p * (1 - weight_decay * dlr) - dlr * a / (np.sqrt(b) + d * eps) for p, a, b in zip(x, m, v, strict=True)
            ]
            k += 1
        yield x


def dadapt_adam(
    run,
    lr=1.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    d0=1e-6,
    growth_rate=math.inf,
    use_bias_correction=False,
    decoupled_weight_decay=False,
):
    x, (b1, b2), k = run.params, betas, 1
    q = math.sqrt(b2)
    s, m, v = zeros_like(x), zeros_like(x), zeros_like(x)
    d, r = d0, 0.0
    for g in run.grads:
        if not decoupled_weight_decay:
            g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        bc = math.sqrt(1 - b2**k) / (1 - b1**k) if use_bias_correction else 1.0
        dlr = d * lr * bc
        acc = dlr * dot(g, [a / (np.sqrt(b) + eps) for a, b in zip(s, v, strict=True)])
        m = [b1 * a + (1 - b1) * dlr * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        s = [q * a + (1 - q) * dlr * b for a, b in zip(s, g, strict=True)]
        size = sum(float(np.abs(a).sum()) for a in s)
        if size > 0:
            r = q * r + (1 - q) * acc
            d = max(d, min(r / ((1 - q) * size), d * growth_rate))
            decay = weight_decay * dlr if decoupled_weight_decay else 0.0
            x = [p * (1 - decay) - a / (np.sqrt(b) + eps) for p, a, b in zip(x, m, v, strict=True)]
            k += 1
        yield x


def dadapt_sgd(run, lr=1.0, momentum=0.0, weight_decay=0.0, d0=1e-6, growth_rate=math.inf):
    x = x0 = run.params
    s, d, r, g0 = zeros_like(x), d0, 0.0, 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        g0 = math.sqrt(dot(g, g)) if g0 == 0 else g0
        if g0 > 0:
            dlr = d * lr / g0
            r += dlr * dot(g, s)
            s = [a + dlr * b for a, b in zip(s, g, strict=True)]
            d = max(d, min(2 * r / math.sqrt(dot(s, s)), d * growth_rate))
            x = [momentum * p + (1 - momentum) * (a - b) for p, a, b in zip(x, x0, s, strict=True)]
        yield x


def dog(run, lr=1.0, eps=1e-8, reps_rel=1e-6, weight_decay=0.0):
    x = x0 = run.params
    rbar, total = reps_rel * (1 + math.sqrt(dot(x0, x0))), 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        way = [a - b for a, b in zip(x, x0, strict=True)]
        rbar = max(rbar, math.sqrt(dot(way, way)))
        total += dot(g, g)
        x = [p - lr * rbar / math.sqrt(total + eps) * a for p, a in zip(x, g, strict=True)]
        yield x


def ldog(run, **numbers):
    each = [
        list(dog(Run([p], [[grads[i]] for grads in run.grads], run.losses), **numbers))
        for i, p in enumerate(run.params)
    ]
    for step in range(len(run.grads)):
        yield [column[step][0] for column in each]


def dowg(run, lr=1.0, eps=1e-4, d0_squared=1e-4, weight_decay=0.0):
    x = x0 = run.params
    r2, v = d0_squared, 0.0
    for g in run.grads:
        g = [a + weight_decay * b for a, b in zip(g, x, strict=True)]  # noqa: PLW2901
        way = [a - b for a, b in zip(x, x0, strict=True)]
        r2 = max(r2, dot(way, way))
        v += r2 * dot(g, g)
        x = [p - lr * r2 / (math.sqrt(v) + eps) * a for p, a in zip(x, g, strict=True)]
        yield x


def polyak(run, max_lr=1.0, variant="sps", f_min=0.0, c=1.0, eps=0.0):
    x = run.params
    for g, loss in zip(run.grads, run.losses, strict=True):
        gap = max(loss - f_min, 0.0) if variant == "sps+" else loss - f_min
        size = c * dot(g, g) + eps
        eta = min(max_lr, gap / size) if size else 0.0
        x = [p - eta * a for p, a in zip(x, g, strict=True)]
        yield x


def momo(run, lr=1.0, beta=0.9, weight_decay=0.0, lb=0.0):
    x = run.params
    m = f = q = None
    for g, loss in zip(run.grads, run.losses, strict=True):
        first = m is None
        m = g if first else [beta * a + (1 - beta) * b for a, b in zip(m, g, strict=True)]
        f = loss if first else beta * f + (1 - beta) * loss
        q = dot(g, x) if first else beta * q + (1 - beta) * dot(g, x)
        decay = 1 + lr * weight_decay
        h = decay * (f - lb) + dot(x, m) - decay * q
        size = dot(m, m)
        tau = min(lr, max(h, 0.0) / size) if size else 0.0
        x = [(p - tau * a) / decay for p, a in zip(x, m, strict=True)]
        yield x


def momo_adam(run, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, lb=0.0):
    x, (b1, b2) = run.params, betas
    m, v, f, q = zeros_like(x), zeros_like(x), 0.0, 0.0
    for t, (g, loss) in enumerate(zip(run.grads, run.losses, strict=True), 1):
        m = [b1 * a + (1 - b1) * b for a, b in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * b**2 for a, b in zip(v, g, strict=True)]
        f = b1 * f + (1 - b1) * loss
        q = b1 * q + (1 - b1) * dot(g, x)
        scale = [np.sqrt(a / (1 - b2**t)) + eps for a in v]
        decay = 1 + lr * weight_decay
        h = decay * (f - (1 - b1**t) * lb) + dot(x, m) - decay * q
        size = dot(m, [a / b for a, b in zip(m, scale, strict=True)])
        tau = min(lr / (1 - b1**t), max(h, 0.0) / size) if size else 0.0
        x = [(p - tau * a / b) / decay for p, a, b in zip(x, m, scale, strict=True)]
        yield x


def of_each(formula):
    """Make a formula for one parameter one for a list of them."""

    def of_list(run, **numbers):
        columns = zip(run.params, zip(*run.grads, strict=True), strict=True)
        yield from map(list, zip(*[formula(p, gs, **numbers) for p, gs in columns], strict=True))

    return of_list


@of_each
def cocob(p, grads, lr=1.0, alpha=100.0, eps=1e-8, weight_decay=0.0):
    p0, largest, total, reward, theta = p, np.full_like(p, eps), 0 * p, 0 * p, 0 * p
    for g in grads:
        g = g + weight_decay * p  # noqa: PLW2901
        largest = np.maximum(largest, abs(g))
        total = total + abs(g)
        reward = np.maximum(reward - g * (p - p0), 0)
        theta = theta - g
        new = p0 + theta / (largest * np.maximum(total + largest, alpha * largest)) * (largest + reward)
        p = p + lr * (new - p)
        yield p


@of_each
def madgrad(p, grads, lr=1e-2, momentum=0.9, weight_decay=0.0, eps=1e-6, decoupled_weight_decay=False):
    x0, s, v = p, 0 * p, 0 * p
    for t, g in enumerate(grads, 1):
        before = p
        if not decoupled_weight_decay:
            g = g + weight_decay * p  # noqa: PLW2901
        weight = (lr + eps) * math.sqrt(t)
        v = v + weight * g**2
        s = s + weight * g
        p = momentum * p + (1 - momentum) * (x0 - s / (np.cbrt(v) + eps))
        if decoupled_weight_decay:
            p = p - (lr + eps) * weight_decay * before
            x0 = x0 - (lr + eps) * weight_decay * before if momentum == 0 else x0
        yield p


@of_each
def novograd(p, grads, lr=1e-3, betas=(0.95, 0.98), eps=1e-8, weight_decay=0.0, grad_averaging=False):
    m, v = 0 * p, None
    for g in grads:
        n = (g**2).sum()
        v = n if v is None else betas[1] * v + (1 - betas[1]) * n
        d = (g / (np.sqrt(v) + eps) if np.sqrt(v) + eps else 0 * g) + weight_decay * p
        m = betas[0] * m + (1 - betas[0] if grad_averaging else 1.0) * d
        p = p - lr * m
        yield p


@of_each
def sm3(p, grads, lr=0.1, momentum=0.9, eps=1e-8, weight_decay=0.0):
    dims = range(p.ndim)
    sums = [np.zeros([n if dim == i else 1 for dim, n in enumerate(p.shape)]) for i in dims] or [0 * p]
    m = 0 * p
    for g in grads:
        g = g + weight_decay * p  # noqa: PLW2901
        nu = np.minimum.reduce([np.broadcast_to(a, p.shape) for a in sums]) + g**2
        sums = [nu.max(axis=tuple(d for d in dims if d != i), keepdims=True) for i in dims] or [nu]
        w = np.where(nu == 0, 0, g / np.sqrt(np.where(nu == 0, 1, nu) + eps))
        m = momentum * m + (1 - momentum) * w
        p = p - lr * m
        yield p


def projected(w, g, p, eps, delta, wd_ratio):
    if p.ndim < 2:
        return w, 1.0
    for rows in (p.shape[0], 1):
        ps, gs, ws = [a.reshape(rows, -1) for a in (p, g, w)]
        length = np.linalg.norm(ps, axis=1, keepdims=True) + eps
        cosine = abs((gs * ps).sum(1, keepdims=True)) / (np.linalg.norm(gs, axis=1, keepdims=True) + eps) / length
        if cosine.max() < delta / math.sqrt(ps.shape[1]):
            unit = ps / length
            return (ws - unit * (unit * ws).sum(1, keepdims=True)).reshape(p.shape), wd_ratio
    return w, 1.0


@of_each
def adamp(
    p,
    grads,
    lr=1e-3,
    betas=(0.9, 0.999),
    eps=1e-8,
    weight_decay=0.0,
    delta=0.1,
    wd_ratio=0.1,
    nesterov=False,
):
    m, v, (b1, b2) = 0 * p, 0 * p, betas
    for t, g in enumerate(grads, 1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        w = (b1 * m + (1 - b1) * g if nesterov else m) / (np.sqrt(v / (1 - b2**t)) + eps)
        w, ratio = projected(w, g, p, eps, delta, wd_ratio)
        p = p * (1 - lr * weight_decay * ratio) - lr / (1 - b1**t) * w
        yield p


@of_each
def sgdp(
    p,
    grads,
    lr=1e-3,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    eps=1e-8,
    delta=0.1,
    wd_ratio=0.1,
):
    b = 0 * p
    for g in grads:
        b = momentum * b + (1 - dampening) * g
        w, ratio = projected(g + momentum * b if nesterov else b, g, p, eps, delta, wd_ratio)
        p = p * (1 - lr * weight_decay * ratio / (1 - momentum)) - lr * w
        yield p


@of_each
def fromage(p, grads, lr=1e-2, min_norm=1e-6):
    for g in grads:
        size, length = [max(math.sqrt((a**2).sum()), min_norm) for a in (g, p)]
        p = (p - lr * g * length / size) / math.sqrt(1 + lr**2)
        yield p
