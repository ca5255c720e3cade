"""The optimizers of the zoo: a row each, made from a learning rate alone."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import functorch_optim as fo

DECOUPLED, L2 = 0.1, 1e-3  # weight decays that are tried beside none


class Entrant(NamedTuple):
    """An optimizer.

    Attributes:
        name: that in the library, or of a variant.
        make: takes the learning rate first, and `weight_decay` if `decay` is a number.
        decay: the weight decay that is tried beside none.
        averages: whether it evaluates other parameters than it trains.
        anneals: whether its learning rate goes down to zero; otherwise it stays.
    """

    name: str
    make: Callable[..., fo.GradientTransformation]
    decay: float | None = None
    averages: bool = False
    anneals: bool = True

    def at(self, lr: Any, steps: int, weight_decay: Any) -> fo.GradientTransformation:
        """Make the transformation for a training of some steps."""
        rate = fo.schedules.cosine(lr, steps) if self.anneals else lr
        return self.make(rate) if self.decay is None else self.make(rate, weight_decay=weight_decay)

    @property
    def default(self) -> float:
        """The learning rate that it has if none is given."""
        default: float = next(iter(inspect.signature(self.make).parameters.values())).default
        return default


def for_matrices(factory: Callable[..., Any], default: float, share: float, **options: Any) -> Callable[..., Any]:
    """Give the hidden matrices to an optimizer, and the rest to AdamW, whose learning rate is a share of its."""

    def labels(params: Any) -> Any:
        leaves, structure = fo.tree.flatten(params)
        return fo.tree.unflatten(structure, list(map(fo.muon_route, fo.tree.paths(params), leaves)))

    def make(lr: Any = default, weight_decay: Any = 0.0) -> fo.GradientTransformation:
        matrices = factory(lr, weight_decay=weight_decay, **options)
        return fo.partition({"muon": matrices, "adamw": fo.adamw(scaled(lr, share), weight_decay=weight_decay)}, labels)

    return make


def scaled(lr: Any, share: float) -> Any:
    """Return a share of a learning rate or schedule."""
    return lr * share


def muon_with_adamw(lr: Any = 0.02, weight_decay: Any = 0.0) -> fo.GradientTransformation:
    """Make Muon with AdamW, whose learning rates are to each other as their defaults."""
    return fo.muon_with_adamw(lr, scaled(lr, 0.015), weight_decay, ns_dtype=None)


def wrapped(wrapper: Callable[..., Any], factory: Callable[..., Any], default: float) -> Callable[..., Any]:
    """Wrap an optimizer."""

    def make(lr: Any = default, weight_decay: Any = 0.0) -> fo.GradientTransformation:
        made: fo.GradientTransformation = wrapper(factory(lr, weight_decay=weight_decay))
        return made

    return make


def quantized(bits: int) -> Callable[..., Any]:
    """Keep moments in few bits, those of small tensors too: there are no others here."""
    return partial(fo.quantized, bits=bits, min_size=1)


ENTRANTS = [
    # Descent along the gradient, and its sign.
    Entrant("sgd", fo.sgd, L2),
    Entrant("sgd_momentum", partial(fo.sgd, momentum=0.9), L2),
    Entrant("sgd_nesterov", partial(fo.sgd, momentum=0.9, nesterov=True), L2),
    Entrant("sgdp", partial(fo.sgdp, momentum=0.9), L2),
    Entrant("asgd", fo.asgd, L2),
    Entrant("sign_sgd", fo.sign_sgd, L2),
    Entrant("signum", fo.signum, L2),
    Entrant("lion", fo.lion, DECOUPLED),
    Entrant("rprop", fo.rprop, anneals=False),
    # Adam and its family.
    Entrant("adam", fo.adam, L2),
    Entrant("adamw", fo.adamw, DECOUPLED),
    Entrant("nadam", fo.nadam, L2),
    Entrant("nadamw", fo.nadamw, DECOUPLED),
    Entrant("radam", fo.radam, L2),
    Entrant("adamax", fo.adamax, L2),
    Entrant("adabelief", fo.adabelief, DECOUPLED),
    Entrant("adam_atan2", fo.adam_atan2, DECOUPLED),
    Entrant("adam_mini", fo.adam_mini, DECOUPLED),
    Entrant("adamp", fo.adamp, DECOUPLED),
    Entrant("adan", fo.adan, DECOUPLED),
    Entrant("adanorm", fo.adanorm, DECOUPLED),
    Entrant("ademamix", fo.ademamix, DECOUPLED),
    Entrant("simplified_ademamix", fo.simplified_ademamix, DECOUPLED),
    Entrant("adopt", fo.adopt, L2),
    Entrant("grams", fo.grams, DECOUPLED),
    Entrant("laprop", fo.laprop, DECOUPLED),
    Entrant("stable_adamw", fo.stable_adamw, DECOUPLED),
    Entrant("yogi", fo.yogi, L2),
    Entrant("adai", fo.adai, L2),
    # Other ways to scale elements.
    Entrant("adadelta", fo.adadelta, L2),
    Entrant("adagrad", fo.adagrad, L2),
    Entrant("rmsprop", fo.rmsprop, L2),
    Entrant("madgrad", fo.madgrad, L2),
    Entrant("adafactor", fo.adafactor, DECOUPLED),
    Entrant("came", fo.came, DECOUPLED),
    Entrant("sm3", fo.sm3, L2),
    # By tensor.
    Entrant("lamb", fo.lamb, DECOUPLED),
    Entrant("lars", fo.lars, L2),
    Entrant("novograd", fo.novograd, L2),
    Entrant("fromage", fo.fromage),
    # By matrix.
    Entrant("muon", for_matrices(fo.muon, 1e-3, 1.0, adjust_lr_fn="match_rms_adamw", ns_dtype=None), DECOUPLED),
    Entrant("muon_with_adamw", muon_with_adamw, DECOUPLED),
    Entrant("normuon", for_matrices(fo.normuon, 0.02, 0.015, ns_dtype=None), DECOUPLED),
    Entrant("dion", for_matrices(fo.dion, 0.01, 0.015), DECOUPLED),
    Entrant("shampoo", fo.shampoo, DECOUPLED),
    Entrant("soap", fo.soap, DECOUPLED),
    Entrant("scion", partial(fo.scion, momentum=0.1, unconstrained=True, ns_dtype=None)),
    # Without a learning rate to tune; here it is a factor.
    Entrant("prodigy", fo.prodigy, DECOUPLED),
    Entrant("dadapt_adam", fo.dadapt_adam, L2),
    Entrant("dadapt_sgd", fo.dadapt_sgd, L2),
    Entrant("dog", fo.dog, L2),
    Entrant("ldog", fo.ldog, L2),
    Entrant("dowg", fo.dowg, L2),
    Entrant("cocob", fo.cocob, L2, anneals=False),
    # From the loss.
    Entrant("polyak", fo.polyak),
    Entrant("momo", fo.momo, DECOUPLED),
    Entrant("momo_adam", fo.momo_adam, DECOUPLED),
    # Averages and wrappers.
    Entrant("schedule_free_sgd", fo.schedule_free_sgd, L2, averages=True, anneals=False),
    Entrant("schedule_free_adamw", fo.schedule_free_adamw, DECOUPLED, averages=True, anneals=False),
    Entrant("ranger", fo.ranger, DECOUPLED, averages=True),
    Entrant("cautious(adamw)", wrapped(fo.cautious, fo.adamw, 1e-3), DECOUPLED),
    Entrant("lookahead(adamw)", wrapped(fo.lookahead, fo.adamw, 1e-3), DECOUPLED, averages=True),
    Entrant("mars(adamw)", wrapped(fo.mars, fo.adamw, 1e-3), DECOUPLED),
    Entrant("quantized(adamw)", wrapped(quantized(8), fo.adamw, 1e-3), DECOUPLED),
    Entrant("quantized(adamw), 4 bits", wrapped(quantized(4), fo.adamw, 1e-3), DECOUPLED),
    Entrant("sam(adamw)", wrapped(fo.sam, fo.adamw, 1e-3), DECOUPLED),
    # With a model of the curvature.
    Entrant("sophia", fo.sophia, DECOUPLED),
    Entrant("lbfgs", partial(fo.lbfgs, max_iter=1, history_size=10)),
]
NAMED = {entrant.name: entrant for entrant in ENTRANTS}
EXCLUDED = {
    "sgld": "it samples: its loss does not go to a minimum",
    "sparse_adam": "it is Adam for sparse gradients, and there are none here",
}


def public_optimizers() -> list[str]:
    """List the optimizers of the library: factories that take a learning rate first, without parts of rules."""
    return [name for name in fo.names() if _is_optimizer(name, getattr(fo, name, None))]


def _is_optimizer(name: str, factory: Any) -> bool:
    places = ("functorch_optim.optimizers.", "functorch_optim.wrappers.")
    if name.startswith("scale_by_") or not getattr(factory, "__module__", "").startswith(places):
        return False
    return next(iter(inspect.signature(factory).parameters), None) in ("lr", "max_lr")
