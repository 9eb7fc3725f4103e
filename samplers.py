"""Which samples a process sees, in which order, and the seed of each sample's augmentation."""

import math

import torch
from torch.utils.data import Sampler

from utils import counter_seed


class RASampler(Sampler):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335): copies of one image, each augmented anew.

    The epoch's permutation is repeated `num_repeats` times side by side and dealt out to the processes in turn, so
    that copies fall on different processes where there are several. As in DeiT an epoch is as long as without
    repeats, rounded down to a multiple of 256 over all processes; a set under 256 images is rounded down to a
    multiple of the processes instead of to nothing.

    Args:
        dataset: anything with a length.
        num_replicas, rank: number of processes and which one this is.
        shuffle: permute; otherwise the order of the data set.
        num_repeats: copies of each image.
        seed: added to the epoch to seed the permutation, the same on all processes.
    """

    def __init__(self, dataset, num_replicas, rank, shuffle=True, num_repeats=3, seed=0):
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank {rank} is not in 0..{num_replicas - 1}")
        if num_repeats < 1:
            raise ValueError(f"num_repeats must be at least 1, not {num_repeats}")
        self.size = len(dataset)
        self.num_replicas, self.rank = num_replicas, rank
        self.shuffle, self.num_repeats, self.seed = shuffle, num_repeats, seed
        self.epoch = 0
        rounded = self.size // 256 * 256 if self.size >= 256 else self.size
        self.num_selected = rounded // num_replicas

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.num_selected

    def __iter__(self):
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        copies = order.repeat_interleave(self.num_repeats)
        padding = math.ceil(len(copies) / self.num_replicas) * self.num_replicas - len(copies)
        copies = torch.cat((copies, copies[:padding]))
        yield from copies[self.rank :: self.num_replicas][: self.num_selected].tolist()


class ShardSampler(Sampler):
    """Every sample exactly once over all processes, in order: rank r takes r, r + replicas, ... without padding."""

    def __init__(self, dataset, num_replicas, rank):
        self.indices = range(rank, len(dataset), num_replicas)

    def __len__(self):
        return len(self.indices)

    def __iter__(self):
        return iter(self.indices)


class SeededSampler(Sampler):
    """Pairs each index of a sampler with the seed of its augmentation, and can start in the middle of an epoch.

    The seed is a function of (seed, epoch, rank, position) alone: it depends neither on the number of loader workers
    nor on what was drawn before, so an epoch cut in two gives the very samples of a whole one.

    Args:
        sampler: yields indices; its `set_epoch(epoch)` is called where it has one.
        seed, rank: as in the class text.
    """

    def __init__(self, sampler, seed, rank):
        self.sampler = sampler
        self.seed, self.rank = seed, rank
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch, start=0):
        """Chooses the epoch, and the position in it of the first sample."""
        self.epoch, self.start = epoch, start
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self):
        return max(0, len(self.sampler) - self.start)  # a data set may shrink before a resume

    def __iter__(self):
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, counter_seed(self.seed, self.epoch, self.rank, position)


def random_subset(size: int, number: int, seed: int) -> list[int]:
    """`number` different indices under `size`, or all where there are fewer, by the seed alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist()
