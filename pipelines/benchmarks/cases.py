"""The cases that the benchmarks of quality share: data sets, kinds of noise, and networks trained on them.

A case is (data set, noise, network, seed). Everything of it that takes long is kept in a folder and not done again:
the trained network, the margins seen in training, and out-of-sample predictions of networks trained on four fifths.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posttrain.cluster.devices import computing_in
from posttrain.cluster.training import Training, fit_network, twins
from posttrain.cluster.training_step import Batch
from posttrain.methods import METHODS
from posttrain.schema import ImageSpec, Precision, stream_seed, uniform
from posttrain.vision import models, noise
from posttrain.vision.images import decode_column, normalize
from posttrain.vision.losses import Noise
from posttrain.vision.weights import load_bytes, to_bytes

NOISES = (
    "clean",
    "symmetric 20",
    "symmetric 40",
    "pair 20",
    "pair 40",
    "instance 20",
    "instance 40",
    "human aggre",
    "human random1",
)
CHECKED = "checked "
"""Before the name of flips that are in the training set alone: somebody has looked through the validation labels."""
HARD = (
    "imbalanced 0",
    "imbalanced 20",
    "two 0",
    "two 20",
    "class 90",
    *(f"{CHECKED}{flips}" for flips in ("symmetric 20", "symmetric 40", "pair 20", "instance 20")),
)
"""For the stop rule alone: class sizes from 100 to 1, two classes that look alike, one class labelled at random, right
validation labels."""
NETWORKS = ("memorised", "augmented")
FOLDS = 5


@dataclass(frozen=True)
class DataSet:
    """What the cases take of a data set, and the network that is trained on it."""

    train: int
    validation: int
    test: int
    factory: str
    arguments: dict[str, Any]
    image: ImageSpec
    training: dict[str, Training]
    """By network."""
    alike: tuple[int, int]
    """Two classes that are easily taken for one another."""
    folder: str | None = None
    """Where it lies, if not under its name."""
    precision: Precision = "float32"
    """In which the network computes."""
    trunk: ImageSpec | None = None
    """Of the images, where the network takes what its first blocks make of them, which stay as they are."""
    pooled: bool = False
    """Whether these are all blocks, and the network takes their pooled features."""


def _training(epochs: int, augment: str, **changes: Any) -> Training:
    # memorised: no augmentation, until (nearly) every label is reproduced
    until = 0.995 if augment == "none" else None
    settings: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": 64,
        "optimizer": "adamw",
        "learning_rate": 3e-3,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "augment": augment,
        "until_train_accuracy": until,
    }
    return Training(**{**settings, **changes})


DATASETS = {
    "digits": DataSet(
        1203,
        134,
        360,
        "posttrain.vision.models:mlp",
        {},
        ImageSpec(1, (8, 8), (0.5,), (0.5,), (8, 8)),
        {
            "memorised": _training(200, "none", schedule="constant"),
            "augmented": _training(60, "crop"),
        },
        (3, 8),
    ),
    "fashion_mnist": DataSet(
        3000,
        1000,
        5000,
        "posttrain.vision.models:small_resnet",
        {"width": 16, "channels": 1, "stem_stride": 2},
        ImageSpec(1, (28, 28), (0.286,), (0.353,)),
        {"memorised": _training(30, "none"), "augmented": _training(15, "crop_flip")},
        (0, 6),
    ),
    "cifar10n": DataSet(
        4000,
        1000,
        5000,
        "posttrain.vision.models:small_resnet",
        {"width": 16, "stem_stride": 2},
        ImageSpec(3, (32, 32), (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
        {"memorised": _training(40, "none"), "augmented": _training(25, "crop_flip")},
        (3, 5),
    ),
}

_LITE0 = ImageSpec(3, (64, 64), (0.498,) * 3, (0.502,) * 3)
_WHOLE: dict[str, Any] = {
    "factory": "pipelines.benchmarks.efficientnet:lite0",
    "arguments": {},
    "image": _LITE0,
    "training": {
        "overfitted": _training(8, "none", learning_rate=1e-3, until_train_accuracy=None),
        "frozen": _training(1, "none"),
    },
}
_TOP: dict[str, Any] = _WHOLE | {
    "factory": "pipelines.benchmarks.efficientnet:Lite0Top",
    # what `normalize` leaves as it is
    "image": ImageSpec(112, (4, 4), (0.0,) * 112, (1 / 255,) * 112),
    "trunk": _LITE0,
}
PRETRAINED = {
    f"{folder}-{name}": DataSet(3000, 1000, 5000, alike=alike, folder=folder, **settings)
    for folder, alike in (("cifar10n", (3, 5)), ("fashion_mnist", (0, 6)))
    for name, settings in (("lite0-top", _TOP), ("lite0", _WHOLE))
}
"""Data sets for a network that was pre-trained on others: `real` runs on them. Of `lite0-top` the first blocks stay as
they are in all trainings, which makes these four times as fast."""
FEATURES = {
    "cifar10n-features": DataSet(
        3000,
        1000,
        5000,
        "posttrain.vision.models:mlp",
        {"inputs": 1280, "width": 256},
        # mean and deviation over all features of all images
        ImageSpec(1280, (1, 1), (0.87 / 255,), (1.59 / 255,)),
        {
            method: _training(30, "none", learning_rate=1e-3, until_train_accuracy=None, method=method)
            for method in METHODS
        },
        (3, 5),
        folder="cifar10n",
        trunk=_LITE0,
        pooled=True,
    )
}
"""Two layers on the pooled features of the frozen, pre-trained network: `synergy` runs on them, and its networks are
called by the method that trains them."""
DATASETS |= PRETRAINED | FEATURES


@dataclass(frozen=True)
class Case:
    """One cell of the benchmark."""

    dataset: str
    noise: str
    network: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}, {self.noise}, {self.network}, seed {self.seed}"

    @property
    def key(self) -> str:
        """A name for files."""
        return str(self).replace(", ", "-").replace(" ", "_")

    @property
    def classes(self) -> int:
        """Number of classes."""
        return 2 if self.noise.startswith("two") else 10


def cases(
    datasets: Sequence[str], noises: Sequence[str], networks: Sequence[str], seeds: Sequence[int]
) -> Iterator[Case]:
    """Every case that exists: human labels are known of CIFAR-10N alone. Seeds vary slowest."""
    for seed, dataset, kind, network in itertools.product(seeds, datasets, noises, networks):
        if dataset.startswith("cifar10n") or not kind.startswith("human"):
            yield Case(dataset, kind, network, seed)


@dataclass(frozen=True)
class Part:
    """Samples of one split; `true` is for measuring."""

    ids: np.ndarray
    pixels: Tensor
    """[n, channels, height, width]: uint8, or what the first blocks of a network make of the images."""
    given: np.ndarray
    true: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, keep: np.ndarray) -> Part:
        """The part's rows by a mask or by positions."""
        at = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Part(self.ids[at], self.pixels[torch.from_numpy(at)], self.given[at], self.true[at])


