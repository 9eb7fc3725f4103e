"""Who sees which sample, in which order, with which seed: golden sequences, exact shards, seeds by counter."""

import itertools
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.data import DistributedSampler

from samplers import RASampler, SeededSampler, ShardSampler, counter_seed

GOLDEN = Path(__file__).parent / "golden"


# Repeated augmentation


def test_repeated_augmentation_deals_the_indices_of_the_original():
    cases = json.loads((GOLDEN / "repeated_augmentation.json").read_text())
    assert len(cases) == 60
    for case in cases:
        sampler = RASampler(range(case["dataset_size"]), case["num_replicas"], case["rank"])
        sampler.set_epoch(case["epoch"])
        indices = list(sampler)
        assert len(sampler) == len(indices) == case["length"]
        assert indices[:40] == case["first_40"]
        assert indices[-5:] == case["last_5"]
        assert sum(indices) == case["sum"]


@pytest.mark.parametrize("size", [4, 5, 6, 17, 100, 255])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_sets_under_256_images_have_whole_epochs(size, replicas):
    """The original rounds them down to a multiple of 256: an epoch of nothing."""
    shards = [list(RASampler(range(size), replicas, rank)) for rank in range(replicas)]
    assert {len(shard) for shard in shards} == {size // replicas}
    seen = Counter(itertools.chain(*shards))
    assert set(seen) <= set(range(size))
    assert max(seen.values()) <= 3
    assert len(seen) == -(-(size // replicas * replicas) // 3)  # three copies each, the last image's cut off


@pytest.mark.parametrize("size", [256, 300, 600])
def test_copies_lie_side_by_side_and_are_dealt_out_in_turn(size):
    """Order and repeats by the definition: each image three times, rank r takes every n-th place from r on."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5)).tolist()
    copies = [index for index in order for _ in range(3)]
    for replicas in (1, 2, 3, 4):
        for rank in range(replicas):
            sampler = RASampler(range(size), replicas, rank)
            sampler.set_epoch(5)
            length = size // 256 * 256 // replicas
            assert list(sampler) == copies[rank::replicas][:length]


def test_on_three_processes_the_three_copies_go_to_three_processes():
    shards = [list(RASampler(range(300), 3, rank)) for rank in range(3)]
    assert shards[0] == shards[1] == shards[2]
    assert max(Counter(shards[0]).values()) == 1


def test_an_epoch_has_an_order_of_its_own_and_the_same_one_when_asked_again():
    sampler = RASampler(range(300), 1, 0)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert list(RASampler(range(300), 1, 0, seed=1)) != orders[0]
    assert list(RASampler(range(300), 1, 0, shuffle=False))[:7] == [0, 0, 0, 1, 1, 1, 2]
    assert list(RASampler(range(300), 1, 0, shuffle=False, num_repeats=1))[:3] == [0, 1, 2]


@pytest.mark.parametrize(("replicas", "rank"), [(2, 2), (1, -1)])
def test_a_rank_that_does_not_exist_is_refused(replicas, rank):
    with pytest.raises(ValueError, match=rf"rank {rank} is not in 0\.\.{replicas - 1}"):
        RASampler(range(10), replicas, rank)


def test_no_repeats_at_all_are_refused():
    with pytest.raises(ValueError, match="num_repeats must be at least 1, not 0"):
        RASampler(range(10), 1, 0, num_repeats=0)


# Shards


@pytest.mark.parametrize("size", range(18))
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_every_sample_is_in_one_shard_exactly_once(size, replicas):
    shards = [ShardSampler(range(size), replicas, rank) for rank in range(replicas)]
    assert sorted(itertools.chain(*shards)) == list(range(size))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1
    assert all(list(shard) == sorted(shard) for shard in shards)


# Seeds


@pytest.mark.parametrize("order", [RASampler, DistributedSampler])
@pytest.mark.parametrize("start", [0, 1, 8, 127])
def test_an_epoch_from_its_middle_on_has_the_pairs_of_the_whole_one(order, start):
    whole, rest = (SeededSampler(order(range(300), 2, 1), seed=3, rank=1) for _ in range(2))
    whole.set_epoch(4)
    rest.set_epoch(4, start)
    pairs = list(whole)
    length = len(pairs)
    assert list(rest) == pairs[start:]
    assert (len(whole), len(rest)) == (length, length - start)
    whole.set_epoch(5)
    rest.set_epoch(5)  # the next epoch is whole again
    assert list(rest) == list(whole) != pairs


def test_copies_of_an_image_have_seeds_of_their_own_on_all_processes():
    """The original seeds all processes alike, so that the copies of an image come out as one and the same."""
    seeds = {}
    for rank in range(2):
        sampler = SeededSampler(RASampler(range(300), 2, rank), seed=0, rank=rank)
        for epoch in range(3):
            sampler.set_epoch(epoch)
            for index, seed in sampler:
                seeds.setdefault((epoch, index), []).append(seed)
    assert max(map(len, seeds.values())) == 3
    everything = list(itertools.chain(*seeds.values()))
    assert len(set(everything)) == len(everything) == 2 * 3 * 128


def test_runs_of_another_seed_draw_other_augmentations():
    one, two = (dict(SeededSampler(range(50), seed=seed, rank=0)) for seed in (0, 1))
    assert not set(one.values()) & set(two.values())


def test_seeds_of_a_grid_of_counters_do_not_collide():
    grid = list(itertools.product(range(4), range(5), range(4), range(250)))
    seeds = {counter_seed(*counters) for counters in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert counter_seed(1, 2) != counter_seed(2, 1)
    assert counter_seed(1) != counter_seed(1, 0)


def test_every_bit_of_a_counter_moves_half_the_bits_of_the_seed():
    flips = []
    for counters in itertools.product((0, 7), (0, 100), (0, 3), (5, 10**6)):
        seed = counter_seed(*counters)
        for place, bit in itertools.product(range(4), (0, 1, 5, 20)):
            changed = list(counters)
            changed[place] ^= 1 << bit
            flips.append((seed ^ counter_seed(*changed)).bit_count())
    mean = sum(flips) / len(flips)
    assert 30.5 < mean < 32.5  # 63 bits; 256 draws of standard deviation 4 have a mean within 0.25 of 31.5
    assert min(flips) > 10


def test_seeds_are_the_same_on_every_machine():
    assert counter_seed(0) == 0xE220A8397B1DCDAF >> 1  # the first output of SplitMix64 from state 0
    assert counter_seed(0, 0, 0, 1) == 3803006026513255849
