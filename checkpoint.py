"""Checkpoints: the training state and the output folder.

    output_dir/
      checkpoint.pth           newest state; written twice per epoch, before and after validation
      checkpoint_previous.pth  the state before it
      checkpoint_0099.pth      kept by --save-every
      model_best.pth           the epoch with the best accuracy
      log.txt  args.json  status.json  events.out.tfevents.*

A file is written under a temporary name, flushed to disk and renamed, so a kill leaves the old file or the new one.
"""

import argparse
import contextlib
import errno
import fcntl
import os
import shutil
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import nn

import utils
from utils import Diverged, UserError, as_user_error, gather_objects, log, rank, world_size
from weights import extract_weights, load_checkpoint, stored_args

# Optimizer options that follow the flags on a resume, or only concern speed.
FROM_FLAGS = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum", "fused", "foreach")
# What loading a checkpoint that does not fit the run may raise.
NOT_FITTING = (AttributeError, IndexError, KeyError, TypeError, ValueError)


class TrainState:
    """Everything that a resumed run needs.

    Attributes:
        model: the bare student; `parallel` is what the training step calls, compiled and in DDP if requested.
        optimizer, scheduler, scaler, ema: objects of torch and timm; `ema` may be None.
        criterion: the loss, whose parameters are trained without DDP (`engine.optimizer_step`); None if it has none.
        epoch, step: the epoch in progress and the number of its batches that are done.
        trained: whether only the validation of the epoch is left.
        meter: the sums of the epoch so far.
        best_accuracy, best_epoch: percent, and the epoch that reached it; -1 before the first validation.
    """

    def __init__(self, model: nn.Module, optimizer, scheduler, scaler, ema, terms: list[str], criterion=None):
        self.model, self.parallel, self.criterion = model, model, criterion or nn.Module()
        self.optimizer, self.scheduler, self.scaler, self.ema = optimizer, scheduler, scaler, ema
        self.terms = terms
        self.best_accuracy, self.best_epoch = 0.0, -1
        # Some models have buffers that are infinite by design, such as masks.
        self.infinite = {name for name, value in model.state_dict().items() if first_not_finite(value)}
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        """Move to the first step of an epoch."""
        self.epoch, self.step, self.trained = epoch, 0, False
        self.meter = utils.Meter(self.terms)

    def finish_epoch(self, accuracy: float) -> bool:
        """Move to the next epoch; return whether the accuracy, in percent, is the best so far."""
        best = accuracy > self.best_accuracy or self.best_epoch < 0
        if best:
            self.best_accuracy, self.best_epoch = accuracy, self.epoch
        self.start_epoch(self.epoch + 1)
        return best

    def to_dict(self, args: argparse.Namespace, **facts: Any) -> dict:
        """Return the state with DeiT's keys, as tensors and plain types; `epoch` is the last finished epoch."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": None,  # a schedule is a function of the epoch
            "scaler": self.scaler.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "criterion": self.criterion.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "trained": self.trained,
            "meter": self.meter.state_dict(),
            "max_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "world_size": world_size(),
            "args": vars(args),
            **facts,
        }

    def load(self, checkpoint: dict, args: argparse.Namespace) -> None:
        """Continue from a checkpoint of this program, DeiT or the original program; log every flag that changed.

        Raises:
            UserError: the file does not fit this model, optimizer or global batch.
        """
        missing = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
        if missing:
            raise UserError(f"--resume: the file has no '{missing[0]}', so training cannot continue: use --finetune")
        stored = stored_args(checkpoint)
        if stored.get("opt", args.opt) != args.opt:
            raise UserError(f"--resume: --opt was {stored['opt']} and is {args.opt}: use --finetune to change it")
        with as_user_error("--resume: the file does not fit this run: ", *NOT_FITTING):
            self._load(checkpoint, args)
        for name, value in vars(args).items():
            if name not in ("resume", "start_epoch", "overwrite") and name in stored and stored[name] != value:
                log(f"--resume: {name} was {stored[name]} and is {value} from now on")

    def _load(self, checkpoint: dict, args: argparse.Namespace) -> None:
        weights = extract_weights(checkpoint)
        load_exactly(self.model, weights)
        self._load_optimizer(checkpoint["optimizer"], fresh=checkpoint["epoch"] < 0)
        self.model.load_state_dict(weights)  # checking the optimizer took a step
        load_exactly(self.criterion, checkpoint.get("criterion", {}))
        if checkpoint.get("scaler") and self.scaler.state_dict():
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None and checkpoint.get("model_ema"):
            load_exactly(self.ema.module, extract_weights(checkpoint, ema=True))
        elif self.ema is not None:
            log("--resume: the checkpoint has no EMA, so the EMA starts from the weights")
            self.ema.set(self.model)
        self.start_epoch(checkpoint["epoch"] + 1)
        self.step, self.trained = resumed_step(checkpoint, args), checkpoint.get("trained", False)
        if self.step:
            self.meter.load_state_dict(checkpoint["meter"])
        self.best_accuracy = float(checkpoint.get("max_accuracy", 0.0))
        self.best_epoch = int(checkpoint.get("best_epoch", -1))
        if self.epoch > 0:
            self.scheduler.step(self.epoch - 1)

    def _load_optimizer(self, stored: dict, fresh: bool) -> None:
        flags = [{k: v for k, v in group.items() if k in FROM_FLAGS} for group in self.optimizer.param_groups]
        if stored["state"] or not fresh:
            check_optimizer_state(self.optimizer, stored)
        groups = [group | flag for group, flag in zip(stored["param_groups"], flags, strict=True)]
        self.optimizer.load_state_dict({**stored, "param_groups": groups})


def check_optimizer_state(optimizer: torch.optim.Optimizer, stored: dict) -> None:
    """Compare a stored state with the state that the optimizer creates in a step with learning rate 0.

    torch silently loads moments of any shape and order, and the next step may then crash the process.

    Raises:
        ValueError: they differ; the message names the first entry that does.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    own = optimizer.state_dict()
    ids = [[i for group in state["param_groups"] for i in group["params"]] for state in (own, stored)]
    for mine, theirs in zip(*ids, strict=True):
        expected, found = own["state"].get(mine, {}), stored["state"].get(theirs, {})
        for name, value in expected.items():
            if name not in found:
                raise ValueError(f"{name} of parameter {mine} is missing")
            if _shape(found[name]) != _shape(value):
                raise ValueError(f"{name} of parameter {mine} has shape {_shape(found[name])}, not {_shape(value)}")


