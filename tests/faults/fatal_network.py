"""A network that ends the process which shows it an image that begins with a white pixel, and counts its images."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from torch import Tensor, nn


class Fatal(nn.Module):
    def __init__(self, log: str | None) -> None:
        super().__init__()
        self._log = log

    def forward(self, images: Tensor) -> Tensor:
        if bool((images[:, 0, 0, 0] == 1).any()):
            os.kill(os.getpid(), signal.SIGSEGV)
        if self._log is not None:
            with Path(self._log).open("a") as stream:
                stream.write(f"{len(images)}\n")
        return images


def network(classes: int, log: str | None = None) -> nn.Module:
    """`log`: a file that gets a line with the number of images of every forward pass."""
    torch.manual_seed(0)
    return nn.Sequential(Fatal(log), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))
