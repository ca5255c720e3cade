"""Every transformation of the library, with the options that change what it computes: a row each.

A new transformation is one more row here, and every property in test_properties.py is tested of it.
"""

from functools import partial

import pytest
import torch
from rows import (
    Row,
    accumulated,
    accumulated_and_clipped,
    adafactor,
    autoclip,
    averaged,
    came,
    cautious_count,
    chained,
    decayed,
    descending_trace,
    dion,
    finite_and_clipped,
    for_matrices,
    grafted,
    less_variance,
    muon,
    not_single,
    not_vectors,
    of_whole_trees,
    parted,
    plateau,
    projected,
    rounded_at_random,
    routed,
    schedule_free,
    searching,
    sharpness_aware,
    skipped,
    soap,
    soap_normalized,
    tanh,
    with_betas,
    with_pairs,
    with_three_betas,
    zclip,
)

import functorch_optim as fo
from functorch_optim import testing

# Values with which all of them matter within a few steps.
ADAM = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3}
SHORT = {**ADAM, "beta2": 0.5}  # that a maximum is not always the latest
RPROP = {"lr": 0.1, "etaminus": 0.5, "etaplus": 1.2, "smallest": 0.055, "largest": 0.15}
INITIAL_SUM = ("initial_accumulator_value",)
DECAYED = {"lr": 0.1, "weight_decay": 0.1}
FREE = {"lr": 1.0, "weight_decay": 0.1, "d0": 0.1}
LAMB = {**DECAYED, **ADAM}
CAME = {"beta1": 0.9, "beta2": 0.99, "beta3": 0.9, "eps1": 1e-2, "eps2": 1e-2, "clip_threshold": 0.7}
MOMENTS = {"beta1": 0.5, "beta2": 0.9}
SOAP = {**MOMENTS, "eps": 0.1, "shampoo_beta": 0.8}
ADOPT = {**DECAYED, **ADAM, "eps": 0.3}
LARS = {**DECAYED, "momentum": 0.9, "trust_coefficient": 0.5, "eps": 1e-3}
WARMUPS = {"alpha_warmup": 8.5, "beta3_warmup": 9.5}

