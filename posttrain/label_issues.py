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
import pyarrow as pa
import torch
from torch import Tensor

from posttrain.errors import ConfigError, DataError, FeaturelessError
from posttrain.given_arrays import Scale, as_layers, as_samples, row_index
from posttrain.in_memory import Cleaned, OutOfFold, ValidationSet, clean_in_memory
from posttrain.influence.in_memory import InMemory
from posttrain.influence.scores import SCORES
from posttrain.runs.noise_report import Wording, noise_sentence
from posttrain.schema import label_quality
from posttrain.store.results import label_sentences

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

    from posttrain.given_arrays import Features

FOLDS = 5
"""Of the out-of-fold predictions where there is no validation set."""


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
    """int64: the likeliest class, predicted without the sample itself; it may be the given one."""
    suggested: np.ndarray
    """int64: the likeliest class other than the given label."""
    confidence: np.ndarray
    """float64: probability that the sample belongs to the suggested class."""
    scores: Mapping[str, np.ndarray]
    """Every score of `removal.score`, larger is more suspect: of the round that removed the sample, else the last."""
    noise: Noise
    probe: FittedProbe
    rounds: tuple[Mapping[str, Any], ...]
    """For each round: live samples, candidates, removed, and its metrics. The first is the start: nothing removed."""
    ended: str
    """Why no further round followed."""
    _index: Any = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.given)

    def __repr__(self) -> str:
        number = sum(done["removed"] > 0 for done in self.rounds)
        rounds = "1 round" if number == 1 else f"{number} rounds"
        return f"<LabelIssues: {int(self.is_issue.sum()):,} of {len(self):,} labels, in {rounds}; {self.noise}>"

    @property
    def ranked(self) -> np.ndarray:
        """int64: positions of all samples, the most suspect first (those removed before those that stayed)."""
        return np.lexsort((self.label_quality, ~self.is_issue))

    def why(self, sample: int) -> str:
        """One sentence on the label of a sample."""
        return self._sentences(slice(sample, sample + 1 or None))[0]

    def _sentences(self, samples: slice) -> list[str]:
        names = np.array([str(name) for name in self.classes])
        given, suggested = (pa.array(names[of[samples]]) for of in (self.given, self.suggested))
        said = label_sentences(given, self.label_quality[samples], suggested, pa.array(self.confidence[samples]))
        return said.to_pylist()

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
                "why": self._sentences(slice(None)),
            },
            index=self._index,
        )


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
    layers, given, classes = as_samples(features, labels)
    scales = {name: Scale.of(matrix, name) for name, matrix in layers.items()}
    varied = tuple(name for name, matrix in layers.items() if bool((matrix != matrix[:1]).any()))
    if not varied:
        raise DataError("features: all samples have the same features, so that no label can be told from another")
    live = InMemory({name: scales[name](layers[name], name) for name in varied}, torch.from_numpy(given))
    bounds = {"budget": budget, "class_floor": class_floor, "max_rounds": max_rounds, "max_share": max_share}
    removal = _section("Removal", score=score, threshold=threshold, **bounds)
    probe, seed = _section("Probe", l2=l2), _section("Run", seed=seed).seed
    calibrated_on = (
        _out_of_fold(given, seed) if validation is None else _validation_set(validation, scales, varied, classes)
    )
    with shown(progress) as tell:
        try:
            cleaned = clean_in_memory(
                live, calibrated_on, classes=len(classes), probe=probe, removal=removal, seed=seed, tell=tell
            )
        except FeaturelessError as error:
            raise DataError(
                f"without one of the {FOLDS} folds, all samples have the same features ({error}); give validation="
            ) from error
    return _issues(cleaned, given, classes, scales, row_index(features), calibrated_on.wording)


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


def _out_of_fold(given: np.ndarray, seed: int) -> OutOfFold:
    if len(given) < FOLDS:
        raise DataError(
            f"{len(given)} samples are fewer than the {FOLDS} folds by which they are judged; give more samples, or "
            "validation="
        )
    return OutOfFold.by_id(np.arange(len(given)), given, FOLDS, seed)


def _validation_set(
    given: tuple[Features, ArrayLike], scales: Mapping[str, Scale], layers: Sequence[str], classes: np.ndarray
) -> ValidationSet:
    if not isinstance(given, Sequence) or len(given) != 2:
        raise DataError("validation has to be a pair (features, labels)")
    own, numbers, _ = as_samples(*given, of="validation ", classes=classes)
    if missing := [name for name in layers if name not in own]:
        raise DataError(f"the validation features lack the layer {missing[0]!r}; they have {list(own)}")
    features = {name: scales[name](own[name], f"validation features[{name!r}]") for name in layers}
    return ValidationSet(InMemory(features, torch.from_numpy(numbers)))


def _issues(
    cleaned: Cleaned,
    given: np.ndarray,
    classes: np.ndarray,
    scales: Mapping[str, Scale],
    index: Any,
    wording: Wording,
) -> LabelIssues:
    columns, fitted = cleaned.columns, cleaned.ensemble
    weight, bias = fitted.fold()
    noise = cleaned.first.noise
    known = noise.doubt is None
    return LabelIssues(
        classes=classes,
        given=given,
        is_issue=cleaned.removed_in > 0,
        round=cleaned.removed_in,
        label_quality=label_quality(columns["mislabel_odds"]),
        predicted=columns["predicted_label"].astype(np.int64),
        suggested=columns["suggested_label"].astype(np.int64),
        confidence=columns["confidence"].astype(np.float64),
        scores={name: columns[name] for name in SCORES},
        noise=Noise(
            noise.rate if known else None,
            noise.low if known else None,
            noise.high if known else None,
            noise.found,
            noise_sentence(noise, wording),
        ),
        probe=FittedProbe(classes, fitted.members, weight.double(), bias.double(), cleaned.last.temperature, scales),
        rounds=tuple({"round": done.number, **done.figures} for done in cleaned.history),
        ended=cleaned.ended,
        _index=index,
    )
