"""SGLD: its step, and the density that it samples."""

import math

import pytest
import torch
from formulas_of_trees import make_run

import functorch_optim as fo


def tensors(arrays):
    return [torch.tensor(array, dtype=torch.float64) for array in arrays]


def test_sgld_steps_by_half_the_gradient_and_noise_of_variance_lr_times_temperature():
    run = make_run()
    params, grads, noise = tensors(run.params), tensors(run.grads[0]), tensors(run.grads[1])
    tx = fo.sgld(lambda count: 0.1 / (1 + count), temperature=0.5, weight_decay=0.2)
    state = tx.init(params)
    for lr in (0.1, 0.05):
        before = params
        params, state = fo.step(tx, grads, state, params, noise=noise)
        for new, p, g, n in zip(params, before, grads, noise, strict=True):
            expected = p - lr / 2 * (g + 0.2 * p) + math.sqrt(lr * 0.5) * n
            torch.testing.assert_close(new, expected, rtol=1e-14, atol=1e-14)


def test_sgld_samples_the_density():
    tx = fo.sgld(0.05, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(20_000, dtype=torch.float64)
    state = tx.init(params)
    for _ in range(300):
        params, state = fo.step(tx, params - 3.0, state, params)  # the density is N(3, 1)
    assert abs(float(params.mean()) - 3) < 0.05
    assert abs(float(params.var()) - 1 / (1 - 0.05 / 4)) < 0.05  # the variance of the discrete chain


def test_sgld_repeats_with_the_seed_of_its_generator_and_runs_in_an_optimizer():
    def trained(seed):
        params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))]
        optimizer = fo.Optimizer(params, fo.sgld, lr=0.1, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_sgld_without_noise_is_an_error():
    tx, params = fo.sgld(), torch.ones(2)
    with pytest.raises(ValueError, match="sgld needs noise"):
        tx.update(torch.ones(2), tx.init(params), params)


def test_a_seed_in_place_of_a_generator_is_an_error():
    with pytest.raises(TypeError, match=r"Invalid generator: 0; give a torch.Generator, as in sgld\(generator="):
        fo.sgld(generator=0)


def test_both_parts_of_complex_noise_have_the_variance_lr_times_temperature():
    tx = fo.sgld(0.5, temperature=2.0, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(20_000, dtype=torch.complex64)
    noise = tx.update(params, tx.init(params), params)[0]
    for part in (noise.real, noise.imag):
        assert abs(float(part.var()) - 1) < 0.05


@pytest.mark.parametrize("noise", [torch.ones(1), torch.ones(()), 1.0, [torch.ones(2)]])
def test_noise_that_is_not_like_the_parameters_is_an_error(noise):
    tx, params = fo.sgld(), torch.ones(2)
    with pytest.raises(ValueError, match="noise"):
        tx.update(torch.ones(2), tx.init(params), params, noise=noise)


@pytest.mark.parametrize("dtypes", [(torch.complex64, torch.float32), (torch.float32, torch.complex64)])
def test_noise_of_one_part_for_two_or_of_two_for_one_is_an_error(dtypes):
    params, noise = [torch.ones(2, dtype=dtype) for dtype in dtypes]
    tx = fo.sgld()
    with pytest.raises(ValueError, match=f"dtype {dtypes[1]}.* dtype {dtypes[0]}; write noise="):
        tx.update(params, tx.init(params), params, noise=noise)