@dataclass(frozen=True)
class Data:
    """The splits of a case."""

    train: Part
    validation: Part
    test: Part
    classes: int


def load(case: Case) -> Data:
    """The case's data: which samples, and which of their labels are wrong, depends on its seed."""
    size = DATASETS[case.dataset]
    pixels, columns = _whole(case.dataset, "train")
    held_out, held_out_columns = _whole(case.dataset, "test")
    order = np.random.default_rng(case.seed).permutation(len(pixels))
    true = columns["true"]
    kind, _, detail = case.noise.removeprefix(CHECKED).partition(" ")
    wanted = np.isin(true, size.alike) if kind == "two" else np.ones(len(true), bool)
    tested = np.random.default_rng([case.seed, 1]).permutation(len(held_out))
    test_labels = held_out_columns["true"]
    if kind == "two":
        tested = tested[np.isin(test_labels[tested], size.alike)]
        true, test_labels = ((labels == size.alike[1]).astype(np.int64) for labels in (true, test_labels))
    if kind == "imbalanced":
        # class c keeps a share of 100^(-c/9)
        wanted = uniform(np.arange(len(true)), stream_seed("imbalance", case.seed)) < 100.0 ** (-true / 9)
    order = order[wanted[order]]
    held_back = min(size.validation, len(order) // 5)
    chosen = order[: min(size.train, len(order) - held_back) + held_back]
    ids = np.arange(len(pixels))
    if kind == "human":
        given = columns[detail]
    elif kind == "clean":
        given = true
    else:
        common: dict[str, Any] = {"classes": case.classes, "rate": int(detail) / 100, "seed": case.seed}
        given = true.copy()
        of_class = np.eye(10)
        of_class[3] = (np.arange(10) != 3) * int(detail) / 900 + (np.arange(10) == 3) * (1 - int(detail) / 100)
        some = {
            "imbalanced": lambda: noise.symmetric(true[chosen], ids[chosen], **common),
            "two": lambda: noise.symmetric(true[chosen], ids[chosen], **common),
            "class": lambda: noise.from_matrix(true[chosen], ids[chosen], matrix=of_class, seed=case.seed),
            "symmetric": lambda: noise.symmetric(true[chosen], ids[chosen], **common),
            "pair": lambda: noise.pair(true[chosen], ids[chosen], **common),
            "instance": lambda: noise.instance_dependent(
                true[chosen], ids[chosen], _images(case.dataset, "train")[0][chosen].numpy(), **common
            ),
        }
        given[chosen] = some[kind]()
        if case.noise.startswith(CHECKED):
            given[chosen[-held_back:]] = true[chosen[-held_back:]]

    def part(rows: np.ndarray) -> Part:
        return Part(ids[rows], pixels[torch.from_numpy(rows)], given[rows], true[rows])

    tested = tested[: size.test]
    test = Part(tested, held_out[torch.from_numpy(tested)], test_labels[tested], test_labels[tested])
    return Data(part(chosen[:-held_back]), part(chosen[-held_back:]), test, case.classes)


def folder_of(dataset: str, split: str = "train") -> Path:
    """Where a data set lies that is not embedded. Raises FileNotFoundError, with the way out."""
    folder = Path(os.environ.get("POSTTRAIN_DATA", Path(__file__).parents[3] / "shared" / "data")) / dataset / split
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; set POSTTRAIN_DATA to the folder that holds {dataset}/{split}, or take "
            "--datasets digits alone"
        )
    return folder


