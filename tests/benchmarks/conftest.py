"""Networks on digits that are trained in a moment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from pipelines.benchmarks import cases
from pipelines.benchmarks.cases import Case, Data
from posttrain.vision.weights import to_bytes

NOISY = Case("digits", "symmetric 40", "memorised", 0)


def trained_for(epochs: int, patch: pytest.MonkeyPatch) -> None:
    training = cases.DATASETS["digits"].training
    for network in cases.NETWORKS:
        patch.setitem(training, network, replace(training[network], epochs=epochs, until_train_accuracy=None))


@pytest.fixture
def two_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits' networks are trained for two epochs."""
    trained_for(2, monkeypatch)


@pytest.fixture(scope="module")
def fifteen_epochs() -> Iterator[None]:
    """The digits' networks are trained for 15 epochs."""
    with pytest.MonkeyPatch.context() as patch:
        trained_for(15, patch)
        yield


@pytest.fixture
def with_batch_norm(monkeypatch: pytest.MonkeyPatch) -> tuple[Data, bytes]:
    """The digits' network is a small ResNet, and its data are few."""
    digits = cases.DATASETS["digits"]
    other = replace(digits, factory="posttrain.vision.models:small_resnet", arguments={"width": 8, "channels": 1})
    monkeypatch.setitem(cases.DATASETS, "digits", other)
    data = cases.load(NOISY)
    data = replace(data, train=data.train.rows(np.arange(130)))
    return data, to_bytes(cases.network(NOISY, 0))


@pytest.fixture
def floats() -> Callable[[bytes], dict[str, Tensor]]:
    """All of a network that is averaged: weights, and the means and variances of batch norm."""

    def of(weights: bytes) -> dict[str, Tensor]:
        state = cases.loaded(NOISY, weights).state_dict()
        return {name: value.double() for name, value in state.items() if value.is_floating_point()}

    return of
