"""Which process sees which sample, in which order and with which seed."""

import itertools
import json
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DistributedSampler

from samplers import RASampler, SeededSampler, ShardSampler
from utils import counter_seed


def test_ra_deals_the_indices_of_the_original():
    cases = json.loads((ROOT / "tests/golden/repeated_augmentation.json").read_text())
    assert len(cases) == 60
    for case in cases:
        sampler = RASampler(range(case["dataset_size"]), case["num_replicas"], case["rank"])
        sampler.set_epoch(case["epoch"])
        indices = list(sampler)
        assert len(sampler) == len(indices) == case["length"]
        assert indices[:40] == case["first_40"]
        assert indices[-5:] == case["last_5"]
        assert sum(indices) == case["sum"]


@pytest.mark.parametrize("size", [4, 17, 255, 256, 600])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_ra_follows_its_definition(size, replicas):
    """Three copies of each image side by side, of which rank r takes every n-th from r on, and whole small epochs."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5)).tolist()
    copies = [index for index in order for _ in range(3)]
    length = (size // 256 * 256 if size >= 256 else size) // replicas
    for rank in range(replicas):
        sampler = RASampler(range(size), replicas, rank, seed=2)
        sampler.set_epoch(3)
        assert list(sampler) == copies[rank::replicas][:length]
        assert len(sampler) == length


@pytest.mark.parametrize(("repeats", "expected"), [(3, [0, 0, 0, 1, 1, 1, 2]), (1, [0, 1, 2, 3, 4, 5, 6])])
def test_ra_keeps_the_order_without_shuffling(repeats, expected):
    assert list(RASampler(range(300), 1, 0, shuffle=False, num_repeats=repeats))[:7] == expected


def batches_of(size, replicas, batch, **options):
    """Return the batches of every process, by step."""
    samplers = [RASampler(range(size), replicas, rank, seed=1, **options) for rank in range(replicas)]
    shards = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(shard) for shard in shards]
    return [[shard[i : i + batch] for shard in shards] for i in range(0, len(shards[0]), batch)]


@pytest.mark.parametrize(("replicas", "batch"), [(2, 256), (4, 128), (8, 64), (64, 8), (3, 100)])
def test_blocks_give_the_global_batches_of_strides(replicas, batch):
    """Including the last, smaller batch; so a run can be resumed with another number of processes."""
    strides = batches_of(2100, replicas, batch)
    blocks = batches_of(2100, replicas, batch, block=batch)
    assert len(blocks) == len(strides) == -(-(2048 // replicas) // batch)
    for one, other in zip(strides, blocks, strict=True):
        assert Counter(itertools.chain(*one)) == Counter(itertools.chain(*other))


@pytest.mark.parametrize(("replicas", "batch", "strided"), [(2, 256, 0.668), (4, 128, 1.0), (64, 8, 1.0)])
def test_blocks_need_a_third_of_the_decodes(replicas, batch, strided):
    """A process decodes an image where it differs from the one before."""

    def decodes(**options):
        shards = list(itertools.chain(*batches_of(2048, replicas, batch, **options)))
        return sum(sum(1 for _ in itertools.groupby(shard)) for shard in shards) / 2048

    assert decodes() == pytest.approx(strided, abs=0.002)
    assert decodes(block=batch) <= (batch + 4) / 3 / batch  # a block may begin and end within the copies of an image


@pytest.mark.parametrize("size", [0, 1, 5, 12, 17])
@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
def test_every_sample_is_in_exactly_one_shard(size, replicas):
    shards = [ShardSampler(range(size), replicas, rank) for rank in range(replicas)]
    assert sorted(itertools.chain(*shards)) == list(range(size))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize("order", [RASampler, partial(RASampler, block=16), DistributedSampler])
@pytest.mark.parametrize("start", [0, 1, 8, 127])
def test_a_resumed_epoch_has_the_pairs_of_a_whole_one(order, start):
    whole, rest = (SeededSampler(order(range(300), 2, 1), seed=3, rank=1) for _ in range(2))
    whole.set_epoch(4)
    rest.set_epoch(4, start)
    pairs = list(whole)
    assert list(rest) == pairs[start:]
    assert (len(whole), len(rest)) == (len(pairs), len(pairs) - start)
    whole.set_epoch(5)
    rest.set_epoch(5)  # the next epoch is whole again
    assert list(rest) == list(whole) != pairs


def test_every_copy_of_an_image_has_its_own_seed():
    """In every run, too. The original seeds all processes alike, so that copies on two of them are identical."""
    seeds = []
    for run, rank, epoch in itertools.product(range(2), range(2), range(3)):
        sampler = SeededSampler(RASampler(range(300), 2, rank), seed=run, rank=rank)
        sampler.set_epoch(epoch)
        seeds += [seed for _, seed in sampler]
    assert len(set(seeds)) == len(seeds) == 2 * 2 * 3 * 128


def test_counter_seeds_of_a_grid_do_not_collide():
    grid = list(itertools.product(range(4), range(5), range(4), range(250)))
    seeds = {counter_seed(*counters) for counters in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert counter_seed(1) != counter_seed(1, 0)


def test_counter_seeds_are_the_same_on_every_machine():
    assert counter_seed(0) == 0xE220A8397B1DCDAF >> 1  # the first output of SplitMix64 from state 0
    assert counter_seed(0, 0, 0, 1) == 3803006026513255849
