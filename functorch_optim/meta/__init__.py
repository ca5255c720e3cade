"""Optimization of what an optimization depends on."""

from functorch_optim.meta.fast_weights import inner_loop
from functorch_optim.meta.forward import forward_grad
from functorch_optim.meta.implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from functorch_optim.meta.rematerialization import checkpoint
from functorch_optim.meta.solvers import (
    solve_bicgstab,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_neumann,
    solve_normal_cg,
)
from functorch_optim.meta.unrolling import Unrolled, unroll
from functorch_optim.meta.zero_order import zero_order_grad

__all__ = [
    "Unrolled",
    "checkpoint",
    "custom_fixed_point",
    "custom_root",
    "forward_grad",
    "inner_loop",
    "root_jvp",
    "root_vjp",
    "solve_bicgstab",
    "solve_cg",
    "solve_dense",
    "solve_gmres",
    "solve_neumann",
    "solve_normal_cg",
    "unroll",
    "zero_order_grad",
]
