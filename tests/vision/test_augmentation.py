from __future__ import annotations

import pytest
import torch

from posttrain.vision.augmentation import Augmentation, augmentation

BATCH = torch.randint(0, 256, (64, 3, 16, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["crop", "crop_flip"])
def test_each_augmented_sample_is_a_shifted_and_maybe_mirrored_copy_of_its_own(kind: Augmentation):
    found = augmentation(kind, (16, 24))(BATCH, torch.Generator().manual_seed(1))
    padded = torch.nn.functional.pad(BATCH.float(), (3, 3, 2, 2), mode="reflect").to(torch.uint8)
    flipped, shifts = 0, set()
    for i, sample in enumerate(found):
        ways = {
            (dy, dx, flip)
            for dy in range(5)
            for dx in range(7)
            for flip, view in enumerate((padded[i], padded[i].flip(-1))[: 1 + (kind == "crop_flip")])
            if torch.equal(view[:, dy : dy + 16, dx : dx + 24], sample)
        }
        assert len(ways) == 1
        (dy, dx, flip) = ways.pop()
        shifts.add((dy, dx))
        flipped += flip
    assert {dy for dy, _ in shifts} == set(range(5)) and {dx for _, dx in shifts} == set(range(7))
    assert flipped == 0 if kind == "crop" else 16 < flipped < 48


def test_augmentation_depends_on_the_generator_alone():
    augment = augmentation("crop_flip", (16, 24))
    torch.manual_seed(1)
    first = augment(BATCH, torch.Generator().manual_seed(5))
    torch.manual_seed(2)
    assert torch.equal(first, augment(BATCH, torch.Generator().manual_seed(5)))
    assert not torch.equal(first, augment(BATCH, torch.Generator().manual_seed(6)))


def test_no_augmentation_changes_nothing_and_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert torch.equal(augmentation("none", (16, 24))(BATCH, generator), BATCH)
    assert torch.equal(generator.get_state(), state)


def test_augmenting_a_batch_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"images of \(8, 8\)"):
        augmentation("crop", (8, 8))(BATCH, torch.Generator())
