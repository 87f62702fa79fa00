from __future__ import annotations

import pickle
import time

import numpy as np
import pyarrow as pa
import pytest

from posttrain.live import Live, NewLabels, Removal, Rows


def rows(**by_partition: list[int]) -> Rows:
    """`rows(p2=[9, 3])`: rows 3 and 9 of partition 2."""
    places = [(int(name[1:]), row) for name, of in by_partition.items() for row in of]
    return Rows.of(np.array([p for p, _ in places]), np.array([row for _, row in places]))


def as_lists(some: Rows) -> dict[int, list[int]]:
    return {partition: of.tolist() for partition, of in some.by_partition()}


def pairs(labels: NewLabels) -> dict[tuple[int, int], int]:
    """(partition, row) -> new label."""
    return {
        (partition, row): label
        for partition, _ in labels.rows.by_partition()
        for row, label in zip(*(of.tolist() for of in labels.in_partition(partition)), strict=True)
    }


def test_rows_are_the_union_sorted_and_without_repetition():
    first = Rows.of(np.array([2, 0, 2, 2], np.int32), np.array([9, 1, 3, 9], np.int32))
    both = first | Rows.of(np.array([2, 5]), np.array([1, 0]))
    assert as_lists(both) == {0: [1], 2: [1, 3, 9], 5: [0]} and len(both) == 5
    assert both.in_partition(2).dtype == np.int32 and both.in_partition(3).tolist() == []
    # what they were added to is as it was
    assert as_lists(first) == {0: [1], 2: [3, 9]}
    assert as_lists(both - first) == {2: [1], 5: [0]}
    assert Rows() | first == first == first | Rows() and len(Rows() | Rows()) == 0
    # numpy takes an empty list for floats
    assert Rows.of(np.array([]), np.array([])).in_partition(0).tolist() == []


def test_rows_of_a_table_and_of_the_largest_partitions_and_rows_are_told_apart():
    partitions, places = np.array([0, 2**30], np.int32), np.array([2**30, 0], np.int32)
    found = Rows.of_table(pa.table({"partition": partitions, "row": places}))
    assert found.contains(partitions, places).all() and not found.contains(partitions, places[::-1]).any()
    assert as_lists(found) == {0: [2**30], 2**30: [0]}


def test_rows_say_of_any_places_which_are_among_them_as_plain_sets_do():
    draw = np.random.default_rng(0)
    some = draw.integers(0, 20, (2, 500))
    asked = draw.integers(0, 22, (2, 300))
    known = set(map(tuple, some.T.tolist()))
    found = Rows.of(*some).contains(*asked)
    assert found.tolist() == [place in known for place in map(tuple, asked.T.tolist())]
    in_one = Rows.of(*some).contains(7, np.arange(25))
    assert in_one.tolist() == [(7, row) in known for row in range(25)]
    assert not Rows().contains(*asked).any()


def test_new_labels_do_not_depend_on_the_order_or_the_rounds_in_which_they_came():
    draw = np.random.default_rng(0)
    at = draw.permutation(600)[:200]
    partitions, places, labels = at // 100, at % 100, draw.integers(0, 10, 200)
    at_once = NewLabels.of(partitions, places, labels)
    in_rounds = NewLabels()
    for part in np.array_split(draw.permutation(200), 7):
        in_rounds = in_rounds | NewLabels.of(partitions[part], places[part], labels[part])
    expected = dict(zip(zip(partitions.tolist(), places.tolist(), strict=True), labels.tolist(), strict=True))
    assert pairs(at_once) == pairs(in_rounds) == expected
    assert at_once == in_rounds and at_once.labels.dtype == np.int32


@pytest.mark.parametrize("there", ["all", "none", "first", "last", "some"])
def test_labels_are_the_new_ones_of_the_rows_that_are_there(there: str):
    # a partition has rows 0..99; the quarantined and the removed are missing from a table of it
    draw = np.random.default_rng(1)
    changed = np.sort(draw.permutation(100)[:30])
    new = {int(row): int(label) for row, label in zip(changed, draw.integers(10, 20, 30), strict=True)}
    live = Live(100, relabelled=NewLabels.of(3, changed, np.array(list(new.values()))))
    asked = {
        "all": np.arange(100),
        "none": np.setdiff1d(np.arange(100), changed),
        "first": changed[:1],
        "last": changed[-1:],
        "some": np.sort(draw.permutation(100)[:40]),
    }[there].astype(np.int32)
    given = draw.integers(0, 10, len(asked)).astype(np.int32)
    as_it_was = given.copy()
    found = live.labels(3, asked, given)
    assert found.tolist() == [new.get(row, label) for row, label in zip(asked.tolist(), given.tolist(), strict=True)]
    assert found.dtype == given.dtype
    # features and labels of a partition are kept by the workers: another view of it has other labels
    assert given.tolist() == as_it_was.tolist()
    # the scores of a round are read with labels that are new already, or with those from before
    assert live.labels(3, asked, found).tolist() == found.tolist()


