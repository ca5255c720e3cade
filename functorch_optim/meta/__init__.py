"""Differentiation of optimizations: of training runs, solutions and inner loops."""

from functorch_optim.meta._check import DerivativeCheck, check_derivative
from functorch_optim.meta._exact import exact_derivatives
from functorch_optim.meta._fast_weights import inner_loop
from functorch_optim.meta._forward import forward_grad
from functorch_optim.meta._implicit import custom_fixed_point, custom_root, root_jvp, root_vjp
from functorch_optim.meta._rematerialization import checkpoint
from functorch_optim.meta._solvers import (
    solve_auto,
    solve_bicgstab,
    solve_cg,
    solve_dense,
    solve_gmres,
    solve_neumann,
    solve_normal_cg,
)
from functorch_optim.meta._unrolling import Unrolled, unroll
from functorch_optim.meta._zero_order import zero_order_grad

__all__ = [
    "DerivativeCheck",
    "Unrolled",
    "check_derivative",
    "checkpoint",
    "custom_fixed_point",
    "custom_root",
    "exact_derivatives",
    "forward_grad",
    "inner_loop",
    "root_jvp",
    "root_vjp",
    "solve_auto",
    "solve_bicgstab",
    "solve_cg",
    "solve_dense",
    "solve_gmres",
    "solve_neumann",
    "solve_normal_cg",
    "unroll",
    "zero_order_grad",
]
