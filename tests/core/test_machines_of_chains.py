"""Random chains on random trees, each step run in another way: compared with the rules tensor by tensor."""

import copy
import pickle
from unittest import mock

import torch
from catalogue import CATALOGUE
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from strategies import LINKS, trees

import functorch_optim as fo
from functorch_optim import testing
from functorch_optim._core import prepare
from functorch_optim._core.links import select
from functorch_optim._core.rule import OF_TREE, TreeRule
from functorch_optim.testing._copies import through_a_file


def declared(tx):
    return {name for link in tx._links for name in link.rule.extras.names}


ROWS = [row for row in CATALOGUE if declared(row()) - OF_TREE <= {"value"}]  # others are given functions or batches
CHAINS = st.lists(LINKS | st.sampled_from(ROWS).map(lambda row: row()), min_size=1, max_size=4).map(
    lambda some: fo.chain(*some) if len(some) > 1 else some[0]
)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def without_tensors(tree):
    """Take the tensors out of a tree; return them, and what builds it again."""
    leaves, structure = fo.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def build(tensors):
        filled = list(leaves)
        for i, tensor in zip(places, tensors, strict=True):
            filled[i] = tensor
        return fo.tree.unflatten(structure, filled)

    return [leaves[i] for i in places], build


def assert_close(left, right):
    left_leaves, left_structure = fo.tree.flatten(left)
    right_leaves, right_structure = fo.tree.flatten(right)
    assert left_structure == right_structure
    for a, b in zip(left_leaves, right_leaves, strict=True):
        tolerance = TOLERANCE.get(b.dtype, 0)
        scale = max(1.0, b.abs().max().nan_to_num().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


class Ways(RuleBasedStateMachine):
    """A chain in training. Each rule is a step in some way, from the same parameters and state as the reference's."""

    @initialize(tx=CHAINS, params=trees(), compiled=st.integers(0, 9))
    def begin(self, tx, params, compiled):
        self.tx, self.params, self.state = tx, params, tx.init(params)
        self.compilations = int(compiled == 0)  # each takes seconds
        self.extra = {"value": torch.tensor(1.0)} if "value" in declared(tx) else {}

    def gradients(self, data, missing=True):
        grads = data.draw(testing.gradients(self.params))
        return fo.tree.map(lambda g: None if missing and data.draw(st.integers(0, 5)) == 0 else g, grads)

    def expected(self, grads):
        """Return parameters and state after a step of the reference."""
        reference = fo.GradientTransformation._of(self.tx._links, self.tx._layout)  # nothing is prepared for it yet
        with mock.patch.object(prepare, "is_plain", return_value=False):
            updates, state = reference.update(grads, self.state, self.params, **self.extra)
            return fo.apply_updates(self.params, updates), state

    def compare(self, grads, step):
        """Make the step, which changes nothing that it is given, and go on from what it returns."""
        with testing.unmodified(gradient=grads, state=self.state, parameter=self.params):
            expected = self.expected(grads)
            new = step(grads, self.state, self.params)
        self.params, self.state = new
        assert_close((self.params, self.state), expected)

    @rule(data=st.data())
    def update(self, data):
        def step(grads, state, params):
            updates, state = self.tx.update(grads, state, params, **self.extra)
            return fo.apply_updates(params, updates), state

        self.compare(self.gradients(data), step)

    @rule(data=st.data())
    def step(self, data):
        self.compare(
            self.gradients(data), lambda grads, state, params: fo.step(self.tx, grads, state, params, **self.extra)
        )

    @rule(data=st.data(), foreach=st.sampled_from([None, True, False]))
    def step_in_place(self, data, foreach):
        def step(grads, state, params):
            state, params = copy.deepcopy((state, params))
            return fo.step_(self.tx, grads, state, params, foreach=foreach, **self.extra)

        self.compare(self.gradients(data), step)

    @rule(data=st.data())
    def vmapped(self, data):
        """Beside others that have other gradients."""

        def step(grads, state, params):
            leaves, build = without_tensors([grads, state, params])
            structures = []

            def one(*leaves):
                grads, state, params = build(leaves)
                new, rebuild = without_tensors(fo.step(self.tx, grads, state, params, **self.extra))
                structures.append(rebuild)
                return tuple(new)

            others = [leaf if leaf.dtype == torch.int64 else 2 * leaf for leaf in leaves]
            new = torch.vmap(one)(*[torch.stack([a, b]) for a, b in zip(leaves, others, strict=True)])
            return structures[0]([leaf[0] for leaf in new])

        if without_tensors(self.params)[0]:
            self.compare(self.gradients(data), step)

    @precondition(lambda self: self.compilations)
    @rule(data=st.data())
    def compiled(self, data):
        self.compilations -= 1
        torch._dynamo.reset()
        step = torch.compile(
            lambda grads, state, params: fo.step(self.tx, grads, state, params, **self.extra),
            backend="eager",
            fullgraph=True,
        )
        self.compare(self.gradients(data), step)

    @rule(data=st.data(), steps=st.integers(1, 4), foreach=st.sampled_from([None, True, False]))
    def in_an_optimizer(self, data, steps, foreach):
        """Where every parameter has a gradient: those without would be at a step of their own."""
        links = self.tx._links
        if any(isinstance(link.rule, TreeRule) for link in links) or not all(map(any, select(links, self.params))):
            return  # what belongs to no parameter is not in the form that optimizers save
        leaves, structure = fo.tree.flatten(self.params)
        params = fo.tree.unflatten(structure, [torch.nn.Parameter(leaf.clone()) for leaf in leaves])
        order = fo.tree.flatten(params)[0]
        optimizer = fo.Optimizer(list(zip(fo.tree.paths(params), order, strict=True)), self.tx, foreach=foreach)
        saved = fo.state_dict(self.state, self.params, by="index")["state"]
        numbers = fo.tree.insertion_order(self.params)
        states = {i: saved[number] for i, number in enumerate(numbers) if number in saved}
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        for _ in range(steps):
            grads = self.gradients(data, missing=False)
            self.params, self.state = self.expected(grads)
            for p, grad in zip(order, fo.tree.flatten(grads)[0], strict=True):
                p.grad = grad
            optimizer.step(**self.extra)
        states = optimizer.state_dict()["state"]
        back = {"state": {number: states[i] for i, number in enumerate(numbers) if i in states}}
        assert_close(fo.tree.map(torch.Tensor.detach, params), self.params)
        assert_close(fo.load_state_dict(self.state, back, self.params, by="index"), self.state)

    @rule(way=st.sampled_from(["path", "parameter", "index", "deepcopy", "pickle"]))
    def saved(self, way):
        before = self.state
        if way == "deepcopy":
            self.state = copy.deepcopy(before)
        elif way == "pickle":
            self.state = pickle.loads(pickle.dumps(before))
        else:
            given = [] if way == "path" else [self.params]
            by = {"by": "path" if way == "path" else way.replace("parameter", "path")}
            saved = through_a_file(fo.state_dict(before, *given, **by))
            self.state = fo.load_state_dict(self.tx.init(self.params), saved, *given, **by)
        assert_close(self.state, before)


def test_ways():
    several = settings(stateful_step_count=12)
    run_state_machine_as_test(Ways, settings=several)
