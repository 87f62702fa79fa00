"""Which labels of a data set are likely wrong, from features in memory: `find_label_issues` and what it returns.

The rounds are those of a run (`posttrain.rounds`, `posttrain.influence`), on features instead of images. Neither Ray
nor MLflow is needed or imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from posttrain.errors import ConfigError, DataError
from posttrain.in_memory import Cleaned, OutOfFold, ValidationSet, clean_in_memory
from posttrain.influence.in_memory import InMemory
from posttrain.influence.scores import SCORES
from posttrain.runs.noise_report import noise_sentence, round_metrics

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

    Features = ArrayLike | Tensor | Mapping[str, ArrayLike | Tensor]

FOLDS = 5
"""Of the out-of-fold predictions where there is no validation set."""

ONE_LAYER = "features"
"""Name of the layer where features come as one matrix."""


@dataclass(frozen=True)
class Noise:
    """The estimated share of wrong labels among the given ones."""

    rate: float | None
    """None: the validation labels say nothing; see `why`."""
    low: float | None
    """95 % interval."""
    high: float | None
    found: bool
    """Whether there are more wrong labels than a clean data set shows."""
    why: str
    """In words."""

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, eq=False)
class FittedProbe:
    """The linear classifier that was fitted on what is left: the mean logits of a probe on each chosen layer.

    It follows scikit-learn: `predict_proba`, `predict`, `score`, `classes_`.
    """

    classes_: np.ndarray
    layers: tuple[tuple[str, float], ...]
    """(layer, L2 penalty) of each probe."""
    _weight: Tensor = field(repr=False)
    _bias: Tensor = field(repr=False)
    _temperature: float
    _scales: Mapping[str, Scale] = field(repr=False)

    def decision_function(self, features: Features) -> np.ndarray:
        """Logits, float64 [n, classes]."""
        given = as_layers(features, "features")
        if missing := [name for name, _ in self.layers if name not in given]:
            raise DataError(f"features lack the layer {missing[0]!r}; the probe was fitted on {list(self._scales)}")
        parts = [self._scales[name](given[name], f"features[{name!r}]").double() for name, _ in self.layers]
        return (torch.cat(parts, dim=1) @ self._weight.T + self._bias).numpy()

    def linear(self) -> tuple[Tensor, Tensor]:
        """(weight [classes, d], bias [classes]), float64, of the same classifier on the raw features side by side."""
        mean = torch.cat([self._scales[name].mean for name, _ in self.layers])
        std = torch.cat([self._scales[name].std for name, _ in self.layers])
        weight = self._weight / std
        return weight, self._bias - weight @ mean

    def predict_proba(self, features: Features) -> np.ndarray:
        """Class probabilities, float64 [n, classes], calibrated on the validation labels as they were given."""
        return torch.from_numpy(self._temperature * self.decision_function(features)).softmax(dim=1).numpy()

    def predict(self, features: Features) -> np.ndarray:
        """The likeliest class of each sample."""
        return self.classes_[self.decision_function(features).argmax(axis=1)]

    def score(self, features: Features, labels: ArrayLike) -> float:
        """Accuracy on these labels."""
        return float(np.mean(self.predict(features) == np.asarray(labels)))


@dataclass(frozen=True, eq=False)
class LabelIssues:
    """What `find_label_issues` found; every array has one entry per sample, in the order of the input."""

    classes: np.ndarray
    """The distinct labels, sorted; class numbers below are positions in it."""
    given: np.ndarray
    """int64: class number of the given label."""
    is_issue: np.ndarray
    """bool: whether the sample was removed in some round."""
    round: np.ndarray
    """int64: the round that removed the sample; 0 where it stayed."""
    label_quality: np.ndarray
    """float64: probability that the given label is right, the lower the more suspect."""
    predicted: np.ndarray
    """int64: the likeliest class, as all the other samples have it."""
    suggested: np.ndarray
    """int64: the likeliest class other than the given label."""
    confidence: np.ndarray
    """float64: probability that the sample belongs to the suggested class."""
    scores: Mapping[str, np.ndarray]
    """Every score of `removal.score`, larger is more suspect: of the round that removed the sample, else the last."""
    noise: Noise
    probe: FittedProbe
    rounds: tuple[Mapping[str, Any], ...]
    """For each round: live samples, candidates, removed, and its metrics."""
    ended: str
    """Why no further round followed."""
    _index: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.given)

    def __repr__(self) -> str:
        rounds = "1 round" if len(self.rounds) == 1 else f"{len(self.rounds)} rounds"
        return f"<LabelIssues: {int(self.is_issue.sum()):,} of {len(self):,} labels, in {rounds}; {self.noise}>"

    @property
    def ranked(self) -> np.ndarray:
        """int64: positions of all samples, the most suspect first (those removed before those that stayed)."""
        return np.lexsort((self.label_quality, ~self.is_issue))

    def why(self, sample: int) -> str:
        """One sentence on the label of a sample."""
        given, suggested = self.classes[self.given[sample]], self.classes[self.suggested[sample]]
        wrong = 100 * (1 - self.label_quality[sample])
        # rounded down, and never 100 %
        return (
            f"label {given} is wrong with a probability of {'over 99' if wrong >= 99 else int(wrong)} %; "
            f"most likely otherwise: {suggested}"
        )

    def to_frame(self) -> pd.DataFrame:
        """A row per sample: cleanlab's columns, and suggested label, confidence, round and the reason."""
        import pandas as pd

        return pd.DataFrame(
            {
                "is_label_issue": self.is_issue,
                "label_quality": self.label_quality,
                "given_label": self.classes[self.given],
                "predicted_label": self.classes[self.predicted],
                "suggested_label": self.classes[self.suggested],
                "confidence": self.confidence,
                "round": self.round,
                "why": [self.why(sample) for sample in range(len(self))],
            },
            index=self._index,
        )


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
        if (
            missing := next((at for at, label in enumerate(given) if label is None or label != label), None)
        ) is not None:
            raise DataError(f"{name}[{missing}] is {given[missing]}, no label; leave such samples out")
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


