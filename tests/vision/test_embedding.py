from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import bad_models
from small_networks import Own, counting, hooks, images, resnet
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.vision import models
from posttrain.vision.embedding import features_and_logits, layer_features, pooled, refuse_irreproducible_features
from posttrain.vision.models import mlp, small_resnet
from posttrain.vision.probed_network import ProbedNetwork

# the head


def test_embedding_is_one_pass_whose_features_give_the_logits():
    model = small_resnet(5, width=4)
    batch = torch.randn(6, 3, 16, 16)
    calls: list[None] = []
    model.register_forward_hook(lambda *_: calls.append(None))
    features, logits = features_and_logits(model, "head", batch)
    assert len(calls) == 1 and not features.requires_grad
    head = model.get_submodule("head")
    torch.testing.assert_close(head(features), logits)
    torch.testing.assert_close(model.eval()(batch), logits)


def test_embedding_does_not_depend_on_the_other_samples_of_the_batch():
    model, batch = small_resnet(5, width=4).train(), torch.randn(6, 3, 16, 16)
    together = features_and_logits(model, "head", batch)[0]
    torch.testing.assert_close(features_and_logits(model, "head", batch[2:3])[0], together[2:3])


def test_the_logits_are_those_of_the_head_even_behind_a_softmax_and_in_half_precision():
    head = nn.Linear(4, 3)
    model = nn.Sequential(head, nn.Softmax(1)).to(torch.bfloat16)
    batch = torch.randn(2, 4, dtype=torch.bfloat16)
    features, logits = features_and_logits(model, "0", batch)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(logits, head(batch).float())


class Odd(nn.Module):
    def __init__(self, forward: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.forward = lambda batch: forward(self.head, batch)


@pytest.mark.parametrize(
    "forward, message",
    [
        (lambda head, batch: batch, "runs 0 times per forward pass"),
        (lambda head, batch: head(batch) + head(-batch), "runs 2 times"),
        (
            lambda head, batch: head(batch[:, None].expand(-1, 5, -1)).mean(1),
            r"has shape \(2, 5, 4\) for 2 samples",
        ),
        (lambda head, batch: head(batch.mean(0, keepdim=True)), r"has shape \(1, 4\) for 2 samples"),
    ],
)
def test_a_head_that_does_not_see_one_vector_per_sample_once_is_refused(forward: Any, message: str):
    with pytest.raises(ModelError, match=message):
        features_and_logits(Odd(forward), "head", torch.randn(2, 4))


def test_images_that_the_model_cannot_take_are_explained_and_the_model_stays_usable():
    model = mlp(3, inputs=16)
    with pytest.raises(ModelError, match=r"shape \(2, 1, 8, 8\): .*model\.image_size"):
        features_and_logits(model, "head", torch.zeros(2, 1, 8, 8))
    features_and_logits(model, "head", torch.zeros(2, 1, 4, 4))
    assert not model.get_submodule("head")._forward_hooks


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("forgetful", "gives other values at model.head 'head' for the same images when it is run again"),
        ("noisy", "gives other values at model.head 'head' for the same images when it is run again"),
        ("in_train_mode", "depends on the other images of its batch, in evaluation mode"),
        ("not_finite", "is not finite for an image of random pixels"),
    ],
)
def test_a_model_whose_features_depend_on_more_than_the_image_is_refused(factory: str, said: str) -> None:
    torch.manual_seed(0)
    model = getattr(bad_models, factory)(10)
    with pytest.raises(ModelError, match=re.escape(said)):
        refuse_irreproducible_features(model, "head", torch.randn(2, 1, 8, 8))


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "swin_t",
        *(
            pytest.param(n, marks=pytest.mark.long)
            for n in ("mobilenet_v3_small", "efficientnet_b0", "vit_b_32", "googlenet")
        ),
    ],
)
def test_the_features_of_torchvisions_networks_are_reproducible(name: str) -> None:
    torch.manual_seed(0)
    # it warns of how it initialises its weights unless told
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = models.build(name, classes=10, arguments=arguments)
    head = models.find_head(model, classes=10)
    refuse_irreproducible_features(model, head, torch.randn(2, 3, 224, 224))


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


def test_failures_of_the_model_are_told_as_for_the_head_and_those_of_the_device_pass(
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
