"""The run file: YAML in, frozen and validated sections out. `RunFile()` is the embedded digits run.

`load` reads a run file with its overrides, `dump` writes one that `load` takes back unchanged, `schema` gives
the JSON schema, `differences` says in which keys two runs differ.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from posttrain.errors import ConfigError


def _without_controls(text: str) -> str:
    if found := re.search(r"[\x00-\x1f\x7f]", text):
        raise ValueError(f"should hold no control character such as {ascii(found[0])[1:-1]}")
    return text


Text = Annotated[str, Field(min_length=1), AfterValidator(_without_controls)]
Paths = Text | Annotated[tuple[Text, ...], Field(min_length=1)]


class Section(BaseModel):
    """Settings that belong together: frozen, and a key that is not declared is an error."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, use_attribute_docstrings=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _a_boolean_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads yes, no, on and off as booleans, and Python would go on to take them for 1 and 0
        field = cls.model_fields[str(info.field_name)]
        if isinstance(value, bool) and field.annotation is not bool:
            raise ValueError("should not be a boolean (put quotes around a yes, no, on or off that is meant as text)")
        return value


class Run(Section):
    """Where the run is kept, and from where its chance starts."""

    path: Text = "runs/digits"
    """Run folder: a local path or a URI that pyarrow opens (s3://, gs://). The same folder again goes on."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Start of every random choice: weights, order of samples, splits. Same seed, same removed samples."""


class Noise(Section):
    """Labels flipped on purpose, to measure what is found again."""

    kind: Literal["symmetric", "pair", "instance", "matrix"] = "symmetric"
    """What a flipped label becomes. symmetric: any of the other classes, all equally likely. pair: the next
    class (the last: the first). instance: what the image itself suggests (Xia et al. 2020, Part-dependent Label
    Noise). matrix: drawn from the row of `matrix`."""
    rate: Annotated[float, Field(ge=0, le=1)] | None = 0.2
    """Share of the training and validation labels that are flipped; the test set stays as it is. Kind instance:
    what the samples' own rates scatter around, cut to 0..1, so that slightly more flip where it is small. Kind
    matrix: null."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Which labels are flipped depends on this seed and the sample's id alone, with kind instance also on the
    image."""
    matrix: tuple[tuple[float, ...], ...] | None = None
    """Kind matrix only: row y holds the chance of each given label where the class is y, in the order of the
    classes. A row adds up to 1; its value for y itself is the share that stays right."""

    @model_validator(mode="before")
    @classmethod
    def _a_matrix_has_no_rate(cls, given: object) -> object:
        # the default is a rate that a matrix contradicts
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
        if len(self.matrix) < 2:
            raise ValueError(f"data.noise.matrix has {len(self.matrix)} rows: give one for each class, at least two")
        for number, row in enumerate(self.matrix):
            if len(row) != len(self.matrix):
                raise ValueError(
                    f"data.noise.matrix has {len(self.matrix)} rows, and row {number} has {len(row)} values: "
                    "give as many rows as values in a row, one for each class"
                )
            if min(row) < 0:
                raise ValueError(
                    f"data.noise.matrix has {min(row):g} in row {number}: give chances, from 0 to 1, that add up to 1"
                )
            if abs(sum(row) - 1) > 1e-6:
                raise ValueError(
                    f"data.noise.matrix: row {number} adds up to {sum(row):.7g}: give chances that add up to 1"
                )
        return self


