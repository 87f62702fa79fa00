from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from small_networks import Own, hooks, images, resnet
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision.embedding import layer_features
from posttrain.vision.layers import check, find
from posttrain.vision.models import build, find_head, mlp, small_resnet
from posttrain.vision.probed_network import with_probe

FAMILIES = {
    "resnet18": 64,
    "resnet50": 64,
    "alexnet": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "mnasnet0_5": 64,
    "efficientnet_b0": 64,
    "convnext_tiny": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x0_5": 64,
    "swin_t": 64,
    "googlenet": 64,
    "inception_v3": 96,
    "vit_b_32": 64,
    "vgg11": 64,
}
ARGUMENTS = {"vit_b_32": {"image_size": 64}} | {
    name: {"init_weights": False} for name in ("googlenet", "inception_v3", "vgg11")
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("resnet18", "mobilenet_v3_small", "swin_t") else pytest.mark.long)
        for name in FAMILIES
    ],
)
def test_each_torchvision_family_has_early_and_late_layers_that_can_be_embedded_and_cut(name: str):
    size, arguments = (3, FAMILIES[name], FAMILIES[name]), ARGUMENTS.get(name, {})
    torch.manual_seed(0)
    model = build(name, classes=5, arguments=arguments)
    head = find_head(model, classes=5)
    batch = torch.randn(3, *size)
    layers = find(model, head, batch[:2])
    assert layers[0] == "input" and layers[-1] == head and 5 <= len(layers) <= 6
    assert check(model, head, layers[::-1], batch[:2]) == layers
    assert hooks(model) == 0
    features = layer_features(model, layers, head, batch, width=32)
    assert all(found.shape[0] == 3 and found.dtype == torch.float32 for found in features.values())
    assert all(features[layer].shape[1] <= 32 for layer in layers[1:-1])
    for members in ([layers[2]], [head, layers[2], "input"]):
        expected = torch.cat([features[layer] for layer in members], dim=1)
        weight, bias = torch.randn(5, expected.shape[1]), torch.randn(5)
        _, _, made = with_probe(model, head, members, 32, weight, bias, factory=name, arguments=arguments, size=size)
        assert find_head(made, classes=5) == "probe"
        # without gradients, as the features: attention has another kernel for them, which rounds differently
        with torch.no_grad():
            assert torch.equal(made.eval().features(batch), expected)
            torch.testing.assert_close(made(batch), expected @ weight.T + bias)
        if head not in members:
            earlier = sum(parameter.numel() for parameter in made.parameters())
            assert earlier < 0.7 * sum(parameter.numel() for parameter in model.parameters())
        # distributed training fails on a parameter that requires a gradient and gets none
        made.train()(batch).square().sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "model, head, size, layers",
    [
        (lambda: build("resnet18", classes=5, arguments={}), "fc", 64, "layer1 layer2 layer3 layer4"),
        # at 32 pixels layer4 is 1x1: the head's input, twice
        (lambda: build("resnet18", classes=5, arguments={}), "fc", 32, "maxpool layer1 layer2 layer3"),
        (lambda: small_resnet(5), "head", 32, "relu stage1 stage2 stage3"),
        (lambda: mlp(5, inputs=192), "head", 8, ""),
    ],
    ids=["resnet18", "resnet18 on 32 pixels", "small_resnet", "mlp"],
)
def test_layers_are_the_ends_of_stages_between_the_input_and_the_head(
    model: Callable[[], nn.Module], head: str, size: int, layers: str
):
    assert find(model(), head, torch.randn(2, 3, size, size)) == ("input", *layers.split(), head)


@pytest.mark.parametrize(
    "most, layers",
    [
        (2, ()),
        (3, ("stage3",)),
        (4, ("stage1", "stage3")),
        (5, ("stage1", "stage2", "stage3")),
        (6, ("relu", "stage1", "stage2", "stage3")),
        (9, ("relu", "stage1", "stage2", "stage3")),
    ],
)
def test_of_more_stages_the_last_at_each_spatial_size_stay(most: int, layers: tuple[str, ...]):
    assert find(resnet(), "head", images(2), most=most) == ("input", *layers, "head")