CATALOGUE = [
    Row("identity", fo.identity),
    Row("scale", fo.scale, {"factor": -0.5}),
    Row("scale_by_learning_rate", fo.scale_by_learning_rate, {"lr": 0.1}),
    Row(
        "scale_by_schedule",
        lambda gamma: fo.scale_by_schedule(fo.schedules.exponential(0.1, gamma)),
        {"gamma": 0.9},
        scheduled=False,
    ),
    Row("maximize", fo.maximize),
    Row("set_to_zero", fo.set_to_zero),
    Row("zero_nans", fo.zero_nans),
    Row("freeze", partial(fo.freeze, not_vectors)),
    Row("stateless", partial(fo.stateless, tanh), elementwise=False),
    Row("tree_transformation", of_whole_trees, {"factor": 0.5}, elementwise=False),
    Row("clip", fo.clip, {"clip_value": 0.7}),
    Row("clip_by_norm", fo.clip_by_norm, {"max_norm": 0.7}, elementwise=False),
    Row("clip_by_norm_3", partial(fo.clip_by_norm, norm_type=3.0), {"max_norm": 0.6}, elementwise=False),
    Row("clip_by_global_norm", fo.clip_by_global_norm, {"max_norm": 0.7}),
    Row("clip_by_global_norm_1", partial(fo.clip_by_global_norm, norm_type=1.0, eps=1e-6), {"max_norm": 0.7}),
    Row("clip_by_global_norm_inf", partial(fo.clip_by_global_norm, norm_type=float("inf")), {"max_norm": 0.7}),
    Row("clip_by_global_norm_skip", partial(fo.clip_by_global_norm, nonfinite="skip"), {"max_norm": 0.7}),
    Row("add_decayed_weights", fo.add_decayed_weights, {"weight_decay": 0.1}),
    Row("add_decayed_weights_mask", partial(fo.add_decayed_weights, mask=not_vectors), {"weight_decay": 0.1}),
    Row("adaptive_grad_clip", fo.adaptive_grad_clip, {"clipping": 0.3, "eps": 0.7}, elementwise=False),
    Row("clip_by_block_rms", fo.clip_by_block_rms, {"threshold": 0.5}, elementwise=False),
    Row("zclip", zclip, {"z_thresh": 0.1, "alpha": 0.5, "max_grad_norm": 0.05, "eps": 0.1, "clip_factor": 0.9}),
    Row("autoclip", autoclip, {"percentile": 30.0, "eps": 1e-3}),
    Row("scale_by_sign", fo.scale_by_sign),
    Row("normalize_by_update_norm", fo.normalize_by_update_norm, {"scale_factor": 0.7, "eps": 1e-3}),
    Row(
        "scale_by_trust_ratio",
        fo.scale_by_trust_ratio,
        {"min_norm": 1.0, "trust_coefficient": 0.5, "eps": 1e-3},
        elementwise=False,
    ),
    Row("centralize", fo.centralize, elementwise=False),
    Row("orthogonalize_against_params", fo.orthogonalize_against_params, elementwise=False),
    Row("keep_params_nonnegative", fo.keep_params_nonnegative),
    Row(
        "add_noise",
        partial(fo.add_noise, generator=0),
        {"eta": 0.1, "gamma": 0.55},
        elementwise=False,
        without=("leaves",),
    ),
    Row("ema", fo.ema, {"decay": 0.9}),
    Row("ema_biased", partial(fo.ema, debias=False), {"decay": 0.9}),
    Row("optimistic_gradient", fo.optimistic_gradient, {"alpha": 0.9, "beta": 0.5}),
    Row("add_decayed_weights_cautious", decayed("decay", cautious=True), DECAYED),
    Row("add_decayed_weights_init", decayed("decay", towards="init"), DECAYED),
    Row("add_decayed_weights_independent", decayed("decay", kind="independent"), DECAYED),
    Row("add_decayed_weights_last", decayed("rate", kind="independent", cautious=True), DECAYED),
    Row("add_decayed_weights_corrected", decayed("decay", kind="corrected"), {**DECAYED, "lr_max": 0.2}),
    Row("trace", fo.trace, {"momentum": 0.9}),
    Row("trace_dampening", fo.trace, {"momentum": 0.9, "dampening": 0.5}),
    Row("trace_nesterov", descending_trace, {"momentum": 0.9}),
    Row("scale_by_adam", with_betas(fo.scale_by_adam), ADAM),
    Row("scale_by_amsgrad", with_betas(fo.scale_by_adam, amsgrad=True), SHORT),
    Row("scale_by_adadelta", fo.scale_by_adadelta, {"rho": 0.9, "eps": 1e-3}),
    Row("sgd", fo.sgd, {"lr": 0.1}),
    Row("sgd_momentum", partial(fo.sgd, maximize=True), {**DECAYED, "momentum": 0.9, "dampening": 0.5}),
    Row("sgd_nesterov", partial(fo.sgd, nesterov=True), {**DECAYED, "momentum": 0.9}),
    Row("adam", with_betas(fo.adam), {**DECAYED, **ADAM}),
    Row("adam_amsgrad", with_betas(fo.adam, amsgrad=True), {**DECAYED, **SHORT}),
    Row("adam_decoupled", with_betas(fo.adam, decoupled_weight_decay=True), {**DECAYED, **ADAM}),
    Row("adamw", with_betas(fo.adamw), {**DECAYED, **ADAM}),
    Row("adamw_mask", with_betas(fo.adamw, mask=not_vectors, amsgrad=True, maximize=True), {**DECAYED, **SHORT}),
    Row("adadelta", partial(fo.adadelta, maximize=True), {**DECAYED, "rho": 0.9, "eps": 1e-3}),
    Row("scale_by_adam_lazy", with_betas(fo.scale_by_adam, lazy=True), ADAM),
    Row("sparse_adam", with_betas(fo.sparse_adam, maximize=True), {"lr": 0.1, **ADAM}),
    Row("scale_by_nadam", with_betas(fo.scale_by_nadam), {**ADAM, "momentum_decay": 0.1}),
    Row("nadam", with_betas(fo.nadam, maximize=True), {**DECAYED, **ADAM, "momentum_decay": 0.1}),
    Row("nadam_decoupled", with_betas(fo.nadam, decoupled_weight_decay=True), {**DECAYED, **ADAM}),
    Row("scale_by_radam", with_betas(fo.scale_by_radam), ADAM),
    Row("radam", with_betas(fo.radam, maximize=True), {**DECAYED, **ADAM}),
    Row("radam_decoupled", with_betas(fo.radam, decoupled_weight_decay=True), {**DECAYED, **ADAM}),
    Row("scale_by_adamax", with_betas(fo.scale_by_adamax), SHORT),
    Row("adamax", with_betas(fo.adamax), {**DECAYED, **SHORT}),
    Row("lion", with_betas(fo.lion), {**DECAYED, "beta1": 0.9, "beta2": 0.5}),
    Row("sign_sgd", partial(fo.sign_sgd, decoupled_weight_decay=True, maximize=True), DECAYED),
    Row("signum", partial(fo.signum, decoupled_weight_decay=True), {**DECAYED, "momentum": 0.5}),
    Row("lamb", with_betas(fo.lamb, mask=not_single), LAMB),
    Row("lamb_clipped", with_betas(fo.lamb, bias_correction=False, mask=not_vectors), {**LAMB, "trust_clip": 0.3}),
    Row("lars", fo.lars, LARS),
    Row("lars_nesterov", partial(fo.lars, nesterov=True, mask=not_vectors, maximize=True), LARS),
    Row("ademamix", with_three_betas(fo.ademamix), {**DECAYED, **ADAM, "beta3": 0.97, **WARMUPS, "alpha": 2.0}),
    Row(
        "simplified_ademamix",
        with_betas(fo.simplified_ademamix, maximize=True),
        {**DECAYED, "lr": 0.02, **ADAM, "alpha": 2.0, "beta1_warmup": 9.5, "min_beta1": 0.5},
    ),
    Row("adopt", with_betas(fo.adopt), ADOPT),
    Row("adopt_clipped", with_betas(fo.adopt, decoupled_weight_decay=True), {**ADOPT, "clip": 0.9}),
    Row("adabelief", with_betas(fo.adabelief), {**DECAYED, **ADAM}),
    Row(
        "adabelief_rectified",
        with_betas(fo.adabelief, rectify=True, decoupled_weight_decay=False, maximize=True),
        {**DECAYED, **ADAM},
    ),
    Row("adan", with_three_betas(fo.adan), {**DECAYED, **ADAM, "beta3": 0.97}),
    Row("adan_decoupled", with_three_betas(fo.adan, proximal=False), {**DECAYED, **ADAM, "beta3": 0.97}),
    Row("nadamw", with_betas(fo.nadamw, mask=not_vectors), {**DECAYED, **ADAM}),
    Row("nadamw_ahead", with_betas(fo.nadamw, correct_ahead=True, maximize=True), {**DECAYED, **ADAM}),
    Row("stable_adamw", with_betas(fo.stable_adamw), {**DECAYED, **ADAM}, complex=False),
    Row(
        "yogi",
        with_betas(fo.yogi),
        {**DECAYED, **ADAM, "initial_accumulator_value": 0.1},
        initial=INITIAL_SUM,
    ),
    Row("laprop", with_betas(fo.laprop), {**DECAYED, **ADAM}),
    Row("adam_atan2", with_betas(fo.adam_atan2), {**DECAYED, "beta1": 0.9, "beta2": 0.99, "a": 1.27, "b": 1.5}),
    Row("adanorm", with_betas(fo.adanorm), {**DECAYED, **ADAM, "r": 0.9}, complex=False),
    Row("grams", with_betas(fo.grams), {**DECAYED, **ADAM}),
    Row(
        "adai", with_betas(fo.adai, decoupled_weight_decay=True), {**DECAYED, "beta1": 0.3, "beta2": 0.97, "eps": 0.02}
    ),
    Row("scale_by_rss", fo.scale_by_rss, {"initial_accumulator_value": 0.1, "eps": 1e-3}, initial=INITIAL_SUM),
    Row("adagrad", fo.adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3}),
    Row(
        "adagrad_decay",
        partial(fo.adagrad, maximize=True),
        {**DECAYED, "initial_accumulator_value": 0.1},
        initial=INITIAL_SUM,
    ),
    Row("scale_by_rms", fo.scale_by_rms, {"alpha": 0.9, "eps": 1e-3}),
    Row("scale_by_rms_corrected", partial(fo.scale_by_rms, bias_correction=True), {"alpha": 0.9, "eps": 1e-3}),
    Row("scale_by_rms_centered", partial(fo.scale_by_rms, centered=True), {"alpha": 0.9, "eps": 1e-3}),
    Row("rmsprop", partial(fo.rmsprop, maximize=True), {**DECAYED, "alpha": 0.9, "eps": 1e-3}),
    Row(
        "rmsprop_centered",
        partial(fo.rmsprop, centered=True),
        {**DECAYED, "alpha": 0.9, "momentum": 0.9, "eps": 1e-3},
    ),
    Row("scale_by_rprop", fo.scale_by_rprop, {"lr": 0.1}, initial=("lr",)),
    Row("rprop", with_pairs(fo.rprop), RPROP, initial=("lr",)),
    Row("asgd", fo.asgd, {**DECAYED, "lambd": 0.1, "alpha": 0.75, "t0": 0.3}),
    Row(
        "adafactor",
        partial(adafactor, maximize=True),
        {**DECAYED, "beta2_decay": -0.8, "eps1": 1e-3, "eps2": 1e-3, "d": 1.01},
        complex=False,
    ),
    Row(
        "adafactor_large_eps",
        partial(adafactor, maximize=True),
        {"lr": 0.1, "beta2_decay": -0.8, "eps1": 0.3, "eps2": 2.0, "d": 1.01},
        complex=False,
    ),
    Row("adafactor_epsilon", fo.adafactor, {"lr": 0.1}, elementwise=False, complex=False),
    Row(
        "adafactor_t5",
        partial(adafactor, relative_step=False, add_eps=True, decay="step"),
        {**DECAYED, "beta2_decay": -0.8, "eps1": 1e-5, "eps2": 1e-3, "d": 1.01, "beta1": 0.9},
        complex=False,
    ),
    Row(
        "adafactor_optax",
        partial(adafactor, relative_step=False, add_eps=True, min_dim_size_to_factor=2, decay="independent"),
        {**DECAYED, "beta2_decay": -0.8, "eps1": 1e-5, "eps2": 2.0, "d": 1.01},
        elementwise=False,
        complex=False,
    ),
    Row(
        "came",
        partial(came, maximize=True),
        {**DECAYED, **CAME},
        complex=False,
    ),
    Row(
        "came_corrected",
        partial(came, bias_correction=True),
        {"lr": 0.1, **CAME, "beta2": 0.9},  # nearer to 1, second derivatives by it are differences of large numbers
        complex=False,
    ),
    Row("muon", muon, {**DECAYED, "momentum": 0.9, "eps": 1e-7}, complex=False),
    Row("muon_large_eps", muon, {**DECAYED, "momentum": 0.9, "eps": 10.0}, complex=False),
    Row(
        "muon_polar_express",
        for_matrices(fo.muon, ns_coefficients="polar_express", adjust_lr_fn="unit_rms"),
        {**DECAYED, "momentum": 0.9},
        complex=False,
    ),
    Row(
        "normuon",
        for_matrices(fo.normuon, maximize=True),
        {**DECAYED, "momentum": 0.9, "beta2": 0.9, "eps": 1e-2},
        complex=False,
    ),
    Row(
        "muon_with_adamw",
        routed,
        {**DECAYED, "adamw_lr": 0.05, "momentum": 0.9, "adamw_eps": 1e-3},
        complex=False,
    ),
    Row("scion", for_matrices(fo.scion), {"lr": 0.1, "momentum": 0.5, "scale": 2.0}, complex=False),
    Row("dion", dion, {**DECAYED, "momentum": 0.5, "eps": 0.1}, complex=False),
    Row(
        "shampoo",
        with_betas(fo.shampoo, frequency=2, start=1, max_dim=2),
        {**DECAYED, **MOMENTS, "eps": 0.1},
        complex=False,
    ),
    Row(
        "shampoo_grafted",
        partial(grafted, frequency=2, grafting="adam", maximize=True),
        {**DECAYED, **MOMENTS, "eps": 0.1, "grafting_beta2": 0.9, "grafting_eps": 0.1},
        complex=False,
    ),
    Row(
        "shampoo_kl",
        partial(grafted, kl=True, grafting="rmsprop", decoupled_weight_decay=False),
        {**DECAYED, **MOMENTS, "eps": 0.1, "grafting_beta2": 0.9, "grafting_eps": 0.1},
        complex=False,
    ),
    Row(
        "shampoo_one_sided",
        partial(grafted, one_sided=True, frequency=2, grafting="adagrad"),
        {**DECAYED, **MOMENTS, "eps": 0.1, "grafting_eps": 0.1},
        complex=False,
    ),
    Row("soap", partial(soap, frequency=2), {**DECAYED, **SOAP}, complex=False),
    Row(
        "soap_normalized",
        partial(soap_normalized, frequency=1),
        {**DECAYED, **SOAP},
        complex=False,
    ),
    Row("lbfgs", partial(fo.lbfgs, max_iter=2, history_size=2), {"lr": 0.1}, elementwise=False, tolerance=1e-9),
    Row("lbfgs_search", searching, {"lr": 0.2}, elementwise=False, tolerance=1e-9),
    Row("prodigy", with_betas(fo.prodigy), {**FREE, **ADAM, "d0": 0.01, "lr": 0.3, "d_coef": 2.0}),
    Row(
        "prodigy_options",
        with_betas(fo.prodigy, d_coef=8.0, use_bias_correction=True, safeguard_warmup=True),
        {**FREE, **ADAM, "d0": 0.05, "beta3": 0.5, "growth_rate": 1.1},
    ),
    Row("dadapt_adam", with_betas(fo.dadapt_adam), {**FREE, **SHORT}, initial=("d0",)),
    Row(
        "dadapt_adam_options",
        with_betas(fo.dadapt_adam, use_bias_correction=True, decoupled_weight_decay=True),
        {**FREE, **SHORT, "growth_rate": 1.2},
        initial=("d0",),
    ),
    Row("dadapt_sgd", partial(fo.dadapt_sgd, maximize=True), {**FREE, "momentum": 0.5}, initial=("d0",)),
    Row("dog", partial(fo.dog, maximize=True), {**DECAYED, "eps": 0.1, "reps_rel": 0.1}, initial=("reps_rel",)),
    Row("ldog", fo.ldog, {**DECAYED, "eps": 0.1, "reps_rel": 0.1}, initial=("reps_rel",)),
    Row("dowg", fo.dowg, {**DECAYED, "eps": 0.1, "d0_squared": 0.1}, initial=("d0_squared",)),
    Row("polyak", partial(fo.polyak, 100.0), {"f_min": -0.1, "c": 3.0, "eps": 0.1}),
    Row("polyak_bounded", partial(fo.polyak, variant="sps+"), {"max_lr": 1e-3}),
    Row("momo", fo.momo, {"lr": 10.0, "weight_decay": 0.01, "beta": 0.5, "lb": -0.1}),
    Row("momo_bounded", fo.momo, {"lr": 1e-3, "weight_decay": 0.1, "beta": 0.5}),
    Row("momo_adam", with_betas(fo.momo_adam), {"lr": 10.0, "weight_decay": 0.01, **ADAM, "lb": -0.1}),
    Row("momo_adam_bounded", with_betas(fo.momo_adam), {"lr": 1e-2, "weight_decay": 0.1, **ADAM}),
    Row("cocob", partial(fo.cocob, maximize=True), {**DECAYED, "alpha": 6.0, "eps": 0.1}, initial=("eps",)),
    Row("madgrad", partial(fo.madgrad, maximize=True), {**DECAYED, "momentum": 0.5, "eps": 0.1}),
    Row(
        "madgrad_decoupled",
        partial(fo.madgrad, momentum=0.0, decoupled_weight_decay=True),
        {**DECAYED, "eps": 0.1},
    ),
    Row("novograd", with_betas(fo.novograd, maximize=True), {**DECAYED, **ADAM}),
    Row("novograd_averaging", with_betas(fo.novograd, grad_averaging=True), {"lr": 0.1, **ADAM}),
    Row("sm3", fo.sm3, {**DECAYED, "momentum": 0.5, "eps": 0.1}, complex=False),
    Row("adam_mini", with_betas(fo.adam_mini), {**DECAYED, **ADAM}, complex=False),
    Row(
        "adam_mini_tensor", with_betas(fo.adam_mini, block="tensor", maximize=True), {**DECAYED, **ADAM}, complex=False
    ),
    Row(
        "sophia",
        with_betas(fo.sophia, every=2, at_first=True),
        {**DECAYED, "beta1": 0.9, "beta2": 0.5, "rho": 1.0, "eps": 0.3},
        complex=False,
    ),
    Row("adamp", with_betas(fo.adamp), {**DECAYED, **ADAM}, elementwise=False, complex=False),
    Row(
        "adamp_projected",
        with_betas(fo.adamp, delta=100.0, nesterov=True, maximize=True),
        {**DECAYED, **ADAM, "wd_ratio": 0.5},
        complex=False,
    ),
    Row(
        "sgdp",
        partial(fo.sgdp, delta=100.0),
        {**DECAYED, "momentum": 0.5, "dampening": 0.1, "eps": 0.1, "wd_ratio": 0.5},
        elementwise=False,
        complex=False,
    ),
    Row("fromage", fo.fromage, {"lr": 0.1, "min_norm": 1.5}, elementwise=False),
    Row("reduce_on_plateau", plateau, {"factor": 0.5}, elementwise=False, held=("best",), scheduled=False),
    Row("chain", chained, {"max_norm": 0.7, "lr": 0.1}),
    Row("named_chain", lambda lr: fo.named_chain(momentum=fo.trace(0.9), sgd=fo.sgd(lr)), {"lr": 0.1}),
    Row("masked", lambda lr: fo.chain(fo.masked(fo.clip_by_global_norm(lr), not_vectors), fo.sgd(lr)), {"lr": 0.1}),
    Row("accumulate", accumulated, {"lr": 0.1, "weight_decay": 0.1}),
    Row("accumulate_clipped", accumulated_and_clipped, {"lr": 0.1, "eps": 1e-3}),
    Row("skip", skipped, {"lr": 0.1, "eps": 1e-3}),
    Row("apply_if_finite", finite_and_clipped, {"lr": 0.1, "max_norm": 0.7}),
    Row("sam", sharpness_aware, {"lr": 0.1, "rho": 0.3}),
    Row("sam_adaptive", partial(sharpness_aware, adaptive=True), {"lr": 0.1, "rho": 0.5, "eta": 0.1}),
    Row("cautious", with_betas(fo.cautious(fo.adamw)), {**DECAYED, **ADAM}),
    Row("cautious_count", cautious_count, {"lr": 0.1, "momentum": 0.9}),
    Row("mars", less_variance, {"lr": 0.1, "gamma": 0.1, "beta1": 0.9}),
    Row("project", projected, {"lr": 0.1, "momentum": 0.5}),
    Row("schedule_free", schedule_free, {"lr": 0.1, "momentum": 0.9, "r": 0.5}, held=("lr_max",)),
    Row(
        "schedule_free_adamw",
        lambda lr, eps: fo.schedule_free(fo.adamw(lr, eps=eps), weight_lr_power=0.0),
        {"lr": 0.1, "eps": 1e-3},
        held=("lr_max",),
    ),
    Row(  # afterwards the numbers are those in the state
        "inject_hyperparams",
        with_betas(fo.inject_hyperparams(fo.adam)),
        {**DECAYED, **ADAM},
        initial=(*DECAYED, *ADAM),
    ),
    Row(
        "inject_hyperparams_chain",
        fo.inject_hyperparams(chained),
        {"max_norm": 0.7, "lr": 0.1},
        initial=("max_norm", "lr"),
    ),
    Row("monitor", lambda lr: fo.monitor(fo.chain(fo.clip_by_global_norm(0.7), fo.sgd(lr, 0.9))), {"lr": 0.1}),
    Row("monitor_per_layer", partial(fo.monitor(fo.sgd, per_layer=True), momentum=0.9), {"lr": 0.1}),
    Row(
        "schedule_free_sgd",
        fo.schedule_free_sgd,
        {**DECAYED, "momentum": 0.9, "warmup_steps": 20.5, "r": 0.5},
        held=("lr_max",),
    ),
    Row("schedule_free_corrected", with_betas(fo.schedule_free_adamw), {**DECAYED, **ADAM, "warmup_steps": 20.5}),
    Row("gpa", lambda lr, mu_x, mu_y: fo.gpa(fo.sgd(lr, 0.5), mu_x, mu_y), {"lr": 0.1, "mu_x": 0.9, "mu_y": 0.7}),
    Row(
        "ema_weights",
        lambda lr, eps, decay: fo.ema_weights(fo.adam(lr, eps=eps), decay),
        {"lr": 0.1, "eps": 1e-3, "decay": 0.9},
    ),
    Row("ema_weights_corrected", averaged, {"lr": 0.1, "decay": 0.22}),
    Row("swa", lambda lr: fo.swa(fo.sgd(lr, 0.5), start=1), {"lr": 0.1}),
    Row(
        "polynomial_average",
        lambda lr, gamma: fo.polynomial_average(fo.sgd(lr, 0.5), gamma),
        {"lr": 0.1, "gamma": 2.0},
    ),
    Row(
        "lookahead",
        lambda lr, eps, slow_step_size: fo.lookahead(fo.adam(lr, eps=eps), 2, slow_step_size),
        {"lr": 0.1, "eps": 1e-3, "slow_step_size": 0.7},
    ),
    Row(
        "ranger",
        with_betas(fo.ranger, k=2, use_gc=True),
        {**DECAYED, **ADAM, "alpha": 0.7},
    ),
    Row("master_weights", with_betas(fo.master_weights(fo.adamw)), {**DECAYED, **ADAM}, without=("kept",)),
    Row("kahan", fo.kahan(fo.sgd), {**DECAYED, "momentum": 0.9}, without=("kept",)),
    Row("stochastic_rounding", rounded_at_random, {"lr": 0.1, "momentum": 0.9}, without=("kept",)),
    Row("quantized", with_betas(fo.quantized(fo.adamw)), {**DECAYED, **ADAM}),
    Row("offload", fo.offload(fo.sgd), {**DECAYED, "momentum": 0.9}),
    Row("cast_states", with_betas(fo.cast_states(fo.adamw)), {**DECAYED, **ADAM}),
    Row("partition", parted, {"lr": 0.1, "momentum": 0.9}),
]