class Data(Section):
    """The data set: its files, its columns, its classes."""

    source: Literal["digits", "parquet", "folder", "torchvision"] = "digits"
    """digits: the set embedded in scikit-learn. parquet: Parquet files. folder: one folder of images per
    class. torchvision: one of its data sets, by name, downloaded where it is absent."""
    name: Literal["CIFAR10", "CIFAR100", "FashionMNIST", "MNIST"] | None = None
    """Data set of torchvision (source torchvision only)."""
    root: Text = "~/.cache/posttrain"
    """Folder that torchvision downloads to and reads from."""
    train: Paths | None = None
    """Path or URI of the training data, or several (sources parquet and folder only)."""
    validation: Paths | None = None
    """Data that the model has not been trained on; its labels may be as noisy as the rest."""
    test: Paths | None = None
    """Data for the final figures, with labels to be trusted. Optional."""
    id: Text = "id"
    """Column with the sample's id: unique, an integer or a string. For folders it is the relative path."""
    id_scope: Literal["all", "set"] = "all"
    """all: an id names the same sample in every set, so that one in two sets is refused. set: the ids begin anew
    in each set (row numbers, as in CIFAR's own files), and say nothing across sets."""
    image: Text = "image"
    """Column with the image: an encoded file (PNG, JPEG, ...) or raw uint8 values."""
    label: Text = "label"
    """Column with the given label: the class's number, or its name."""
    test_label: Text | None = None
    """Label column of the test set, where it has another name than `label`."""
    true_label: Text | None = None
    """Column with the true label, for measuring only: nothing is decided by it."""
    image_shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=3)] | None = None
    """Height, width and, for colour, channels of images that are stored as raw uint8 bytes."""
    classes: Annotated[int, Field(ge=2)] | Annotated[tuple[Text, ...], Field(min_length=2)] | None = None
    """Number of classes, or their names in the order of their numbers. null: taken from the data."""
    validation_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the training data that is split off before posttrain itself pre-trains, where no validation
    set is named."""
    leakage: Literal["refuse", "exclude_evaluation", "exclude_training", "report", "off"] = "refuse"
    """What becomes of images that are in the training set and in a held-out one, too, the same or nearly so.
    refuse: a held-out set that is named may hold none of the very same; of one that is split off the training data they
    are left out; those that are nearly the same are told. exclude_evaluation, exclude_training: those there are left
    out. report: they are told. off: nobody looks."""
    noise: Noise | None = None
    """Labels flipped on purpose, for measuring. Left out, with source digits: rate 0.2; null: none."""

    @model_validator(mode="before")
    @classmethod
    def _digits_are_noisy(cls, given: object) -> object:
        # digits alone are clean: without flipped labels the embedded run would have nothing to show
        if isinstance(given, Mapping) and "noise" not in given and given.get("source", "digits") == "digits":
            return {**given, "noise": {}}
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


class Model(Section):
    """The model as it is: how to build it, its weights, and what its images look like."""

    factory: Text = "posttrain.vision.models:mlp"
    """A torchvision model by name (resnet18), or a function of your own (package.module:function) that is
    called with classes=<number of classes> and the arguments below and returns the module."""
    arguments: dict[str, JsonValue] = {}
    """Further keyword arguments of the factory."""
    weights: Text | None = None
    """A state_dict (.pt, .pth), a safetensors file, or an MLflow model (models:/..., runs:/...). null:
    posttrain trains the model first."""
    head: Text | None = None
    """Dotted name of the last Linear module. null: found by itself."""
    channels: Literal[1, 3] = 1
    """Channels that the model expects: 1 (grey) or 3 (RGB)."""
    image_size: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 8
    """Pixels that the model expects: one number for squares, or height and width."""
    mean: tuple[float, ...] = (0.5,)
    """Subtracted from pixels scaled to 0..1: one number, or one per channel."""
    std: tuple[Annotated[float, Field(gt=0)], ...] = (0.5,)
    """What the difference is divided by: one number, or one per channel."""

    @field_validator("weights")
    @classmethod
    def _weights_of_a_known_kind(cls, weights: str | None) -> str | None:
        known = weights is None or re.search(r"^(models|runs):/|\.(pt|pth|safetensors)$", weights)
        if not known:
            raise ValueError("should be a .pt, .pth or .safetensors file or an MLflow URI (models:/..., runs:/...)")
        return weights

    @model_validator(mode="after")
    def _one_mean_per_channel(self) -> Self:
        for key in ("mean", "std"):
            given = len(getattr(self, key))
            if given not in (1, self.channels):
                raise ValueError(
                    f"model.{key} has {given} values, and model.channels is {self.channels}: give one value"
                    + (" per channel, or one for all" if self.channels > 1 else "")
                )
        return self


Augment = Literal["none", "crop_flip", "crop"]


class Training(Section):
    """How a network is trained: what pre-training and refining have in common."""

    epochs: int = Field(default=1, ge=1)
    """Passes over the training data."""
    batch_size: int = Field(default=128, ge=1)
    """Samples per step, over all workers."""
    learning_rate: float = Field(default=0.01, gt=0)
    """Step size at the start."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of sgd; adamw has its own."""
    weight_decay: float = Field(default=5e-4, ge=0)
    """Weight decay of the optimizer."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (with Nesterov's momentum where momentum is above 0) or adamw."""
    schedule: Literal["constant", "cosine"] = "constant"
    """constant, or cosine: the learning rate falls to 0 over all steps."""


