"""Trains with accelerate, and goes on from a checkpoint: python with_accelerate.py chain."""

import sys

import torch
from accelerate import Accelerator
from task import make_data, make_model, make_optimizer, same


def begin(form):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    opt = make_optimizer(model, form)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, step_size=4, gamma=0.5)
    loader = torch.utils.data.DataLoader(make_data(), batch_size=16)
    return accelerator, *accelerator.prepare(model, opt, scheduler, loader)


def train(form, epochs, checkpoint=None):
    accelerator, model, opt, scheduler, loader = begin(form)
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
    for _ in range(epochs):
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(x), y))
                if accelerator.sync_gradients and form != "chain":  # the chain clips by itself
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                opt.step()
                scheduler.step()
                opt.zero_grad()
    return model, opt, accelerator


form = sys.argv[1]
whole, _, _ = train(form, epochs=6)
_, _, accelerator = train(form, epochs=3)
accelerator.save_state("accelerate")
resumed, opt, _ = train(form, epochs=3, checkpoint="accelerate")
print(form, "goes on as if it had not stopped:", same(whole, resumed))
print("learning rate:", opt.param_groups[0]["lr"])