def find_label_issues(
    features: Features,
    labels: ArrayLike,
    *,
    validation: tuple[Features, ArrayLike] | None = None,
    score: str = "mislabel_odds",
    threshold: float = 0.5,
    max_share: float | Literal["estimated"] = "estimated",
    budget: float = 0.05,
    class_floor: float = 0.1,
    max_rounds: int = 10,
    l2: float | Sequence[float] = (1.0, 0.1, 0.01),
    seed: int = 0,
    progress: bool = True,
) -> LabelIssues:
    """The samples whose labels are likely wrong, with the estimated noise rate and a classifier fitted on the rest.

    `features`: [n, d], or {layer: [n, d]} of several layers or embeddings of the same samples; numpy arrays, torch
    tensors, data frames or scipy's sparse matrices. Any modality does: embeddings of images, text or audio, or the
    columns of a table. `labels`: [n], numbers or text. `validation`: (features, labels) of samples that the model
    behind the features was not trained on; their labels may be as noisy. Without it every sample is judged by probes
    that were fitted without its fold (out-of-fold, 5 folds). These cannot see what a network has memorised: features
    of a network that was trained on these very labels need a validation set.

    `score`, `threshold`, `max_share`, `budget`, `class_floor`, `max_rounds` and `l2` are the keys of the run file of
    these names. `progress`: whether to show a bar where standard error is a terminal. Neither Ray nor MLflow is used.

    Raises DataError where features and labels do not fit together, ConfigError for a setting out of its bounds.

    >>> from sklearn.datasets import load_wine
    >>> import posttrain
    >>> features, labels = load_wine(return_X_y=True)
    >>> labels[:9] = 2
    >>> issues = posttrain.find_label_issues(features, labels, progress=False)
    >>> issues.is_issue[:9].all()
    np.True_
    """
    given, classes = as_classes(labels, "labels")
    layers = as_layers(features, "features")
    count = len(next(iter(layers.values())))
    if count != len(given):
        raise DataError(f"features has {count} rows and labels has {len(given)}; give one label per row")
    scales = {name: Scale.of(matrix) for name, matrix in layers.items()}
    varied = tuple(name for name, matrix in layers.items() if bool((matrix != matrix[:1]).any()))
    if not varied:
        raise DataError("features: all samples have the same features, so that no label can be told from another")
    live = InMemory({name: scales[name](layers[name], name) for name in varied}, torch.from_numpy(given))
    probe = _section("Probe", l2=l2)
    removal = _section(
        "Removal",
        score=score,
        threshold=threshold,
        max_share=max_share,
        budget=budget,
        class_floor=class_floor,
        max_rounds=max_rounds,
    )
    if validation is None:
        calibrated_on = OutOfFold.by_id(np.arange(count), given, FOLDS, seed)
    else:
        calibrated_on = _validation_set(validation, scales, varied, classes)
    with shown(progress) as tell:
        cleaned = clean_in_memory(
            live, calibrated_on, classes=len(classes), probe=probe, removal=removal, seed=seed, tell=tell
        )
    return _issues(cleaned, given, classes, scales, getattr(features, "index", None), out_of_fold=validation is None)


