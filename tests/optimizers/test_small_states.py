"""States that are small beside their parameter are float32 at least, so that nothing in them is rounded away."""

import pytest
import torch

import functorch_optim as fo

SMALL = {
    "adam_mini": (fo.adam_mini, ["exp_avg_sq"]),
    "adanorm": (fo.adanorm, ["exp_grad_norm"]),
    "came": (fo.came, ["exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col"]),
    "ldog": (fo.ldog, ["rbar", "G"]),
    "novograd": (fo.novograd, ["exp_avg_sq"]),
    "sm3": (fo.sm3, ["accumulators"]),
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_states_of_half_precision_follow_those_of_single_precision(name, dtype):
    factory, fields = SMALL[name]
    tx = factory(1e-4)
    states = []
    grads = torch.randn(500, 4, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    for wide in (dtype, torch.float32):
        params = torch.ones(4, 3, dtype=wide)
        state = tx.init(params)
        for g in grads:
            _, state = tx.update(g.to(wide), state, params)
        states.append(state)
    for field in fields:
        half, single = [fo.tree.get(state, field) for state in states]
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, single, rtol=0.02, atol=0)
