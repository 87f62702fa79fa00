"""A network as it travels: a recipe and its weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

import torch

from posttrain.schema import ModelSpec, Precision
from posttrain.vision import models
from posttrain.vision.weights import backbone_digest, load_bytes


@dataclass(frozen=True)
class Network:
    """A network by its recipe and weights."""

    spec: ModelSpec
    weights: bytes = field(repr=False)
    digest: str
    """Of the weights."""
    precision: Precision = "float32"
    """The number format in which it embeds and is trained."""

    @property
    def backbone(self) -> str:
        """Name of its feature store: a digest of everything that its features depend on, 16 hexadecimal digits."""
        spec = self.spec
        backbone = backbone_digest(load_network(self), spec.head)
        # the weights alone do not say how images are seen, nor what is done with the weights
        recipe = f"{spec.factory}:{json.dumps(spec.arguments, sort_keys=True, default=str)}:{spec.head}:{spec.image}"
        content = f"{backbone}:{recipe}:{spec.layers}:{spec.width}"
        if self.precision != "float32":
            content += f":{self.precision}"
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def load_network(network: Network) -> torch.nn.Module:
    """The model, built by its factory, with the weights."""
    model = models.build(network.spec.factory, classes=network.spec.classes, arguments=network.spec.arguments)
    load_bytes(model, network.weights)
    return model


def for_inference(network: Network, device: torch.device) -> torch.nn.Module:
    """The model on the device, in evaluation mode, with channels last."""
    return load_network(network).to(device).to(memory_format=torch.channels_last).eval()
