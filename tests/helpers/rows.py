"""Rows of the catalogue: what they are, and factories whose arguments are all numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import functorch_optim as fo
from functorch_optim import testing


class Row(NamedTuple):
    """A transformation and how to make it.

    Attributes:
        name: what the test is called.
        make: takes the hyperparameters by name.
        hyperparameters: values of the numeric ones; any of them may be given as a tensor or a schedule instead.
        held: parts of its state that derivatives do not flow through.
        elementwise: whether its links may be run on batches of tensors.
        complex: whether it takes complex parameters.
        initial: hyperparameters of which the value at the first update alone is used.
        scheduled: whether its hyperparameters may be schedules.
        tolerance: of rounding, relative.
        without: properties of the test kit that it does not have.
    """

    name: str
    make: Callable[..., fo.GradientTransformation]
    hyperparameters: dict[str, float] = {}  # noqa: RUF012
    held: tuple[str, ...] = ()
    elementwise: bool = True
    complex: bool = True
    initial: tuple[str, ...] = ()
    scheduled: bool = True
    tolerance: float = 1e-12
    without: tuple[str, ...] = ()

    @property
    def subject(self) -> testing.Subject:
        """What the test kit checks."""
        return testing.Subject(self.make, self.hyperparameters, self.tolerance)

    @property
    def keeps_hyperparameters(self) -> bool:
        """Whether its state keeps hyperparameters, so that param groups must not."""
        return any(link.rule.keeps is not None for link in self()._links)

    def __call__(self, **changed: Any) -> fo.GradientTransformation:
        """Make the transformation, with some hyperparameters changed."""
        return self.make(**{**self.hyperparameters, **changed})


def with_betas(factory: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """Let a factory take its two betas apart."""

    def make(beta1: Any, beta2: Any, **hyperparameters: Any) -> Any:
        return factory(betas=(beta1, beta2), **hyperparameters, **static)

    return make


def not_vectors(params: Any) -> Any:
    """Mask: parameters that are not vectors."""
    return fo.tree.map(lambda p: p.ndim != 1, params)


def not_single(params: Any) -> Any:
    """Mask: parameters of several elements. LAMB's step of one element depends on its sign alone."""
    return fo.tree.map(lambda p: p.numel() > 1, params)


def chained(max_norm: Any, lr: Any) -> fo.GradientTransformation:
    """Make a chain of a reduction over the tree, an optimizer, and a mask."""
    return fo.chain(fo.clip_by_global_norm(max_norm), fo.adam(lr, eps=1e-3), fo.masked(fo.scale(0.5), not_vectors))


def parted(lr: Any, momentum: Any) -> fo.GradientTransformation:
    """Make a partition."""
    parts = {True: fo.sgd(lr, momentum), False: fo.chain(fo.clip_by_norm(lr), fo.adamw(lr, eps=1e-3))}
    return fo.partition(parts, not_vectors)


def rounded_at_random(lr: Any, momentum: Any) -> fo.GradientTransformation:
    """Make SGD that rounds parameters in half precision at random."""
    return fo.stochastic_rounding(fo.sgd(lr, momentum), generator=0)


def of_whole_trees(factor: Any) -> fo.GradientTransformation:
    """Make a transformation from functions of whole trees, with a state."""

    def init(params: Any) -> Any:
        return fo.tree.map(torch.zeros_like, params)

    def update(updates: Any, state: Any, params: Any) -> Any:
        total = fo.tree.map(lambda g, s: s + g, updates, state)
        kept = fo.tree.map(lambda s, g: s if g is None else s + g, state, updates)
        return fo.tree.map(torch.sin, total), kept

    return fo.chain(fo.GradientTransformation(init, update), fo.clip_by_norm(factor))


def tanh(updates: Any, params: Any) -> Any:
    """Transform whole trees without a state."""
    return fo.tree.map(torch.tanh, updates)


