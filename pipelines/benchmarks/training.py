"""A case's network trained on: the rounds of posttrain, their controls, and networks from scratch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import FEATURES, Case, Part
from posttrain.cluster.training import Training
from posttrain.config import Refine
from posttrain.methods import Method
from posttrain.vision.losses import Noise
from posttrain.vision.weights import to_bytes

REFINE = Refine(scope="network", epochs=2, batch_size=64, augment="crop_flip")
"""Of each round. Digits are cropped and not mirrored; features are neither."""
DECAY = 0.99
"""Of the moving average of weights, by gradient step."""


def refining(dataset: str, method: Method = "cross_entropy") -> Training:
    """How the data set's network is trained in one round of refining."""
    settings: dict[str, Any] = REFINE.model_dump(exclude={"scope"}) | {"method": method}
    if dataset == "digits":
        settings["augment"] = "crop"
    elif dataset in FEATURES:
        settings["augment"] = "none"
    return Training(**settings)


def round_seed(case: Case, number: int) -> int:
    """The seed of a round's training, the same for posttrain and its controls."""
    return case.seed + 1000 * number


def steps_of_epoch(samples: int, batch_size: int) -> int:
    """Gradient steps of one epoch: a last batch of a single sample is left out."""
    whole, rest = divmod(samples, batch_size)
    return whole + (rest > 1)


def trained_on(
    case: Case,
    part: Part,
    weights: bytes | None,
    *,
    seed: int,
    settings: Training,
    steps: int | None = None,
    watch: Callable[[nn.Module], None] = lambda model: None,
    noise: Noise | None = None,
) -> tuple[bytes, int]:
    """The network after training on a part, and the gradient steps that it took.

    `steps`: exactly as many, whatever the settings' epochs. Without weights the training starts from those of
    the case's seed. `watch` sees the model before each step. `noise`: as `cases.train` takes it.
    """
    if steps is not None:
        epochs = -(-steps // steps_of_epoch(len(part), settings.batch_size))
        settings = cases.with_settings(settings, epochs=epochs, max_steps=steps)
    passed = 0

    def before_step(model: nn.Module) -> None:
        nonlocal passed
        passed += 1
        watch(model)

    # a forward pass for each step, and the hook runs before it
    result = cases.train(case, part, seed=seed, weights=weights, settings=settings, after_step=before_step, noise=noise)
    return result.weights, passed


class Average:
    """The moving average of a network's weights and buffers over the gradient steps of a training."""

    def __init__(self, case: Case, weights: bytes) -> None:
        self._case = case
        self._model = cases.averaged(case, weights, DECAY)

    def watch(self, model: nn.Module) -> None:
        """Before each step: the first call finds the weights that the average begins with."""
        self._model.update_parameters(model)

    def finished(self, weights: bytes) -> bytes:
        """The averaged network, once the weights after the last step are in it."""
        self._model.update_parameters(cases.loaded(self._case, weights))
        return to_bytes(self._model.module)
