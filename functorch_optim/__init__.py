"""Optimizers for PyTorch as pure (init, update) pairs over trees of tensors, and as torch.optim classes."""

from functorch_optim import meta, optim, projections, schedules, tree
from functorch_optim._control import cond
from functorch_optim._core.combine import chain, masked, named_chain, partition
from functorch_optim._core.hyperparameters import Hyperparameter, at
from functorch_optim._core.leafwise import identity, leafwise, stateless
from functorch_optim._core.rule import EmptyState, StepState, leaf_state
from functorch_optim._core.saving import Loaded, load_state_dict, migrate, state_dict
from functorch_optim._core.stepping import eval_params, step, step_
from functorch_optim._core.transformation import GradientTransformation, apply_updates, factory
from functorch_optim._labels.groups import label_table, param_groups
from functorch_optim._labels.matching import label
from functorch_optim._labels.uses import frozen, layer_decay, weight_decay_mask
from functorch_optim._learning_rate import learning_rate
from functorch_optim._lr_sweep import LRSweep, lr_sweep
from functorch_optim._minimize import Minimized, minimize
from functorch_optim._modules import buffers_of, params_of, update_bn
from functorch_optim._names import get, names
from functorch_optim._numerics import debias, safe_norm, safe_sqrt
from functorch_optim.optim._convert import from_torch, to_torch
from functorch_optim.optim._wrapper import Optimizer
from functorch_optim.optimizers._curvature import gauss_newton_bartlett, hutchinson
from functorch_optim.optimizers.adabelief import adabelief, scale_by_belief
from functorch_optim.optimizers.adadelta import adadelta, scale_by_adadelta
from functorch_optim.optimizers.adafactor import adafactor
from functorch_optim.optimizers.adagrad import adagrad, scale_by_rss
from functorch_optim.optimizers.adai import adai, scale_by_adai
from functorch_optim.optimizers.adam import adam, adamw, scale_by_adam, sparse_adam
from functorch_optim.optimizers.adam_atan2 import adam_atan2, scale_by_adam_atan2
from functorch_optim.optimizers.adam_mini import adam_mini
from functorch_optim.optimizers.adamax import adamax, scale_by_adamax
from functorch_optim.optimizers.adamp import adamp, sgdp
from functorch_optim.optimizers.adan import adan, scale_by_adan
from functorch_optim.optimizers.adanorm import adanorm, scale_by_adanorm
from functorch_optim.optimizers.ademamix import (
    ademamix,
    scale_by_ademamix,
    scale_by_simplified_ademamix,
    simplified_ademamix,
)
from functorch_optim.optimizers.adopt import adopt, scale_by_adopt
from functorch_optim.optimizers.asgd import asgd
from functorch_optim.optimizers.came import came
from functorch_optim.optimizers.cocob import cocob
from functorch_optim.optimizers.dadaptation import dadapt_adam, dadapt_sgd
from functorch_optim.optimizers.dion import dion
from functorch_optim.optimizers.dog import dog, dowg, ldog
from functorch_optim.optimizers.fromage import fromage
from functorch_optim.optimizers.grams import grams, scale_by_grams
from functorch_optim.optimizers.lamb import lamb
from functorch_optim.optimizers.laprop import laprop, scale_by_laprop
from functorch_optim.optimizers.lars import lars, scale_by_lars
from functorch_optim.optimizers.lbfgs import LBFGSState, lbfgs
from functorch_optim.optimizers.lion import lion, scale_by_lion
from functorch_optim.optimizers.madgrad import madgrad
from functorch_optim.optimizers.momo import momo, momo_adam
from functorch_optim.optimizers.muon import muon, normalize_rows, normuon, scale_by_muon
from functorch_optim.optimizers.muon_with_adamw import muon_route, muon_with_adamw
from functorch_optim.optimizers.nadam import nadam, scale_by_nadam
from functorch_optim.optimizers.nadamw import nadamw, scale_by_nadamw
from functorch_optim.optimizers.novograd import novograd
from functorch_optim.optimizers.polyak import polyak
from functorch_optim.optimizers.prodigy import prodigy
from functorch_optim.optimizers.qk_clip import qk_clip
from functorch_optim.optimizers.radam import radam, scale_by_radam
from functorch_optim.optimizers.ranger import ranger
from functorch_optim.optimizers.rmsprop import rmsprop, scale_by_rms
from functorch_optim.optimizers.rprop import rprop, scale_by_rprop
from functorch_optim.optimizers.scion import scale_by_lmo, scion
from functorch_optim.optimizers.sgd import sgd
from functorch_optim.optimizers.sgld import sgld
from functorch_optim.optimizers.shampoo import scale_by_shampoo, shampoo
from functorch_optim.optimizers.signum import sign_sgd, signum
from functorch_optim.optimizers.sm3 import sm3
from functorch_optim.optimizers.soap import scale_by_soap, soap
from functorch_optim.optimizers.sophia import SophiaState, sophia
from functorch_optim.optimizers.stable_adamw import stable_adamw
from functorch_optim.optimizers.yogi import scale_by_yogi, yogi
from functorch_optim.transforms.clipping import (
    adaptive_grad_clip,
    clip,
    clip_by_block_rms,
    clip_by_global_norm,
    clip_by_norm,
)
from functorch_optim.transforms.constraints import keep_params_nonnegative, orthogonalize_against_params
from functorch_optim.transforms.decay import add_decayed_weights
from functorch_optim.transforms.momentum import ema, optimistic_gradient, trace
from functorch_optim.transforms.noise import AddNoiseState, add_noise
from functorch_optim.transforms.norm_history import AutoClipState, autoclip, zclip
from functorch_optim.transforms.normalizing import (
    centralize,
    normalize_by_update_norm,
    scale_by_sign,
    scale_by_trust_ratio,
)
from functorch_optim.transforms.plateau import ReduceOnPlateauState, reduce_on_plateau
from functorch_optim.transforms.scaling import maximize, scale, scale_by_learning_rate, scale_by_schedule
from functorch_optim.transforms.zeros import freeze, set_to_zero, zero_nans
from functorch_optim.tree import MaskedNode, stop_gradient
from functorch_optim.wrappers.accumulation import AccumulateState, accumulate
from functorch_optim.wrappers.averaging import AverageState, ema_weights, polynomial_average, swa
from functorch_optim.wrappers.casting import cast_states
from functorch_optim.wrappers.cautious import cautious
from functorch_optim.wrappers.injection import HyperparamsState, ScheduledHyperparamsState, inject_hyperparams
from functorch_optim.wrappers.lookahead import LookaheadState, lookahead
from functorch_optim.wrappers.mars import MarsState, mars
from functorch_optim.wrappers.monitoring import GradientMetrics, UpdateMetrics, metrics, monitor
from functorch_optim.wrappers.offloading import OffloadState, offload
from functorch_optim.wrappers.projecting import project
from functorch_optim.wrappers.quantizing import QuantizedState, quantized
from functorch_optim.wrappers.rounding import (
    KahanState,
    MasterWeightsState,
    StochasticRoundingState,
    kahan,
    master_weights,
    stochastic_rounding,
)
from functorch_optim.wrappers.schedule_free import (
    ScheduleFreeState,
    gpa,
    schedule_free,
    schedule_free_adamw,
    schedule_free_sgd,
)
from functorch_optim.wrappers.sharpness import sam
from functorch_optim.wrappers.skipping import ApplyIfFiniteState, SkipState, apply_if_finite, skip

