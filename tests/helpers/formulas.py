"""Formulas of papers in numpy, for one parameter each: the parameter after every step."""

import numpy as np


def norm(x):
    return np.sqrt((x * x).sum())


def each(formula):
    """Make a formula for one parameter one for a list of them."""

    def whole(ps, history, **numbers):
        runs = [formula(p, list(grads), **numbers) for p, grads in zip(ps, zip(*history, strict=True), strict=True)]
        return zip(*runs, strict=True)

    return whole


@each
def lion(p, grads, lr, betas, weight_decay):
    m = 0 * p
    for g in grads:
        u = np.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def sign_sgd(p, grads, lr, weight_decay):
    for g in grads:
        p = p - lr * np.sign(g + weight_decay * p)
        yield p


@each
def signum(p, grads, lr, momentum, weight_decay, decoupled_weight_decay):
    m = 0 * p
    for g in grads:
        m = momentum * m + (1 - momentum) * (g if decoupled_weight_decay else g + weight_decay * p)
        p = p - lr * (np.sign(m) + (weight_decay * p if decoupled_weight_decay else 0))
        yield p


def adam_direction(grads, betas, eps, correct=True):
    m = v = np.zeros_like(grads[0])
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        c1, c2 = (1 - betas[0] ** t, 1 - betas[1] ** t) if correct else (1, 1)
        yield (m / c1) / (np.sqrt(v / c2) + eps)


@each
def lamb(p, grads, lr, betas, eps, weight_decay, trust_clip=np.inf, bias_correction=True):
    for u in adam_direction(grads, betas, eps, bias_correction):
        r = u + weight_decay * p
        ratio = norm(p) / norm(r) if norm(p) > 0 and norm(r) > 0 else 1.0
        ratio = min(ratio, trust_clip)
        p = p - lr * ratio * r
        yield p


@each
def lars(p, grads, lr, momentum, weight_decay, trust_coefficient, eps, nesterov):
    for t, g in enumerate(grads, 1):
        ratio = trust_coefficient * norm(p) / (norm(g) + weight_decay * norm(p) + eps)
        d = (g + weight_decay * p) * (ratio if norm(p) > 0 and norm(g) > 0 else 1.0)
        b = d if t == 1 else momentum * b + d  # noqa: F821
        p = p - lr * (d + momentum * b if nesterov else b)
        yield p


def half_life(b):
    return np.log(0.5) / np.log(b + 1e-8) - 1


def growing(t, start, end, steps):
    """Return the decay rate of the authors' code, f_inv((1 - t/T) f(start) + t/T f(end))."""
    if steps is None or t >= steps:
        return end
    return 0.5 ** (1 / ((1 - t / steps) * half_life(start) + t / steps * half_life(end) + 1))


@each
def ademamix(p, grads, lr, betas, alpha, eps, weight_decay, alpha_warmup, beta3_warmup):
    m1 = m2 = v = 0 * p
    for t, g in enumerate(grads, 1):
        a = alpha if alpha_warmup is None else alpha * min(t / alpha_warmup, 1)
        b3 = growing(t, betas[0], betas[2], beta3_warmup)
        m1 = betas[0] * m1 + (1 - betas[0]) * g
        m2 = b3 * m2 + (1 - b3) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = (m1 / (1 - betas[0] ** t) + a * m2) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def simplified_ademamix(p, grads, lr, betas, alpha, eps, weight_decay, beta1_warmup, min_beta1):
    m = n = 0 * p
    for t, g in enumerate(grads, 1):
        m = growing(t, min_beta1, betas[0], beta1_warmup) * m + g
        n = betas[1] * n + (1 - betas[1]) * g * g
        p = p - lr * ((alpha * g + m) / (np.sqrt(n / (1 - betas[1] ** t)) + eps) + weight_decay * p)
        yield p


@each
def adopt(p, grads, lr, betas, eps, weight_decay, decoupled_weight_decay, power=0.25, clip=None):
    m = 0 * p
    for t, given in enumerate(grads, 1):
        g = given if decoupled_weight_decay else given + weight_decay * p
        if t == 1:
            v = g * g
        else:
            n = g / np.maximum(np.sqrt(v), eps)
            c = clip if power is None else (t - 1) ** power
            m = betas[0] * m + (1 - betas[0]) * (n if c is None else np.clip(n, -c, c))
            v = betas[1] * v + (1 - betas[1]) * g * g
            p = p - lr * (m + (weight_decay * p if decoupled_weight_decay else 0))
        yield p


