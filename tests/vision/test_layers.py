from __future__ import annotations

import contextlib
import copy
import json
import pickle
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision import models, probed_network
from posttrain.vision.embedding import features_and_logits, layer_features, pooled
from posttrain.vision.layers import check, find
from posttrain.vision.models import build, find_head, mlp, small_resnet
from posttrain.vision.probed_network import FACTORY, ProbedNetwork, with_probe
from posttrain.vision.weights import backbone_digest, load_bytes, load_weights, save_weights, to_bytes, weights_digest

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


# which layers

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
    "name", [pytest.param(name, marks=pytest.mark.slow if name in ("vit_b_32", "vgg11") else ()) for name in FAMILIES]
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


# pooling


@pytest.mark.parametrize(
    "shape, width, grid",
    [
        ((2, 8, 8, 8), 32, 4),  # 8 * 16 = 4 * 32
        ((2, 8, 8, 8), 31, 2),
        ((2, 8, 8, 8), 8, 2),
        ((2, 8, 8, 8), 7, 1),
        ((2, 8, 3, 9), 99, 2),
        ((2, 8, 1, 9), 99, 1),
        ((2, 64, 8, 8), 9, 1),
    ],
)
def test_maps_are_averaged_over_the_finest_grid_that_fits(shape: tuple[int, ...], width: int, grid: int):
    maps = torch.randn(shape)
    _, channels, height, wide = shape

    def edges(size: int) -> list[slice]:
        return [slice(i * size // grid, -(-(i + 1) * size // grid)) for i in range(grid)]

    expected = torch.stack(
        [maps[:, c, rows, columns].mean((1, 2)) for c in range(channels) for rows in edges(height)
         for columns in edges(wide)], dim=1
    )  # fmt: skip
    if expected.shape[1] <= width:
        torch.testing.assert_close(pooled(maps, width), expected)
    else:
        # the projection of the same vectors given as such
        torch.testing.assert_close(pooled(maps, width), pooled(expected, width))
        assert pooled(maps, width).shape == (2, width)


def test_vectors_stay_tokens_are_averaged_and_half_precision_becomes_float32():
    vectors, tokens = torch.randn(3, 7), torch.randn(3, 5, 7)
    assert torch.equal(pooled(vectors, 7), vectors)
    torch.testing.assert_close(pooled(tokens, 7), tokens.sum(1) / 5)
    half = pooled(vectors.half(), 7)
    assert half.dtype == torch.float32 and torch.equal(half, vectors.half().float())
    assert pooled(vectors.double(), 3).dtype == torch.float32


def test_maps_with_channels_last_are_told_by_a_square_smaller_than_the_channels():
    maps = torch.randn(2, 24, 8, 8)
    torch.testing.assert_close(pooled(maps.permute(0, 2, 3, 1), 200), pooled(maps, 200))
    assert torch.equal(pooled(maps.contiguous(memory_format=torch.channels_last), 200), pooled(maps, 200))


def test_an_output_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5, 6\) is neither"):
        pooled(torch.zeros(2, 3, 4, 5, 6), 8)


def test_the_projection_keeps_distances_and_does_not_touch_the_random_state():
    torch.manual_seed(0)
    vectors = torch.randn(60, 3000)
    state = torch.get_rng_state()
    short = pooled(vectors, 501)
    assert torch.equal(torch.get_rng_state(), state)
    ratios = torch.pdist(short) / torch.pdist(vectors)
    # squared ratios are chi-squared(501) / 501: a standard deviation of sqrt(2 / 501) = 0.063, half that for roots
    assert abs(ratios.mean() - 1) < 0.01 and 0.02 < ratios.std() < 0.045
    assert ratios.min() > 0.8 and ratios.max() < 1.2


def test_the_projection_is_the_same_on_every_machine():
    # a unit vector is projected to a row of the matrix; the values were written down once
    row = torch.tensor([-0.1563478410243988, 0.24675610661506653, 0.694764256477356])
    torch.testing.assert_close(pooled(torch.eye(40), 3)[39], row)
    assert not torch.allclose(pooled(torch.eye(5), 3)[:4], pooled(torch.eye(4), 3))


# features of all layers in one pass

ALL = ("input", "relu", "stage1", "stage2", "stage3", "head")


def test_all_layers_are_served_by_one_pass_and_equal_what_the_modules_give():
    model, batch = resnet().train(), images()
    calls = counting(model)
    features = layer_features(model, ALL, "head", batch, width=32)
    assert len(calls) == 1 and [*features] == [*ALL]
    assert torch.equal(features["head"], features_and_logits(model, "head", batch)[0])
    assert torch.equal(features["input"], pooled(batch, 32))
    maps = batch
    with torch.no_grad():
        for name, module in model.eval().named_children():
            maps = module(maps)
            if name in ALL[1:-1]:
                torch.testing.assert_close(features[name], pooled(maps, 32))
    assert not any(found.requires_grad for found in features.values())


def test_the_heads_features_are_never_projected():
    assert layer_features(resnet(), ["head"], "head", images(), width=2)["head"].shape == (6, 16)


def test_features_do_not_depend_on_the_other_samples_of_the_batch():
    model, batch = resnet(), images()
    together = layer_features(model, ALL, "head", batch, width=9)
    for name, alone in layer_features(model, ALL, "head", batch[2:3], width=9).items():
        torch.testing.assert_close(alone, together[name][2:3])


def test_the_pass_ends_behind_the_last_layer_asked_for():
    model = resnet()
    calls = {name: counting(module) for name, module in model.named_children()}
    layer_features(model, ["stage1", "relu"], "head", images(), width=8)
    assert [name for name, found in calls.items() if found] == ["stem", "relu"]
    # the last one's own hooks come behind the one that ended the pass
    later = [len(calls[name]) for name in ("stage2", "stage3", "pool", "flatten", "head")]
    assert later == [0] * 5
    layer_features(model, ["input"], "head", images(), width=8)
    assert len(calls["stem"]) == 1
    assert sum(len(module._forward_hooks) for module in model.modules()) == len(calls)


class Swallowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = resnet()
        self.failures = 0

    def forward(self, batch: Tensor) -> Tensor:
        try:
            return self.net(batch)
        except Exception:
            self.failures += 1
            return self.net(batch)


def test_a_network_that_handles_its_own_failures_does_not_take_the_early_end_for_one():
    model = Swallowing()
    layer_features(model, ["net.stage1"], "net.head", images(), width=8)
    ProbedNetwork(model, "net.head", ["net.stage1"], 8, 5, images(2))(images())
    assert model.failures == 0


def test_what_a_later_module_does_in_place_does_not_change_a_layers_features():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 5))
    batch = torch.randn(4, 3, 2, 2)
    features = layer_features(model, ["1", "2", "3"], "3", batch, width=8)
    with torch.no_grad():
        expected = F.linear(batch.flatten(1), *model[1].parameters())
    torch.testing.assert_close(features["1"], expected)
    assert torch.equal(features["2"], features["1"].relu())