from functorch_optim import _former  # isort: skip  # noqa: F401 - after all that it names

__version__ = "0.1.0"

__all__ = [
    "AccumulateState",
    "AddNoiseState",
    "ApplyIfFiniteState",
    "AutoClipState",
    "AverageState",
    "EmptyState",
    "GradientMetrics",
    "GradientTransformation",
    "Hyperparameter",
    "HyperparamsState",
    "KahanState",
    "LBFGSState",
    "LRSweep",
    "Loaded",
    "LookaheadState",
    "MarsState",
    "MaskedNode",
    "MasterWeightsState",
    "Minimized",
    "OffloadState",
    "Optimizer",
    "QuantizedState",
    "ReduceOnPlateauState",
    "ScheduleFreeState",
    "ScheduledHyperparamsState",
    "SkipState",
    "SophiaState",
    "StepState",
    "StochasticRoundingState",
    "UpdateMetrics",
    "accumulate",
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adai",
    "adam",
    "adam_atan2",
    "adam_mini",
    "adamax",
    "adamp",
    "adamw",
    "adan",
    "adanorm",
    "adaptive_grad_clip",
    "add_decayed_weights",
    "add_noise",
    "ademamix",
    "adopt",
    "apply_if_finite",
    "apply_updates",
    "asgd",
    "at",
    "autoclip",
    "buffers_of",
    "came",
    "cast_states",
    "cautious",
    "centralize",
    "chain",
    "clip",
    "clip_by_block_rms",
    "clip_by_global_norm",
    "clip_by_norm",
    "cocob",
    "cond",
    "dadapt_adam",
    "dadapt_sgd",
    "debias",
    "dion",
    "dog",
    "dowg",
    "ema",
    "ema_weights",
    "eval_params",
    "factory",
    "freeze",
    "from_torch",
    "fromage",
    "frozen",
    "gauss_newton_bartlett",
    "get",
    "gpa",
    "grams",
    "hutchinson",
    "identity",
    "inject_hyperparams",
    "kahan",
    "keep_params_nonnegative",
    "label",
    "label_table",
    "lamb",
    "laprop",
    "lars",
    "layer_decay",
    "lbfgs",
    "ldog",
    "leaf_state",
    "leafwise",
    "learning_rate",
    "lion",
    "load_state_dict",
    "lookahead",
    "lr_sweep",
    "madgrad",
    "mars",
    "masked",
    "master_weights",
    "maximize",
    "meta",
    "metrics",
    "migrate",
    "minimize",
    "momo",
    "momo_adam",
    "monitor",
    "muon",
    "muon_route",
    "muon_with_adamw",
    "nadam",
    "nadamw",
    "named_chain",
    "names",
    "normalize_by_update_norm",
    "normalize_rows",
    "normuon",
    "novograd",
    "offload",
    "optim",
    "optimistic_gradient",
    "orthogonalize_against_params",
    "param_groups",
    "params_of",
    "partition",
    "polyak",
    "polynomial_average",
    "prodigy",
    "project",
    "projections",
    "qk_clip",
    "quantized",
    "radam",
    "ranger",
    "reduce_on_plateau",
    "rmsprop",
    "rprop",
    "safe_norm",
    "safe_sqrt",
    "sam",
    "scale",
    "scale_by_adadelta",
    "scale_by_adai",
    "scale_by_adam",
    "scale_by_adam_atan2",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_adanorm",
    "scale_by_ademamix",
    "scale_by_adopt",
    "scale_by_belief",
    "scale_by_grams",
    "scale_by_laprop",
    "scale_by_lars",
    "scale_by_learning_rate",
    "scale_by_lion",
    "scale_by_lmo",
    "scale_by_muon",
    "scale_by_nadam",
    "scale_by_nadamw",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rprop",
    "scale_by_rss",
    "scale_by_schedule",
    "scale_by_shampoo",
    "scale_by_sign",
    "scale_by_simplified_ademamix",
    "scale_by_soap",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "schedule_free",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "schedules",
    "scion",
    "set_to_zero",
    "sgd",
    "sgdp",
    "sgld",
    "shampoo",
    "sign_sgd",
    "signum",
    "simplified_ademamix",
    "skip",
    "sm3",
    "soap",
    "sophia",
    "sparse_adam",
    "stable_adamw",
    "state_dict",
    "stateless",
    "step",
    "step_",
    "stochastic_rounding",
    "stop_gradient",
    "swa",
    "to_torch",
    "trace",
    "tree",
    "update_bn",
    "weight_decay_mask",
    "yogi",
    "zclip",
    "zero_nans",
]