@cache
def _images(dataset: str, split: str) -> tuple[Tensor, dict[str, np.ndarray]]:
    """uint8 images of all samples of a split, and their labels by kind."""
    image = DATASETS[dataset].trunk or DATASETS[dataset].image
    folder = DATASETS[dataset].folder or dataset
    if dataset == "digits":
        from posttrain.vision.datasets import digits

        tables = digits(0)
        table = tables[split]
        columns = {"true": table["label"].to_numpy().astype(np.int64)}
        column = table["image"]
    else:
        table = pyarrow.dataset.dataset(folder_of(folder, split)).to_table()
        names = {"label_clean": "true", "label": "true", "label_aggre": "aggre", "label_random1": "random1"}
        columns = {names[name]: table[name].to_numpy().astype(np.int64) for name in table.column_names if name in names}
        column = table["image"]
    pixels, readable, _ = decode_column(
        column, channels=image.channels, size=image.size, shape=image.shape, background=image.background
    )
    assert readable.all()
    return pixels, columns


@cache
def _whole(dataset: str, split: str) -> tuple[Tensor, dict[str, np.ndarray]]:
    """The same, as the network takes the images."""
    pixels, columns = _images(dataset, split)
    image = DATASETS[dataset].trunk
    if image is not None:
        from pipelines.benchmarks.efficientnet import pooled, trunk  # which imports this module

        made_of = pooled if DATASETS[dataset].pooled else trunk
        pixels = made_of(normalize(part, image.mean, image.std) for part in pixels.split(500))
    return pixels, columns