@pytest.mark.parametrize(
    "layers, message",
    [
        (["stge1"], r"layer 'stge1' does not exist \(nearest: "),
        (["twice", "head"], "layer 'twice' runs more than once"),
        (["idle"], "layer 'idle' does not run"),
        (["pair"], "layer 'pair' gives a tuple"),
    ],
)
def test_a_layer_without_features_is_an_error_that_leaves_no_hooks(layers: list[str], message: str):
    model = Own()
    with pytest.raises(ModelError, match=message):
        layer_features(model, layers, "head", images(), width=8)
    assert hooks(model) == 0


def test_failures_of_the_model_are_told_as_by_models_embed_and_those_of_the_device_pass(
    monkeypatch: pytest.MonkeyPatch,
):
    model = resnet()
    with pytest.raises(ModelError, match=r"shape \(2, 1, 16, 16\): .*model\.image_size"):
        layer_features(model, ["stage1"], "head", torch.zeros(2, 1, 16, 16), width=8)

    def full(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.get_submodule("stage1"), "forward", full)
    with pytest.raises(torch.OutOfMemoryError):
        layer_features(model, ["stage2"], "head", images(), width=8)
    assert hooks(model) == 0


# a network that ends in a probe


COMMITTEES = [
    ("input",),
    ("relu",),
    ("stage1.0.conv2",),
    ("stage3",),
    ("input", "stage1", "head"),
    ("head", "input"),
    ("stage2", "relu", "stage3", "input"),
]


@pytest.mark.parametrize("layers", COMMITTEES, ids=" ".join)
def test_a_probed_network_gives_the_probe_on_the_layers_side_by_side_in_the_order_given(layers: tuple[str, ...]):
    model, batch = resnet(), images()
    before = weights_digest(model)
    _, made = cut(model, *layers)
    features = side_by_side(model, layers, "head", batch)
    assert torch.equal(made.eval().features(batch), features)
    head = models.head_of(made, "probe")
    torch.testing.assert_close(made(batch), features @ head.weight.T + head.bias)
    assert find_head(made, classes=5) == "probe"
    seen, logits = features_and_logits(made, "probe", batch)
    assert torch.equal(seen, features)
    torch.testing.assert_close(logits, made(batch))
    assert weights_digest(model) == before and hooks(model) == 0


