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
    def of(cls, features: Tensor, name: str) -> Scale:
        """Raises DataError where the variance of a column has no place in float64."""
        values = features.double()
        mean, std = values.mean(dim=0), values.std(dim=0, correction=0)
        varies = (values != values[:1]).any(dim=0)
        if (lost := varies & ((std == 0) | ~torch.isfinite(mean + std))).any():
            column = int(lost.nonzero()[0])
            raise DataError(
                f"{name}: the values in column {column} are too large or too small for their variance to be computed "
                f"(the largest: {float(values[:, column].abs().max()):.2g}); rescale them"
            )
        # of a constant column only rounding is left, if anything
        usable = varies & (std > 0)
        return cls(torch.where(varies, mean, values[0]), torch.where(usable, std, torch.ones_like(std)))

    def __call__(self, features: Tensor, name: str) -> Tensor:
        if features.shape[1] != len(self.mean):
            raise DataError(f"{name} has {features.shape[1]} columns, and the training features have {len(self.mean)}")
        scaled = ((features.double() - self.mean) / self.std).float()
        if not bool(torch.isfinite(scaled).all()):
            row, column = (~torch.isfinite(scaled)).nonzero()[0].tolist()
            value = float(features[row, column])
            raise DataError(
                f"{name}: {value:.2g} in row {row} and column {column} lies too far from the training features "
                f"(mean {float(self.mean[column]):.2g}, standard deviation {float(self.std[column]):.2g}); are both "
                "on one scale?"
            )
        return scaled


def as_layers(features: Features, name: str) -> dict[str, Tensor]:
    """Features as {layer: [n, d]}; one matrix becomes the layer `ONE_LAYER`. Raises DataError."""
    given = features if isinstance(features, Mapping) else {ONE_LAYER: features}
    if not given:
        raise DataError(f"{name} is empty; give a matrix [samples, columns], or one for each layer")
    layers: dict[str, Tensor] = {}
    for layer, matrix in given.items():
        where = name if len(given) == 1 else f"{name}[{layer!r}]"
        try:
            given_tensor = isinstance(matrix, Tensor)
            tensor = matrix.detach().cpu() if given_tensor else torch.from_numpy(_as_numbers(matrix, where))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where} is no matrix of numbers ({error}); encode text and categories first") from None
        if tensor.is_complex():
            raise DataError(f"{where} holds complex numbers; give real and imaginary parts as columns of their own")
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


def _as_numbers(matrix: Any, where: str) -> np.ndarray:
    if hasattr(matrix, "toarray"):
        matrix = matrix.toarray()  # scipy's sparse matrices
    array = np.asarray(matrix)
    if array.dtype.kind == "O" and array.ndim == 2:
        import pandas as pd

        # pandas' own missing value is no number to numpy
        if (missing := np.asarray(pd.isna(array))).any():
            raise DataError(
                f"{where} holds a missing value (first in row {int(missing.any(axis=1).argmax())}); fill or drop it"
            )
    if array.dtype.kind not in "fiubc":
        array = array.astype(np.float64)
    exact = array.dtype if array.dtype.kind == "c" or array.dtype in (np.float32, np.float64) else np.float64
    # torch takes no memory that may not be written to, as of a file that is mapped
    return np.require(array, exact, ["C", "W"])