# -- networks ----------------------------------------------------------------------------------------------

_device = torch.device("cpu")


def train_on(device: str) -> None:
    """From now on, networks are trained on this device, "cpu" or "cuda"; everything else computes on the CPU.

    Raises ValueError where torch sees no GPU.
    """
    global _device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no GPU; leave --device out to train on the CPU")
    _device = torch.device(device)


class Images:
    """Batches of a part in seeded random order, as `fit_network` takes them; `last` are their positions."""

    def __init__(self, part: Part, seed: int, on_epoch: Callable[[int], None] = lambda epoch: None) -> None:
        self._part, self._seed, self._on_epoch = part, seed, on_epoch
        self._labels = torch.from_numpy(part.given)
        self.last = np.empty(0, np.int64)
        self.samples = len(part)

    def batches(self, size: int, steps: int, epoch: int) -> Iterator[Batch]:
        self._on_epoch(epoch)
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._part))
        for step in range(steps):
            self.last = order[step * size : (step + 1) * size]
            if len(self.last) < 2:
                return
            yield Batch(self._part.pixels[self.last], self._labels[self.last], torch.from_numpy(self.last))


@dataclass
class Trained:
    """A network and what was seen while it was trained."""

    weights: bytes = field(repr=False)
    accuracy: float
    """On the given labels, in the last epoch."""
    epochs: int
    seconds: float
    aum: np.ndarray | None = None
    """[n] averaged logit margin over training, larger is better (Pleiss et al. 2020)."""
    checkpoints: list[bytes] = field(default_factory=list, repr=False)


