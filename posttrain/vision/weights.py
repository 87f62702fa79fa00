"""The weights of a model: read from files without unpickling, saved and sent as bytes, and told apart by digests."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from posttrain.errors import ModelError


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads the weights of a .safetensors file, or of a file by torch.save, into the model, without unpickling.

    Takes a bare state_dict, {"state_dict": ...} or {"model": ...}; prefixes of DataParallel and torch.compile
    are removed. Every tensor must fit and be finite, none may be missing or left over; only a bias for a Linear
    without one is added (see `models.replace_head`). Raises ModelError with the file and what does not fit.
    """
    state = _state(_read(path), path)
    own = model.state_dict()
    for prefix in ("module.", "_orig_mod."):
        if all(key.startswith(prefix) for key in state) and not any(key.startswith(prefix) for key in own):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    biases = _added_biases(model, state)
    if faults := _faults(state, own, biases):
        raise ModelError(
            f"the weights in {path} do not fit the model ({'; '.join(faults)}); "
            "check model.factory, model.arguments and the number of classes"
        )
    broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
    if broken:
        raise ModelError(f"the weights in {path} are not finite in {', '.join(broken[:3])}; use other weights")
    for key, linear in biases.items():
        linear.bias = nn.Parameter(state[key].to(linear.weight, copy=True))
    model.load_state_dict(state, strict=False)


def _faults(state: Mapping[str, Tensor], own: Mapping[str, Tensor], biases: Collection[str]) -> list[str]:
    """What keeps `state` from fitting the model's `own` state_dict: a clause for each kind of fault."""
    # tied tensors: safetensors' save_model stores one of them; and BatchNorm counts only since torch 0.4.1
    stored = {own[key].data_ptr() for key in state if key in own}
    missing = [
        key
        for key, tensor in own.items()
        if key not in state and tensor.data_ptr() not in stored and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in own and key not in biases]
    misshaped = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in state
        if key in own and state[key].shape != own[key].shape
    ]
    return [
        f"{what} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshaped))
        if keys
    ]


def to_bytes(model: nn.Module) -> bytes:
    """The model's state_dict in the safetensors format, tied tensors under each name; `load_bytes` loads it."""
    # clones: safetensors refuses tensors that share memory
    state = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in model.state_dict().items()}
    return safetensors.torch.save(state)


def load_bytes(model: nn.Module, weights: bytes) -> None:
    """Loads weights of `to_bytes` into the model."""
    state = safetensors.torch.load(weights)
    for key, linear in _added_biases(model, state).items():
        linear.bias = nn.Parameter(state[key].to(linear.weight, copy=True))
    model.load_state_dict(state)


def weights_digest(model: nn.Module) -> str:
    """16 hexadecimal digits of a SHA-256 over all parameters and buffers: name, dtype, shape, bytes."""
    return _digest(_tensors(model))


def backbone_digest(model: nn.Module, head: str) -> str:
    """As `weights_digest`, over everything but the head: equal as long as the features are."""
    own = {f"{head}.{name}" for name, _ in _tensors(model.get_submodule(head))}
    return _digest((name, tensor) for name, tensor in _tensors(model) if name not in own)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    # buffers that are not part of the state_dict shape the features, too
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _read(path: Path) -> object:
    if not path.is_file():
        raise ModelError(f"there is no weights file {path}; check model.weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # the readers of torch raise a dozen types for files that are not theirs
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and culprit:
            raise ModelError(
                f"{path} holds pickled objects ({culprit[1]}), which could run code and are refused; "
                "save the model's state_dict() instead"
            ) from error
        raise ModelError(
            f"{path} is not a readable weights file ({type(error).__name__}); "
            "save the model's state_dict() by torch.save or as safetensors"
        ) from error


def _state(content: object, path: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelError(
            f"{path} holds no state_dict (names to tensors), at the top or under 'state_dict' or 'model'; "
            "save the model's state_dict()"
        )
    return {str(key): tensor for key, tensor in content.items()}


def _added_biases(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, nn.Linear]:
    """The biases in `state` that belong to a Linear of the model that has none, by their names."""
    return {
        f"{path}.bias": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module.bias is None
        and f"{path}.bias" in state
        and state[f"{path}.bias"].shape == (module.out_features,)
    }
