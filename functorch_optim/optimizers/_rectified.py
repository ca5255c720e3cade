"""How far a running mean of squares can be trusted."""

from typing import Any

from functorch_optim._numerics import debias, sqrt, where


def rectification(beta2: Any, step: Any) -> tuple[Any, Any]:
    """Return whether rho_t > 5, and r_t there: RAdam's factor for the variance of the step.

    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t)
    r_t = sqrt((rho_t - 4) (rho_t - 2) rho_inf / ((rho_inf - 4) (rho_inf - 2) rho_t))
    """
    rho_inf = 2 / (1 - beta2) - 1
    rho_t = rho_inf - 2 * step * beta2**step / debias(beta2, step)
    rectified = rho_t > 5
    # Numbers for which r_t is finite, where it is not used.
    rho, inf = where(rectified, rho_t, 6.0), where(rectified, rho_inf, 6.0)
    return rectified, sqrt((rho - 4) * (rho - 2) * inf / ((inf - 4) * (inf - 2) * rho))
