"""Trains parameters in a TensorDict: python with_tensordict.py."""

import optree
import torch
from tensordict import TensorDict

import functorch_optim as fo

optree.register_pytree_node(
    TensorDict,
    lambda node: (list(node.values()), (tuple(node.keys()), node.batch_size)),
    lambda kept, values: TensorDict(dict(zip(kept[0], values)), kept[1]),
    namespace="functorch_optim",
)

params = TensorDict({"body": TensorDict({"w": torch.ones(3)}), "b": torch.zeros(())})
tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))
state = tx.init(params)
for _ in range(500):
    grads = torch.func.grad(lambda p: (p["body", "w"].sum() + p["b"] - 1) ** 2)(params)
    params, state = fo.step(tx, grads, state, params)
print(type(params).__name__, type(fo.tree.get(state, "exp_avg")).__name__)
print("sum:", round((params["body", "w"].sum() + params["b"]).item(), 3))
