"""Trains with Composer, and goes on from a checkpoint: python with_composer.py chain."""

import sys

import torch
from composer import ComposerModel, Trainer
from composer.algorithms import GradientClipping
from composer.optim import MultiStepScheduler
from task import make_data, make_model, make_optimizer, same


class Regression(ComposerModel):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, batch):
        return self.model(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.mse_loss(outputs, batch[1])


def train(form, epochs, **checkpoints):
    module = Regression()
    clipping = [] if form == "chain" else [GradientClipping(clipping_type="norm", clipping_threshold=1.0)]
    trainer = Trainer(
        model=module, optimizers=make_optimizer(module, form), algorithms=clipping,
        schedulers=MultiStepScheduler(["2ep", "4ep"], gamma=0.5), max_duration=f"{epochs}ep", device="cpu",
        train_dataloader=torch.utils.data.DataLoader(make_data(), batch_size=16), progress_bar=False, **checkpoints,
    )  # fmt: skip
    trainer.fit()
    trainer.close()
    return module, trainer


form = sys.argv[1]
whole, _ = train(form, epochs=6)
train(form, epochs=3, save_folder="composer", save_filename=f"{form}.pt", save_overwrite=True)
resumed, trainer = train(form, epochs=6, load_path=f"composer/{form}.pt")
print(form, "goes on as if it had not stopped:", same(whole, resumed))
print("learning rate:", trainer.state.optimizers[0].param_groups[0]["lr"])
