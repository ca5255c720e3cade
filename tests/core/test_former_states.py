"""States, optimizers and state dicts that version 0.1.0 wrote are loaded by this one, with the same bits.

`data/states_of_0.1.0.pickle.gz` holds, for every row of the catalogue of then, the state after three steps, pickled and
as `fo.state_dict` had it; and for every case of torch_like_cases.py the class after three steps.
"""

import gzip
import pathlib
import pickle

import pytest
import torch
from catalogue import CATALOGUE, assert_close, make_params, step
from torch_like_cases import make_pair, parameters

import functorch_optim as fo

STATES = pathlib.Path(__file__).parents[1] / "data/states_of_0.1.0.pickle.gz"
FORMER = pickle.loads(gzip.decompress(STATES.read_bytes()))
ROWS = {row.name: row for row in CATALOGUE}
states = pytest.mark.parametrize("name", FORMER["states"])
classes = pytest.mark.parametrize(
    "case", FORMER["classes"], ids=lambda case: "-".join([case["class"], *map(str, case["options"])])
)
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}


def fresh(name):
    torch.manual_seed(0)
    params = make_params()
    tx = ROWS[name]()
    return tx, params, tx.init(params)


@states
def test_pickled_states(name):
    former = FORMER["states"][name]
    loaded = pickle.loads(former["pickle"])
    leaves = fo.tree.flatten(loaded)[0]
    assert_close([leaf for leaf in leaves if leaf is not None], former["leaves"], **EXACT)
    tx, params, initial = fresh(name)
    assert fo.tree.flatten(loaded)[1] == fo.tree.flatten(initial)[1]
    step(tx, fo.tree.map(torch.ones_like, params), loaded, params)  # it is one of this transformation


@states
@pytest.mark.parametrize("by_parameter", [False, True])
def test_state_dicts(name, by_parameter):
    former = FORMER["states"][name]
    _, params, initial = fresh(name)
    if by_parameter:
        loaded = fo.load_state_dict(initial, former["by_parameter"], params)
    else:
        loaded = fo.load_state_dict(initial, former["state_dict"])
    assert_close(fo.tree.flatten(loaded)[0], former["leaves"], **EXACT)


def plain(state_dict):
    return {index: dict(state) for index, state in state_dict["state"].items()}


@classes
def test_classes(case):
    ours, _ = make_pair(case["class"], **case["options"])
    ours.load_state_dict(case["state_dict"])
    # As torch.optim does, loading casts what NAdam and ASGD carry on to the dtype of the parameter.
    torch.testing.assert_close(plain(ours.state_dict()), plain(case["state_dict"]), **EXACT, check_dtype=False)
    unpickled = pickle.loads(case["pickle"])
    torch.testing.assert_close([p.detach() for p in parameters(unpickled)], case["params"], **EXACT)
    torch.testing.assert_close(plain(unpickled.state_dict()), plain(case["state_dict"]), **EXACT)
    for optimizer in (ours, unpickled):
        for p in parameters(optimizer):
            p.grad = torch.ones_like(p)
        optimizer.step()


WRAPPERS = {
    "transformation": lambda p: fo.Optimizer(
        [("p", p)], fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10)))
    ),
    "factory": lambda p: fo.Optimizer([p], fo.nadam, lr=0.1),
    "tree": lambda p: fo.Optimizer([p], fo.lbfgs, max_iter=2),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers(name):
    former = FORMER["wrappers"][name]
    optimizer = WRAPPERS[name](torch.nn.Parameter(torch.ones(3)))
    optimizer.load_state_dict(former["state_dict"])
    torch.testing.assert_close(plain(optimizer.state_dict()), plain(former["state_dict"]), **EXACT)
    unpickled = pickle.loads(former["pickle"])
    torch.testing.assert_close(plain(unpickled.state_dict()), plain(former["state_dict"]), **EXACT)