@each
def adabelief(p, grads, lr, betas, eps, weight_decay, rectify, decoupled_weight_decay=True):
    m = s = 0 * p
    for t, given in enumerate(grads, 1):
        g = given if decoupled_weight_decay else given + weight_decay * p
        p = p * (1 - lr * weight_decay) if decoupled_weight_decay else p
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        d1, d2 = 1 - betas[0] ** t, 1 - betas[1] ** t
        if not rectify:
            u = m / d1 / (np.sqrt(s / d2) + eps)
        else:
            longest = 2 / (1 - betas[1]) - 1
            n = longest - 2 * t * betas[1] ** t / d2
            if n >= 5:
                r = (n - 4) / (longest - 4) * (n - 2) / n * longest / (longest - 2)
                u = np.sqrt(d2 * r) / d1 * m / (np.sqrt(s) + eps)
            else:
                u = m / d1
        p = p - lr * u
        yield p


@each
def adan(p, grads, lr, betas, eps, weight_decay, proximal):
    m = mean_d = n = 0 * p
    last = grads[0]
    for t, g in enumerate(grads, 1):
        d, last = g - last, g
        m = betas[0] * m + (1 - betas[0]) * g
        mean_d = betas[1] * mean_d + (1 - betas[1]) * d
        n = betas[2] * n + (1 - betas[2]) * (g + betas[1] * d) ** 2
        d1, d2, d3 = [1 - b**t for b in betas]
        u = (m / d1 + betas[1] * mean_d / d2) / (np.sqrt(n / d3) + eps)
        p = (p - lr * u) / (1 + lr * weight_decay) if proximal else (1 - lr * weight_decay) * p - lr * u
        yield p


@each
def nadamw(p, grads, lr, betas, eps, weight_decay, correct_ahead):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        d1 = 1 - betas[0] ** t
        ahead = betas[0] * m / (1 - betas[0] ** (t + 1) if correct_ahead else d1) + (1 - betas[0]) * g / d1
        p = p - lr * (ahead / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + weight_decay * p)
        yield p


@each
def stable_adamw(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        b1, b2 = [b * (1 - b ** (t - 1)) / (1 - b**t) for b in betas]
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        rate = lr / max(1, np.sqrt((g * g / np.maximum(v, eps**2)).mean()))
        p = p * (1 - rate * weight_decay) - rate * m / (np.sqrt(v) + eps)
        yield p


@each
def yogi(p, grads, lr, betas, eps, weight_decay, initial_accumulator_value):
    m = v = np.full_like(p, initial_accumulator_value)
    for t, given in enumerate(grads, 1):
        g = given + weight_decay * p
        m = betas[0] * m + (1 - betas[0]) * g
        v = v - (1 - betas[1]) * np.sign(v - g * g) * g * g
        p = p - lr * m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        yield p


@each
def laprop(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        v = betas[1] * v + (1 - betas[1]) * g * g
        m = betas[0] * m + (1 - betas[0]) * g / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        p = (1 - lr * weight_decay) * (p - lr * m / (1 - betas[0] ** t))
        yield p


@each
def adam_atan2(p, grads, lr, betas, weight_decay, a, b):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = a * np.arctan2(m / (1 - betas[0] ** t), b * np.sqrt(v / (1 - betas[1] ** t)))
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def adanorm(p, grads, lr, betas, eps, weight_decay, r):
    m = v = n = 0 * p
    for t, g in enumerate(grads, 1):
        n = r * n + (1 - r) * norm(g)
        longer = np.where((n > norm(g)) & (norm(g) > 0), g * n / max(norm(g), 1e-300), g)
        m = betas[0] * m + (1 - betas[0]) * longer
        v = betas[1] * v + (1 - betas[1]) * g * g
        u = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * m / (np.sqrt(v) + eps)
        p = p - lr * (u + weight_decay * p)
        yield p


@each
def grams(p, grads, lr, betas, eps, weight_decay):
    m = v = 0 * p
    for t, g in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        rate = np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
        p = p * (1 - lr * weight_decay) - lr * rate * np.sign(g) * np.abs(m) / (np.sqrt(v) + eps)
        yield p


def adai(ps, history, lr, betas, eps, weight_decay):
    m, v, q = [[make(p) for p in ps] for make in (np.zeros_like, np.zeros_like, np.ones_like)]
    for t, given in enumerate(history, 1):
        grads = [g + weight_decay * p for g, p in zip(given, ps, strict=True)]
        v = [betas[1] * v_ + (1 - betas[1]) * g * g for v_, g in zip(v, grads, strict=True)]
        corrected = [v_ / (1 - betas[1] ** t) for v_ in v]
        mean = sum(c.sum() for c in corrected) / sum(c.size for c in corrected)
        beta1 = [np.clip(1 - betas[0] * c / mean, 0, 1 - eps) for c in corrected]
        q = [b * q_ for b, q_ in zip(beta1, q, strict=True)]
        m = [b * m_ + (1 - b) * g for b, m_, g in zip(beta1, m, grads, strict=True)]
        ps = [p - lr * m_ / (1 - q_) for p, m_, q_ in zip(ps, m, q, strict=True)]
        yield ps
