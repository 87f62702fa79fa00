"""From a torch module and a data set to features: torch, torchvision and Hugging Face data sets, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from posttrain.errors import DataError, LabelRangeError, ModelError
from posttrain.vision import layers as vision_layers
from posttrain.vision.embedding import layer_features
from posttrain.vision.models import error_line, find_head

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_IMAGE_KEYS = ("pixel_values", "image", "img", "x", "input")
_LABEL_KEYS = ("label", "labels", "fine_label", "y", "target")


def count_outputs(model: nn.Module, dataset: Any) -> int:
    """The number of classes that a model tells apart, by one pass over a sample. Raises ModelError."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is a {type(model).__name__}; give a torch.nn.Module")
    if next(model.parameters(), None) is None:
        raise ModelError("the model has no parameters; give the network whose head is a Linear")
    image = sample(Samples(dataset), 0)[0][None].to(next(model.parameters()).device)
    model.eval()
    try:
        with torch.no_grad():
            output = model(image)
    except RuntimeError as error:
        raise ModelError(
            f"the model cannot take a sample of shape {tuple(image.shape)}: {error_line(error)}; give the data set the "
            "transform that the model was trained with"
        ) from error
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ModelError(f"the model returns a {type(output).__name__}; logits [samples, classes] are needed")
    return logits.shape[1]


def refuse_other_classes(labels: np.ndarray, classes: int) -> None:
    """Raises LabelRangeError where the labels are not the numbers of the model's classes, each of which occurs."""
    if labels.dtype.kind not in "iu":
        raise LabelRangeError(
            f"the labels are {labels.dtype}; the numbers of the model's classes (0..{classes - 1}) are needed"
        )
    if missing := sorted({*range(classes)} ^ {*np.unique(labels).tolist()}):
        what = "no training label is" if missing[0] in range(classes) else "a training label is"
        raise LabelRangeError(f"the model has {classes} outputs (0..{classes - 1}), and {what} {missing[0]}")


def find_layers(model: nn.Module, dataset: Any, *, classes: int, head: str | None) -> tuple[str, tuple[str, ...]]:
    """(name of the head, layers worth a probe) of a model, by one pass over two samples."""
    head = find_head(model, classes=classes, name=head)
    example = torch.stack([sample(dataset, at % len(dataset))[0] for at in range(2)])
    device = next(model.parameters()).device
    return head, vision_layers.find(model, head, example.to(device))


def embed(
    model: nn.Module,
    dataset: Dataset[Any],
    *,
    head: str,
    layers: Sequence[str],
    max_features: int,
    batch_size: int,
    num_workers: int,
    tell: Callable[[int, int], None],
) -> tuple[dict[str, Tensor], np.ndarray]:
    """(features float32 [n, d] of each layer, labels [n]) from one pass over a data set, in its order.

    The model computes where its parameters are, and is in evaluation mode afterwards. `num_workers`: processes that
    load samples, as of torch's DataLoader. `tell` is called with (done, total). Raises DataError where a sample is
    no pair of a tensor and a label, ModelError where the model cannot take them.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    labels: list[Any] = []
    for images, given in _batches(dataset, batch_size, num_workers):
        for name, features in layer_features(model, layers, head, images.to(device), width=max_features).items():
            found[name].append(features.cpu())
        labels += given
        tell(len(labels), len(dataset))  # pyright: ignore[reportArgumentType]  a map-style data set has a length
    return {name: torch.cat(parts) for name, parts in found.items()}, np.array(labels)


def accuracy(model: nn.Module, dataset: Dataset[Any], *, batch_size: int, num_workers: int) -> float:
    """The share of a data set's labels that a model predicts, computed where its parameters are."""
    device, right, count = next(model.parameters()).device, 0, 0
    model.eval()
    for images, given in _batches(dataset, batch_size, num_workers):
        with torch.no_grad():
            output = model(images.to(device))
        predicted = getattr(output, "logits", output).argmax(dim=1).cpu()
        right += int((predicted == torch.tensor(given)).sum())
        count += len(given)
    return right / count


def _batches(dataset: Any, batch_size: int, num_workers: int) -> Iterator[tuple[Tensor, list[Any]]]:
    loader = torch.utils.data.DataLoader(
        Samples(dataset), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    yield from loader


class Samples(torch.utils.data.Dataset[tuple[Tensor, Any]]):
    """A data set whose items are pairs of a tensor and a label."""

    def __init__(self, dataset: Any) -> None:
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise DataError(
                f"{type(dataset).__name__} has no length or no items by number; give a map-style data set (of an "
                "iterable one, list(...) or Hugging Face's non-streaming data set)"
            )
        if not len(dataset):
            raise DataError("the training or the validation set has no samples: give data sets that have some")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, at: int) -> tuple[Tensor, Any]:
        return sample(self.dataset, at)


def _collate(items: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    images = [image for image, _ in items]
    if len({image.shape for image in images}) > 1:
        raise DataError(
            f"images of different shapes ({tuple(images[0].shape)} and others): resize them in the data set's transform"
        )
    return torch.stack(images), [label for _, label in items]


def sample(dataset: Any, at: int) -> tuple[Tensor, Any]:
    """(image, label) of one item: a pair, or a dict with the columns of a Hugging Face data set."""
    item = dataset[at]
    if isinstance(item, Mapping):
        image, label = _from_dict(item, at)
    elif isinstance(item, Sequence) and not isinstance(item, str) and len(item) >= 2:
        image, label = item[0], item[1]
    else:
        raise DataError(f"sample {at} is a {type(item).__name__}; a pair (image, label) or a dict of both is needed")
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(image)
    if not isinstance(image, Tensor):
        raise DataError(
            f"the image of sample {at} is a {type(image).__name__}, and the model takes tensors: give the data set the "
            "transform that the model was trained with (Hugging Face: set_transform)"
        )
    if not image.is_floating_point():
        raise DataError(
            f"the image of sample {at} is a tensor of {image.dtype}, and the model takes floating numbers: give the "
            "data set the transform that the model was trained with"
        )
    return image, _class_number(label, at)


def _class_number(label: Any, at: int) -> Any:
    if not isinstance(label, Tensor | np.ndarray | np.generic):
        return label
    if math.prod(label.shape) != 1:
        raise DataError(
            f"the label of sample {at} has the shape {tuple(label.shape)}; give one class number per sample (of a "
            "one-hot label the argmax)"
        )
    return label.item()


def _from_dict(item: Mapping[str, Any], at: int) -> tuple[Any, Any]:
    image = next((item[key] for key in _IMAGE_KEYS if key in item), None)
    label = next((item[key] for key in _LABEL_KEYS if key in item), None)
    if image is None or label is None:
        missing, keys = ("image", _IMAGE_KEYS) if image is None else ("label", _LABEL_KEYS)
        raise DataError(
            f"sample {at} has the columns {', '.join(map(str, item))}, and none of them is the {missing}; rename it to "
            f"one of {', '.join(keys)}"
        )
    return image, label