def _shape(value: Any) -> list[int]:
    return [size for size in value.shape if size != 1] if torch.is_tensor(value) else []


def load_exactly(model: nn.Module, weights: dict) -> None:
    """Load weights; raise a UserError unless their names and shapes equal the model's."""
    own = model.state_dict()
    odd = sorted(own.keys() ^ weights.keys())
    odd += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if odd:
        raise UserError(f"--resume: the file is for another model, image size or loss ({odd[0]}): use --finetune")
    model.load_state_dict(weights)


def resumed_step(checkpoint: dict, args: argparse.Namespace) -> int:
    """Return the batch to continue with, at the same image; raise a UserError if the global batch changed."""
    stored = stored_args(checkpoint)
    processes = checkpoint.get("world_size") or stored.get("world_size") or world_size()  # DeiT stores it as a flag
    old_batch = stored.get("batch_size", args.batch_size) * processes
    old_global = old_batch * stored.get("accum_steps", args.accum_steps)
    new_batch = args.batch_size * world_size()
    new_global = new_batch * args.accum_steps
    if old_global != new_global:
        accum, rest = divmod(old_global, new_batch)
        fix = f"--accum-steps {accum}" if not rest else f"--batch-size {old_global // world_size() // args.accum_steps}"
        raise UserError(f"--resume: the global batch was {old_global} images and is {new_global}: give {fix}")
    if (old_batch, processes) != (new_batch, world_size()):
        log(f"--resume: from {processes} to {world_size()} process(es); the global batch stays {new_global} images")
    return checkpoint.get("step", 0) * old_batch // new_batch


# The output folder