@contextmanager
def shown(wanted: bool) -> Iterator[Callable[[str], None]]:
    """Shows what is being done on standard error while it is done, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield lambda line: None
        return
    with console.status("posttrain") as status:
        yield lambda line: status.update(f"posttrain: {line}")


def _section(name: str, **values: Any) -> Any:
    """A section of the run file with these values. Raises ConfigError."""
    from pydantic import ValidationError

    from posttrain import config

    try:
        return getattr(config, name)(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{key} = {first['input']!r}: {first['msg']}") from None


def _validation_set(
    given: tuple[Features, ArrayLike], scales: Mapping[str, Scale], layers: Sequence[str], classes: np.ndarray
) -> ValidationSet:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise DataError("validation has to be a pair (features, labels)")
    own, numbers = as_layers(given[0], "validation features"), as_classes(given[1], "validation labels", classes)[0]
    if missing := [name for name in layers if name not in own]:
        raise DataError(f"the validation features lack the layer {missing[0]!r}; they have {list(own)}")
    count = len(next(iter(own.values())))
    if count != len(numbers):
        raise DataError(f"the validation features have {count} rows and its labels are {len(numbers)}")
    features = {name: scales[name](own[name], f"validation features[{name!r}]") for name in layers}
    return ValidationSet(InMemory(features, torch.from_numpy(numbers)))


def _issues(
    cleaned: Cleaned,
    given: np.ndarray,
    classes: np.ndarray,
    scales: Mapping[str, Scale],
    index: Any,
    *,
    out_of_fold: bool,
) -> LabelIssues:
    columns, fitted = cleaned.columns, cleaned.ensemble
    weight, bias = fitted.fold()
    where = "out-of-fold predictions (no validation set was given)" if out_of_fold else "the validation set"
    noise = cleaned.first.noise
    known = noise.doubt is None
    return LabelIssues(
        classes=classes,
        given=given,
        is_issue=cleaned.removed_in > 0,
        round=cleaned.removed_in,
        label_quality=1 / (1 + np.exp(columns["mislabel_odds"].astype(np.float64))),
        predicted=columns["predicted_label"].astype(np.int64),
        suggested=columns["suggested_label"].astype(np.int64),
        confidence=columns["confidence"].astype(np.float64),
        scores={name: columns[name] for name in SCORES},
        noise=Noise(
            noise.rate if known else None,
            noise.low if known else None,
            noise.high if known else None,
            noise.found,
            f"{noise_sentence(noise)}, by {where}",
        ),
        probe=FittedProbe(classes, fitted.members, weight.double(), bias.double(), cleaned.last.temperature, scales),
        rounds=tuple({"round": done.number, **round_metrics(done)} for done in cleaned.history),
        ended=cleaned.ended,
        _index=index,
    )