def train(
    case: Case,
    part: Part,
    *,
    seed: int,
    weights: bytes | None = None,
    settings: Training | None = None,
    watch: bool = False,
    after_step: Callable[[nn.Module], None] | None = None,
    noise: Noise | None = None,
) -> Trained:
    """The case's network, trained on a part's given labels as posttrain trains it; `watch` keeps what baselines need.

    AUM sums the margins of each sample's own training step; its cost is nothing but the bookkeeping. Of the two
    networks of co-teaching the first is meant. `noise`: what is known of the labels, for methods that need it.
    """
    dataset = DATASETS[case.dataset]
    settings = settings or dataset.training[case.network]
    model = network(case, seed) if weights is None else loaded(case, weights)
    model.to(_device).to(memory_format=torch.channels_last).train()
    # before it has hooks, which the second network must not have
    whole = _with_twin(case, model, seed) if settings.method == "co_teaching" else model
    margins, seen = np.zeros(len(part)), np.zeros(len(part))
    snapshots: list[bytes] = []

    def remember(module: nn.Module, inputs: Any, logits: Tensor) -> None:
        at = images.last
        given, logits = torch.from_numpy(part.given[at]), logits.detach().cpu().float()
        own = logits.gather(1, given[:, None])[:, 0]
        others = logits.scatter(1, given[:, None], -torch.inf).max(dim=1).values
        margins[at] += (own - others).numpy()
        seen[at] += 1

    # TracIn sums over checkpoints: a few on the way, the last is the network itself
    every = max(1, settings.epochs // 6)
    images = Images(
        part, seed, lambda epoch: snapshots.append(to_bytes(model)) if watch and epoch % every == 0 else None
    )
    hooks = [model.register_forward_hook(remember)] if watch else []
    if after_step is not None:
        hooks.append(model.register_forward_pre_hook(lambda module, inputs: after_step(module)))
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = fit_network(
            whole,
            images,  # pyright: ignore[reportArgumentType]  the same method, without Ray
            settings,
            spec=dataset.image,
            live=len(part),
            world=1,
            device=_device,
            seed=seed,
            progress=lambda done, total: None,
            classes=case.classes,
            noise=noise,
            precision=dataset.precision,
        )
    seconds = time.perf_counter() - began
    for hook in hooks:
        hook.remove()
    aum = margins / np.maximum(seen, 1) if watch else None
    # the first snapshot is the untrained network
    return Trained(to_bytes(model), found["accuracy"], found["epochs"], seconds, aum, snapshots[1:])


def _with_twin(case: Case, model: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return twins(model, models.find_head(model, classes=case.classes))


def network(case: Case, seed: int) -> nn.Module:
    """The case's network with first weights drawn from the seed."""
    dataset = DATASETS[case.dataset]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.build(dataset.factory, classes=case.classes, arguments=dataset.arguments)


def averaged(case: Case, weights: bytes, decay: float) -> AveragedModel:
    """The moving average, by step, of the case's network from these weights on."""
    return AveragedModel(loaded(case, weights), multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def loaded(case: Case, weights: bytes) -> nn.Module:
    """The case's network with these weights, in evaluation mode."""
    model = network(case, 0)
    load_bytes(model, weights)
    return model.eval()


def inputs(case: Case, part: Part) -> Iterator[Tensor]:
    """A part's images as the network takes them, in batches of 500."""
    image = DATASETS[case.dataset].image
    for pixels in part.pixels.split(500):
        yield normalize(pixels, image.mean, image.std).contiguous(memory_format=torch.channels_last)


def logits(case: Case, model: nn.Module, part: Part) -> Tensor:
    """[n, classes] of a network in evaluation mode."""
    with torch.inference_mode(), computing_in(DATASETS[case.dataset].precision, torch.device("cpu")):
        return torch.cat([model.eval()(batch).float() for batch in inputs(case, part)])


def accuracy(case: Case, model: nn.Module, part: Part) -> float:
    """Share of the part's given labels that the network gives."""
    return float((logits(case, model, part).argmax(dim=1).numpy() == part.given).mean())


def trained(case: Case, data: Data, folder: Path) -> Trained:
    """The case's network from `folder`, trained and kept there where it is not."""
    path = folder / "networks" / f"{case.key}.pt"
    found: Mapping[str, Any] | None = _kept(path)
    if found is None:
        result = train(case, data.train, seed=case.seed, watch=True)
        found = {
            "weights": result.weights,
            "accuracy": result.accuracy,
            "epochs": result.epochs,
            "seconds": result.seconds,
            "aum": torch.from_numpy(result.aum),
            "checkpoints": result.checkpoints,
        }
        _keep(path, found)
    return Trained(**{**found, "aum": found["aum"].numpy()})


@dataclass(frozen=True)
class OutOfSample:
    """[n, classes] probabilities of each training sample from a network that was trained without it."""

    probabilities: np.ndarray
    seconds: float
    """As the training of the networks took when it was done."""
    fresh: bool
    """Whether that was now, not in a run before."""


def out_of_sample(case: Case, data: Data, folder: Path) -> OutOfSample:
    """From `FOLDS` networks, each trained on the other folds as the case's network was; kept in `folder`."""
    path = folder / "out_of_sample" / f"{case.key}.pt"
    found: Mapping[str, Any] | None = _kept(path)
    fresh = found is None
    if found is None:
        began = time.perf_counter()
        fold = np.random.default_rng([case.seed, 2]).permutation(len(data.train)) % FOLDS
        probabilities = torch.zeros(len(fold), data.classes)
        for number in range(FOLDS):
            result = train(case, data.train.rows(fold != number), seed=case.seed + 100 * (number + 1))
            out = data.train.rows(fold == number)
            probabilities[torch.from_numpy(fold == number)] = logits(case, loaded(case, result.weights), out).softmax(
                dim=1
            )
        found = {"probabilities": probabilities, "seconds": time.perf_counter() - began}
        _keep(path, found)
    return OutOfSample(found["probabilities"].numpy(), found["seconds"], fresh)


def _kept(path: Path) -> Mapping[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None


def _keep(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    torch.save(dict(content), aside)
    os.replace(aside, path)


def with_settings(settings: Training, **changes: Any) -> Training:
    """The same training but for the changes."""
    return replace(settings, **changes)
