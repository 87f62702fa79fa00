from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from harness import bad_models
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from posttrain.errors import ModelError
from posttrain.vision import models
from posttrain.vision.embedding import features_and_logits, refuse_irreproducible_features
from posttrain.vision.models import build, find_head, mlp, replace_head, small_resnet
from posttrain.vision.weights import backbone_digest, load_weights, save_weights, weights_digest


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


# weights


def resnet(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return small_resnet(3, width=4)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state, "optimizer": {"lr": 0.1}},
        lambda state: {f"module.{key}": tensor for key, tensor in state.items()},
        lambda state: {"state_dict": {f"module._orig_mod.{key}": tensor for key, tensor in state.items()}},
        lambda state: {key: tensor for key, tensor in state.items() if not key.endswith("num_batches_tracked")},
    ],
    ids=["bare", "state_dict", "model", "DataParallel", "compiled", "old BatchNorm"],
)
def test_checkpoints_of_the_usual_layouts_load(wrap: Callable[[dict], dict], tmp_path: Path):
    torch.save(wrap(resnet(1).state_dict()), tmp_path / "a.pt")
    model = resnet(2)
    load_weights(model, tmp_path / "a.pt")
    assert same(model, resnet(1))


def test_saved_weights_come_back_bit_by_bit(tmp_path: Path):
    trained = resnet(1)
    trained(torch.randn(4, 3, 8, 8))  # moves the statistics of BatchNorm
    save_weights(trained, tmp_path / "a.safetensors")
    model = resnet(2)
    load_weights(model, tmp_path / "a.safetensors")
    assert same(model, trained) and weights_digest(model) == weights_digest(trained)


def tied(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("save", [save_weights, safetensors.torch.save_model])
def test_tied_weights_are_saved_and_loaded(save: Callable[[nn.Module, Any], None], tmp_path: Path):
    save(tied(1), tmp_path / "a.safetensors")
    model = tied(2)
    load_weights(model, tmp_path / "a.safetensors")
    assert same(model, tied(1)) and model[1].weight is model[0].weight


def test_weights_that_do_not_fit_are_named_with_their_file(tmp_path: Path):
    state = mlp(4, inputs=9, width=5).state_dict()
    state["extra.scale"] = state.pop("hidden.bias")
    path = tmp_path / "a.pt"
    torch.save(state, path)
    model = mlp(3, inputs=9, width=5)
    before = weights_digest(model)
    with pytest.raises(ModelError) as caught:
        load_weights(model, path)
    message = str(caught.value)
    assert str(path) in message and "missing hidden.bias" in message and "unexpected extra.scale" in message
    assert "head.weight (4, 5) for (3, 5)" in message and "\n" not in message
    assert weights_digest(model) == before


def test_of_many_keys_that_do_not_fit_the_first_few_are_named(tmp_path: Path):
    torch.save(resnet(0).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"missing hidden\.weight, hidden\.bias; unexpected .* and \d+ more"):
        load_weights(mlp(3), tmp_path / "a.pt")


def test_weights_that_are_not_finite_are_refused(tmp_path: Path):
    state = mlp(3).state_dict()
    state["hidden.bias"][7] = float("nan")
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"not finite in hidden\.bias"):
        load_weights(mlp(3), tmp_path / "a.pt")


def test_a_pickled_model_is_refused_and_not_run(tmp_path: Path):
    torch.save(mlp(3), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"a\.pt holds pickled objects \(torch\.nn.*\).* save the model's state_dict"):
        load_weights(mlp(3), tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", bytes(100)], ids=["empty", "text", "zeros"])
def test_a_file_that_is_no_weights_file_is_refused(name: str, content: bytes, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name} is not a readable weights file"):
        load_weights(mlp(3), tmp_path / name)


def test_a_file_without_a_state_dict_and_a_missing_file_are_refused(tmp_path: Path):
    torch.save({"accuracy": 0.9}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="holds no state_dict"):
        load_weights(mlp(3), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"there is no weights file .*b\.pt"):
        load_weights(mlp(3), tmp_path / "b.pt")


# replacing the head, fingerprints


def test_a_replaced_head_decides_and_the_backbone_stays():
    model, batch = resnet(0), torch.randn(4, 3, 8, 8)
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
    save_weights(model, tmp_path / "a.safetensors")
    again = bare()
    load_weights(again, tmp_path / "a.safetensors")
    assert same(again, model) and again[1].bias.requires_grad


def test_a_head_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"has weight \(3, 128\)"):
        replace_head(mlp(3), "head", torch.zeros(3, 5), torch.zeros(3))


def test_the_backbones_fingerprint_sees_every_tensor_but_the_heads():
    reference = backbone_digest(resnet(0), "head")
    assert reference == backbone_digest(resnet(0), "head") != backbone_digest(resnet(1), "head")
    assert len(reference) == 16 and int(reference, 16) >= 0
    for name in resnet(0).state_dict():
        model = resnet(0)
        tensor = model.state_dict()[name]
        tensor.view(-1)[-1] += 1
        assert (backbone_digest(model, "head") == reference) == name.startswith("head."), name


def test_fingerprints_tell_names_types_and_shapes_apart():
    base = nn.Sequential(nn.Linear(2, 3))
    wide = nn.Sequential(nn.Linear(3, 2))
    for model in (base, wide):
        for tensor in model.parameters():
            nn.init.zeros_(tensor)
    renamed = nn.Module()
    renamed.add_module("fc", base[0])
    half = nn.Sequential(nn.Linear(2, 3)).to(torch.float16)
    bfloat = nn.Sequential(nn.Linear(2, 3)).to(torch.bfloat16)
    for model in (half, bfloat):
        for tensor in model.parameters():
            nn.init.zeros_(tensor)
    assert len({weights_digest(model) for model in (base, wide, renamed, half, bfloat)}) == 5


def test_a_buffer_outside_the_state_dict_counts_for_the_fingerprint():
    model = mlp(3)
    before = backbone_digest(model, "head")
    model.register_buffer("mean", torch.ones(1), persistent=False)
    assert backbone_digest(model, "head") != before


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
    "name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0", "vit_b_32", "swin_t", "googlenet"]
)
def test_the_networks_of_torchvision_are_steady(name: str) -> None:
    torch.manual_seed(0)
    # it warns of how it draws its first weights unless told
    arguments = {"init_weights": False} if name == "googlenet" else {}
    model = models.build(name, classes=10, arguments=arguments)
    head = models.find_head(model, classes=10)
    refuse_irreproducible_features(model, head, torch.randn(2, 3, 224, 224))
