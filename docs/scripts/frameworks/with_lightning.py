"""Trains with Lightning, and goes on from a checkpoint: python with_lightning.py chain."""

import sys

import lightning
import torch
from task import make_data, make_model, make_optimizer, same


class Regression(lightning.LightningModule):
    def __init__(self, form):
        super().__init__()
        self.model, self.form = make_model(), form

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.mse_loss(self.model(x), y)

    def configure_optimizers(self):
        opt = make_optimizer(self.model, self.form)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, step_size=2, gamma=0.5)]


def train(form, epochs, checkpoint=None):
    module = Regression(form)
    clip = None if form == "chain" else 1.0  # the chain clips by itself
    trainer = lightning.Trainer(
        max_epochs=epochs, gradient_clip_val=clip, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(make_data(), batch_size=16), ckpt_path=checkpoint)
    return module, trainer


form = sys.argv[1]
whole, _ = train(form, epochs=6)
_, trainer = train(form, epochs=3)
trainer.save_checkpoint("lightning.ckpt")
resumed, trainer = train(form, epochs=6, checkpoint="lightning.ckpt")
print(form, "goes on as if it had not stopped:", same(whole, resumed))
print("learning rate:", trainer.optimizers[0].param_groups[0]["lr"])
