"""From the run file to what the steps take: sources, classes, the model's recipe and its first weights."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.config import Data, RunFile
from posttrain.errors import ConfigError, DataError, LabelRangeError, ModelError
from posttrain.schema import ImageSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from posttrain.data.sources import Listing, Source
    from posttrain.vision.noise import LabelNoise


@dataclass(frozen=True)
class Inputs:
    """Everything of a run that is known before Ray starts."""

    sources: dict[str, Source]
    classes: tuple[str, ...]
    spec: ModelSpec
    layers: tuple[str, ...]
    """Layers to try probes on."""
    weights: bytes | None
    """Weights to start from; None where posttrain has to pre-train."""
    validation_share: float | None
    noise: LabelNoise | None
    rows: Mapping[str, int]
    """Samples that each source holds."""
    listing: str
    """SHA-256 over names and sizes of all files, 16 hexadecimal digits."""
    remarks: tuple[str, ...] = ()
    """What the user should know of the data before the run begins."""


def prepare(config: RunFile, *, only: Mapping[str, frozenset[str]] | None = None) -> Inputs:
    """Check the data and the model as far as that goes without reading images, and describe them.

    `only`: paths of the files of each split to read, where those are not all that are there. Raises ConfigError,
    DataError, LabelRangeError or ModelError.
    """
    from posttrain.data.sources import TableSource, list_source
    from posttrain.vision import models
    from posttrain.vision.embedding import refuse_irreproducible_features
    from posttrain.vision.noise import LabelNoise

    sources = _sources(config.data, config.run.seed)
    for name, source in sources.items():
        if only is not None and name in only and not isinstance(source, TableSource):
            sources[name] = replace(source, only=only[name])
    listings = {name: list_source(source) for name, source in sources.items()}
    _refuse_no_images(config.data, listings)
    _refuse_other_ids(config.data, listings)
    classes = _classes(config.data, sources["train"], listings["train"])
    refuse_one_class(config, classes)
    _refuse_another_matrix(config.data, classes)
    arguments = dict(config.model.arguments)
    model = models.build(config.model.factory, classes=len(classes), arguments=arguments)
    weights = None
    if config.model.weights is not None:
        weights = _given_weights(config, config.model.weights, model)
        if "validation" not in sources:
            raise DataError(
                "model.weights is set, but the data have no validation set that this model has not seen; "
                "set data.validation (sources parquet and folder), or leave model.weights out"
            )
    head = models.find_head(model, classes=len(classes), name=config.model.head)
    image = _image(config, listings["train"])
    # refuses images that the network cannot take, layers and a head that do not fit, before any work
    example = _example(image)
    tried = _layers(config.probe.layers, model, head, example)
    refuse_irreproducible_features(model, head, example)
    kept, width = _kept(tried, head), config.probe.max_features
    noise = config.data.noise
    return Inputs(
        sources,
        classes,
        ModelSpec(config.model.factory, arguments, len(classes), head, image, kept, width),
        tried,
        weights,
        None if "validation" in sources else config.data.validation_share,
        LabelNoise(noise.kind, noise.rate, noise.seed, noise.matrix, image) if noise else None,
        {name: listing.rows for name, listing in listings.items()},
        _digest(listings),
        tuple(
            f"data.{name}: {listing.skipped[0]:,} files are skipped, as their names are not those of images; "
            f"the first: {listing.skipped[1]}"
            for name, listing in listings.items()
            if listing.skipped is not None
        ),
    )


def _refuse_no_images(data: Data, listings: Mapping[str, Listing]) -> None:
    from posttrain.vision import images

    for name, listing in listings.items():
        if listing.images is not None and not images.holds_images(listing.images):
            raise DataError(
                f"data.{name} = {getattr(data, name)}: column {data.image!r} is {listing.images} where "
                "encoded images (binary), raw pixels or tensors are needed; set data.image to the column that holds "
                "the images"
            )


def _refuse_other_ids(data: Data, listings: Mapping[str, Listing]) -> None:
    # the sets stand in common tables: what was read, of leaks, of the quarantine
    of_train = listings["train"].ids
    for name, listing in listings.items():
        if listing.ids != of_train:
            raise DataError(
                f"data.{name} = {getattr(data, name)}: the ids in column {data.id!r} are {listing.ids}, and those of "
                f"data.train are {of_train}; write ids of one type in all sets (data.id)"
            )


def _refuse_another_matrix(data: Data, classes: Sequence[str]) -> None:
    matrix = data.noise.matrix if data.noise is not None else None
    if matrix is not None and len(matrix) != len(classes):
        raise ConfigError(
            f"data.noise.matrix has {len(matrix)} rows, and there are {len(classes)} classes "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}): give one row for each class, or set "
            "data.classes"
        )


def _given_weights(config: RunFile, path: str, model: nn.Module) -> bytes:
    """The weights in a file, or in MLflow."""
    from posttrain.vision.weights import load_weights, to_bytes

    with tempfile.TemporaryDirectory() as folder:
        if path.startswith(("models:/", "runs:/")):
            from posttrain.store.mlflow_weights import fetch_weights

            local = fetch_weights(path, config.tracking.uri, Path(folder))
        else:
            local = Path(path).expanduser()
            if not local.is_file():
                raise ModelError(f"{path}: no such weights file; check model.weights")
        load_weights(model, local)
        return to_bytes(model)


def _image(config: RunFile, listing: Listing) -> ImageSpec:
    side, channels = config.model.image_size, config.model.channels
    background = config.model.background
    return ImageSpec(
        channels,
        (side, side) if isinstance(side, int) else side,
        _per_channel(config.model.mean, channels),
        _per_channel(config.model.std, channels),
        config.data.image_shape or listing.image_shape,
        (background, background, background) if isinstance(background, int) else background,
    )


def refuse_one_class(config: RunFile, classes: Sequence[str], hint: str = "") -> None:
    """Raises LabelRangeError where there are fewer than two of the classes that occur."""
    if len(classes) < 2:
        raise LabelRangeError(
            f"data.train = {config.data.train}: only one class ({classes[0] if classes else 'none'}); "
            f"at least two are needed: is data.label the right column?{hint}"
        )


def for_recipe(inputs: Inputs, config: RunFile) -> Inputs:
    """The inputs of a run file that differs in its section `probe`. Raises ConfigError where a layer is not there."""
    from posttrain.vision import models

    spec = inputs.spec
    model = models.build(spec.factory, classes=spec.classes, arguments=spec.arguments)
    tried = _layers(config.probe.layers, model, spec.head, _example(spec.image))
    return replace(
        inputs, layers=tried, spec=replace(spec, layers=_kept(tried, spec.head), width=config.probe.max_features)
    )


def _kept(tried: tuple[str, ...], head: str) -> tuple[str, ...]:
    # the head's own features serve the evaluation
    return (*(name for name in tried if name != head), head)


def _example(image: ImageSpec) -> Tensor:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.randn(2, image.channels, *image.size)


def _layers(
    wanted: tuple[str, ...] | Literal["auto", "last"], model: nn.Module, head: str, example: Tensor
) -> tuple[str, ...]:
    from posttrain.vision import layers
    from posttrain.vision.embedding import features_and_logits
    from posttrain.vision.probed_network import ProbedNetwork

    ends_in_probe = isinstance(model, ProbedNetwork)
    if ends_in_probe and wanted not in ("auto", "last"):
        raise ConfigError(
            "probe.layers names layers of a model that ends in a probe already; leave it out, or start from the "
            "network that the probe was put on"
        )
    if wanted == "auto" and not ends_in_probe:
        return layers.find(model, head, example)
    if wanted in ("auto", "last"):
        features_and_logits(model, head, example)
        return (head,)
    try:
        return layers.check(model, head, wanted, example)
    except ModelError as error:
        raise ConfigError(f"probe.layers: {error}") from error


def list_files(config: RunFile) -> str:
    """The digest `Inputs.listing` of the data as they are now, without building a model."""
    from posttrain.data.sources import list_source

    sources = _sources(config.data, config.run.seed)
    return _digest({name: list_source(source) for name, source in sources.items()})


def _digest(listings: dict[str, Listing]) -> str:
    files = hashlib.sha256()
    for name, listing in listings.items():
        for path, size in listing.files:
            files.update(f"{name}\t{path.rsplit('/', 1)[-1]}\t{size}\n".encode())
    return files.hexdigest()[:16]


def untrained(config: RunFile, inputs: Inputs) -> bytes:
    """Random first weights of the network, by the run's seed."""
    import torch

    from posttrain.vision import models
    from posttrain.vision.weights import to_bytes

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = models.build(inputs.spec.factory, classes=inputs.spec.classes, arguments=inputs.spec.arguments)
    return to_bytes(model)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else values * channels