def test_labels_of_another_partition_or_of_no_rows_are_the_given_ones():
    live = Live(10, relabelled=NewLabels.of(3, np.array([0, 5]), np.array([1, 1])))
    given = np.array([7, 8], np.int32)
    assert live.labels(2, np.array([0, 5]), given).tolist() == [7, 8]
    assert Live(10).labels(3, np.array([0, 5]), given).tolist() == [7, 8]
    assert live.labels(3, np.array([], np.int32), given[:0]).tolist() == []
    assert live.labels(np.array([2, 3]), np.array([0, 5]), given).tolist() == [7, 1]


def test_a_removal_leaves_a_new_live_set_and_the_old_one_as_it_was():
    old = Live(20, quarantined=rows(p0=[1]))
    new = old.without(Removal(rows(p0=[4], p1=[2]), NewLabels.of(1, np.array([3]), np.array([5]))))
    assert (old.count, new.count) == (19, 17) and old.digest != new.digest
    assert old.rows(0, 6).tolist() == [0, 2, 3, 4, 5] and new.rows(0, 6).tolist() == [0, 2, 3, 5]
    assert new.mask(1, np.array([1, 2, 3])).tolist() == [True, False, True]
    assert new.labels(1, np.array([2, 3]), np.array([0, 0])).tolist() == [0, 5]
    # relabelled samples are live, but no longer as they were given
    assert new.as_given().rows(1, 5).tolist() == [0, 1, 4] and new.as_given().count == 16


def test_why_a_sample_takes_no_part_is_told_apart_and_it_counts_once():
    live = Live(100, removed=rows(p0=[1, 2]), previously_removed=rows(p0=[3], p4=[4]), quarantined=rows(p4=[4, 5]))
    assert as_lists(live.excluded) == {0: [1, 2, 3], 4: [4, 5]} and live.count == 95
    assert as_lists(live.quarantined - live.previously_removed) == {4: [5]}
    assert live.quarantine(rows(p9=[0])).count == 94


def test_a_partitions_own_part_says_the_same_of_it_and_travels_alone():
    live = Live(50, rows(p0=[1], p2=[3]), rows(p2=[4]), rows(p2=[5]), NewLabels.of(2, np.array([0]), np.array([7])))
    own = pickle.loads(pickle.dumps(live.only(2)))
    assert own.rows(2, 8).tolist() == live.rows(2, 8).tolist() == [0, 1, 2, 6, 7]
    assert own.labels(2, np.arange(3), np.zeros(3, int)).tolist() == [7, 0, 0]
    assert len(own.excluded) == 3 and live.only(7) == Live(50)


def test_the_digest_tells_live_sets_apart_and_nothing_else():
    removed, new = rows(p1=[2, 5], p3=[0]), NewLabels.of(np.array([4, 4]), np.array([2, 5]), np.array([7, 8]))
    live = Live(30, removed, relabelled=new)
    # by whom and in which order does not matter: the same samples take part
    same = Live(30).without(Removal(rows(p3=[0]))).without(Removal(relabelled=new)).quarantine(rows(p1=[5, 2]))
    assert live.digest == same.digest and len(live.digest) == 16 and int(live.digest, 16) >= 0
    others = [
        Live(30),
        Live(30, removed),
        Live(30, relabelled=new),
        Live(30, rows(p1=[2, 6], p3=[0]), relabelled=new),
        Live(30, removed, relabelled=NewLabels.of(4, np.array([2, 5]), np.array([8, 7]))),
        Live(30, removed, relabelled=NewLabels.of(4, np.array([2, 6]), np.array([7, 8]))),
    ]
    assert len({one.digest for one in (live, *others)}) == 1 + len(others)


def seconds_of_a_run(partitions: int) -> float:
    """Ten rounds over 100,000 samples in so many partitions, each of which is asked what of it is live."""
    draw = np.random.default_rng(0)
    at = draw.permutation(1_000_000)[:100_000]
    per_partition = 1_000_000 // partitions
    began = time.process_time()
    live = Live(1_000_000)
    for part in np.array_split(at, 10):
        live = live.without(Removal(Rows.of(part // per_partition, part % per_partition)))
        assert live.digest
    assert live.count == 900_000
    for partition in range(partitions):
        live.excluded.in_partition(partition)
    return time.process_time() - began


def test_the_time_is_that_of_the_excluded_samples_however_many_partitions_they_lie_in():
    few, many = (min(seconds_of_a_run(partitions) for _ in range(3)) for partitions in (10, 10_000))
    # ten thousand look-ups of a few microseconds; by partitions times rows it would be a thousand times as much
    assert many < few + 1.0
