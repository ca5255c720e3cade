"""The handwritten digits that come with scikit-learn, and batches of them."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import sklearn.datasets
import sklearn.model_selection
import torch
from torch import Tensor

SPLIT_SEED = 0  # not the seed of the training: all runs are tested on the same digits
TEST_SHARE = 0.2
PIXEL_RANGE = 16.0


class Digits(NamedTuple):
    """Images of handwritten digits, 8 by 8 pixels, and their labels.

    Attributes:
        images: one row of 64 pixels in [0, 1] for each image: (images, 64) float32 tensor.
        labels: the digits: (images,) int64 tensor.
    """

    images: Tensor
    labels: Tensor


def load(device: str = "cpu") -> tuple[Digits, Digits]:
    """Load the digits, split into training and test digits; every digit has the same share in both.

    Args:
        device: where the tensors are put.
    """
    pixels, targets = sklearn.datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels / PIXEL_RANGE, dtype=torch.float32)
    labels = torch.as_tensor(targets, dtype=torch.int64)
    parts = sklearn.model_selection.train_test_split(
        range(len(targets)), test_size=TEST_SHARE, stratify=targets, random_state=SPLIT_SEED
    )
    train, test = [Digits(images[part].to(device), labels[part].to(device)) for part in parts]
    return train, test


class Batches:
    """Batches of digits in a random order, which is the same in every iteration over them.

    Args:
        digits: the digits of the batches.
        epochs: number of times that each digit comes.
        seed: seed of the order.
        batch_size: number of digits in a batch; the last batch of an epoch has the remaining ones.
    """

    def __init__(self, digits: Digits, epochs: int, seed: int, batch_size: int = 64) -> None:
        self.digits = digits
        self.epochs = epochs
        self.seed = seed
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.epochs * math.ceil(len(self.digits.labels) / self.batch_size)

    def __iter__(self) -> Iterator[Digits]:
        generator = torch.Generator().manual_seed(self.seed)
        images, labels = self.digits
        for _ in range(self.epochs):
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
            for some in torch.split(order, self.batch_size):
                yield Digits(images[some], labels[some])
