"""Trains a sharded module on several processes, saves it, and goes on from the checkpoint.

torchrun --nproc-per-node 2 train_sharded.py
"""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import functorch_optim as fo


def make(mesh):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    fully_shard(model, mesh=mesh)
    tx = fo.chain(fo.clip_by_global_norm(1.0), fo.adamw(1e-2))
    return model, fo.Optimizer(model.named_parameters(), tx)


def train(model, opt, steps):
    torch.manual_seed(dist.get_rank())  # each process has its own batches
    for _ in range(steps):
        x = torch.randn(16, 8)
        loss = (model(x).squeeze(1) - x.sum(1)).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


dist.init_process_group("gloo")
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
model, opt = make(mesh)
train(model, opt, 20)
states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
dcp.save(states, checkpoint_id="checkpoint")

model, opt = make(mesh)
states = dict(zip(("model", "optimizer"), get_state_dict(model, opt), strict=True))
dcp.load(states, checkpoint_id="checkpoint")
set_state_dict(model, opt, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
step = int(next(iter(opt.state.values()))["step"])
loss = train(model, opt, 200)
if dist.get_rank() == 0:
    print(f"resumed at step {step}, loss {loss:.3f}")
dist.destroy_process_group()