class Pretrain(Training):
    """Training the model from scratch, where no weights are given."""

    epochs: int = Field(default=200, ge=1)
    """Passes over the training data, at most."""
    batch_size: int = Field(default=64, ge=1)
    """Samples per step, over all workers."""
    learning_rate: float = Field(default=3e-3, gt=0)
    """Step size at the start."""
    optimizer: Literal["sgd", "adamw"] = "adamw"
    """sgd (with Nesterov's momentum where momentum is above 0) or adamw."""
    augment: Augment = "none"
    """Random change of the training images: none, crop (shifted crops), crop_flip (and mirrored)."""
    until_train_accuracy: float | None = Field(default=0.995, gt=0, le=1)
    """Stop after the epoch that reaches this accuracy on the given labels. null: all epochs."""


class Refine(Training):
    """Refining the boundary after each removal."""

    scope: Literal["head", "network", "both"] = "head"
    """head: the boundary fitted on what is left becomes the new head, and the other keys of this section have no
    effect. network: the whole network is trained on the images that are left. both: the network in every round,
    and in the end the boundary becomes its new head, unless the held-out labels speak against it. Where nothing was
    removed, head and both take it only if it is clearly better."""
    augment: Augment | None = None
    """Random change of the training images: none, crop (shifted crops), crop_flip (and mirrored). null: as in
    pre-training, where posttrain does that; else crop_flip."""


def _several(value: object) -> object:
    return (value,) if isinstance(value, int | float | str) and not isinstance(value, bool) else value


def _layers(value: object) -> object:
    return (value,) if isinstance(value, str) and value not in ("auto", "last") else value


Positive = Annotated[float, Field(gt=0)]


class Probe(Section):
    """The linear softmax head that is fitted on the frozen features."""

    l2: Annotated[
        tuple[Positive, ...],
        Field(min_length=1),
        BeforeValidator(_several, json_schema_input_type=Positive | tuple[Positive, ...]),
    ] = (1.0, 0.1, 0.01)
    """L2 penalty lambda of a probe, on standardised features. Of several, each layer takes the one with the
    lowest cross-entropy on held-out labels."""
    layers: Annotated[
        Annotated[tuple[Text, ...], Field(min_length=1)] | Literal["auto", "last"],
        BeforeValidator(_layers, json_schema_input_type=Text | tuple[Text, ...]),
    ] = "auto"
    """Layers to try probes on, by their dotted names (input: the images; the head's name: what goes into it). auto:
    found by themselves. last: what goes into the head, alone. The boundary is drawn by the best ones together."""
    width: int = Field(default=256, ge=8)
    """Most features of a layer; what is wider is averaged over pixels and projected. The head's input is left
    as it is."""
    curvature: Literal["auto", "exact", "ekfac"] = "auto"
    """exact: the full matrix. ekfac: Kronecker-factored, for any size. auto: exact up to `exact_limit`."""
    exact_limit: int = Field(default=2048, ge=0)
    """Largest number of probe parameters (features x classes) for which auto takes the exact curvature."""


class Removal(Section):
    """Which samples go, how many at a time, and when it is enough."""

    score: Literal["mislabel_odds", "loo_margin", "parameter", "data", "loss", "margin", "gradient_norm", "random"] = (
        "mislabel_odds"
    )
    """What samples are ranked by. mislabel_odds: how likely the given label is wrong, by what the others say and by how
    labels go wrong; loo_margin: on which side of the boundary a sample falls when only the others draw it. parameter,
    data: influence on the model, on the data. random: the control."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """A sample may go only if the probability that its label is wrong is above this: 0.5 means more likely wrong than
    right, 1 that none may go. It holds for every score but random."""
    share: Annotated[float, Field(ge=0, le=1)] | Literal["estimated"] = "estimated"
    """Largest share of the samples removed in all rounds together. estimated: as many as may be wrong by
    the estimate (99.9 % confidence), and none where there is no sign of wrong labels."""
    action: Literal["remove", "relabel"] = "remove"
    """remove: selected samples go. relabel: those whose suggested label is certain enough get that label and stay,
    the others go."""
    relabel_above: float = Field(default=0.95, gt=0, le=1)
    """Confidence of the suggested label from which on a sample is relabelled (action relabel only)."""
    budget: float = Field(default=0.05, gt=0, lt=1)
    """Largest share of the live samples removed or relabelled in one round."""
    class_floor: float = Field(default=0.1, ge=0, le=1)
    """Smallest share of its initial live samples that each class keeps; it keeps one in any case."""
    max_rounds: int = Field(default=10, ge=1)
    """Rounds after which the run stops in any case."""
    minimum: float = Field(default=0.002, ge=0, lt=1)
    """Share of the live samples below which a round's candidates no longer count, and the run stops."""
    patience: int = Field(default=2, ge=1)
    """Rounds in a row with a validation accuracy more than two standard errors below the best: then the run stops."""

    @property
    def least_odds(self) -> float:
        """`threshold` as log odds."""
        if self.threshold in (0, 1):
            return math.inf if self.threshold else -math.inf
        return math.log(self.threshold / (1 - self.threshold))