def as_classes(labels: ArrayLike, name: str, classes: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(class numbers int64 [n], the distinct labels, sorted); labels are numbers or text. Raises DataError."""
    given = _label_array(labels)
    if given.ndim != 1:
        raise DataError(f"{name} has the shape {given.shape}; give one label per sample (of one-hot rows the argmax)")
    if not len(given):
        raise DataError(f"{name} is empty: there are no samples")
    if given.dtype.kind == "O":
        given = _of_one_type(given, name)
    if given.dtype.kind == "f":
        if not np.isfinite(given).all():
            at = int(np.argmin(np.isfinite(given)))
            raise DataError(f"{name}[{at}] is {given[at]}, no label; leave such samples out")
        if (given != np.floor(given)).any():
            at = int(np.argmax(given != np.floor(given)))
            raise DataError(f"{name}[{at}] is {given[at]}, no whole number: are they classes?")
        given = given.astype(np.int64)
    if classes is None:
        classes, numbers = np.unique(given, return_inverse=True)
        if len(classes) < 2:
            raise DataError(f"all {name} are {classes.tolist()[0]!r}; at least two classes are needed")
        return numbers.astype(np.int64), classes
    if given.dtype.kind != classes.dtype.kind and {given.dtype.kind, classes.dtype.kind} - set("iub"):
        raise DataError(f"{name} are {given.dtype} and the training labels {classes.dtype}; give both in one type")
    numbers = np.searchsorted(classes, given).clip(max=len(classes) - 1)
    if (unknown := classes[numbers] != given).any():
        label = given[unknown].tolist()[0]
        at = int(np.argmax(unknown))
        raise DataError(f"{name}[{at}] is {label!r}, a class that no training label has ({len(classes)} classes)")
    return numbers.astype(np.int64), classes


def _label_array(labels: Any) -> np.ndarray:
    import pandas as pd

    if isinstance(labels, Tensor):
        return labels.detach().cpu().numpy()
    # numpy would make text of numbers in a list of text, and a number of pandas' missing value
    as_they_are = isinstance(labels, list | tuple) or isinstance(
        getattr(labels, "dtype", None), pd.api.extensions.ExtensionDtype
    )
    return np.asarray(labels, dtype=object) if as_they_are else np.asarray(labels)


def _of_one_type(given: np.ndarray, name: str) -> np.ndarray:
    """Labels that are Python objects as an array of numbers or text. Raises DataError."""
    import pandas as pd

    # pandas' own missing value is neither equal nor unequal to itself
    if (missing := np.asarray(pd.isna(given))).any():
        at = int(np.argmax(missing))
        raise DataError(f"{name}[{at}] is {given[at]}, no label; leave such samples out")
    plain = [label.item() if isinstance(label, np.generic | Tensor) else label for label in given]
    kinds = {type(label) for label in plain}
    if len(kinds) > 1 and not kinds <= {int, float, bool}:
        raise DataError(f"{name} mixes {', '.join(sorted(kind.__name__ for kind in kinds))}; use one type")
    try:
        array = np.array(plain)
    except ValueError:  # of lists of different lengths
        array = given
    if array.ndim != 1 or array.dtype.kind == "O":
        raise DataError(f"{name} are of the type {type(plain[0]).__name__}; give numbers of up to 64 bits, or text")
    return array


def as_samples(
    features: Features, labels: ArrayLike, *, of: str = "", classes: np.ndarray | None = None
) -> tuple[dict[str, Tensor], np.ndarray, np.ndarray]:
    """(features by layer, class numbers, classes) of samples that have one label each; `of` is what they are called."""
    numbers, classes = as_classes(labels, f"{of}labels", classes)
    layers = as_layers(features, f"{of}features")
    count = len(next(iter(layers.values())))
    if count != len(numbers):
        raise DataError(f"{of}features has {count} rows and {of}labels has {len(numbers)}; give one label per row")
    _refuse_another_order(row_index(features), getattr(labels, "index", None), of)
    return layers, numbers, classes


def _refuse_another_order(of_features: Any, of_labels: Any, of: str) -> None:
    """Raises DataError where pandas' indices say that rows and labels are not of the same samples."""
    import pandas as pd

    if not isinstance(of_features, pd.Index) or not isinstance(of_labels, pd.Index) or of_features.equals(of_labels):
        return
    # what nobody has set says nothing, unless it names the very same rows in another order
    unset = any(index.equals(pd.RangeIndex(len(index))) for index in (of_features, of_labels))
    if unset and len(of_features.symmetric_difference(of_labels)):
        return
    raise DataError(
        f"{of}features and {of}labels have different indices; give labels.loc[features.index], or, where both are in "
        "one order, labels.to_numpy()"
    )
