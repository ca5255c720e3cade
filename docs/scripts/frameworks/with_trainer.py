"""Trains with Trainer of Hugging Face, and goes on from a checkpoint: python with_trainer.py chain."""

import sys

import torch
from task import make_data, make_model, make_optimizer, same
from transformers import Trainer, TrainingArguments


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x, labels):
        return {"loss": torch.nn.functional.mse_loss(self.model(x), labels)}


def train(form, epochs, **saving):
    module = Regression()
    arguments = TrainingArguments(
        output_dir="trainer", num_train_epochs=epochs, per_device_train_batch_size=16, use_cpu=True, report_to=[],
        max_grad_norm=0.0 if form == "chain" else 1.0,  # the chain clips by itself
        lr_scheduler_type="constant_with_warmup", warmup_steps=4, disable_tqdm=True, **saving,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in make_data()]
    # Without a scheduler of ours, Trainer makes its own, which drives `lr` in the groups.
    trainer = Trainer(module, arguments, train_dataset=data, optimizers=(make_optimizer(module, form), None))
    return module, trainer


form = sys.argv[1]
whole, trainer = train(form, 6, save_strategy="epoch")
trainer.train()
resumed, trainer = train(form, 6, save_strategy="no")
trainer.train(resume_from_checkpoint="trainer/checkpoint-12")
print(form, "goes on as if it had not stopped:", same(whole, resumed))
print("learning rate:", trainer.optimizer.param_groups[0]["lr"])