class Ray(Section):
    """The machines: one by default, a cluster where an address is given."""

    address: Text | None = None
    """Address of a Ray cluster (auto, host:port, ray://...). null: a Ray of its own on this machine."""
    workers: int | None = Field(default=None, ge=1)
    """Workers that embed and score. null: as many as there are GPUs for, or one per CPU where there is none."""
    gpus_per_worker: float | None = Field(default=None, ge=0)
    """GPUs of each such worker; a fraction shares one. null: 1 where there is a GPU; on one machine with fewer GPUs
    than workers, an equal share of one."""
    cpus_per_worker: float = Field(default=1, gt=0)
    """CPUs of each such worker."""
    train_workers: int | None = Field(default=None, ge=0)
    """Workers of Ray Train; 0 trains in the driver's own process. null: 0, or 1 where an address is set."""
    gpus_per_train_worker: float | None = Field(default=None, ge=0)
    """GPUs of each of these; with 0 workers, whether the driver trains on its GPU. null: 1 where the workers that
    embed have GPUs, else 0; on one machine with fewer GPUs than training workers, an equal share of one. Several that
    share a GPU (a fraction) exchange gradients by Gloo, else by NCCL."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """In what the network computes where it embeds and trains: bfloat16 and float16 are faster on GPUs. Weights,
    losses, sums, and all that is done with the features stay in float32 or float64."""
    num_cpus: int | None = Field(default=None, ge=1)
    """CPUs that a Ray of its own may use. null: all."""
    object_store_gb: float | None = Field(default=None, gt=0)
    """Memory of its object store in GB (10^9 bytes). null: Ray's default."""

    @field_validator("gpus_per_worker", "gpus_per_train_worker")
    @classmethod
    def _a_share_of_one_gpu_or_whole_ones(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError("should be a whole number, or a fraction below 1")
        return gpus

    @model_validator(mode="after")
    def _a_cluster_has_its_size(self) -> Self:
        for key in ("num_cpus", "object_store_gb"):
            if self.address not in (None, "local") and getattr(self, key) is not None:
                raise ValueError(
                    f"ray.{key} is for a Ray that posttrain starts itself, and ray.address is "
                    f"{self.address}: remove one of them"
                )
        return self


class Tracking(Section):
    """MLflow."""

    uri: Text | None = None
    """Tracking server or database. null: an SQLite file in the run folder."""
    experiment: Text = "posttrain"
    """Experiment under which the run is logged."""
    log_model: bool = True
    """Whether the refined model is logged at the end."""


class Results(Section):
    """What is written at the end."""

    cleaned: Literal["both", "parquet", "manifest", "none"] = "both"
    """The cleaned data set as Parquet (the kept samples), as a manifest (their ids), both, or not."""


class Distribution(Section):
    """What a search draws the values of one key from: exactly one of the following."""

    choice: Annotated[tuple[JsonValue, ...], Field(min_length=1)] | None = None
    """Values that are equally likely."""
    uniform: tuple[float, float] | None = None
    """Lowest and highest number."""
    loguniform: tuple[Positive, Positive] | None = None
    """Lowest and highest number; their logarithms are uniform."""
    integers: tuple[int, int] | None = None
    """Smallest and largest whole number, both of them possible."""

    @property
    def kind(self) -> Literal["choice", "uniform", "loguniform", "integers"]:
        """Which of them it is."""
        (kind,) = self.model_fields_set
        return kind  # pyright: ignore[reportReturnType]

    @property
    def examples(self) -> tuple[JsonValue, ...]:
        """Values to check a key's bounds and type with: all choices, or both ends and one between."""
        if self.choice is not None:
            return self.choice
        low, high = self.uniform or self.loguniform or self.integers or (0, 0)
        return (low, high) if self.integers else (low, low + (high - low) * 0.381966, high)

    @model_validator(mode="before")
    @classmethod
    def _is_one_of_them(cls, given: object) -> object:
        known = isinstance(given, Mapping) and set(given) <= set(cls.model_fields)
        if isinstance(given, Mapping) and known and (len(given) != 1 or None in given.values()):
            raise ValueError(f"should be exactly one of {', '.join(cls.model_fields)}")
        return given

    @model_validator(mode="after")
    def _low_comes_first(self) -> Self:
        if self.choice is None:
            low, high = self.uniform or self.loguniform or self.integers or (0, 0)
            if low >= high:
                raise ValueError(f"should be [lowest, highest], and {low:g} is not below {high:g}")
        return self

    @model_serializer(mode="wrap")
    def _that_one_alone(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


def _flattened(value: object) -> object:
    """{removal: {budget: ...}}, as `--set` makes it, to {removal.budget: ...}."""
    if not isinstance(value, Mapping):
        return value
    flat: dict[object, object] = {}
    for key, given in value.items():
        if isinstance(given, Mapping) and key in RunFile.model_fields:
            flat |= {f"{key}.{name}": distribution for name, distribution in given.items()}
        else:
            flat[key] = given
    return flat


class Search(Section):
    """What `posttrain tune` tries: trials, each with values of its own for some keys of the run file."""

    trials: int = Field(default=8, ge=1)
    """Recipes tried. The first is the run file as it is, which no trial's stop cuts short."""
    metric: Literal["validation_accuracy", "validation_loss"] = "validation_accuracy"
    """What the best recipe has the highest (accuracy) or the lowest (loss) of, on held-out labels."""
    grace_rounds: int = Field(default=1, ge=1)
    """Rounds that every trial does before it may be stopped for being worse than others."""
    reduction: float = Field(default=2, ge=2)
    """Of the trials that get as far as a milestone, one in so many goes on (asynchronous successive halving)."""
    at_once: int | None = Field(default=None, ge=1)
    """Most trials that run side by side. null: as many as the resources carry."""
    space: Annotated[
        dict[str, Distribution],
        Field(min_length=1),
        BeforeValidator(_flattened, json_schema_input_type=dict[str, Distribution]),
    ] = {
        "removal.score": Distribution(choice=("mislabel_odds", "loo_margin", "parameter", "data")),
        "removal.budget": Distribution(loguniform=(0.02, 0.1)),
        "removal.max_rounds": Distribution(integers=(4, 12)),
        "probe.layers": Distribution(choice=("auto", "last")),
        "probe.l2": Distribution(loguniform=(0.003, 1.0)),
        # both shows its boundary at its end alone: by its rounds it would be stopped for being worse
        "refine.scope": Distribution(choice=("head", "network")),
        "refine.learning_rate": Distribution(loguniform=(0.001, 0.03)),
    }
    """By key of the sections probe, removal and refine: what its values are drawn from. Naming any key takes the
    place of all of these."""


SEARCHED = ("probe", "removal", "refine")
"""Sections whose keys a search may vary: with another model or other data, trials could not be compared."""


class RunFile(Section):
    """A run of posttrain. Every key has a default; all defaults together are the embedded digits run."""

    run: Run = Run()
    data: Data = Data()
    model: Model = Model()
    pretrain: Pretrain = Pretrain()
    probe: Probe = Probe()
    removal: Removal = Removal()
    refine: Refine = Refine()
    ray: Ray = Ray()
    tracking: Tracking = Tracking()
    results: Results = Results()
    search: Search = Search()

    @property
    def refining(self) -> Refine:
        """`refine` with what it takes over from pre-training."""
        if self.refine.augment is not None:
            return self.refine
        augment: Augment = self.pretrain.augment if self.model.weights is None else "crop_flip"
        return self.refine.model_copy(update={"augment": augment})

    def with_values(self, values: Mapping[str, JsonValue]) -> RunFile:
        """The run file with other values of keys such as removal.budget. Raises ValidationError."""
        sections: dict[str, dict[str, JsonValue]] = {}
        for key, value in values.items():
            section, _, name = key.partition(".")
            sections.setdefault(section, {})[name] = value
        changed = {
            name: type(section := getattr(self, name)).model_validate({**dict(section), **given})
            for name, given in sections.items()
        }
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _space_fits_the_keys(self) -> Self:
        wrong: list[str] = []
        for key, distribution in self.search.space.items():
            section, _, name = key.partition(".")
            where = f"search.space.{key}"
            if section in RunFile.model_fields and section not in SEARCHED:
                wrong.append(
                    f"{where}: a search varies keys of {', '.join(SEARCHED)} only; trials that differ in {section} "
                    "could not be compared"
                )
                continue
            if key not in (known := [k for k in _known(RunFile) if k.partition(".")[0] in SEARCHED and "." in k]):
                wrong.append(f"{where}: {_unknown(key, known)}")
                continue
            for value in distribution.examples:
                try:
                    self.with_values({key: value})
                except ValidationError as error:
                    (complaint,) = _complaints(error, {name: value})
                    wrong.append(f"{where}: {section}.{complaint}")
                    break
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @model_validator(mode="after")
    def _model_fits_the_data(self) -> Self:
        if self.data.source != "digits":
            missing = [key for key in ("factory", "channels", "image_size") if key not in self.model.model_fields_set]
            if missing:
                keys = ", ".join(f"model.{key}" for key in missing)
                raise ValueError(
                    f"{keys} {'has' if len(missing) == 1 else 'have'} to be set "
                    f"where data.source is {self.data.source}: the defaults are made for digits"
                )
        if (
            self.model.weights is not None
            and self.data.source in ("parquet", "folder")
            and self.data.validation is None
        ):
            raise ValueError(
                "model.weights is set without data.validation: a validation set the model has not seen is required"
            )
        return self


_File = TypeVar("_File", bound=RunFile)


class Job(Section):
    """A job that is started again and again, by hand or by a scheduler, and keeps a model up to date."""

    name: Text
    """Name of the registered model in MLflow whose versions the job makes; `champion` is the alias of the best."""
    lease_s: float = Field(default=120, ge=1)
    """Seconds after which a start of the job that no longer shows signs of life is taken for dead."""
    wait_s: float = Field(default=0, ge=0)
    """Seconds to wait where another start of the job is at work. 0: refuse at once."""

    @field_validator("name")
    @classmethod
    def _a_name_that_a_registry_takes(cls, name: str) -> str:
        if re.search("[/:%'\"\\s]", name):
            raise ValueError("should be a name without / : % quotes and spaces")
        return name


class Gate(Section):
    """What a new model, the challenger, must show to take the place of the champion."""

    margin: float = Field(default=0.0, ge=-1, le=1)
    """Held-out accuracy that the challenger must have beyond the champion's; below 0: that it may fall short."""
    class_drop: float = Field(default=0.05, ge=0, le=1)
    """Held-out accuracy that a class may lose at most."""
    class_samples: int = Field(default=20, ge=1)
    """Held-out samples from which on a class is looked at by itself."""
    alarm_share: float = Field(default=0.5, gt=0, le=1)
    """Share of a file's new samples that looks wrong above which that file is held back, and the run is an alarm."""
    alarm_samples: int = Field(default=20, ge=1)
    """Samples from which on there can be an alarm."""
    alarm_older_share: float = Field(default=0.2, gt=0, le=1)
    """Share of the samples that former runs have let pass which this one takes out, above which it is an alarm."""


class JobFile(RunFile):
    """A run file with what a job needs besides; `run.path` is the folder of the job, which holds those of its runs."""

    job: Job
    gate: Gate = Gate()
    results: Results = Results(cleaned="manifest")
    """Ids alone: else each run of the job would leave a copy of the data behind."""

    @model_validator(mode="before")
    @classmethod
    def _the_name_is_what_is_missing(cls, given: object) -> object:
        return {**given, "job": {}} if isinstance(given, Mapping) and given.get("job") is None else given

    def run_file(self, **sections: Section) -> RunFile:
        """The run file of one run of the job, with other sections in place of its own."""
        own = {key: getattr(self, key) for key in RunFile.model_fields}
        return RunFile.model_construct(None, **{**own, **sections})


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunFile:
    """The validated run file at `path`, or the embedded digits run for None, with `overrides` applied.

    An override is `section.key=value`, its value read as YAML. Raises ConfigError, with all that is wrong in
    one sentence.
    """
    return _loaded(RunFile, path, overrides)


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> JobFile:
    """The validated job file at `path`, as `load` does."""
    return _loaded(JobFile, path, overrides)


def _loaded(kind: type[_File], path: str | Path | None, overrides: Sequence[str]) -> _File:
    raw = {} if path is None else _read(Path(path))
    for override in overrides:
        _override(raw, override)
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        where = " and ".join([str(path)] * (path is not None) + ["--set"] * bool(overrides))
        raise ConfigError(f"{where}: {'; '.join(_complaints(error, raw, kind))}") from None


def dump(runfile: RunFile) -> str:
    """The run file as YAML with every key, which `load` takes back unchanged."""
    return yaml.dump(runfile.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def schema(kind: type[RunFile] = RunFile) -> dict[str, Any]:
    """The JSON schema of a run file (or job file), for editors and checks: types, bounds, defaults, meanings."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema()}


def differences(a: RunFile, b: RunFile) -> list[str]:
    """The keys in which two run files differ, as `key: old -> new`; empty where they are the same."""
    return list(_changes(a.model_dump(), b.model_dump()))


# Reading and writing YAML -----------------------------------------------------------------------------------


_SECRET = re.compile(
    r"((?:password|passwd|pwd|secret|token|signature|sig|credential|access_?key)[^=&#\s]*=)[^&#\s]+", re.I
)


def without_credentials(text: str) -> str:
    """The text with user and password, and keys in queries, taken out of the URIs in it."""
    # up to the last @ before the path: a password may hold one
    text = re.sub(r"//[^/?#\s]*@", "//***@", text)
    return re.sub(r"(?<=[?&;])[^\s'\"]+", lambda query: _SECRET.sub(r"\1***", query[0]), text)


def without_marks(record: Any) -> Any:
    """What `without_secrets` gave, as if no user and password had ever stood there."""
    return json.loads(json.dumps(record, default=str).replace("//***@", "//"))


def without_secrets(record: Any) -> Any:
    """Nested mappings and lists, as a run file is written down, with `without_credentials` of all their texts."""
    if isinstance(record, Mapping):
        return {key: without_secrets(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [without_secrets(value) for value in record]
    return without_credentials(record) if isinstance(record, str) else record


class _Loader(yaml.SafeLoader):
    """Plain data only; a key that is written twice is an error, not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        seen: set[str] = set()
        for key in keys:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value} is there twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Without anchors: a run file is read by people."""

    def ignore_aliases(self, data: object) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # PyYAML takes these for line breaks or leaves them out, unless they are escaped
        escaped = re.search("[\x85\u2028\u2029\ufeff]", data)
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if escaped else None)


_Dumper.add_representer(str, _Dumper.represent_str)


# YAML 1.1 reads 1e-3 as text, since it has no dot; YAML 1.2 and everyone who writes it mean the number.
_FLOAT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789"))


MOST_BYTES = 2**20
"""Largest run file that is read."""

MOST_VALUES = 100_000
"""Most values of a run file, those behind an alias counted each time that it stands there."""


def _extent(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; a few aliases of aliases can stand for billions."""
    if id(node) not in known:
        known[id(node)] = 0  # of a node that contains itself YAML complains later
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        known[id(node)] = 1 + sum(_extent(part, known) for part in inside)
    return known[id(node)]


def _parse(text: str, where: str) -> object:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and (extent := _extent(node, {})) > MOST_VALUES:
            shown = f"{extent:,}" if extent < 10**9 else "billions of"
            raise ConfigError(
                f"{where}: its aliases and lists stand for {shown} values, and a run file holds at most "
                f"{MOST_VALUES:,}; write it without them"
            )
        # deep: a node that contains itself is then an error of YAML's and no endless structure
        return None if node is None else loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        fault = error.problem or error.context or ""
        for sign, remedy in (("recursive", "; write out what the anchor stands for"), ("tag", "; leave the tag out")):
            if sign in fault:
                fault += remedy
                break
        raise ConfigError(f"{where}{line}: {fault}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply to be a run file") from None
    # with a tag such as !!timestamp, PyYAML's constructors stumble over any value that is none
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{where}: a value cannot be read: {' '.join(str(error).split())}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such run file; without one, the embedded digits run is taken") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: a run file is YAML in UTF-8, and this is not UTF-8 text") from None
    except OSError as error:
        raise ConfigError(f"{path}: the run file cannot be read: {error.strerror}") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{path}: is larger than {MOST_BYTES:,} bytes; a run file is a page of YAML, name that one")
    raw = _parse(text, str(path))
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: a run file is a mapping with sections such as data: and model:, and this is not one"
        )
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one key of the nested mapping `raw`, in place."""
    key, sign, value = override.partition("=")
    *sections, last = (part.strip() for part in key.split("."))
    if not sign or not all([*sections, last]):
        raise ConfigError(f"--set {override}: should be section.key=value, as in removal.budget=0.03")
    target = raw
    for section in sections:
        if target.get(section) is None:
            target[section] = {}
        target = target[section]
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {section} is a value, it has no keys beneath it")
    target[last] = _parse(value, f"--set {override}")


# Saying what is wrong ---------------------------------------------------------------------------------------


def _complaints(error: ValidationError, raw: dict[str, Any], kind: type[RunFile] = RunFile) -> list[str]:
    """What is wrong, once per key: `removal.budget = 3: should be less than 1`."""
    found: dict[str, list[str]] = {}
    for entry in error.errors(include_url=False):
        parts = _located(entry["loc"], kind)
        key = ".".join(parts)
        of_space = parts[:2] == ["search", "space"] and len(parts) > 2
        message = entry["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if entry["type"] in ("int_parsing", "float_parsing"):
            message += _unit(entry["input"])
        if entry["type"] == "too_short":
            lengths = entry.get("ctx", {})
            if lengths["actual_length"] < len(entry["input"]):
                continue  # an item that is not valid is not counted any more, and has a complaint of its own
            fewest = lengths["min_length"]
            message = f"should hold at least {fewest} value{'s' * (fewest > 1)}"
        if entry["type"] == "extra_forbidden":
            beside = [f"{'.'.join(parts[:-1])}.{how}" for how in Distribution.model_fields] if of_space else []
            found[_unknown(key, beside or list(_known(kind)))] = []
        elif entry["type"] == "invalid_key" or entry["loc"][-1:] == ("[key]",):
            *under, bad = [part for part in entry["loc"] if part != "[key]"]
            where = ".".join(_located(tuple(under), kind)) if under else "the run file"
            found[f"{where} has the key {bad}, which is no text (put quotes around it)"] = []
        elif entry["type"] == "missing":
            found[f"{key} has to be set"] = []
        elif entry["type"] in ("model_type", "dict_type"):
            found.setdefault(f"{key} = {_shown(entry['input'])}", []).append("should be a mapping with keys beneath it")
        elif entry["type"] == "value_error" and isinstance(entry["input"], Mapping) and not of_space:
            found[message] = []  # a check across keys, which names them itself
        else:
            found.setdefault(f"{key} = {_shown(_at(raw, parts))}", []).append(message)
    return [": ".join([what] + [" or ".join(dict.fromkeys(whys))] * bool(whys)) for what, whys in found.items()]


def _located(location: tuple[int | str, ...], kind: type[RunFile]) -> list[str]:
    """The key of the run file that pydantic's location lies in, without branches of unions and indices."""
    parts: list[str] = []
    inside: Any = kind
    for part in map(str, location):
        parts.append(part)
        if get_origin(inside) is dict:
            inside = get_args(inside)[1]
        elif part in inside.model_fields:
            annotation = inside.model_fields[part].annotation
            of_sections = get_origin(annotation) is dict and _section(get_args(annotation)[1])
            inside = annotation if of_sections else _section(annotation)
        else:
            break
        if inside is None:
            break
    return parts


