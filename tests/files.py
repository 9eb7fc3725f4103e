"""Helpers for tests of files: a state to save, and a limit on the size of files."""

import contextlib
import resource

import torch


@contextlib.contextmanager
def largest_file(size):
    """Files cannot grow over so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def state(number, size=300):
    """A state whose tensors all hold one number, so that a mix of two states shows."""
    return {
        "model": {f"layer{i}.weight": torch.full((size, 24), float(number)) for i in range(20)},
        "optimizer": {"state": {i: {"exp_avg": torch.full((size, 24), float(number))} for i in range(20)}},
        "number": number,
        "epoch": number,
        "best_epoch": number,
        "args": {"lr": 1e-3},
    }


def equal(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