def with_three_betas(factory: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """Let a factory take its three betas apart."""

    def make(beta1: Any, beta2: Any, beta3: Any, **hyperparameters: Any) -> Any:
        return factory(betas=(beta1, beta2, beta3), **hyperparameters, **static)

    return make


def with_pairs(factory: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """Let a factory take its etas and step sizes apart."""

    def make(etaminus: Any, etaplus: Any, smallest: Any, largest: Any, **hyperparameters: Any) -> Any:
        return factory(etas=(etaminus, etaplus), step_sizes=(smallest, largest), **hyperparameters, **static)

    return make


def adafactor(eps1: Any, eps2: Any, **hyperparameters: Any) -> fo.GradientTransformation:
    """Make Adafactor with its two eps apart."""
    return fo.adafactor(eps=(eps1, eps2), **hyperparameters)


def came(eps1: Any, eps2: Any, **hyperparameters: Any) -> fo.GradientTransformation:
    """Make CAME with its two eps apart."""
    return with_three_betas(fo.came, eps=(eps1, eps2))(**hyperparameters)


def matrices(params: Any) -> Any:
    """Label parameters by whether they are matrices."""
    return fo.tree.map(lambda p: p.ndim == 2, params)


def muon(lr: Any, weight_decay: Any, momentum: Any, eps: Any) -> fo.GradientTransformation:
    """Make Muon for matrices, in full precision, and SGD for the rest."""
    hidden = fo.muon(lr, weight_decay, momentum, eps=eps, ns_dtype=None)
    return fo.partition({True: hidden, False: fo.sgd(lr)}, matrices)


def for_matrices(factory: Callable[..., Any], **static: Any) -> Callable[..., fo.GradientTransformation]:
    """Make an optimizer for matrices, in full precision, and SGD for the rest."""

    def make(lr: Any, **hyperparameters: Any) -> fo.GradientTransformation:
        hidden = factory(lr, **hyperparameters, ns_dtype=None, **static)
        return fo.partition({True: hidden, False: fo.sgd(lr)}, matrices)

    return make


def routed(lr: Any, adamw_lr: Any, weight_decay: Any, momentum: Any, adamw_eps: Any) -> fo.GradientTransformation:
    """Make Muon with AdamW."""
    return fo.muon_with_adamw(lr, adamw_lr, weight_decay, momentum, adamw_eps=adamw_eps, ns_dtype=None)


def dion(lr: Any, **hyperparameters: Any) -> fo.GradientTransformation:
    """Make Dion of rank one for matrices, and SGD for the rest."""
    return fo.partition({True: fo.dion(lr, rank=1, **hyperparameters), False: fo.sgd(lr)}, matrices)


def descending_trace(momentum: Any) -> fo.GradientTransformation:
    """Make momentum that looks ahead, and goes downhill: uphill, rounding errors grow as fast as the parameters."""
    return fo.chain(fo.trace(momentum, nesterov=True), fo.scale(-0.1))


def searching(lr: Any) -> fo.GradientTransformation:
    """Make L-BFGS with a line search."""
    return fo.lbfgs(lr, max_iter=1, history_size=2, line_search_fn="strong_wolfe")


def plateau(factor: Any) -> fo.GradientTransformation:
    """Make a scale that is lowered unless the loss falls to a tenth."""
    return fo.reduce_on_plateau(factor, patience=0, threshold=0.9)


def accumulated(lr: Any, weight_decay: Any) -> fo.GradientTransformation:
    """Make steps of two gradients each."""
    return fo.accumulate(fo.adamw(lr, eps=1e-3, weight_decay=weight_decay), 2)


def accumulated_and_clipped(lr: Any, eps: Any) -> fo.GradientTransformation:
    """Make steps of the sum of two gradients each, whose norm is a reduction over the tree."""
    return fo.accumulate(fo.chain(fo.clip_by_global_norm(0.7), fo.adam(lr, eps=eps)), 2, mean=False)


def schedule_free(lr: Any, momentum: Any, r: Any) -> fo.GradientTransformation:
    """Make Schedule-Free SGD. The largest learning rate so far has a kink where the rate stays."""
    return fo.schedule_free(fo.sgd(lr, 0.5, weight_decay=0.1), momentum, r=r, weight_lr_power=0.0)


def decayed(before: str, **options: Any) -> Callable[..., fo.GradientTransformation]:
    """Make a chain of weight decay and a learning rate, which stands before or behind it."""

    def make(weight_decay: Any, lr: Any, **numbers: Any) -> fo.GradientTransformation:
        decay, rate = fo.add_decayed_weights(weight_decay, **options, **numbers), fo.scale_by_learning_rate(lr)
        return fo.chain(decay, rate) if before == "decay" else fo.chain(rate, decay)

    return make


def zclip(z_thresh: Any, alpha: Any, max_grad_norm: Any, eps: Any, clip_factor: Any) -> fo.GradientTransformation:
    """Make ZClip for which most norms are spikes, and the first ones greater than the largest that there may be."""
    largest = fo.tree.map(lambda number: fo.schedules.exponential(1.0, 10.0) * number, max_grad_norm)
    return growing(fo.zclip(alpha, z_thresh, largest, eps, warmup_steps=2, clip_factor=clip_factor))


def autoclip(percentile: Any, eps: Any) -> fo.GradientTransformation:
    """Make AutoClip for which most norms are greater than those before."""
    return growing(fo.autoclip(percentile, eps=eps))


def grafted(beta1: Any, beta2: Any, lr: Any, **options: Any) -> fo.GradientTransformation:
    """Make Shampoo with the norm of another method, and SGD for single elements, whose steps are then that method's."""
    several = fo.shampoo(lr, (beta1, beta2), **options)
    return fo.partition({True: several, False: fo.sgd(lr, maximize=options.get("maximize", False))}, not_single)


def soap(beta1: Any, beta2: Any, **options: Any) -> fo.GradientTransformation:
    """Make SOAP of gradients of full rank, that change from step to step, also where the parameters stay.

    Of a gradient of less rank the bases depend on rounding, of which differences know nothing. So do the numbers of the
    second step where its gradient is the first one: in the bases of that it is diagonal but for rounding.
    """
    return fo.chain(fo.add_decayed_weights(lambda count: 0.2 * (count + 1)), fo.soap(betas=(beta1, beta2), **options))


def soap_normalized(lr: Any, **options: Any) -> fo.GradientTransformation:
    """Make SOAP with normalized updates, and SGD for single elements, whose updates are then signs."""
    several = soap(lr=lr, normalize_grads=True, max_dim=2, maximize=True, **options)
    return fo.partition({True: several, False: fo.sgd(lr, maximize=True)}, not_single)


def growing(tx: fo.GradientTransformation) -> fo.GradientTransformation:
    """Let what a transformation is given grow from step to step."""
    return fo.chain(fo.scale(lambda count: 3.0**count), tx)


def averaged(lr: Any, decay: Any) -> fo.GradientTransformation:
    """Make an average that is corrected, and begins with the decay of its warm-up."""
    return fo.ema_weights(fo.sgd(lr, 0.5), decay, warmup="torch_ema", debias=True)


def skipped(lr: Any, eps: Any) -> fo.GradientTransformation:
    """Make steps of which the second is left out."""
    return fo.skip(fo.adam(lr, eps=eps), lambda step: step == 1)


def finite_and_clipped(lr: Any, max_norm: Any) -> fo.GradientTransformation:
    """Make steps that are left out where gradients are not finite."""
    return fo.apply_if_finite(fo.chain(fo.clip_by_global_norm(max_norm), fo.sgd(lr, 0.5, weight_decay=0.1)))


def sharpness_aware(lr: Any, rho: Any, **options: Any) -> fo.GradientTransformation:
    """Make SAM around SGD with momentum."""
    return fo.sam(fo.sgd(lr, 0.5), rho, **options)


def cautious_count(lr: Any, momentum: Any) -> fo.GradientTransformation:
    """Make cautious momentum, with the other way of scaling."""
    return fo.chain(fo.cautious(fo.trace(momentum), "count"), fo.scale_by_learning_rate(lr))


def less_variance(lr: Any, gamma: Any, beta1: Any) -> fo.GradientTransformation:
    """Make MARS, of gradients of which only some are clipped: of a single element the clipped one is a sign."""
    return fo.chain(fo.scale(0.3), fo.mars(fo.sgd(lr, 0.5), gamma, beta1))


def projected(lr: Any, momentum: Any) -> fo.GradientTransformation:
    """Make projected descent, in a ball."""
    return fo.project(fo.sgd(lr, momentum), lambda params: fo.projections.l2_ball(params, 1.5))