rows = pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.name)
HYPERPARAMETERS = [(row, name) for row in CATALOGUE for name in row.hyperparameters]
hyperparameters = pytest.mark.parametrize(
    ("row", "name"), HYPERPARAMETERS, ids=[f"{row.name}-{name}" for row, name in HYPERPARAMETERS]
)


# A problem for all of them. -------------------------------------------------------------------------------------------

SHAPES = {"weight": (3, 2), "bias": (2,), "scale": (), "none": (0, 3)}


def make_params(dtype=torch.float64, device="cpu", batch=()):
    params = {name: torch.randn((*batch, *shape), dtype=dtype, device=device) for name, shape in SHAPES.items()}
    return {"layer": params, "rest": [torch.randn(*batch, 3, dtype=dtype, device=device)]}


def make_problem(device="cpu", missing=True):
    """Make what the test kit runs a transformation on: some gradients are missing, and some zero."""
    params = make_params(device=device)
    history = [fo.tree.map(torch.randn_like, params) for _ in range(3)]
    history[1]["layer"]["scale"] = torch.zeros((), dtype=torch.float64, device=device)
    if missing:
        history[1]["layer"]["bias"] = history[1]["rest"][0] = None
    return testing.Problem(params, history)


def loss(params, x):
    """Stand for a network: every parameter matters, at several scales, and the gradients depend on the parameters."""
    layer, rest = params["layer"], params["rest"][0]
    hidden = torch.tanh(layer["weight"] @ layer["bias"] + x * rest)
    value = (
        (hidden * hidden * layer["scale"]).sum() + layer["scale"].square() + (rest * layer["bias"].sum()).cos().sum()
    )
    return value.real if value.is_complex() else value


def step(tx, grads, state, params, x=1.0, objective=loss):
    """Update with the extras that some transformation declares."""
    extras = {"value": lambda: objective(params, x), "value_fn": lambda: lambda params: objective(params, x)}
    declared = {name for link in tx._links for name in link.rule.extras.names}
    return tx.update(grads, state, params, **{name: extras[name]() for name in declared & extras.keys()})


def train(tx, params, x, steps=4, state=None):
    """Run some steps; return the parameters and the state."""
    state = tx.init(params) if state is None else state
    for _ in range(steps):
        grads = torch.func.grad(loss)(params, x)
        updates, state = step(tx, grads, state, params, x)
        params = fo.apply_updates(params, updates)
    return params, state


def assert_close(left, right, **tolerance):
    left_leaves, left_structure = fo.tree.flatten(left)
    right_leaves, right_structure = fo.tree.flatten(right)
    assert left_structure == right_structure
    for a, b in zip(left_leaves, right_leaves, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 1e-12, "atol": 1e-13}))
