"""Data loaders, and the open files and shared memory that their workers need."""

import multiprocessing
import os
import resource
import shutil
import sys
from collections.abc import Callable, Sequence
from multiprocessing.queues import Queue

from timm.data.loader import fast_collate
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data._utils import signal_handling

_WAYS_OUT = "enlarge /dev/shm (docker run --shm-size=8g or --ipc=host), raise ulimit -n, or use --num_workers 0"


class LoaderError(RuntimeError):
    """The loader workers lack shared memory or open files."""


class _BatchQueue(Queue):
    """A queue that sends an error if it cannot send a batch. Python's queue would drop it, and the run would hang."""

    def _on_queue_feeder_error(self, error, item):
        error = LoaderError(f"a loader worker cannot hand over its batch: {error}: {_WAYS_OUT}")
        self.put((item[0], ExceptionWrapper((LoaderError, error, None))))


class _Fork(multiprocessing.context.ForkContext):  # begin_loader_worker needs fork
    def Queue(self, maxsize=0):
        return _BatchQueue(maxsize, ctx=self)


def _reserve_files(num_workers):
    """Raise the soft limit on open files if the workers may exceed it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = sys.maxsize if hard == resource.RLIM_INFINITY else hard
    needed = len(os.listdir("/dev/fd")) + 10 * num_workers + 20
    if needed > most:
        raise LoaderError(f"{num_workers} loader workers need {needed} open files; the limit is {most}: {_WAYS_OUT}")
    if soft != resource.RLIM_INFINITY and soft < 2 * needed:  # twice, because validation has workers, too
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * needed, most), hard))


def warn_if_shm_is_small(batch_bytes: int, num_workers: int) -> str | None:
    """Return a warning if /dev/shm cannot hold the batches that the loader workers prepare in advance, else None.

    Args:
        batch_bytes: size of a batch in bytes.
        num_workers: workers of all processes on this machine; each prepares two batches.
    """
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return None
    needed = 2 * num_workers * batch_bytes
    if needed <= free:
        return None
    return f"/dev/shm has {free >> 20} MB left, but loader workers may need {needed >> 20} MB: {_WAYS_OUT}"


def build_loader(
    dataset: Dataset,
    sampler: Sampler | Sequence,
    batch_size: int,
    num_workers: int,
    *,
    drop_last: bool,
    pin_memory: bool = False,
    timeout: float = 0,
    worker_init_fn: Callable[[int], None] | None = None,
) -> DataLoader:
    """Build a DataLoader of (uint8 images (B, 3, H, W), int64 labels (B,)) with persistent workers.

    Args:
        timeout: seconds to wait for a batch; 0 for no limit.
        worker_init_fn: called in each worker with its number.

    Raises:
        LoaderError: the limit on open files is too low. Iterating raises it if /dev/shm is full.
    """
    # When a worker dies, torch's signal handler raises on the line being executed, even while a checkpoint is saved.
    # Without it, the DataLoader finds the dead worker after it has waited 5 s (or `timeout`) for a batch.
    signal_handling._SIGCHLD_handler_set = True
    if num_workers > 0:
        _reserve_files(num_workers)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=fast_collate,
        pin_memory=pin_memory,
        drop_last=drop_last,
        persistent_workers=num_workers > 0,
        timeout=timeout if num_workers > 0 else 0,
        multiprocessing_context=_Fork() if num_workers > 0 else None,
        worker_init_fn=worker_init_fn,
    )
