"""Networks that cannot be cleaned with, for `bad_input`, and one that stumbles over single images."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.vision.models import mlp


def stumbling(classes: int) -> nn.Module:
    """As `mlp`, but the features of an all-white image are not finite."""
    return nn.Sequential(OrderedDict(scale=_Contrast(), body=mlp(classes)))


class _Contrast(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images / (images.amin(dim=(1, 2, 3), keepdim=True) - 1).abs().clamp(max=1)


def forgetful(classes: int) -> nn.Module:
    """Dropout that stays on in evaluation mode."""
    return _between(classes, _Dropout())


class _Dropout(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return F.dropout(features, 0.5, training=True)


def noisy(classes: int) -> nn.Module:
    """A little random noise on the features."""
    return _between(classes, _Noise())


class _Noise(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features + 0.01 * torch.randn_like(features)


def in_train_mode(classes: int) -> nn.Module:
    """A batch norm that takes mean and variance from the batch in evaluation mode, too."""
    return _between(classes, nn.BatchNorm1d(128, track_running_stats=False))


def not_finite(classes: int) -> nn.Module:
    """Logarithms of negative numbers."""
    return _between(classes, _Logarithm())


class _Logarithm(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return (features - 1).log()


def without_pooling(classes: int) -> nn.Module:
    """A head on maps instead of vectors."""
    return nn.Sequential(OrderedDict(convolution=nn.Conv2d(1, 4, 1), head=nn.Linear(8, classes)))


def without_head(classes: int) -> nn.Module:
    """No Linear module at all."""
    return nn.Sequential(OrderedDict(convolution=nn.Conv2d(1, classes, 8), flatten=nn.Flatten()))


def raising(classes: int) -> nn.Module:
    """Fails when it is called."""
    raise RuntimeError("there is no such width")


def no_module(classes: int) -> object:
    """Returns something else."""
    return {"classes": classes}


def _between(classes: int, module: nn.Module) -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(64, 128),
            relu=nn.ReLU(),
            between=module,
            head=nn.Linear(128, classes),
        )
    )
