from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from posttrain.errors import ModelError
from posttrain.vision.models import mlp, small_resnet
from posttrain.vision.weights import backbone_digest, load_weights, to_bytes, weights_digest


def same(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


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
    (tmp_path / "a.safetensors").write_bytes(to_bytes(trained))
    model = resnet(2)
    load_weights(model, tmp_path / "a.safetensors")
    assert same(model, trained) and weights_digest(model) == weights_digest(trained)


def tied(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def written_by_us(model: nn.Module, path: str) -> None:
    Path(path).write_bytes(to_bytes(model))


@pytest.mark.parametrize("save", [written_by_us, safetensors.torch.save_model])
def test_tied_weights_are_saved_and_loaded(save: Callable[[nn.Module, str], None], tmp_path: Path):
    save(tied(1), str(tmp_path / "a.safetensors"))
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


def test_the_backbones_digest_sees_every_tensor_but_the_heads():
    reference = backbone_digest(resnet(0), "head")
    assert reference == backbone_digest(resnet(0), "head") != backbone_digest(resnet(1), "head")
    assert len(reference) == 16 and int(reference, 16) >= 0
    for name in resnet(0).state_dict():
        model = resnet(0)
        tensor = model.state_dict()[name]
        tensor.view(-1)[-1] += 1
        assert (backbone_digest(model, "head") == reference) == name.startswith("head."), name


def test_digests_tell_names_types_and_shapes_apart():
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


def test_a_buffer_outside_the_state_dict_counts_for_the_digest():
    model = mlp(3)
    before = backbone_digest(model, "head")
    model.register_buffer("mean", torch.ones(1), persistent=False)
    assert backbone_digest(model, "head") != before
