"""Small networks, their images and their features, for the tests of layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.vision.embedding import layer_features
from posttrain.vision.models import small_resnet
from posttrain.vision.probed_network import FACTORY, ProbedNetwork, with_probe

SMALL_RESNET = "posttrain.vision.models:small_resnet"
BLOCKS = {"width": 4}
SIZE = (3, 16, 16)


def resnet(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = small_resnet(5, **BLOCKS)
    # running statistics unlike those of a fresh network
    model.train()(torch.randn(8, *SIZE))
    return model


def images(samples: int = 6) -> Tensor:
    return torch.randn(samples, *SIZE, generator=torch.Generator().manual_seed(1))


def side_by_side(model: nn.Module, layers: Sequence[str], head: str, batch: Tensor, width: int = 24) -> Tensor:
    features = layer_features(model, layers, head, batch, width=width)
    return torch.cat([features[layer] for layer in layers], dim=1)


def cut(model: nn.Module, *layers: str, width: int = 24, seed: int = 3) -> tuple[dict[str, Any], ProbedNetwork]:
    dim = side_by_side(model, layers, "head", images(), width).shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(5, dim, generator=generator), torch.randn(5, generator=generator)
    factory, recipe, made = with_probe(
        model, "head", layers, width, weight, bias, factory=SMALL_RESNET, arguments=BLOCKS, size=SIZE
    )
    assert factory == FACTORY
    return recipe, made


def counting(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    return calls


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Own(nn.Module):
    """What networks of users do: a list of blocks, functional activations, a tuple, a block that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)])
        self.pair = Pair()
        self.head = nn.Linear(6, 5)
        self.behind = nn.Linear(5, 5)
        self.idle = nn.Linear(5, 5)

    def forward(self, batch: Tensor) -> Tensor:
        maps = F.relu(self.norm(self.stem(batch)))
        maps = self.twice(self.twice(maps))
        for block in self.blocks:
            maps = F.relu(block(maps))
        maps, _ = self.pair(maps)
        return self.behind(self.head(maps.mean((2, 3))))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(6, 6, 1)

    def forward(self, maps: Tensor) -> tuple[Tensor, int]:
        return self.mix(maps), 1