def _section(annotation: Any) -> type[Section] | None:
    """The section that a field of this type holds, if it holds one (`Noise` for `Noise | None`)."""
    if get_origin(annotation) is dict:
        return None
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _known(section: type[Section], prefix: str = "") -> Iterator[str]:
    """All keys of a section, dotted, with those of the sections beneath it."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if beneath := _section(field.annotation):
            yield from _known(beneath, f"{prefix}{name}.")


def _unknown(key: str, known: Sequence[str]) -> str:
    """That a key is unknown, with the nearest known one: first in its own section, then anywhere."""
    shown = key if key.isprintable() and key.strip() else _shown(key)
    parent, _, name = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    anywhere = {k.rpartition(".")[2]: k for k in reversed(known)}
    for names in (anywhere if name in anywhere else siblings, anywhere):
        if near := difflib.get_close_matches(name, names, n=1):
            return f"{shown} is not a key of a run file; did you mean {names[near[0]]}?"
    return f"{shown} is not a key of a run file; there are {', '.join(siblings.values() or known)}"


def _at(raw: Any, parts: Sequence[str]) -> object:
    for part in parts:
        if isinstance(raw, Mapping) and part not in raw and "." in part:
            raw = _at(raw, part.split("."))
        else:
            raw = raw.get(part) if isinstance(raw, Mapping) else None
    return raw


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in dict.fromkeys([*old, *new]):
        before, after = (_shown(side[key]) if key in side else "(not set)" for side in (old, new))
        if isinstance(old.get(key), Mapping) and isinstance(new.get(key), Mapping):
            yield from _changes(old[key], new[key], f"{prefix}{key}.")
        elif key not in old or key not in new or old[key] != new[key]:
            yield f"{prefix}{key}: {before} -> {after}"


def _unit(value: object) -> str:
    """What to write in the place of a number with a unit."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[a-zA-Z]{1,3})\s*", value) if isinstance(value, str) else None
    if found is None:
        return ""
    return f" (write {float(found[1]) / 100:g})" if found[2] == "%" else f" (write {found[1]}, without a unit)"


def _shown(value: object) -> str:
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):  # a number of thousands of digits, a key that is no text
        return "(too long to show)"
    return text if len(text) <= 60 else text[:57] + "..."
