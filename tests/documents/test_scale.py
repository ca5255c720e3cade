"""The page on memory and communication: its formulas are those of the states that are made, and of the steps."""

import inspect
import pathlib
import re
import warnings

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_optim as fo

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "how-to" / "scale.md").read_text()
RANKS = 4
NO_OPTIMIZERS = {"gauss_newton_bartlett", "hutchinson", "muon_route", "normalize_rows", "qk_clip"}


def rows(columns):
    """Return (text of a transformation, cells) for each of the table with so many columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\| `.*$", PAGE, re.M)]
    return [(text, line[1:]) for line in lines if len(line) == columns for text in re.findall(r"`(.+?)`", line[0])]


ROWS = rows(6)
each_row = pytest.mark.parametrize(("text", "cells"), ROWS, ids=[text for text, _ in ROWS])


def make(text):
    """Make the transformation of a text, with a learning rate where it must have one."""
    if text == "sgld":
        return fo.sgld(0.1, generator=torch.Generator().manual_seed(0))
    made = eval(text, vars(fo))
    if isinstance(made, fo.GradientTransformation):
        return made
    lr = inspect.signature(made).parameters.get("lr")
    return made(0.1) if lr is not None and lr.default is lr.empty else made()


def value(formula, m, n):
    """Compute a formula such as `2 m n + m^2`."""
    product = re.sub(r"(?<=\w) (?=[a-z])", "*", formula.replace("^", "**"))
    return eval(product or "0", {"m": m, "n": n, "min": min})


def state_of(tx, *shape, dtype=torch.float32, place=lambda p: p):
    leaves = fo.tree.flatten(tx.init({"w": place(torch.zeros(shape, dtype=dtype))}))[0]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim > 0]


def numbers(leaves):
    return sum(leaf.numel() for leaf in leaves)


def test_formulas_are_read():
    assert value("2 m n + 2 m^2 + n min(m, n)", 5, 7) == 70 + 50 + 35
    assert value("", 5, 7) == 0


@each_row
def test_the_numbers_of_a_state(text, cells):
    matrix, vector, single, _, _ = cells
    assert numbers(state_of(make(text), 5, 7)) == value(matrix, 5, 7)
    if vector == "none":
        with pytest.raises(ValueError, match="for matrices"):
            state_of(make(text), 7)
    else:
        assert numbers(state_of(make(text), 7)) == value(vector, 5, 7)
    half = state_of(make(text), 5, 7, dtype=torch.bfloat16)
    assert {leaf.dtype for leaf in half} <= {torch.bfloat16, torch.float32}
    assert numbers([leaf for leaf in half if leaf.dtype == torch.float32]) == value(single, 5, 7)


def test_every_optimizer_has_a_row():
    texts = [text for text, _ in ROWS]
    optimizers = {
        name
        for name in fo.__all__
        if name.islower()
        and getattr(getattr(fo, name), "__module__", "").startswith("functorch_optim.optimizers.")
        and not name.startswith("scale_by_")
    }
    assert len(set(texts)) == len(texts)
    assert optimizers - set(texts) == NO_OPTIMIZERS


def test_bytes_in_half_precision():
    table = rows(2)
    assert len(table) == 8
    p = torch.zeros(512, 512, dtype=torch.bfloat16)
    for text, [cell] in table:
        leaves = fo.tree.flatten(make(text).init(p))[0]
        assert sum(leaf.nbytes for leaf in leaves if leaf.ndim > 0) == float(cell) * p.numel(), text


class Exchanged(TorchDispatchMode):
    """Counts the elements that the owner of a tensor receives and sends back, and the numbers of the tree."""

    def __init__(self):
        super().__init__()
        self.elements, self.numbers = 0.0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.distributed.tensor.DTensor in types:
            return NotImplemented  # its own collectives come here
        result = function(*args, **(kwargs or {}))
        if str(function).startswith("c10d.alltoall_base_"):
            received, sent, *_ = args  # bytes of float32; one of them is the whole tensor, and the other is its shard
            self.elements += max(received.numel(), sent.numel()) / 4
        elif str(function).startswith("_c10d_functional.all_"):
            self.numbers += max(1, result.numel() // RANKS)
        return result


@pytest.fixture(scope="module")
def sharded():
    """Ranks that exist by name alone: what they would send is whatever lies in memory."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    yield lambda p: distribute_tensor(p, mesh, [Shard(0)])
    torch.distributed.destroy_process_group()


@each_row
def test_shards_and_what_is_exchanged(text, cells, sharded):
    m, n = 64, 32
    matrix, _, _, whole, exchanged = cells
    tx = make(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, where ranks have no address
        states = [getattr(leaf, "_local_tensor", leaf) for leaf in state_of(tx, m, n, place=sharded)]
        expected = (value(matrix, m, n) - value(whole, m, n)) / RANKS + value(whole, m, n)
        assert numbers(states) == expected
        if exchanged == "for the loss":
            return
        params, grads = {"w": sharded(torch.ones(m, n))}, {"w": sharded(torch.ones(m, n))}
        extras = {"value": torch.tensor(1.0)} if text in ("polyak", "momo", "momo_adam") else {}
        params, state = fo.step_(tx, grads, tx.init(params), params, **extras)
        with Exchanged() as counted:
            fo.step_(tx, grads, state, params, **extras)
    of_tree = re.fullmatch(r"(\d) numbers?( of each)?", exchanged)
    assert counted.numbers == (int(of_tree[1]) if of_tree else 0)
    expected = 0 if of_tree else value(exchanged, m, n) + 2 * RANKS * value(whole, m, n) * bool(exchanged)
    singles = len([leaf for leaf in fo.tree.flatten(state)[0] if leaf.ndim == 0])
    assert expected <= counted.elements <= expected + 2 * RANKS * singles * bool(expected)
