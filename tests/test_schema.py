from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chisquare

from posttrain.schema import (
    ORDER_BITS,
    PARTITION_ROWS,
    Relabelled,
    current_labels,
    excluded_digest,
    excluded_rows,
    order_key,
    partition_boundaries,
    partition_count,
    relabelled_digest,
    relabelled_rows,
    stream_seed,
    uniform,
)

PATHS = np.array(["a", "train/cat/1.png", "é"], object)


def test_order_keys_stay_the_same_from_release_to_release():
    # a run folder holds (partition, row): other keys would make every old run point at other samples
    integers = np.array([0, 1, -5, 2**62])
    assert order_key(integers).tolist() == [
        752221890588809190,
        236117651207822723,
        459314592267210630,
        16163970571419297,
    ]
    assert order_key(integers, seed=7).tolist() == [
        831842297169231076,
        1096425169201054845,
        189961072276818002,
        331526550724193481,
    ]
    assert order_key(PATHS).tolist() == [822014640388062636, 1089544162565521088, 693764677716633574]


def test_order_keys_depend_on_the_id_and_not_on_its_type_or_place():
    ids = np.array([3, 70000, 12, 0])
    for kind in (np.int32, np.uint32, np.int64, np.uint64):
        assert order_key(ids.astype(kind)).tolist() == order_key(ids).tolist()
    assert order_key(PATHS.astype(str)).tolist() == order_key(PATHS).tolist()
    assert order_key(ids[::-1]).tolist() == order_key(ids).tolist()[::-1]
    assert [int(order_key(ids[i : i + 1])[0]) for i in range(4)] == order_key(ids).tolist()


def test_order_keys_of_a_million_ids_fit_their_bits_and_do_not_collide():
    keys = order_key(np.arange(1_000_000))
    assert keys.dtype == np.int64
    assert keys.min() >= 0 and keys.max() < 2**ORDER_BITS
    assert len(np.unique(keys)) == 1_000_000


def test_no_ids_have_no_keys():
    assert order_key(np.array([], np.int64)).shape == uniform(np.array([], object), 1).shape == (0,)


@pytest.mark.parametrize(
    "ids",
    [np.arange(100_000), np.array([f"train/{i}.png" for i in range(20_000)], object)],
    ids=["int", "str"],
)
def test_the_draw_of_each_id_is_uniform(ids: np.ndarray):
    for seed in (0, 1, 2**31):
        draw = uniform(ids, seed)
        assert draw.min() >= 0 and draw.max() < 1
        assert chisquare(np.histogram(draw, 100, (0, 1))[0]).pvalue > 1e-3
        # the low bits too
        assert chisquare(np.bincount((draw * 2**40).astype(np.int64) % 64)).pvalue > 1e-3


def test_draws_of_different_seeds_have_nothing_to_do_with_each_other_or_with_the_order():
    ids = np.arange(50_000)
    draws = [uniform(ids, seed) for seed in (0, 1, 2, 1_000_003)]
    draws.append(ids / len(ids))
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 4 / np.sqrt(len(ids))
    assert uniform(ids, 1).tolist() == draws[1].tolist()


def test_partition_boundaries_part_the_keys_evenly():
    for partitions in (4, 7, 1000):
        edges = [0, *partition_boundaries(partitions), 2**ORDER_BITS]
        widths = [high - low for low, high in pairwise(edges)]
        assert len(widths) == partitions
        assert max(widths) - min(widths) <= 1


def test_samples_spread_evenly_over_the_partitions():
    count = partition_count(100_000)
    sizes = np.histogram(order_key(np.arange(100_000)), [0, *partition_boundaries(count), 2**ORDER_BITS])[0]
    assert sizes.sum() == 100_000
    assert chisquare(sizes).pvalue > 1e-3