def test_fewer_than_two_layers_are_no_choice():
    with pytest.raises(ValueError, match="most is 1"):
        find(resnet(), "head", images(2), most=1)


def test_equal_stages_are_thinned_evenly():
    stages = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(9)]
    model = nn.Sequential(nn.Flatten(), *stages, nn.Linear(6, 6), nn.Linear(6, 5))
    assert find(model, "11", torch.randn(2, 1, 2, 3), most=5) == ("input", "3", "6", "9", "11")


def test_what_the_ends_of_stages_leave_goes_to_the_longest_stage():
    convolutions = [nn.Conv2d(3, 3, 3, stride=2 if at == 1 else 1, padding=1) for at in range(10)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5))
    assert find(model, "12", images(2)) == ("input", "0", "3", "6", "9", "12")


def test_the_layers_of_a_users_own_network_are_found_inside_lists_and_blocks_without_a_tensor():
    assert find(Own(), "head", images(2), most=9) == ("input", "norm", "blocks.0", "blocks.1", "pair.mix", "head")


@pytest.mark.parametrize(
    "name, message",
    [
        ("blocks.2", r"layer 'blocks\.2' does not exist; the nearest .*: .*blocks\.1"),
        ("nrm", r"layer 'nrm' does not exist; the nearest .*: norm"),
        ("", "does not exist"),
        ("twice", r"layer 'twice' runs 2 times per forward pass, not once; the nearest .*: \w+"),
        ("idle", "runs 0 times"),
        ("blocks", r"runs 0 times .*blocks\.[01]"),
        ("pair", r"layer 'pair' gives a tuple, where one floating tensor .*pair\.mix"),
        ("behind", r"layer 'behind' is not done before the head 'head'"),
    ],
)
def test_a_layer_that_a_probe_cannot_sit_on_is_named_with_the_nearest_ones(name: str, message: str):
    model = Own()
    with pytest.raises(ModelError, match=message):
        check(model, "head", ["norm", name], images(2))
    assert hooks(model) == 0


class WithInput(nn.Module):
    """A network with a module of the name that stands for the images."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Conv2d(3, 4, 3)
        self.head = nn.Linear(4, 5)

    def forward(self, batch: Tensor) -> Tensor:
        return self.head(self.input(batch).mean((2, 3)))


@pytest.mark.parametrize("name", ["inpt", "haed"])
@pytest.mark.parametrize(
    "ask",
    [
        lambda model, name: check(model, "head", [name], images(2)),
        lambda model, name: layer_features(model, [name], "head", images(2), width=8),
    ],
    ids=["check", "embed"],
)
def test_of_the_nearest_layers_each_is_listed_once(ask: Callable[[nn.Module, str], object], name: str):
    with pytest.raises(ModelError) as error:
        ask(WithInput(), name)
    listed = re.search(r"nearest[^:]*: ([\w, ]+)", str(error.value))
    assert listed is not None
    assert sorted(listed[1].split(", ")) == ["head", "input"]


def test_checked_names_come_back_once_and_in_the_order_of_the_forward_pass():
    names = ["head", "pair.mix", "input", "norm", "blocks.0", "norm"]
    assert check(Own(), "head", names, images(2)) == ("input", "norm", "blocks.0", "pair.mix", "head")


@pytest.mark.parametrize("ask", [find, lambda model, head, batch: check(model, head, ["relu"], batch)])
def test_images_that_the_model_cannot_take_leave_no_hooks_behind(ask: Callable[..., object]):
    model = resnet()
    with pytest.raises(ModelError, match=r"model\.channels"):
        ask(model, "head", torch.zeros(2, 1, 16, 16))
    assert hooks(model) == 0
