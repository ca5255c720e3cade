"""Training as the loop that anyone would write, and batches for it."""

import torch
from catalogue import loss, train

import functorch_optim as fo

BATCHES = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def by_hand(tx, params, batches, state=None):
    """Train; return the parameters, the state, and the losses."""
    state = tx.init(params) if state is None else state
    losses = []
    for batch in batches:
        losses.append(loss(params, batch))
        params, state = train(tx, params, batch, steps=1, state=state)
    return fo.meta.Unrolled(params, state, torch.stack(losses))