def test_the_number_of_partitions_follows_from_the_number_of_samples():
    assert [partition_count(n) for n in (0, 1, 4 * PARTITION_ROWS, 4 * PARTITION_ROWS + 1)] == [4, 4, 4, 5]
    assert partition_count(1_000_000) == -(-1_000_000 // PARTITION_ROWS)


def test_excluded_rows_are_the_union_sorted_and_without_repetition():
    first = excluded_rows(np.array([2, 0, 2, 2]), np.array([9, 1, 3, 9]))
    both = excluded_rows(np.array([2, 5]), np.array([1, 0]), first)
    assert {b: rows.tolist() for b, rows in both.items()} == {0: [1], 2: [1, 3, 9], 5: [0]}
    assert all(rows.dtype == np.int32 for rows in both.values())


def test_excluded_rows_leave_what_they_are_added_to_as_it_was():
    before = excluded_rows(np.array([1]), np.array([4]))
    excluded_rows(np.array([1, 2]), np.array([0, 0]), before)
    assert {b: rows.tolist() for b, rows in before.items()} == {1: [4]}


def test_the_digest_tells_sets_of_rows_apart_and_nothing_else():
    rows = excluded_rows(np.array([1, 1, 3]), np.array([2, 5, 0]))
    backwards = excluded_rows(np.array([1, 1]), np.array([5, 2]), excluded_rows(np.array([3]), np.array([0])))
    assert excluded_digest(rows) == excluded_digest(backwards)
    assert excluded_digest({1: np.array([2, 5], np.int64)}) == excluded_digest({1: np.array([2, 5], np.int32)})
    others = [{}, {1: rows[1]}, {1: rows[1], 2: rows[3]}, {1: np.array([2, 6]), 3: rows[3]}]
    digests = {excluded_digest(other) for other in (rows, *others)}
    assert len(digests) == 5
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


def as_pairs(relabelled: Relabelled) -> dict[int, list[tuple[int, int]]]:
    """partition -> (row, new label)."""
    return {b: list(zip(rows.tolist(), labels.tolist(), strict=True)) for b, (rows, labels) in relabelled.items()}


def test_relabelled_rows_are_sorted_and_keep_each_row_with_its_label():
    first = relabelled_rows(np.array([2, 0, 2, 2]), np.array([9, 1, 3, 5]), np.array([7, 4, 0, 2]))
    both = relabelled_rows(np.array([5, 2, 2]), np.array([0, 4, 1]), np.array([1, 8, 6]), first)
    assert as_pairs(first) == {0: [(1, 4)], 2: [(3, 0), (5, 2), (9, 7)]}
    assert as_pairs(both) == {0: [(1, 4)], 2: [(1, 6), (3, 0), (4, 8), (5, 2), (9, 7)], 5: [(0, 1)]}
    assert all(array.dtype == np.int32 for pair in both.values() for array in pair)


def test_relabelled_rows_do_not_depend_on_the_order_or_the_rounds_in_which_they_came():
    draw = np.random.default_rng(0)
    at = draw.permutation(600)[:200]
    partitions, rows, labels = at // 100, at % 100, draw.integers(0, 10, 200)
    at_once = relabelled_rows(partitions, rows, labels)
    in_rounds: Relabelled = {}
    for part in np.array_split(draw.permutation(200), 7):
        in_rounds = relabelled_rows(partitions[part], rows[part], labels[part], in_rounds)
    expected = dict(zip(zip(partitions.tolist(), rows.tolist(), strict=True), labels.tolist(), strict=True))
    for found in (at_once, in_rounds):
        assert {(b, row): label for b, pairs in as_pairs(found).items() for row, label in pairs} == expected
        assert all((np.diff(rows) > 0).all() for rows, _ in found.values())
    assert relabelled_digest(at_once) == relabelled_digest(in_rounds)


def test_relabelled_rows_leave_what_they_are_added_to_as_it_was():
    before = relabelled_rows(np.array([1]), np.array([4]), np.array([2]))
    relabelled_rows(np.array([1, 2]), np.array([0, 0]), np.array([3, 3]), before)
    assert as_pairs(before) == {1: [(4, 2)]}
    nothing = np.array([], np.int32)
    assert as_pairs(relabelled_rows(nothing, nothing, nothing, before)) == as_pairs(before)
    assert relabelled_rows(nothing, nothing, nothing) == {}


@pytest.mark.parametrize("there", ["all", "none", "first", "last", "some"])
def test_current_labels_are_the_new_ones_of_the_rows_that_are_there(there: str):
    # a partition has rows 0..99; the quarantined and the removed are missing from a table of it
    draw = np.random.default_rng(1)
    changed = np.sort(draw.permutation(100)[:30])
    new = {int(row): int(label) for row, label in zip(changed, draw.integers(10, 20, 30), strict=True)}
    relabelled = relabelled_rows(np.full(30, 3), changed, np.array(list(new.values())))
    rows = {
        "all": np.arange(100),
        "none": np.setdiff1d(np.arange(100), changed),
        "first": changed[:1],
        "last": changed[-1:],
        "some": np.sort(draw.permutation(100)[:40]),
    }[there].astype(np.int32)
    given = draw.integers(0, 10, len(rows)).astype(np.int32)
    as_it_was = given.copy()
    found = current_labels(given, rows, 3, relabelled)
    assert found.tolist() == [new.get(row, label) for row, label in zip(rows.tolist(), given.tolist(), strict=True)]
    assert found.dtype == given.dtype
    # features and labels of a partition are kept by the workers: another view of it has other labels
    assert given.tolist() == as_it_was.tolist()


def test_current_labels_of_another_partition_or_of_no_rows_are_the_given_ones():
    relabelled = relabelled_rows(np.array([3, 3]), np.array([0, 5]), np.array([1, 1]))
    labels = np.array([7, 8], np.int32)
    assert current_labels(labels, np.array([0, 5]), 2, relabelled).tolist() == [7, 8]
    assert current_labels(labels, np.array([0, 5]), 3, {}).tolist() == [7, 8]
    assert current_labels(labels[:0], np.array([], np.int32), 3, relabelled).tolist() == []


def test_current_labels_can_be_given_twice():
    # the scores of a round are read with labels that are new already, or with those from before
    relabelled = relabelled_rows(np.array([0, 0]), np.array([1, 2]), np.array([5, 6]))
    once = current_labels(np.array([0, 0, 0, 0]), np.arange(4), 0, relabelled)
    assert current_labels(once, np.arange(4), 0, relabelled).tolist() == once.tolist() == [0, 5, 6, 0]


def test_the_digest_tells_new_labels_apart_and_nothing_else():
    new = relabelled_rows(np.array([1, 1, 3]), np.array([2, 5, 0]), np.array([7, 8, 9]))
    wide = {partition: (rows.astype(np.int64), labels.astype(np.int64)) for partition, (rows, labels) in new.items()}
    backwards = dict(reversed(new.items()))
    assert relabelled_digest(new) == relabelled_digest(wide) == relabelled_digest(backwards)
    others: list[Relabelled] = [
        {},
        {1: new[1]},
        {1: new[1], 2: new[3]},
        {1: (np.array([2, 6]), new[1][1]), 3: new[3]},  # another row
        {1: (new[1][0], np.array([7, 9])), 3: new[3]},  # another label
        {1: (new[1][0], np.array([8, 7])), 3: new[3]},  # labels of each other
        {1: (new[1][1], new[1][0]), 3: new[3]},  # rows for labels
    ]
    digests = {relabelled_digest(other) for other in (new, *others)}
    assert len(digests) == 1 + len(others)
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)


def test_draws_of_different_streams_know_nothing_of_each_other():
    ids = np.arange(20_000)
    noise = {seed: uniform(ids, seed) for seed in range(8)}
    for seed in range(4):
        for number in range(4):
            control = uniform(ids, stream_seed("control", seed, number))
            assert max(abs(np.corrcoef(control, other)[0, 1]) for other in noise.values()) < 0.04