class FolderLock:
    """A lock on an output folder until the process ends; a UserError if it is still held after `wait` seconds.

    It is a POSIX record lock, which works on network file systems and is not inherited by forked loader workers.
    """

    def __init__(self, folder: str | Path, wait: float = 5.0):
        self.file = open(Path(folder) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 open until the run ends
        deadline = time.monotonic() + wait
        while not self._take(folder):
            if time.monotonic() > deadline:
                self.file.seek(0)
                holder = self.file.read().strip() or "another run"
                raise UserError(f"--output_dir {folder} is in use by {holder}: wait for it, or give another folder")
            time.sleep(0.2)
        with contextlib.suppress(OSError):  # a full disk
            self.file.truncate(0)
            self.file.write(f"pid {os.getpid()} on {socket.gethostname()}")
            self.file.flush()

    def _take(self, folder) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            log(f"warning: the file system of {folder} has no locks ({error}): make sure that no other run uses it")
        return True


def open_output_folder(path: str) -> "CheckpointFolder | None":
    """Create and lock the output folder on rank 0, and check that every rank sees it; None without a path.

    Raises:
        UserError: it cannot be written, is in use, or is not shared by all nodes.
    """
    if not path:
        return None
    folder, probe, error = CheckpointFolder(path), None, None
    if rank() == 0:
        try:
            with as_user_error(f"--output_dir {path} cannot be written: ", OSError):
                folder.folder.mkdir(parents=True, exist_ok=True)
                folder.lock = FolderLock(path)
                for leftover in folder.folder.glob(".*.tmp"):  # of a run that was killed during a write
                    leftover.unlink()
                probe = folder.folder / f".probe-{uuid.uuid4().hex}.tmp"
                probe.touch()
        except UserError as refused:
            error = str(refused)
    probe, error = gather_objects((probe, error))[0]
    if error:
        raise UserError(error)
    blind = [host for host in gather_objects(None if probe.exists() else socket.gethostname()) if host]
    if rank() == 0:
        probe.unlink()
    if blind:
        raise UserError(f"--output_dir {path} on {blind[0]} is not the folder of rank 0: give one that all nodes share")
    return folder


class CheckpointFolder:
    """The checkpoints of a run. Only rank 0 writes; a failed write keeps the existing files."""

    LATEST, PREVIOUS, BEST = "checkpoint.pth", "checkpoint_previous.pth", "model_best.pth"
    FRESH = ".fresh.pth.tmp"
    MAX_FAILURES = 3

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.failures = 0
        self.latest_damaged = False
        self.lock: FolderLock | None = None
        self.best_lost: int | None = None  # the best epoch, if its weights could not be written

    def files(self) -> list[Path]:
        """Return the checkpoints that exist."""
        named = [self.folder / name for name in (self.LATEST, self.PREVIOUS, self.BEST)]
        return [path for path in named if path.exists()] + sorted(self.folder.glob("checkpoint_????.pth"))

    def clear(self) -> None:
        """Delete the checkpoints and TensorBoard events of an earlier run; `RunLog` replaces its log."""
        if rank() == 0:
            with as_user_error(f"--output_dir {self.folder} cannot be cleared: ", OSError):
                for path in (*self.folder.glob("events.out.tfevents.*"), *self.files()):
                    path.unlink()

    def save(self, state: dict, *, best=False, milestone: int | None = None, ignore=frozenset()) -> bool:
        """Write the state as the newest checkpoint; return, on all ranks, whether that worked.

        Args:
            state: from `TrainState.to_dict`, on every rank.
            best: also write it as model_best.pth.
            milestone: also keep it as checkpoint_<milestone>.pth.
            ignore: names of model buffers that are infinite by design.

        Raises:
            Diverged: a tensor of the state is not finite; nothing is written.
            UserError: writing failed for the third time in a row.
        """
        bad, reason = None, None
        if rank() == 0:
            bad = first_not_finite(state, ignore=ignore)
            if bad is None:
                try:
                    self._write(state, best, milestone)
                    self.failures = 0
                except OSError as error:
                    self.failures, reason = self.failures + 1, str(error)
                    (self.folder / self.FRESH).unlink(missing_ok=True)  # its space is needed by the next save
                    log(f"warning: checkpoint not written; the previous one is kept: {reason}")
                if best:
                    self.best_lost = state["best_epoch"] if self.failures else None
                elif self.best_lost is not None:
                    log(f"warning: the weights of the best epoch, {self.best_lost}, are not in {self.BEST}")
        bad, reason, self.failures = gather_objects((bad, reason, self.failures))[0]
        if bad is not None:
            raise Diverged(f"{bad} is not finite: not saved, the previous checkpoint is kept")
        if self.failures >= self.MAX_FAILURES:
            raise UserError(f"{self.failures} checkpoints in a row could not be written to {self.folder}: {reason}")
        return self.failures == 0

    def _write(self, state: dict, best: bool, milestone: int | None) -> None:
        latest, fresh = self.folder / self.LATEST, self.folder / self.FRESH
        utils.write_atomically(fresh, lambda file: _save(state, file))
        # Copies come first: after a kill in between, the resumed run validates the epoch again and rewrites them.
        if best:
            copy_file(fresh, self.folder / self.BEST)
        if milestone is not None:
            copy_file(fresh, self.folder / f"checkpoint_{milestone:04d}.pth")
        if latest.exists() and not self.latest_damaged:
            os.replace(latest, self.folder / self.PREVIOUS)
        os.replace(fresh, latest)
        utils.sync_folder(self.folder)
        self.latest_damaged = False

    def load_newest(self) -> tuple[Path | None, dict | None]:
        """Return the path and content of the newest valid checkpoint, or (None, None).

        checkpoint.pth comes first: later epochs in other files belong to a run that `--resume FILE` abandoned. If it is
        damaged, the epoch and step decide. Rank 0 chooses, so that all ranks continue from the same file.

        Raises:
            UserError: there are checkpoints, but none is valid.
        """
        path, checkpoint, error = None, None, None
        if rank() == 0:
            try:
                path, checkpoint = self._newest()
            except UserError as damaged:
                error = str(damaged)
        path, error = gather_objects((path, error))[0]
        if error is not None:
            raise UserError(error)
        if path is not None and rank() != 0:
            checkpoint = load_checkpoint(path)
        return path, checkpoint

    def _newest(self) -> tuple[Path | None, dict | None]:
        paths = self.files()
        for path in sorted(paths, key=lambda path: (path.name == self.LATEST, _progress(path)), reverse=True):
            try:
                return path, load_checkpoint(path)
            except UserError as error:
                log(f"warning: {error}; trying an older one")
                self.latest_damaged |= path.name == self.LATEST
        if paths:
            raise UserError(f"no checkpoint in {self.folder} is valid: restore one, or use --overwrite to start over")
        return None, None

    def repair_best(self, checkpoint: dict) -> None:
        """Make model_best.pth the best epoch again after a resume, or warn that its weights are lost."""
        best, epoch = checkpoint.get("best_epoch", -1), checkpoint["epoch"]
        target = self.folder / self.BEST
        if rank() != 0 or best < 0 or (target.exists() and _progress(target)[0] == best):
            return
        if epoch == best and not checkpoint.get("step"):
            utils.write_atomically(target, lambda file: _save(checkpoint, file))
        else:
            self.best_lost = best
            log(f"warning: the weights of the best epoch, {best}, are not in {self.BEST}")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file atomically."""
    with open(source, "rb") as file:
        utils.write_atomically(target, lambda copy: shutil.copyfileobj(file, copy))


def _save(state: dict, file) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:  # torch turns an OSError into this while it closes the archive
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _progress(path: Path) -> tuple[float, float]:
    """Return (epoch, step) of a checkpoint without reading its tensors; damaged files sort as the newest."""
    try:
        with open(path, "rb") as file:  # torch cannot map a file whose name is not UTF-8
            name = f"/proc/self/fd/{file.fileno()}"
            checkpoint = torch.load(name, map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["epoch"], checkpoint.get("step", 0)
    except Exception:
        return float("inf"), 0.0  # load_newest tries it first, and reports it


def first_not_finite(state: Any, name: str = "checkpoint", ignore=frozenset()) -> str | None:
    """Return the name of a non-finite tensor in nested dicts and lists, or None."""
    if torch.is_tensor(state):
        return name if state.is_floating_point() and not state.isfinite().all() else None
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    found = (first_not_finite(value, f"{name} {key}", ignore) for key, value in items if key not in ignore)
    return next((bad for bad in found if bad), None)
