"""Wrappers that keep two sets of weights."""

import pytest

import functorch_optim as fo

RATE = 0.1
WRAPPERS = {
    "ema_weights": lambda tx: fo.ema_weights(tx, 0.9),
    "debiased": lambda tx: fo.ema_weights(tx, 0.9, debias=True, warmup="timm", start=1),
    "swa": lambda tx: fo.swa(tx, start=1),
    "polynomial_average": fo.polynomial_average,
    "lookahead": lambda tx: fo.lookahead(tx, every=3),
    "schedule_free": fo.schedule_free,
    "gpa": lambda tx: fo.gpa(tx, 0.9),
}
each = pytest.mark.parametrize("name", WRAPPERS)
