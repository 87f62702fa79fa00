from __future__ import annotations

import torch

from pipelines.benchmarks.plain_loop import to_remove


def test_what_the_boundary_gives_another_label_is_removed_up_to_the_budget() -> None:
    margin = torch.tensor([-1.0, 0.2, 0.6, 0.4, -0.1])
    assert to_remove(margin, 0.9).tolist() == [2, 3, 1]
    assert to_remove(margin, 0.4).tolist() == [2, 3]
