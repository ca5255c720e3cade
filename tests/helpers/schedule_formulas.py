"""The formulas of schedules in plain Python: functions of the step and of the arguments."""

import math


def linear(step, start_value, end_value, total_iters):
    return end_value if step >= total_iters else start_value + (end_value - start_value) * step / total_iters


def cosine(step, value, total_iters, end_value=0.0):
    if step >= total_iters:
        return end_value
    return end_value + (value - end_value) * (1 + math.cos(math.pi * step / total_iters)) / 2


def exponential(step, value, gamma):
    return value * gamma**step


def staircase(step, value, step_size, gamma=0.1):
    return value * gamma ** (step // step_size)


def polynomial(step, value, total_iters, power=1.0, end_value=0.0):
    return end_value if step >= total_iters else end_value + (value - end_value) * (1 - step / total_iters) ** power


def warmup_cosine(step, peak_value, warmup_iters, total_iters, start_value=0.0, end_value=0.0):
    if step < warmup_iters:
        return linear(step, start_value, peak_value, warmup_iters)
    return cosine(step - warmup_iters, peak_value, total_iters - warmup_iters, end_value)


def warmup_stable_decay(
    step, peak_value, warmup_iters, stable_iters, decay_iters, start_value=0.0, end_value=0.0, weight=lambda x: x
):
    if step < warmup_iters:
        return linear(step, start_value, peak_value, warmup_iters)
    if step < warmup_iters + stable_iters:
        return peak_value
    x = min((step - warmup_iters - stable_iters) / decay_iters, 1)
    return peak_value + (end_value - peak_value) * weight(x)


def power_decay(step, power, peak_value, warmup_iters, stable_iters, decay_iters, start_value, end_value):
    def weight(x):
        return 1 - (1 - x) ** power

    numbers = (peak_value, warmup_iters, stable_iters, decay_iters, start_value, end_value)
    return warmup_stable_decay(step, *numbers, weight=weight)


def rex(step, value, total_iters, end_value):
    x = min(step / total_iters, 1)
    return end_value + (value - end_value) * (1 - x) / (1 / 2 + (1 - x) / 2)


def rewarmed(step, value, gamma, milestone, warmup_iters):
    return exponential(step, value, gamma) * (1 if step < milestone else min((step - milestone) / warmup_iters, 1))


def inverse_sqrt(step, value, warmup_iters, start_value=0.0, timescale=None):
    if step < warmup_iters:
        return linear(step, start_value, value, warmup_iters)
    if timescale is None:
        return value * math.sqrt(warmup_iters / step)
    return value * math.sqrt(timescale / (timescale + step - warmup_iters))


def linear_factor(step, value, start_factor, end_factor, total_iters):
    return value * linear(step, start_factor, end_factor, total_iters)


def constant_factor(step, value, factor, total_iters):
    return value * factor if step < total_iters else value


def multi_step(step, value, first, second, gamma):
    return value * (1 if step < first else gamma if step < second else gamma**3)


def cosine_annealing(step, value, T_max, eta_min):  # noqa: N803
    return eta_min + (value - eta_min) * (1 + math.cos(math.pi * step / T_max)) / 2


def warm_restarts(step, value, T_0, eta_min, T_mult=1):  # noqa: N803
    while step >= T_0:
        step, T_0 = step - T_0, T_0 * T_mult  # noqa: N806
    return cosine(step, value, T_0, eta_min)


def cyclic(step, base_lr, max_lr, step_size_up, step_size_down=None, k=lambda step, cycle: 1.0):
    step_size_down = step_size_up if step_size_down is None else step_size_down
    cycle, x = divmod(step, step_size_up + step_size_down)
    x = x / step_size_up if x < step_size_up else 1 - (x - step_size_up) / step_size_down
    return base_lr + (max_lr - base_lr) * x * k(step, 1 + cycle)


def cyclic_momentum(step, base_momentum, max_momentum, *sizes):
    return max_momentum + base_momentum - cyclic(step, base_momentum, max_momentum, *sizes)


def interpolated(step, values, milestones, weight):
    begin = 0
    for start, end, milestone in zip(values[:-1], values[1:], milestones, strict=True):
        if step <= milestone:
            return start + (end - start) * weight((step - begin) / (milestone - begin))
        begin = milestone
    return values[-1]


def one_cycle(step, max_lr, total_steps, pct_start, div_factor, final_div_factor, weight):
    values = [max_lr / div_factor, max_lr, max_lr / div_factor / final_div_factor]
    return interpolated(step, values, [pct_start * total_steps - 1, total_steps - 1], weight)


def three_phases(step, max_lr, total_steps, pct_start, div_factor, final_div_factor):
    initial, ends = max_lr / div_factor, [pct_start * total_steps - 1, 2 * (pct_start * total_steps - 1)]
    return interpolated(
        step, [initial, max_lr, initial, initial / final_div_factor], [*ends, total_steps - 1], half_wave
    )


def one_cycle_momentum(step, total_steps, pct_start, base_momentum, max_momentum):
    values = [max_momentum, base_momentum, max_momentum]
    return interpolated(step, values, [pct_start * total_steps - 1, total_steps - 1], half_wave)


def straight(x):
    return x


def half_wave(x):
    return (1 - math.cos(math.pi * x)) / 2


def joined(step, value, gamma, top, milestone, total_iters):
    if step < milestone:
        return exponential(step, value, gamma)
    return linear(step - milestone, 0.0, top, total_iters)
