"""The section `data` of a run file: the data set, and the label noise that can be added to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from posttrain.config.section import Paths, Section, Text


class Noise(Section):
    """Labels flipped on purpose, to measure how many of them are found."""

    kind: Literal["symmetric", "pair", "instance", "matrix"] = "symmetric"
    """What a flipped label becomes. symmetric: any other class, all equally likely. pair: the next class (after the
    last class, the first). instance: a class that the image itself suggests (part-dependent label noise, Xia et al.
    2020). matrix: a class sampled from the row of `matrix`."""
    rate: Annotated[float, Field(ge=0, le=1)] | None = 0.2
    """Share of the training and validation labels that are flipped; test labels stay as they are. With kind instance,
    each sample has its own rate around this one, cut to 0..1, so that slightly more labels flip when the rate is
    small. With kind matrix: null."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Decides which labels are flipped, together with the sample's id and, with kind instance, its image."""
    matrix: tuple[tuple[float, ...], ...] | None = None
    """Kind matrix only: row y holds the probability of each given label for samples of class y. Rows and columns follow
    the order of the classes, each row sums to 1, and its entry y is the share of labels that stay right."""

    @model_validator(mode="before")
    @classmethod
    def _no_rate_with_a_matrix(cls, given: object) -> object:
        # the default rate would contradict the matrix
        if isinstance(given, Mapping) and given.get("kind") == "matrix" and "rate" not in given:
            return {**given, "rate": None}
        return given

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        if self.kind != "matrix":
            if self.matrix is not None:
                raise ValueError(
                    f"data.noise.matrix is for data.noise.kind = matrix only, and data.noise.kind is {self.kind}: "
                    "remove one or change the other"
                )
            if self.rate is None:
                raise ValueError(
                    f"data.noise.rate = null is for data.noise.kind = matrix only, and data.noise.kind is {self.kind}: "
                    "give a rate from 0 to 1; data.noise = null flips nothing"
                )
            return self
        if self.rate is not None:
            raise ValueError(
                f"data.noise.rate = {self.rate:g} does not go with data.noise.kind = matrix, whose rows say how many "
                "labels are flipped: leave data.noise.rate out, or set it to null"
            )
        if self.matrix is None:
            raise ValueError("data.noise.kind = matrix needs data.noise.matrix, one row for each class")
        _check_matrix(self.matrix)
        return self


def _check_matrix(matrix: tuple[tuple[float, ...], ...]) -> None:
    if len(matrix) < 2:
        raise ValueError(f"data.noise.matrix has {len(matrix)} rows: give one for each class, at least two")
    for number, row in enumerate(matrix):
        if len(row) != len(matrix):
            raise ValueError(
                f"data.noise.matrix has {len(matrix)} rows, and row {number} has {len(row)} values: "
                "give as many rows as values in a row, one for each class"
            )
        if min(row) < 0:
            raise ValueError(
                f"data.noise.matrix has {min(row):g} in row {number}: give probabilities from 0 to 1 that sum to 1"
            )
        if abs(sum(row) - 1) > 1e-6:
            raise ValueError(
                f"data.noise.matrix: row {number} sums to {sum(row):.7g}: give probabilities that sum to 1"
            )


class Data(Section):
    """The data set: its files, its columns, its classes."""

    source: Literal["digits", "parquet", "folder", "torchvision"] = "digits"
    """digits: the data set that comes with scikit-learn. parquet: Parquet files. folder: one folder of images per
    class. torchvision: one of its data sets, by name, downloaded if necessary."""
    name: Literal["CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"] | None = None
    """Name of the torchvision data set (source torchvision only)."""
    root: Text = "~/.cache/posttrain"
    """Folder that torchvision downloads to and reads from."""
    train: Paths | None = None
    """Path or URI of the training data, or a list of them (sources parquet and folder only)."""
    validation: Paths | None = None
    """Path or URI of data that the model was not trained on, or a list of them. Its labels may be as noisy as those of
    the training data."""
    test: Paths | None = None
    """Path or URI of data with labels you trust, or a list of them: used for the reported accuracy only. Optional."""
    id: Text = "id"
    """Column with the sample's id: a unique integer or string. For source folder, the id is the relative path."""
    id_scope: Literal["all", "set"] = "all"
    """all: an id names the same sample in every set, so that an id in two sets is refused. set: each set numbers its
    samples on its own (as CIFAR's files do), so that the same id in two sets means nothing."""
    image: Text = "image"
    """Column with the image: an encoded file (PNG, JPEG, ...) or raw uint8 values."""
    label: Text = "label"
    """Column with the given label: the number of the class, or its name."""
    test_label: Text | None = None
    """Label column of the test set, if it differs from `label`."""
    true_label: Text | None = None
    """Column with the true label, for measuring only: it influences no decision."""
    image_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=3)] | None = None
    """Height, width and, for colour, channels of images that are stored as raw uint8 bytes."""
    classes: Annotated[int, Field(ge=2)] | Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """Number of classes, or the list of their names, in which class 0 comes first. null: taken from the data."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training data that is split off for validation, where posttrain trains the model itself and no
    validation set is given."""
    leakage: Literal["refuse", "exclude_evaluation", "exclude_training", "report", "off"] = "refuse"
    """What happens to images that are in the training set and also in the validation or test set. refuse: an identical
    image in a validation or test set that you name is an error; if the validation set was split off the training data,
    the image is left out of validation; near-duplicates are reported. exclude_evaluation: both kinds are left out of
    validation and test. exclude_training: both kinds are left out of training. report: both kinds are only reported.
    off: no check."""
    noise: Noise | None = None
    """Labels flipped on purpose, for measuring. By default, source digits has pair noise at rate 0.3, and the
    other sources have none; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _digits_are_noisy(cls, given: object) -> object:
        # digits themselves are clean: without flipped labels the embedded run would have nothing to show
        if isinstance(given, Mapping) and "noise" not in given and given.get("source", "digits") == "digits":
            return {**given, "noise": {"kind": "pair", "rate": 0.3}}
        return given

    @model_validator(mode="after")
    def _keys_fit_the_source(self) -> Self:
        files = ("parquet", "folder")
        sources_of = {
            "name": ("torchvision",),
            "train": files,
            "validation": files,
            "test": files,
            "test_label": ("parquet",),
            "true_label": ("parquet",),
            "image_shape": ("parquet",),
        }
        for key, sources in sources_of.items():
            if self.source not in sources and getattr(self, key) is not None:
                raise ValueError(
                    f"data.{key} is for data.source = {' or '.join(sources)} only, "
                    f"and data.source is {self.source}: remove one or change the other"
                )
        # the columns of `cleaned/` as well
        if len({self.id, self.image, self.label}) < 3:
            raise ValueError(
                f"data.id, data.image and data.label are {self.id!r}, {self.image!r} and {self.label!r}: name three "
                "different columns"
            )
        if self.source == "torchvision" and self.name is None:
            raise ValueError("data.source = torchvision needs data.name (CIFAR10, CIFAR100, FashionMNIST or MNIST)")
        if self.source in files and self.train is None:
            raise ValueError(f"data.source = {self.source} needs data.train, the path of the training data")
        if isinstance(self.classes, tuple) and len(set(self.classes)) < len(self.classes):
            raise ValueError(f"data.classes names a class twice: {', '.join(self.classes)}")
        return self