def test_the_probe_of_a_committee_is_the_mean_of_its_members():
    model, batch, layers = resnet(), images(), ("stage1", "head", "input")
    members = [layer_features(model, [layer], "head", batch, width=24)[layer] for layer in layers]
    probes = [(torch.randn(5, features.shape[1]), torch.randn(5)) for features in members]
    weight = torch.cat([weight / 3 for weight, _ in probes], dim=1)
    bias = torch.stack([bias for _, bias in probes]).mean(0)
    _, _, made = with_probe(model, "head", layers, 24, weight, bias, factory=SMALL_RESNET, arguments=BLOCKS, size=SIZE)
    logits = [features @ weight.T + bias for features, (weight, bias) in zip(members, probes, strict=True)]
    torch.testing.assert_close(made.eval()(batch), torch.stack(logits).mean(0))


def test_a_committee_on_a_torchvision_network_needs_no_weights_of_its_head():
    torch.manual_seed(0)
    model = build("resnet18", classes=5, arguments={})
    layers, batch = ["input", "layer1", "fc"], torch.randn(3, 3, 64, 64)
    features = side_by_side(model, layers, "fc", batch)
    assert features.shape == (3, 24 + 24 + 512)
    weight, bias = torch.randn(5, features.shape[1]), torch.randn(5)
    _, recipe, made = with_probe(
        model, "fc", layers, 24, weight, bias, factory="resnet18", arguments={}, size=(3, 64, 64)
    )
    own, original = made.state_dict(), model.state_dict()
    assert {key.removeprefix("network.") for key in own if key.startswith("network.")} == {
        key for key in original if not key.startswith("fc.")
    }
    again = build(FACTORY, classes=5, arguments=json.loads(json.dumps(recipe)))
    assert isinstance(again, ProbedNetwork)
    load_bytes(again, to_bytes(made))
    with torch.no_grad():
        assert torch.equal(again.eval().features(batch), features)
        torch.testing.assert_close(again(batch), features @ weight.T + bias)


def test_all_layers_of_a_committee_come_from_one_pass_that_ends_behind_the_last_one():
    _, made = cut(resnet(), "stage2", "input", "relu")
    calls = {name: counting(module) for name, module in made.network.named_children()}
    made(images())
    assert {name: len(found) for name, found in calls.items() if found} == {"stem": 1, "relu": 1, "stage1": 1}


def test_what_lies_behind_the_last_layer_is_neither_run_nor_kept():
    _, made = cut(resnet(), "stage1", "relu")
    assert {name.split(".")[1] for name in made.state_dict() if name.startswith("network.")} == {"stem", "stage1"}
    assert isinstance(made.network.get_submodule("stage2"), nn.Identity)
    calls = [counting(made.network.get_submodule(name)) for name in ("stage2", "head")]
    made(images())
    assert calls == [[], []]


def test_a_head_with_two_names_is_left_out_under_both():
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = resnet()
            self.classifier = self.net.get_submodule("head")

        def forward(self, batch: Tensor) -> Tensor:
            return self.net(batch)

    model = Alias()
    features = side_by_side(model, ["input", "classifier"], "classifier", images())
    made = ProbedNetwork(model, "classifier", ["input", "classifier"], 24, 5, images(2))
    assert torch.equal(made.eval().features(images()), features)
    assert not any("head" in name or "classifier" in name for name in made.state_dict())


def test_passes_of_several_threads_do_not_meet():
    class Meeting(nn.Module):
        """Lets nobody pass before the others are there."""

        barrier: threading.Barrier | None = None

        def forward(self, maps: Tensor) -> Tensor:
            if self.barrier is not None:
                self.barrier.wait(timeout=20)
            return maps

    meeting = Meeting()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), meeting, nn.Conv2d(4, 4, 3), meeting, nn.Flatten(), nn.Linear(576, 5))
    made = ProbedNetwork(network, "5", ["0", "input", "2", "5"], 24, 5, images(2)).eval()
    batches = [torch.randn(4, *SIZE) for _ in range(3)]
    expected = [made(batch) for batch in batches]
    meeting.barrier = threading.Barrier(3)
    with ThreadPoolExecutor(3) as pool:
        found = [*pool.map(made, batches)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_member_whose_output_is_overwritten_keeps_its_features_and_gradients():
    def plain(network: nn.Sequential, batch: Tensor) -> Tensor:
        maps = network[0](batch)
        last = network[2](maps.relu())
        hidden = network[5](last.flatten(1))
        return torch.cat([hidden.relu(), pooled(last, 64), hidden, pooled(maps, 64)], dim=1)

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Identity(),
        nn.Linear(576, 8), nn.ReLU(inplace=True), nn.Linear(8, 5),
    )  # fmt: skip
    reference = copy.deepcopy(network)
    made = ProbedNetwork(network, "7", ["7", "2", "5", "0"], 64, 5, images(2))
    features, expected = made.features(images()), plain(reference, images())
    torch.testing.assert_close(features, expected)
    features.square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)


