"""Training on: as many gradient steps as asked for, and the average over them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.benchmarks import cases, training
from pipelines.benchmarks.cases import Case, Data

NOISY = Case("digits", "symmetric 40", "memorised", 0)


def test_the_average_after_one_step_is_a_hundredth_of_the_way(
    with_batch_norm: tuple[Data, bytes], floats: Callable[[bytes], dict[str, Tensor]]
):
    data, weights = with_batch_norm
    average = training.Average(NOISY, weights)
    after, steps = training.trained_on(
        NOISY, data.train, weights, seed=1, settings=training.refining("digits"), steps=1, watch=average.watch
    )
    assert steps == 1
    begun, ended, averaged = floats(weights), floats(after), floats(average.finished(after))
    assert any("running_var" in name for name in averaged)
    for name, value in averaged.items():
        assert not torch.equal(begun[name], ended[name])
        torch.testing.assert_close(value, 0.99 * begun[name] + 0.01 * ended[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("samples", "steps"), [(64, 1), (65, 3), (129, 5)])
def test_as_many_steps_are_taken_as_are_asked_for(with_batch_norm: tuple[Data, bytes], samples: int, steps: int):
    data, weights = with_batch_norm
    part = data.train.rows(np.arange(samples))
    settings = training.refining("digits")
    epoch = list(cases.Images(part, 0).batches(64, 100, 0))
    # a last batch of one is left out: batch normalisation cannot take it
    assert training.steps_of_epoch(samples, 64) == len(epoch)
    assert training.trained_on(NOISY, part, weights, seed=0, settings=settings, steps=steps)[1] == steps
