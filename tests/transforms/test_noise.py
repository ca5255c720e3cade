"""Noise is normal, becomes weaker, and is a function of the state."""

import math

import pytest
import torch

import functorch_optim as fo
from functorch_optim._random import mixed, normal
from functorch_optim.testing._copies import through_pickle


def noise_of(tx, shape=(), state=None, dtype=torch.float64):
    params = torch.zeros(shape, dtype=dtype)
    return tx.update(params, tx.init(params) if state is None else state)


def test_its_distribution_is_normal():
    n, _ = noise_of(fo.add_noise(1.0, generator=1), (200_000,))
    ordered = n.sort().values
    ideal = (torch.arange(len(n), dtype=torch.float64) + 0.5) / len(n)
    distance = (torch.special.ndtr(ordered) - ideal).abs().max()  # Kolmogorov's and Smirnov's
    assert distance < 1.95 / math.sqrt(len(n))  # exceeded once in a thousand
    assert not (torch.special.ndtr(1.01 * ordered + 0.01) - ideal).abs().max() < 1.95 / math.sqrt(len(n))
    lags = [(n[lag:] * n[:-lag]).mean().abs().item() for lag in (1, 2, 64, 1000)]
    assert max(lags) < 4 / math.sqrt(len(n))


def test_its_variance_falls_with_a_power_of_the_step():
    tx = fo.add_noise(0.04, 0.55, generator=2)
    state, spreads = None, []
    for _ in range(4):
        n, state = noise_of(tx, (100_000,), state)
        spreads.append(n.std().item())
    assert spreads == pytest.approx([math.sqrt(0.04 / t**0.55) for t in (1, 2, 3, 4)], rel=0.02)


def test_steps_leaves_and_keys_have_noise_of_their_own():
    params = {"a": torch.zeros(1000, dtype=torch.float64), "b": torch.zeros(1000, dtype=torch.float64)}
    drawn = []
    for key in (0, 1, -1):
        tx = fo.add_noise(1.0, 0.0, generator=key)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params, state)
            drawn += updates.values()
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert correlations.abs().max() < 5 / math.sqrt(1000)


def test_the_hash_is_that_of_its_paper():
    """The first numbers of SplitMix64 with seed 0."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    keys = [(k * golden) & mask for k in (1, 2, 3)]
    signed = torch.tensor([key - (1 << 64) if key >> 63 else key for key in keys])
    assert [number & mask for number in mixed(signed).tolist()] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


@pytest.mark.sampled(pool="compiled")
def test_compiled_it_is_the_same():
    """Of enough elements for a loop over vectors: an overflow in its index made it write past the end."""
    tx, params = fo.add_noise(1.0, generator=3), torch.zeros(300, dtype=torch.float64)
    state = tx.init(params)
    found, _ = torch.compile(tx.update, fullgraph=True)(params, state)
    torch.testing.assert_close(found, tx.update(params, state)[0], rtol=1e-12, atol=0)


def test_no_number_is_infinite():
    extremes = torch.special.erfinv(((torch.tensor([0, (1 << 52) - 1]).double() + 0.5) * 2.0**-51) - 1)
    assert extremes.isfinite().all()
    assert normal(torch.tensor(3), torch.Size([10**6])).isfinite().all()


def test_generators_give_keys_which_are_reproducible_and_not_given_twice():
    def made(seed):
        generator = torch.Generator().manual_seed(seed)
        return [fo.add_noise(1.0, generator=generator) for _ in range(2)]

    (one, other), (again, _) = made(5), made(5)
    assert torch.equal(noise_of(one, (3,))[0], noise_of(again, (3,))[0])
    assert not torch.equal(noise_of(one, (3,))[0], noise_of(other, (3,))[0])
    assert torch.equal(noise_of(one, (3,))[0], noise_of(one, (3,))[0])
    assert torch.equal(noise_of(one, (3,))[0], noise_of(through_pickle(one), (3,))[0])
    assert repr(one).startswith("add_noise(1.0, 0.55, tensor(")
    torch.manual_seed(7)
    first = noise_of(fo.add_noise(1.0), (3,))[0]
    torch.manual_seed(7)
    assert torch.equal(first, noise_of(fo.add_noise(1.0), (3,))[0])


def test_members_of_a_batch_differ_by_their_keys():
    keys = torch.arange(3)
    noise = torch.vmap(lambda key: noise_of(fo.add_noise(1.0, generator=key), (4,))[0])(keys)
    alone = torch.stack([noise_of(fo.add_noise(1.0, generator=k), (4,))[0] for k in range(3)])
    torch.testing.assert_close(noise, alone, rtol=1e-14, atol=0)
    tx = fo.add_noise(1.0, generator=0)
    same = torch.vmap(lambda g: tx.update(g, tx.init(g))[0])(torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(same[0], same[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex128])
def test_other_dtypes_keep_theirs(dtype):
    n, _ = noise_of(fo.add_noise(1.0, generator=0), (20_000,), dtype=dtype)
    parts = torch.view_as_real(n) if dtype.is_complex else n.double()
    assert n.dtype == dtype
    assert parts.std().item() == pytest.approx(1.0, rel=0.03)


def test_a_seed_that_is_none_is_an_error():
    for wrong in (0.5, True, "0", torch.tensor(0.5)):
        with pytest.raises(TypeError, match="Invalid generator: .*; give a torch.Generator, or an integer as in"):
            fo.add_noise(1.0, generator=wrong)
    with pytest.raises(ValueError, match="Invalid eta: -1.0"):
        fo.add_noise(-1.0, generator=0)
