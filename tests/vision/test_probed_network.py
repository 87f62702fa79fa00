from __future__ import annotations

import contextlib
import copy
import json
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_networks import BLOCKS, SIZE, SMALL_RESNET, counting, cut, hooks, images, resnet, side_by_side
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision import models, probed_network
from posttrain.vision.embedding import features_and_logits, layer_features, pooled
from posttrain.vision.layers import check, find
from posttrain.vision.models import build, find_head
from posttrain.vision.probed_network import FACTORY, ProbedNetwork, with_probe
from posttrain.vision.weights import backbone_digest, load_bytes, load_weights, to_bytes, weights_digest

ENSEMBLES = [
    ("input",),
    ("relu",),
    ("stage1.0.conv2",),
    ("stage3",),
    ("input", "stage1", "head"),
    ("head", "input"),
    ("stage2", "relu", "stage3", "input"),
]


@pytest.mark.parametrize("layers", ENSEMBLES, ids=" ".join)
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


def test_the_probe_of_an_ensemble_is_the_mean_of_its_members():
    model, batch, layers = resnet(), images(), ("stage1", "head", "input")
    members = [layer_features(model, [layer], "head", batch, width=24)[layer] for layer in layers]
    probes = [(torch.randn(5, features.shape[1]), torch.randn(5)) for features in members]
    weight = torch.cat([weight / 3 for weight, _ in probes], dim=1)
    bias = torch.stack([bias for _, bias in probes]).mean(0)
    _, _, made = with_probe(model, "head", layers, 24, weight, bias, factory=SMALL_RESNET, arguments=BLOCKS, size=SIZE)
    logits = [features @ weight.T + bias for features, (weight, bias) in zip(members, probes, strict=True)]
    torch.testing.assert_close(made.eval()(batch), torch.stack(logits).mean(0))


def test_an_ensemble_on_a_torchvision_network_needs_no_weights_of_its_head():
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


def test_all_layers_of_an_ensemble_come_from_one_pass_that_ends_behind_the_last_one():
    _, made = cut(resnet(), "stage2", "input", "relu")
    calls = {name: counting(module) for name, module in made.network.named_children()}
    made(images())
    assert {name: len(found) for name, found in calls.items() if found} == {"stem": 1, "relu": 1, "stage1": 1}


def test_modules_behind_the_last_layer_are_neither_run_nor_kept():
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
    (tmp_path / "a.safetensors").write_bytes(to_bytes(made))
    for loaded in (again, built(), built()):
        if loaded is not again:
            load_weights(loaded, next(tmp_path.iterdir()))
            next(tmp_path.iterdir()).unlink()
        assert weights_digest(loaded) == weights_digest(made)
        assert torch.equal(loaded.eval()(batch), expected)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(copied(batch), expected)


def test_digests_tell_layers_their_order_and_the_width_apart_at_the_same_weights():
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
