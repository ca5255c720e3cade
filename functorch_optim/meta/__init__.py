"""Optimization of what an optimization depends on."""

from functorch_optim.meta.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from functorch_optim.meta.solvers import (
    solve_bicgstab,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_neumann,
    solve_normal_cg,
)
from functorch_optim.meta.zero_order import zero_order_grad

__all__ = [
    "custom_fixed_point",
    "custom_root",
    "root_jvp",
    "root_vjp",
    "solve_bicgstab",
    "solve_cg",
    "solve_dense",
    "solve_gmres",
    "solve_neumann",
    "solve_normal_cg",
    "zero_order_grad",
]
