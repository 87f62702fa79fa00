from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from posttrain.errors import ModelError
from posttrain.vision.embedding import features_and_logits
from posttrain.vision.models import build, find_head, mlp, replace_head, small_resnet
from posttrain.vision.weights import backbone_digest, load_weights, to_bytes, weights_digest


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# building


def test_a_torchvision_name_gives_that_architecture_with_our_classes():
    model = build("resnet18", classes=7, arguments={"zero_init_residual": True})
    assert parameters(model) == 11_689_512 - 1000 * 513 + 7 * 513  # torchvision's documented count, less its head
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


@pytest.mark.parametrize("classes, arguments", [(3, {}), (5, {"inputs": 12, "width": 9})])
def test_the_built_in_mlp_is_named_like_a_users_factory(classes: int, arguments: dict[str, int]):
    model = build("posttrain.vision.models:mlp", classes=classes, arguments=arguments)
    inputs, width = arguments.get("inputs", 64), arguments.get("width", 128)
    assert parameters(model) == (inputs + 1) * width + (width + 1) * classes
    assert model(torch.zeros(2, 1, inputs, 1)).shape == (2, classes)


@pytest.mark.parametrize("blocks, depth", [(1, 8), (3, 20)])
def test_small_resnet_has_the_depth_and_width_of_the_paper(blocks: int, depth: int):
    model = small_resnet(10, blocks=blocks)
    weighted = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and "downsample" not in name
    ]
    assert len(weighted) == depth
    features, logits = features_and_logits(model, "head", torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, 64) and logits.shape == (2, 10)


def test_small_resnet_takes_grey_images_of_28_pixels_and_halves_them_twice():
    model = small_resnet(10, width=4, channels=1)
    shapes: list[torch.Size] = []
    model.get_submodule("pool").register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    model.eval()(torch.zeros(2, 1, 28, 28))
    assert shapes == [(2, 16, 7, 7)]


def test_a_stem_of_stride_2_halves_the_image_once_more_at_a_quarter_of_the_cost():
    shapes: list[torch.Size] = []
    costs: list[int] = []
    for stride in (1, 2):
        model = small_resnet(10, width=4, stem_stride=stride).eval()
        model.get_submodule("pool").register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(2, 3, 32, 32))
        costs.append(counter.get_total_flops())
    assert shapes == [(2, 16, 8, 8), (2, 16, 4, 4)]
    assert costs[1] / costs[0] == pytest.approx(0.25, abs=0.001)
    assert parameters(small_resnet(10, stem_stride=2)) == parameters(small_resnet(10))


@pytest.mark.parametrize(
    "factory, message",
    [
        (
            "resnet81",
            r"'resnet81' is no classifier of torchvision \(nearest: .*resnet18.*package\.module:function",
        ),
        ("fcn_resnet50", "no classifier of torchvision"),
        ("no_such_package.zoo:net", r"'no_such_package\.zoo' cannot be imported.*No module named"),
        ("posttrain.vision.models:small_rsnet", r"no function 'small_rsnet' \(nearest: small_resnet\)"),
        ("posttrain.vision.images:PIXEL_LIMIT", "is a int, not a function"),
        ("builtins:dict", "returned dict; return a torch.nn.Module"),
    ],
)
def test_a_factory_that_leads_nowhere_is_explained(factory: str, message: str):
    with pytest.raises(ModelError, match=message):
        build(factory, classes=3, arguments={})


def test_arguments_that_the_factory_does_not_take_are_shown():
    with pytest.raises(ModelError, match=r"'depth': 3.*unexpected keyword argument.*check model\.arguments"):
        build("posttrain.vision.models:mlp", classes=3, arguments={"depth": 3})
    with pytest.raises(ModelError, match=r"check model\.arguments"):
        build("resnet18", classes=3, arguments={"depth": 3})


def test_a_module_in_the_current_folder_is_found_and_its_own_errors_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_zoo.py").write_text("from torch import nn\ndef net(classes): return nn.Linear(2, classes)\n")
    (tmp_path / "own_broken_zoo.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert isinstance(build("own_zoo:net", classes=3, arguments={}), nn.Linear)
    with pytest.raises(ModelError, match="ZeroDivisionError: division by zero"):
        build("own_broken_zoo:net", classes=3, arguments={})


# the head


@pytest.mark.parametrize(
    "name, head", [("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("vgg11", "classifier.6")]
)
def test_the_head_of_torchvision_models_is_found(name: str, head: str):
    with torch.device("meta"):
        model = build(name, classes=4096, arguments={})
    assert find_head(model, classes=4096) == head


NESTED = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 2))


def test_the_last_linear_with_as_many_outputs_as_classes_is_the_head():
    assert find_head(NESTED, classes=3) == "2.0"
    assert find_head(NESTED, classes=2) == "3"
    assert find_head(NESTED, classes=3, name="1") == "1"


@pytest.mark.parametrize(
    "classes, name, message",
    [
        (10, None, r"has 10 outputs.*1 \(4 -> 3\), 2\.0 \(3 -> 3\), 3 \(3 -> 2\).*model\.head"),
        (3, "fc", r"'fc' does not exist; .*could be meant: 1, 2\.0$"),
        (3, "2.1", r"'2\.1' is a ReLU, not a Linear; .*: 1, 2\.0$"),
        (3, "3", r"'3' has 2 outputs for 3 classes; .*: 1, 2\.0$"),
        (10, "3", r"'3' has 2 outputs for 10 classes; .*: 1 \(4 -> 3\)"),
    ],
)
def test_where_no_head_is_found_the_error_says_which_could_be_meant(classes: int, name: str | None, message: str):
    with pytest.raises(ModelError, match=message):
        find_head(NESTED, classes=classes, name=name)


def test_a_model_without_any_linear_is_told_so():
    with pytest.raises(ModelError, match=r"Linear modules: none"):
        find_head(nn.Conv2d(1, 3, 1), classes=3)


# replacing the head


def test_a_replaced_head_decides_and_the_backbone_stays():
    torch.manual_seed(0)
    model, batch = small_resnet(3, width=4), torch.randn(4, 3, 8, 8)
    features, _ = features_and_logits(model, "head", batch)
    before = backbone_digest(model, "head"), weights_digest(model)
    weight, bias = torch.randn(3, 16), torch.randn(3)
    replace_head(model, "head", weight, bias)
    torch.testing.assert_close(model(batch), features @ weight.T + bias)
    assert backbone_digest(model, "head") == before[0] and weights_digest(model) != before[1]


def test_a_head_without_bias_gets_one_only_where_it_is_needed_and_keeps_it_in_the_file(tmp_path: Path):
    def bare() -> nn.Sequential:
        return nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))

    model, weight = bare(), torch.randn(2, 4)
    replace_head(model, "1", weight, torch.zeros(2))
    assert [*model.state_dict()] == ["1.weight"]
    replace_head(model, "1", weight, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(model(torch.zeros(1, 4)), torch.tensor([[1.0, 2.0]]))
    (tmp_path / "a.safetensors").write_bytes(to_bytes(model))
    again = bare()
    load_weights(again, tmp_path / "a.safetensors")
    assert same(again, model) and again[1].bias.requires_grad


def test_a_head_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"has weight \(3, 128\)"):
        replace_head(mlp(3), "head", torch.zeros(3, 5), torch.zeros(3))
