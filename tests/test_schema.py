from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import chisquare

from posttrain.schema import (
    ORDER_BITS,
    PARTITION_ROWS,
    label_quality,
    order_key,
    partition_boundaries,
    partition_count,
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


def test_draws_of_different_streams_know_nothing_of_each_other():
    ids = np.arange(20_000)
    noise = {seed: uniform(ids, seed) for seed in range(8)}
    for seed in range(4):
        for number in range(4):
            control = uniform(ids, stream_seed("control", seed, number))
            assert max(abs(np.corrcoef(control, other)[0, 1]) for other in noise.values()) < 0.04


def test_a_label_is_right_with_one_less_the_probability_that_it_is_wrong():
    odds = np.array([np.log(0.64 / 0.36), 0.0, -800.0, 800.0, np.inf, -np.inf], np.float32)
    np.testing.assert_allclose(label_quality(odds), [0.36, 0.5, 1, 0, 0, 1], rtol=1e-6)
