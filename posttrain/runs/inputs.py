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

    from posttrain.cluster.reading import Listing, Noise, Source


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
    held_out_share: float | None
    noise: Noise | None
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

    from posttrain.cluster import reading
    from posttrain.vision import images, models

    sources = _sources(config.data, config.run.seed)
    for name, source in sources.items():
        if only is not None and name in only and not isinstance(source, reading.TableSource):
            sources[name] = replace(source, only=only[name])
    listings = {name: reading.list_source(source) for name, source in sources.items()}
    for name, listing in listings.items():
        if listing.images is not None and not images.holds_images(listing.images):
            raise DataError(
                f"data.{name} = {getattr(config.data, name)}: column {config.data.image!r} is {listing.images} where "
                "encoded images (binary), raw pixels or tensors are needed; set data.image to the column that holds "
                "the images"
            )
    classes = _classes(config.data, sources["train"], listings["train"])
    refuse_one_class(config, classes)
    noise = config.data.noise
    if noise is not None and noise.matrix is not None and len(noise.matrix) != len(classes):
        raise ConfigError(
            f"data.noise.matrix has {len(noise.matrix)} rows, and there are {len(classes)} classes "
            f"({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}): give one row for each class, or set "
            "data.classes"
        )
    model = models.build(config.model.factory, classes=len(classes), arguments=config.model.arguments)
    weights = None
    if config.model.weights is not None:
        path = config.model.weights
        with tempfile.TemporaryDirectory() as folder:
            if path.startswith(("models:/", "runs:/")):
                from posttrain.store.mlflow_weights import fetch_weights

                local = fetch_weights(path, config.tracking.uri, Path(folder))
            else:
                local = Path(path).expanduser()
                if not local.is_file():
                    raise ModelError(f"{path}: no such weights file; check model.weights")
            models.load_weights(model, local)
            weights = models.to_bytes(model)
        if "validation" not in sources:
            raise DataError(
                "model.weights is set, but the data have no validation set that this model has not seen; "
                "set data.validation (sources parquet and folder), or leave model.weights out"
            )
    head = models.find_head(model, classes=len(classes), name=config.model.head)
    side = config.model.image_size
    channels = config.model.channels
    image = ImageSpec(
        channels,
        (side, side) if isinstance(side, int) else side,
        _per_channel(config.model.mean, channels),
        _per_channel(config.model.std, channels),
        config.data.image_shape or listings["train"].image_shape,
    )
    # refuses images that the network cannot take, layers and a head that do not fit, before any work
    example = _example(image)
    tried = _layers(config.probe.layers, model, head, example)
    models.refuse_unsteady(model, head, example)
    return Inputs(
        sources,
        classes,
        ModelSpec(
            config.model.factory,
            dict(config.model.arguments),
            len(classes),
            head,
            image,
            _kept(tried, head),
            config.probe.max_features,
        ),
        tried,
        weights,
        None if "validation" in sources else config.data.validation_share,
        reading.Noise(noise.kind, noise.rate, noise.seed, noise.matrix, image) if noise else None,
        {name: listing.rows for name, listing in listings.items()},
        _digest(listings),
        tuple(
            f"data.{name}: {listing.passed_over[0]:,} files are passed over, which are not named as images; the first: "
            f"{listing.passed_over[1]}"
            for name, listing in listings.items()
            if listing.passed_over is not None
        ),
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
    from posttrain.vision import layers, models

    ends_in_probe = isinstance(model, layers.Probed)
    if ends_in_probe and wanted not in ("auto", "last"):
        raise ConfigError(
            "probe.layers names layers of a model that ends in a probe already; leave it out, or start from the "
            "network that the probe was put on"
        )
    if wanted == "auto" and not ends_in_probe:
        return layers.find(model, head, example)
    if wanted in ("auto", "last"):
        models.embed(model, head, example)
        return (head,)
    try:
        return layers.check(model, head, wanted, example)
    except ModelError as error:
        raise ConfigError(f"probe.layers: {error}") from error


def list_files(config: RunFile) -> str:
    """The digest `Inputs.listing` of the data as they are now, without building a model."""
    from posttrain.cluster import reading

    sources = _sources(config.data, config.run.seed)
    return _digest({name: reading.list_source(source) for name, source in sources.items()})


def _digest(listings: dict[str, Listing]) -> str:
    files = hashlib.sha256()
    for name, listing in listings.items():
        for path, size in listing.files:
            files.update(f"{name}\t{path.rsplit('/', 1)[-1]}\t{size}\n".encode())
    return files.hexdigest()[:16]


def untrained(config: RunFile, inputs: Inputs) -> bytes:
    """First weights of the network, drawn from the run's seed."""
    import torch

    from posttrain.vision import models

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = models.build(inputs.spec.factory, classes=inputs.spec.classes, arguments=inputs.spec.arguments)
    return models.to_bytes(model)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else values * channels


def _sources(data: Data, seed: int) -> dict[str, Source]:
    from posttrain.cluster.reading import FolderSource, ParquetSource, TableSource
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
    from posttrain.cluster.reading import ParquetSource, highest_label, string_labels

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
