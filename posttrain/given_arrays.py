"""Features and labels as users have them, checked and brought into tensors and class numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    Features = ArrayLike | Tensor | Mapping[str, ArrayLike | Tensor]

ONE_LAYER = "features"
"""Name of the layer where features come as one matrix."""


@dataclass(frozen=True)
class Scale:
    """Centres and scales the columns of one layer by the training samples, as tables need it: float32 alone would lose
    what varies little around a large mean."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Scale:
        values = features.double()
        std = values.std(dim=0, correction=0)
        return cls(values.mean(dim=0), torch.where(std > 0, std, torch.ones_like(std)))

    def __call__(self, features: Tensor, name: str) -> Tensor:
        if features.shape[1] != len(self.mean):
            raise DataError(f"{name} has {features.shape[1]} columns, and the training features have {len(self.mean)}")
        return ((features.double() - self.mean) / self.std).float()


def as_layers(features: Features, name: str) -> dict[str, Tensor]:
    """Features as {layer: [n, d]}; one matrix becomes the layer `ONE_LAYER`. Raises DataError."""
    given = features if isinstance(features, Mapping) else {ONE_LAYER: features}
    if not given:
        raise DataError(f"{name} is empty; give a matrix [samples, columns], or one for each layer")
    layers: dict[str, Tensor] = {}
    for layer, matrix in given.items():
        where = name if len(given) == 1 else f"{name}[{layer!r}]"
        try:
            tensor = matrix.detach().cpu() if isinstance(matrix, Tensor) else torch.from_numpy(_as_numbers(matrix))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} is no matrix of numbers ({error}); encode text and categories first") from None
        if tensor.ndim != 2:
            shape = tuple(tensor.shape)
            raise DataError(f"{where} has the shape {shape}; give one row per sample, as features.reshape(n, -1) does")
        if not bool(torch.isfinite(tensor).all()):
            row = int((~torch.isfinite(tensor)).any(dim=1).nonzero()[0])
            raise DataError(f"{where} holds a value that is not finite (first in row {row}); fill or drop it")
        layers[str(layer)] = tensor
    lengths = {layer: len(tensor) for layer, tensor in layers.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"{name}: the layers have different numbers of samples: {lengths}")
    return layers


def row_index(features: Features) -> Any:
    """The index of a data frame, or of the first one among several layers; None where there is none."""
    import pandas as pd

    given = features.values() if isinstance(features, Mapping) else [features]
    return next((matrix.index for matrix in given if isinstance(matrix, pd.DataFrame)), None)


def _as_numbers(matrix: Any) -> np.ndarray:
    if hasattr(matrix, "toarray"):
        matrix = matrix.toarray()  # scipy's sparse matrices
    array = np.asarray(matrix)
    if array.dtype.kind not in "fiub":
        array = array.astype(np.float64)
    return np.ascontiguousarray(array, dtype=array.dtype if array.dtype in (np.float32, np.float64) else np.float64)


def as_classes(labels: ArrayLike, name: str, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers int64 [n], the distinct labels, sorted); labels are numbers or text. Raises DataError."""
    given = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if given.ndim != 1:
        raise DataError(f"{name} has the shape {given.shape}; give one label per sample (of one-hot rows the argmax)")
    if given.dtype.kind == "f":
        if not np.isfinite(given).all():
            raise DataError(f"{name}[{int(np.argmin(np.isfinite(given)))}] is no label; leave such samples out")
        if (given != np.floor(given)).any():
            at = int(np.argmax(given != np.floor(given)))
            raise DataError(f"{name}[{at}] is {given[at]}, no whole number: are they classes?")
        given = given.astype(np.int64)
    elif given.dtype.kind == "O":
        import pandas as pd

        # pandas' own missing value is neither equal nor unequal to itself
        if (missing := np.asarray(pd.isna(given))).any():
            at = int(np.argmax(missing))
            raise DataError(f"{name}[{at}] is {given[at]}, no label; leave such samples out")
        if len({type(label) for label in given}) > 1:
            raise DataError(
                f"{name} mixes {', '.join(sorted({type(label).__name__ for label in given}))}; use one type"
            )
        given = np.array(given.tolist())
    if classes is None:
        classes, numbers = np.unique(given, return_inverse=True)
        if len(classes) < 2:
            raise DataError(f"{name} holds {len(classes)} class(es); at least two are needed")
        return numbers.astype(np.int64), classes
    if given.dtype.kind != classes.dtype.kind and {given.dtype.kind, classes.dtype.kind} - set("iub"):
        raise DataError(f"{name} are {given.dtype} and the training labels {classes.dtype}; give both in one type")
    numbers = np.searchsorted(classes, given).clip(max=len(classes) - 1)
    if (unknown := classes[numbers] != given).any():
        at = int(np.argmax(unknown))
        raise DataError(f"{name}[{at}] is {given[at]!r}, a class that no training label has ({len(classes)} classes)")
    return numbers.astype(np.int64), classes


def as_samples(
    features: Features, labels: ArrayLike, *, of: str = "", classes: np.ndarray | None = None
) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
    """(features by layer, class numbers, classes) of samples that have one label each; `of` is what they are called."""
    numbers, classes = as_classes(labels, f"{of}labels", classes)
    layers = as_layers(features, f"{of}features")
    count = len(next(iter(layers.values())))
    if count != len(numbers):
        raise DataError(f"{of}features has {count} rows and {of}labels has {len(numbers)}; give one label per row")
    return layers, numbers, classes
