"""fo.Optimizer over a chain: its one learning rate is shown and driven; programs find what they expect in groups."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed
from torch.optim import lr_scheduler

import functorch_optim as fo
from functorch_optim.testing._copies import through_a_file


def make(tx, count=2, named=True, **options):
    params = [nn.Parameter(torch.tensor([1.0, -2.0]) * (i + 1)) for i in range(count)]
    given = [(f"p{i}", p) for i, p in enumerate(params)] if named else params
    return params, fo.Optimizer(given, tx, **options)


def train(params, opt, steps=3, scheduler=None):
    for t in range(steps):
        for p in params:
            p.grad = torch.cos(p.detach() + t)
        opt.step()
        if scheduler is not None:
            scheduler.step()


def everywhere(params):
    return fo.tree.map(lambda p: True, params)


def clipped(lr):
    return fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr, weight_decay=0.3))


@fo.factory
def own(learning_rate):
    return fo.chain(fo.clip(1.0), fo.sgd(learning_rate))


CHAINS = {
    "alone": fo.adamw(0.1),
    "chain": clipped(0.1),
    "named": fo.named_chain(clip=fo.clip(1.0), adam=fo.adam(0.1)),
    "masked": fo.chain(
        fo.masked(fo.add_decayed_weights(0.1), lambda params: fo.tree.map(lambda p: True, params)), fo.sgd(0.1)
    ),
    "wrapped": fo.schedule_free(fo.adam(0.1)),
    "accumulated": fo.accumulate(fo.adam(0.1), 2),
    "partition": fo.partition({"a": fo.adam(0.1), "b": fo.set_to_zero()}, "a"),
    "own factory": own(0.1),
    "default": fo.sgd(),
    "not by descent": fo.adagrad(0.1),
    "tensor": fo.adam(torch.tensor(0.1)),
}
each_chain = pytest.mark.parametrize("tx", CHAINS.values(), ids=CHAINS)


@each_chain
def test_zero_stops(tx):
    params, opt = make(tx)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 if tx is not CHAINS["default"] else 1e-3)
    train(params, opt)
    before = [p.detach().clone() for p in params]
    assert not torch.equal(before[0], torch.tensor([1.0, -2.0]))
    if tx is CHAINS["wrapped"]:
        return  # its average moves on
    opt.param_groups[0]["lr"] = 0
    train(params, opt)
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("name", ["alone", "chain"])
def test_schedulers_drive(name):
    params, opt = make(CHAINS[name])
    scheduler = lr_scheduler.ExponentialLR(opt, 0.5)
    train(params, opt, 5, scheduler)
    scheduled = {
        "alone": fo.adamw,
        "chain": lambda lr: fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(lr, weight_decay=0.3)),
    }
    others, by_schedule = make(scheduled[name](fo.schedules.exponential(0.1, 0.5)))
    train(others, by_schedule, 5)
    torch.testing.assert_close(params, others)
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**5)


@pytest.mark.parametrize("named", [True, False])
def test_groups_have_rates_of_their_own(named):
    params = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    groups = [{"params": [(f"p{i}", p)] if named else [p]} for i, p in enumerate(params)]
    opt = fo.Optimizer(groups, fo.chain(fo.clip_by_global_norm(1e9), fo.adamw(0.1)))
    opt.param_groups[0]["lr"] = 0.0
    opt.param_groups[1]["lr"] = 0.7
    train(params, opt)
    [alone] = others = [nn.Parameter(torch.ones(2))]
    train(others, torch.optim.AdamW(others, lr=0.7))
    assert torch.equal(params[0], torch.ones(2))
    torch.testing.assert_close(params[1], alone)


def test_wrong_rates_are_refused():
    params, opt = make(fo.adam(0.1))
    opt.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match="Invalid learning rate: -1.0"):
        train(params, opt)
    assert not opt.state


WITHOUT = {
    "schedule": (fo.adamw(fo.schedules.cosine(0.1, 10)), r"has a schedule for its learning rate, cosine\(0.1, 10\)"),
    "two": (fo.partition({"a": fo.adam(0.1), "b": fo.sgd(0.1)}, "a"), "has 2 learning rates, so param_groups have no"),
    "none": (fo.chain(fo.scale_by_adam(), fo.scale(-0.1)), "has no argument called lr, so param_groups have no 'lr'"),
    "opaque": (fo.GradientTransformation(lambda p: (), lambda u, s, p: (u, s)), "has no argument called lr"),
    "tree": (fo.sgd({"p0": 0.1, "p1": 0.2}), "a learning rate that is learned, or differs between parameters"),
    "learned": (fo.sgd(torch.tensor(0.1, requires_grad=True)), "a learning rate that is learned, or differs"),
}


@pytest.mark.parametrize(("tx", "message"), WITHOUT.values(), ids=WITHOUT)
def test_what_cannot_be_driven_says_so(tx, message):
    params, opt = make(tx)
    assert "lr" not in opt.param_groups[0]
    with pytest.raises(KeyError, match=message):
        lr_scheduler.StepLR(opt, 1)
    with pytest.raises(KeyError, match="^'momentum'$"):
        opt.param_groups[0]["momentum"]
    train(params, opt, 1)
    before = [p.detach().clone() for p in params]
    for one in (opt, copy.deepcopy(opt)):
        one.param_groups[0]["lr"] = 0
        with pytest.raises(ValueError, match=message):
            one.step()
    assert all(map(torch.equal, params, before))
    del opt.param_groups[0]["lr"]
    train(params, opt, 1)
    opt.load_state_dict(through_a_file(opt.state_dict()))
    with pytest.raises(KeyError, match=message):
        opt.param_groups[0]["lr"]


def test_rates_are_saved_and_loaded():
    params, opt = make(CHAINS["chain"])
    opt.param_groups[0]["lr"] = 0.03
    train(params, opt)
    others, other = make(CHAINS["chain"])
    other.load_state_dict(through_a_file(opt.state_dict()))
    for p, q in zip(others, params, strict=True):
        p.data.copy_(q.detach())
    unpickled = pickle.loads(pickle.dumps(opt))
    copied = [p for group in unpickled.param_groups for p in group["params"]]
    for own, optimizer in ((params, opt), (others, other), (copied, unpickled)):
        train(own, optimizer)
    assert all(map(torch.equal, params, others))
    assert all(map(torch.equal, params, copied))
    _, scheduled = make(fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(fo.schedules.cosine(0.1, 10))))
    scheduled.load_state_dict(opt.state_dict())  # the schedule stays
    assert "lr" not in scheduled.param_groups[0]
    _, former = make(CHAINS["chain"])
    old = opt.state_dict()
    del old["param_groups"][0]["lr"]
    former.load_state_dict(old)
    assert former.param_groups[0]["lr"] == 0.1


def test_from_torch_has_the_rate_as_it_is():
    params, opt = make(CHAINS["chain"])
    opt.param_groups[0]["lr"] = 0.02
    train(params, opt)
    tx, tree, state = fo.from_torch(opt)
    grads = {name: torch.cos(p) for name, p in tree.items()}
    tree, _ = fo.step(tx, grads, state, tree)
    for p in params:
        p.grad = torch.cos(p.detach())
    opt.step()
    torch.testing.assert_close(list(tree.values()), [p.detach() for p in params])


def test_migration_brings_its_own_rate():
    params, opt = make(fo.adam(0.1))
    opt.param_groups[0]["lr"] = 0.0
    opt.migrate(fo.adam(0.3))
    assert opt.param_groups[0]["lr"] == 0.3
    opt.migrate(fo.adam(fo.schedules.cosine(0.1, 10)))
    assert "lr" not in opt.param_groups[0]
    train(params, opt)


# Other programs. ------------------------------------------------------------------------------------------------------

FORMS = {
    "factory": lambda params: fo.Optimizer(params, fo.adamw, lr=0.1, foreach=True),
    "chain": lambda params: fo.Optimizer(params, CHAINS["chain"]),
}
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


@each_form
def test_rebuilt_from_defaults(form):
    params = [nn.Parameter(torch.ones(2))]
    opt = form(params)
    assert "transformation" not in opt.param_groups[0]
    others = [nn.Parameter(torch.ones(2))]
    other = type(opt)(others, **opt.defaults)
    assert other.param_groups[0].keys() == opt.param_groups[0].keys()
    train(params, opt)
    train(others, other)
    assert torch.equal(params[0], others[0])
    assert other.state_dict()["param_groups"] == opt.state_dict()["param_groups"]


@each_form
def test_entries_of_other_programs_are_kept_saved_and_loaded(form):
    params = [nn.Parameter(torch.ones(2))]
    opt = form(params)
    train(params, opt)
    opt.param_groups[0]["rho"] = 0.05
    opt.state[params[0]].update(
        old_p=torch.ones(2), z=torch.zeros(2), k=[1, {"a": torch.ones(1)}], count=torch.tensor(3)
    )
    saved = through_a_file(opt.state_dict())
    other = form([nn.Parameter(torch.ones(2))])
    other.load_state_dict(saved)
    [state] = other.state.values()
    assert other.param_groups[0]["rho"] == 0.05
    assert torch.equal(state["old_p"], torch.ones(2))
    assert state["count"].dtype == torch.int64
    assert state["k"] == [1, {"a": torch.ones(1)}]
    assert state["k"][1]["a"] is not saved["state"][0]["k"][1]["a"]
    train([p for group in other.param_groups for p in group["params"]], other)
    assert torch.equal(state["old_p"], torch.ones(2))
    saved["state"][0]["momentum_buffer"] = torch.ones(2)  # a rule's, and so another optimizer's
    with pytest.raises(ValueError, match="has 'momentum_buffer', which this transformation does not keep"):
        other.load_state_dict(saved)


class SAM(torch.optim.Optimizer):
    """The wrapper of many repositories: all arguments go into groups, which the base optimizer is given."""

    def __init__(self, params, base_optimizer, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho, "adaptive": False, **kwargs})
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)


def test_sam_gives_its_groups_to_the_optimizer_that_it_wraps():
    params = [nn.Parameter(torch.ones(2))]
    sam = SAM(params, fo.Optimizer, transformation=fo.adamw, lr=0.1)
    assert sam.param_groups[0]["rho"] == 0.05
    train(params, sam.base_optimizer)
    saved = sam.base_optimizer.state_dict()
    assert "transformation" not in saved["param_groups"][0]


MISSPELT = ["weight_deacy", "lrr", "learning_rate", "LR", "wd", "beta", "beta1", "epsilon", "decay_weight", "amsgard"]
OF_PROGRAMS = [
    "rho",
    "adaptive",
    "lr_scale",
    "initial_lr",
    "max_lr",
    "min_lr",
    "max_momentum",
    "layer",
    "capturable",
    "tag",
]


@pytest.mark.parametrize("name", MISSPELT)
def test_misspelt_hyperparameters_in_groups(name):
    p, q = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    message = f"adamw has no hyperparameter '{name}', which a param group gives; did you mean '.*'. It has lr, betas"
    with pytest.raises(TypeError, match=message):
        fo.Optimizer([{"params": [p], name: 0.1}], fo.adamw)
    opt = fo.Optimizer([p], fo.adamw)
    with pytest.raises(TypeError, match=message):
        opt.add_param_group({"params": [q], name: 0.1})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", OF_PROGRAMS)
def test_entries_of_programs_in_groups(name):
    opt = fo.Optimizer([{"params": [nn.Parameter(torch.ones(2))], name: 0.1}], fo.adamw)
    assert opt.state_dict()["param_groups"][0][name] == 0.1


@pytest.mark.parametrize(
    ("factory", "name", "right"),
    [
        (fo.adagrad, "lr_deccay", "lr_decay"),
        (fo.adam, "weight_dacay", "weight_decay"),
        (fo.adam, "decouple_weight_decay", "decoupled_weight_decay"),
        (fo.sgd, "momentm", "momentum"),
    ],
)
def test_the_hyperparameter_that_was_meant(factory, name, right):
    """Also where the word begins or ends like another one."""
    with pytest.raises(TypeError, match=f"has no hyperparameter '{name}', .*; did you mean '{right}'"):
        fo.Optimizer([{"params": [nn.Parameter(torch.ones(2))], name: 0.1}], factory, lr=0.1)


FACTORIES = [fo.sgd, fo.adam, fo.adamw, fo.nadam, fo.adagrad, fo.soap, fo.shampoo, fo.fromage]


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
@pytest.mark.parametrize("name", ["lr_scale", "lr_mult", "weight_decay_mult"])
def test_words_made_of_hyperparameters_are_those_of_programs(factory, name):
    opt = fo.Optimizer([{"params": [nn.Parameter(torch.ones(2, 2))], name: 0.1}], factory, lr=0.1)
    assert opt.param_groups[0][name] == 0.1


@pytest.mark.parametrize("factory", FACTORIES, ids=lambda factory: factory.__name__)
def test_groups_that_schedulers_of_torch_have_written_to(factory):
    source = torch.optim.SGD([nn.Parameter(torch.ones(2, 2))], lr=0.1, momentum=0.9)
    torch.optim.lr_scheduler.OneCycleLR(source, max_lr=0.1, total_steps=10)
    torch.optim.swa_utils.SWALR(source, swa_lr=0.05)
    annotated = {name: value for name, value in source.param_groups[0].items() if name not in source.defaults}
    assert annotated.keys() >= {"max_lr", "min_lr", "initial_lr", "max_momentum", "base_momentum", "swa_lr"}
    opt = fo.Optimizer([annotated], factory, lr=0.1)
    assert opt.param_groups[0]["max_lr"] == 0.1


# torch.distributed.checkpoint. ----------------------------------------------------------------------------------------

ASKED = {
    "chain": CHAINS["chain"],
    "schedule": fo.adamw(fo.schedules.cosine(0.1, 10), weight_decay=0.5),
    "two rates": fo.partition({"a": fo.adamw(0.1), "b": fo.sgd(0.1)}, lambda params: dict.fromkeys(params, "a")),
    "no rate": fo.chain(fo.scale_by_adam(), fo.add_decayed_weights(0.5), fo.scale(-0.1)),
    "momentum": fo.sgd(0.1, 0.9, weight_decay=0.1),
    "carried": fo.nadam(0.1),
    "wrapped": fo.schedule_free(fo.adamw(0.1)),
    "factory": None,
}


@pytest.mark.parametrize("tx", ASKED.values(), ids=ASKED)
def test_asking_for_a_state_changes_nothing(tx):
    def fresh():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        named = model.named_parameters()
        return model, fo.Optimizer(named, fo.adamw, lr=0.1) if tx is None else fo.Optimizer(named, tx)

    (model, opt), (twin, other) = fresh(), fresh()
    before = copy.deepcopy(model.state_dict())
    saved = distributed.get_optimizer_state_dict(model, opt)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(state.get("step", 0) == 0 for state in saved["state"].values())
    assert set(saved["state"]) == {"weight", "bias"}
    third, resumed = fresh()
    distributed.set_optimizer_state_dict(third, resumed, saved)
    for one, optimizer in ((model, opt), (twin, other), (third, resumed)):
        train(list(one.parameters()), optimizer)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), third.state_dict(), rtol=0, atol=0)


def test_other_steps_with_a_rate_of_zero_count():
    params, opt = make(fo.adam(0.1))
    opt.param_groups[0]["lr"] = 0.0
    for p in params:
        p.grad = torch.zeros(2)
    opt.step()
    assert opt.state[params[0]]["step"] == 1
