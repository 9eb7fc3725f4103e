"""The samples of each process, their order, and the seed of each sample's augmentation."""

from collections.abc import Iterator, Sized

import torch
from torch.utils.data import Sampler

from utils import counter_seed


class RASampler(Sampler):
    """Repeated augmentation (Hoffer et al., arXiv 1901.09335): several copies of an image, each augmented anew.

    Each element of the epoch's permutation is repeated, and processes take the copies in turn. As in DeiT, an epoch has
    the length of the data set, rounded down to a multiple of 256 over all processes. Below 256 images, it is rounded
    down to a multiple of the number of processes instead; DeiT's epoch would be empty.

    Args:
        num_replicas, rank: number of processes, and the index of this one.
        shuffle: permute the data set instead of keeping its order.
        num_repeats: copies of each image.
        seed: added to the epoch to seed the permutation; the same on all processes.
        block: batch size per process; processes then take blocks of this size in turn, so each image is decoded by one
            process only. Batches over all processes have the same images. None is DeiT's order, copy by copy.
    """

    def __init__(
        self,
        dataset: Sized,
        num_replicas: int,
        rank: int,
        shuffle: bool = True,
        num_repeats: int = 3,
        seed: int = 0,
        block: int | None = None,
    ):
        self.size, self.num_replicas, self.rank = len(dataset), num_replicas, rank
        self.shuffle, self.num_repeats, self.seed = shuffle, num_repeats, seed
        self.block, self.epoch = block, 0
        rounded = self.size // 256 * 256 if self.size >= 256 else self.size
        self.num_selected = rounded // num_replicas

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_selected

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.size, generator=generator) if self.shuffle else torch.arange(self.size)
        copies = order.repeat_interleave(self.num_repeats)[: self.num_selected * self.num_replicas]
        if self.block is None:
            yield from copies[self.rank :: self.num_replicas].tolist()
        else:
            for batch in copies.split(self.block * self.num_replicas):  # the last one may be smaller
                yield from batch.view(self.num_replicas, -1)[self.rank].tolist()


class ShardSampler(Sampler):
    """Every sample exactly once over all processes, in order and without padding: rank, rank + num_replicas, ..."""

    def __init__(self, dataset: Sized, num_replicas: int, rank: int):
        self.indices = range(rank, len(dataset), num_replicas)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class SeededSampler(Sampler):
    """Pair each index with the seed of its augmentation; it can start in the middle of an epoch.

    The seed depends only on (seed, epoch, rank, position), so neither the number of loader workers nor a restart within
    an epoch changes the samples.

    Args:
        sampler: yields indices; its `set_epoch(epoch)` is called if it has one.
        seed, rank: seed of the run, and the index of this process.
    """

    def __init__(self, sampler: Sampler | Sized, seed: int, rank: int):
        self.sampler, self.seed, self.rank = sampler, seed, rank
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Set the epoch, and the position in it at which to start."""
        self.epoch, self.start = epoch, start
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return max(0, len(self.sampler) - self.start)  # the data set may be smaller after a resume

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for position, index in enumerate(self.sampler):
            if position >= self.start:
                yield index, counter_seed(self.seed, self.epoch, self.rank, position)


def random_subset(size: int, number: int, seed: int) -> list[int]:
    """Return `number` different indices below `size`, or all if there are fewer, drawn with this seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist()
