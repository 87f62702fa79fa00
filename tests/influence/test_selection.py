from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.errors import StepError
from posttrain.influence.selection import Histograms, ordered_bits, select


def walk(ids, labels, scores, *, at_most, caps, threshold) -> set:
    """The rule itself: sorted by (score descending, id ascending), walked down."""
    ranked = sorted(zip(-scores.astype(float), ids.tolist(), labels.tolist(), strict=True))
    given_by = dict.fromkeys(range(len(caps)), 0)
    taken = set()
    for negative, sample_id, label in ranked:
        if len(taken) == at_most:
            break
        if -negative > np.float32(threshold) and given_by[label] < caps[label]:
            given_by[label] += 1
            taken.add(sample_id)
    return taken


def cut_into(ids, labels, scores, pieces: int):
    def blocks():
        for rows in np.array_split(np.arange(len(ids)), pieces):
            yield ids[rows], labels[rows], scores[rows]

    return blocks


def taken_ids(selection, blocks) -> list:
    return [i for block in blocks() for i in block[0][selection.mask(*block)].tolist()]


# Few distinct values: heavy ties. Any float32: the whole range of bits, infinities and zeros of both signs.
few = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0])
any_float32 = st.floats(width=32, allow_nan=False)


@st.composite
def problems(draw):
    classes = draw(st.integers(1, 4))
    n = draw(st.integers(0, 60))
    scores = draw(st.lists(draw(st.sampled_from([few, any_float32])), min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    ids = np.array(draw(st.permutations(range(n))), dtype=np.int64) - n // 2
    if draw(st.booleans()):
        ids = np.array([f"train/{i}.png" for i in ids.tolist()], dtype=draw(st.sampled_from([object, np.str_])))
    limits = {
        "at_most": draw(st.integers(0, n + 3)),
        "caps": np.array(draw(st.lists(st.integers(0, n + 1), min_size=classes, max_size=classes))),
        "threshold": draw(st.one_of(st.just(-np.inf), few, any_float32)),
    }
    return ids, np.array(labels, dtype=np.int32), np.array(scores, dtype=np.float32), limits


@settings(max_examples=250, deadline=None)
@given(problems(), st.integers(1, 7), st.randoms(use_true_random=False))
def test_the_cut_takes_what_the_sorted_walk_takes_in_any_order_and_blocks(problem, pieces, random):
    ids, labels, scores, limits = problem
    expected = walk(ids, labels, scores, **limits)
    order = list(range(len(ids)))
    random.shuffle(order)
    for rows, count in ((np.arange(len(ids)), 1), (np.array(order, dtype=np.int64), pieces)):
        blocks = cut_into(ids[rows], labels[rows], scores[rows], count)
        selection = select(blocks, classes=len(limits["caps"]), **limits)
        taken = taken_ids(selection, blocks)
        assert sorted(taken) == sorted(expected)
        assert selection.total == len(expected)
        assert selection.candidates == int((scores > np.float32(limits["threshold"])).sum())
        given_by = [sum(labels[ids == i][0] == c for i in expected) for c in range(len(limits["caps"]))]
        assert list(selection.per_class) == given_by


def score_at(bits: int) -> float:
    """The score that `ordered_bits` maps to `bits`."""
    as_float = bits ^ 0x8000_0000 if bits & 0x8000_0000 else bits ^ 0xFFFF_FFFF
    return float(np.uint32(as_float).view(np.float32))


@given(st.lists(any_float32, min_size=2, max_size=50))
def test_bits_compare_as_the_scores_do_and_lead_back_to_them(values):
    scores = np.array(values, dtype=np.float32)
    bits = ordered_bits(scores)
    assert ((scores[:, None] < scores[None, :]) == (bits[:, None] < bits[None, :])).all()
    assert [score_at(int(b)) for b in bits] == scores.tolist()


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match=r"1 of 2 scores are not a number"):
        ordered_bits(np.array([1.0, np.nan], dtype=np.float32))


def test_a_label_outside_the_classes_is_refused():
    histograms = Histograms(21, 11, floor=0, classes=2)
    with pytest.raises(ValueError, match="labels run from 0 to 2, but there are 2 classes"):
        histograms.add(np.zeros(2, dtype=np.float32), np.array([0, 2]))


def test_histograms_of_parts_add_up_to_the_histogram_of_the_whole():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=1000).astype(np.float32), rng.integers(0, 3, 1000)
    whole, left, right = (Histograms(21, 11, floor=0, classes=3) for _ in range(3))
    whole.add(scores, labels)
    left.add(scores[:400], labels[:400])
    right.add(scores[400:], labels[400:])
    assert ((left + right).counts == whole.counts).all()


def test_scores_that_change_between_two_passes_are_an_error():
    streams = iter([np.ones(4), np.full(4, 1e9), np.ones(4)])

    def blocks():
        yield np.arange(4), np.zeros(4, dtype=np.int64), next(streams).astype(np.float32)

    with pytest.raises(StepError, match="the scores changed"):
        select(blocks, classes=1, at_most=2, caps=np.array([2]), threshold=0.0)


def test_a_cut_lies_between_the_scores_that_it_separates():
    scores: Sequence[float] = [3.0, 2.0, 1.0]
    blocks = cut_into(np.arange(3), np.zeros(3, dtype=np.int64), np.array(scores, dtype=np.float32), 1)
    [cut] = select(blocks, classes=1, at_most=2, caps=np.array([3]), threshold=-np.inf).thresholds
    above_one, below_two = ordered_bits(np.array([1.0, 2.0], dtype=np.float32)).tolist()
    assert above_one < cut.bits < below_two
    [nothing] = select(blocks, classes=1, at_most=0, caps=np.array([3]), threshold=-np.inf).thresholds
    assert nothing.bits == ordered_bits(np.array([np.inf], dtype=np.float32))[0]


def test_a_million_scores_with_heavy_ties_are_cut_exactly_within_seconds():
    rng = np.random.default_rng(0)
    n, classes = 1_000_000, 100
    ids, labels = rng.permutation(n), rng.integers(0, classes, n)
    scores = rng.integers(0, 50, n).astype(np.float32)
    caps = np.full(classes, 700)
    blocks = cut_into(ids, labels, scores, 50)
    start = time.perf_counter()
    selection = select(blocks, classes=classes, at_most=50_000, caps=caps, threshold=-1.0)
    assert time.perf_counter() - start < 5
    order = np.lexsort((ids, -scores))
    rank_in_class = np.empty(n, dtype=np.int64)
    for c in range(classes):
        mine = order[labels[order] == c]
        rank_in_class[mine] = np.arange(len(mine))
    expected = order[rank_in_class[order] < 700][:50_000]
    assert sorted(taken_ids(selection, blocks)) == sorted(ids[expected].tolist())