def _sources(data: Data, seed: int) -> dict[str, Source]:
    from posttrain.data.sources import FolderSource, ParquetSource, TableSource
    from posttrain.vision import datasets

    if data.source == "digits":
        return {name: TableSource(table, f"digits/{name}") for name, table in datasets.digits(seed).items()}
    if data.source == "torchvision":
        assert data.name is not None
        tables = datasets.torchvision_tables(data.name, Path(data.root).expanduser())
        return {name: TableSource(table, f"{data.name}/{name}") for name, table in tables.items()}
    sources: dict[str, Source] = {}
    for name in ("train", "validation", "test"):
        given = getattr(data, name)
        if given is None:
            continue
        locations = (given,) if isinstance(given, str) else tuple(given)
        if data.source == "folder":
            if len(locations) != 1:
                raise DataError(f"data.{name} names {len(locations)} folders; for data.source = folder name one")
            sources[name] = FolderSource(locations[0])
        else:
            label = (data.test_label or data.label) if name == "test" else data.label
            true_label = data.true_label if name == "train" else None
            sources[name] = ParquetSource(locations, data.id, data.image, label, true_label)
    return sources


def _classes(data: Data, train: Source, listing: Listing) -> tuple[str, ...]:
    from posttrain.data.classes import highest_label, string_labels
    from posttrain.data.sources import ParquetSource

    if isinstance(data.classes, int):
        return tuple(str(c) for c in range(data.classes))
    if data.classes is not None:
        return data.classes
    if listing.classes is not None:
        return listing.classes
    if isinstance(train, ParquetSource):
        names = string_labels(train)
        if names is not None:
            return names
        highest = highest_label(train)
        if highest >= listing.rows:
            raise LabelRangeError(
                f"{train.locations[0]}: the labels go up to {highest}, with {listing.rows} samples; is data.label = "
                f"{train.label!r} the right column? If it is, set data.classes"
            )
        return tuple(str(c) for c in range(highest + 1))
    raise DataError("the classes are not known; set data.classes")