class Attentive(nn.Module):
    """Parameters that are used without their module's running, and frozen ones."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(3, 1, batch_first=True)
        self.block = nn.Linear(3, 8)
        self.token = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, classes)
        self.attention.requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        tokens = batch.flatten(2).transpose(1, 2)
        mixed = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.block(mixed).mean(1) + self.token)


def test_parameters_that_are_used_without_running_stay_and_frozen_ones_stay_frozen():
    network, batch = Attentive(5), images(2)
    features = layer_features(network, ["block"], "head", batch, width=8)["block"]
    made = ProbedNetwork(network, "head", ["block"], 8, 5, batch)
    torch.testing.assert_close(made.features(batch), features)
    trainable = {name for name, parameter in made.named_parameters() if parameter.requires_grad}
    assert trainable == {"network.block.weight", "network.block.bias", "probe.weight", "probe.bias"}


@pytest.mark.parametrize("layers", [["stage1"], ["input", "stage1", "head"]], ids=" ".join)
def test_training_moves_the_network_up_to_the_last_layer_also_after_a_pass_in_inference_mode(layers: list[str]):
    with torch.inference_mode():
        # a width that no other test has projected to
        layer_features(resnet(), ["stage1"], "head", images(), width=13)
    _, made = cut(resnet(), *layers, width=13)
    batch, labels = images(), torch.arange(6) % 5
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    before = {name: parameter.clone() for name, parameter in made.named_parameters()}
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(made(batch), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_that_is_cut_where_no_gradients_are_kept_trains_like_any_other(
    mode: Callable[[], contextlib.AbstractContextManager[None]],
):
    layers, whole = ["input", "stage1"], resnet()
    with mode():
        built = [
            probed_network.build(5, network=SMALL_RESNET, arguments=BLOCKS, layers=layers, width=24, size=SIZE),
            # the model and the probe's weights are of the same mode
            cut(resnet(), *layers)[1],
            ProbedNetwork(whole, "head", layers, 24, 5, images(2)),
        ]
    names = {name for name, _ in cut(resnet(), *layers)[1].named_parameters()}
    for made in built:
        before = {name: parameter.clone() for name, parameter in made.named_parameters()}
        assert before.keys() == names
        F.cross_entropy(made(images()), torch.arange(6) % 5).backward()
        torch.optim.SGD(made.parameters(), lr=0.1).step()
        assert all(not torch.equal(parameter, before[name]) for name, parameter in made.named_parameters())


@pytest.mark.parametrize("layers", [["stage2"], ["relu", "stage2", "head"]], ids=" ".join)
def test_the_gradient_at_the_first_weights_is_the_difference_quotient(layers: list[str]):
    _, made = cut(resnet(), *layers)
    made.double().eval()
    batch = images().double()
    weight = made.network.get_parameter("stem.0.weight")

    def loss() -> Tensor:
        return made(batch).square().mean()

    (gradient,) = torch.autograd.grad(loss(), weight)
    step = 1e-3
    with torch.no_grad():
        direction = gradient / gradient.norm()
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        below = loss()
    # features are float32: the quotient is good to some 1e-3
    torch.testing.assert_close((above - below) / (2 * step), gradient.norm(), rtol=2e-2, atol=0)


@pytest.mark.parametrize("layers", [["stage2"], ["input", "stage1", "head"]], ids=" ".join)
def test_the_recipe_is_json_and_rebuilds_the_network_from_bytes_and_files(tmp_path: Path, layers: list[str]):
    recipe, made = cut(resnet(), *layers)
    arguments = json.loads(json.dumps(recipe))
    batch = images()
    expected = made.eval()(batch)

    def built() -> nn.Module:
        return build(FACTORY, classes=5, arguments=arguments)

    again = built()
    assert again.training
    load_bytes(again, to_bytes(made))
    torch.save(made.state_dict(), tmp_path / "a.pt")
    save_weights(made, tmp_path / "a.safetensors")
    for loaded in (again, built(), built()):
        if loaded is not again:
            load_weights(loaded, next(tmp_path.iterdir()))
            next(tmp_path.iterdir()).unlink()
        assert weights_digest(loaded) == weights_digest(made)
        assert torch.equal(loaded.eval()(batch), expected)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(batch), expected)


def test_fingerprints_tell_layers_their_order_and_the_width_apart_at_the_same_weights():
    # each layer has 4 channels on a 4 x 4 grid, which neither width projects: the weights fit all of them
    networks = [
        probed_network.build(5, network=SMALL_RESNET, arguments=BLOCKS, layers=layers, width=width, size=SIZE)
        for layers, width in (
            (["relu", "stage1"], 64),
            (["stage1", "relu"], 64),
            (["relu", "stage1.0"], 64),
            (["relu", "stage1"], 65),
        )
    ]
    for network in networks:
        load_bytes(network, to_bytes(networks[0]))
    assert len({backbone_digest(network, "probe") for network in networks}) == 4


def test_the_probe_of_a_probed_network_is_replaced():
    model, layers = resnet(), ["head", "stage2"]
    recipe, made = cut(model, *layers)
    features = side_by_side(model, layers, "head", images())
    weight, bias = torch.randn(5, features.shape[1]), torch.randn(5)
    factory, again, replaced = with_probe(
        made, "probe", ["probe"], 24, weight, bias, factory=FACTORY, arguments=recipe, size=SIZE
    )
    assert (factory, again) == (FACTORY, recipe)
    assert backbone_digest(replaced, "probe") == backbone_digest(made, "probe")
    torch.testing.assert_close(replaced.eval()(images()), features @ weight.T + bias)


@pytest.mark.parametrize("layers", [["network.stage1"], ["probe", "input"]], ids=" ".join)
def test_a_probed_network_cannot_be_cut_again(layers: list[str]):
    recipe, made = cut(resnet(), "stage1", "stage2")
    dim = side_by_side(made, layers, "probe", images()).shape[1]
    with pytest.raises(ModelError, match=r"a probe on stage1, stage2, .* name 'probe' alone instead of"):
        with_probe(
            made, "probe", layers, 24, torch.randn(5, dim), torch.zeros(5),
            factory=FACTORY, arguments=recipe, size=SIZE,
        )  # fmt: skip
    with pytest.raises(ModelError, match="ends in a probe itself"):
        probed_network.build(5, network=FACTORY, arguments=recipe, layers=["network.stage1"], width=24, size=SIZE)


def test_a_probed_network_has_layers_like_any_other():
    model = resnet()
    _, made = cut(model, "stage1", "stage2")
    layers = find(made, "probe", images(2))
    assert layers == ("input", "network.relu", "network.stage1", "network.stage2", "probe")
    assert check(made, "probe", layers, images(2)) == layers
    features = layer_features(made, layers, "probe", images(), width=24)
    for name, found in layer_features(model, ["relu", "stage1", "stage2"], "head", images(), width=24).items():
        assert torch.equal(features[f"network.{name}"], found)
    for name in ("network.relu", "network.stage2"):
        only = layer_features(made, [name], "probe", images(), width=24)
        assert torch.equal(only[name], features[name])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"layers": ["relu", "stage9"]}, r"layer 'stage9' does not exist; the nearest .*stage3"),
        ({"layers": ["head"]}, "layer 'head' is the head"),
        ({"layers": []}, r"layers are \[\]; name at least one"),
        ({"layers": ["relu", "relu"]}, r"layers are \['relu', 'relu'\]; .* each once"),
        ({"network": "resnet81"}, "no classifier of torchvision"),
        ({"network_head": "fc"}, r"model\.head 'fc' does not exist"),
        ({"size": [1, 16, 16]}, r"cannot take a batch of shape \(2, 1, 16, 16\)"),
    ],
)
def test_a_probe_that_cannot_be_built_says_why(arguments: dict[str, Any], message: str):
    given = {"network": SMALL_RESNET, "arguments": BLOCKS, "layers": ["stage1"], "width": 8, "size": [*SIZE]}
    with pytest.raises(ModelError, match=message):
        build(FACTORY, classes=5, arguments=given | arguments)


def test_a_recipe_that_built_another_network_and_a_probe_of_another_shape_are_refused():
    def made(weight: Tensor, arguments: dict[str, Any]) -> object:
        return with_probe(
            resnet(), "head", ["stage1"], 24, weight, torch.zeros(5),
            factory=SMALL_RESNET, arguments=arguments, size=SIZE,
        )  # fmt: skip

    with pytest.raises(ModelError, match=r"'width': 8.* has other weights: stem\.0\.weight"):
        made(torch.zeros(5, 24), {"width": 8})
    with pytest.raises(ValueError, match=r"has weight \(5, 24\)"):
        made(torch.zeros(5, 9), BLOCKS)
