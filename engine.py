"""One epoch of training, and evaluation."""

import contextlib
import datetime
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

import utils

MAX_BAD_LOSSES = 3  # steps in a row without a finite loss
MAX_SKIPPED = 20  # steps in a row without a finite gradient


def train_one_epoch(
    state,
    loader: Iterable,
    criterion: Callable[..., dict[str, Tensor]],
    hooks,
    *,
    device: torch.device,
    prepare: nn.Module,
    watch: "DivergenceWatch",
    seed_step: Callable[[int, int], None] = lambda epoch, step: None,
    should_stop: Callable[[], int] = lambda: 0,
    mixup: Callable | None = None,
    amp_dtype: torch.dtype = torch.float32,
    accum_steps: int = 1,
    clip_grad: float | None = None,
    train_mode: bool = True,
    print_freq: int = 10,
) -> bool:
    """Train until the epoch ends or a stop is requested; return whether the epoch ended.

    Nothing here waits for the device between two console lines.

    Args:
        state: a `checkpoint.TrainState`; its model, optimizer, EMA, meter and step are updated.
        loader: yields uint8 images (B, 3, H, W) and int64 labels (B,), starting at `state.step`.
        criterion: (images, outputs, maps, labels) -> dict of scalar terms whose `loss` is minimized.
        hooks: `hooks.pop()` returns the maps of the model's latest forward pass.
        prepare: uint8 images on the device -> float32 input.
        watch: counts steps without a finite loss or gradient across epochs.
        seed_step: called with (epoch, step) before each batch, to seed the device's randomness.
        should_stop: a collective that returns nonzero if all ranks must stop at this step boundary.
        mixup: (images, labels) -> (images, labels), or None.
        amp_dtype: autocast dtype; float32 turns autocast off.
        accum_steps: batches per optimizer step; an incomplete last group is averaged over its own size.
        clip_grad: largest gradient norm, or None.
        train_mode: False trains in eval mode, without dropout.
        print_freq: batches between console lines.

    Raises:
        utils.Diverged: on all ranks at once.
    """
    state.model.train(train_mode)
    prepare.train()
    num_steps = state.step + len(loader)  # type: ignore[arg-type]
    parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
    buffers = BufferGuard(state.model)
    console = Console(f"Epoch: [{state.epoch}]", num_steps, state.step, device)
    rows: list[Tensor] = []
    watch.begin(list(state.meter.sums), state.epoch)
    state.optimizer.zero_grad(set_to_none=True)
    for step, (images, labels) in enumerate(console.timed(loader), state.step):
        seed_step(state.epoch, step)
        first, last = accumulation_group(step, num_steps, accum_steps)
        if step == first:
            buffers.keep()
        images, labels = to_device((images, labels), device)
        images = prepare(images)
        if mixup is not None:
            images, labels = mixup(images, labels)
        with sync_gradients(state.parallel, step == last):
            with autocast(device, amp_dtype):
                outputs = state.parallel(images)
                terms = criterion(images, outputs, hooks.pop(), labels)
            state.scaler.scale(poison_unless_finite(terms["loss"]) / (last - first + 1)).backward()
        rows.append(torch.stack([terms[name].detach() for name in state.meter.sums]))
        console.images += len(images) * utils.world_size()
        if step != last:
            continue
        norm = optimizer_step(state, parameters, clip_grad)
        buffers.restore_unless(norm.isfinite())
        watch.note(rows[-(last - first + 1) :], norm, step)
        state.step = step + 1
        stop = should_stop()
        if stop or len(rows) >= print_freq or state.step == num_steps:
            for row in torch.stack(rows).tolist():
                state.meter.add(row)
            rows.clear()
            watch.check(state.scaler)
            console.line(step, state.optimizer.param_groups[0]["lr"], state.meter.averages())
        if stop:
            break
    state.trained = state.step >= num_steps
    return state.trained


def optimizer_step(state, parameters: list[Tensor], clip_grad: float | None) -> Tensor:
    """Unscale, clip, step and update the EMA; return the gradient norm, on the device.

    The scaler is used in every precision, because it skips steps with a bad gradient without a wait for the device.
    """
    for parameter in state.criterion.parameters():
        if parameter.grad is not None:  # the loss is not in DDP
            utils.sum_over_ranks(parameter.grad).div_(utils.world_size())
    state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or torch.finfo(torch.float32).max)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    if state.ema is not None:
        state.ema.update(state.model)
    return norm


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return autocast of this dtype, turned off for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def to_device(batch: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """Move a batch to the device; a GPU copies it on a separate stream while earlier steps compute."""
    if device.type != "cuda":
        return [tensor.to(device) for tensor in batch]
    copies, computing = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
    computing.wait_stream(copies)
    for tensor in batch:
        tensor.record_stream(computing)  # do not reuse the memory while a step reads it
    return batch


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream for copies to this GPU."""
    return torch.cuda.Stream(device)


def accumulation_group(step: int, num_steps: int, accum_steps: int) -> tuple[int, int]:
    """Return the first and last batch of the optimizer step that batch `step` belongs to."""
    first = step // accum_steps * accum_steps
    return first, min(first + accum_steps, num_steps) - 1


def sync_gradients(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Let DistributedDataParallel sum gradients over ranks only in the last batch of a group."""
    return model.no_sync() if not last and hasattr(model, "no_sync") else contextlib.nullcontext()  # type: ignore


def poison_unless_finite(loss: Tensor) -> Tensor:
    """Give a loss that is not finite a NaN gradient, since an infinite loss can have a finite one.

    The sum over ranks carries the NaN to all of them, so the scaler skips the step everywhere.
    """
    return loss * (1 + 0 * loss.detach())


class ConstantScaler(GradScaler):
    """A GradScaler with a scale of 1 that only skips steps with a non-finite gradient."""

    def __init__(self, device: str):
        super().__init__(device, init_scale=1.0)

    def update(self, new_scale=None):
        super().update(new_scale=1.0)

    def state_dict(self):
        return {}


class BufferGuard:
    """Restore BatchNorm statistics after a skipped step, because the bad batch has changed them."""

    def __init__(self, model: nn.Module):
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]

    def keep(self) -> None:
        """Copy the statistics."""
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def restore_unless(self, finite: Tensor) -> None:
        """Copy them back unless `finite` (a bool scalar on the device), without a wait for the device."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, kept))


class DivergenceWatch:
    """Stop all ranks together when training breaks down; only `check` reads from the device.

    Gradients are tested after they are summed over ranks, so all ranks skip the same steps. Losses are tested on each
    rank, and `check` shares the result. Consecutive steps are counted across epochs.
    """

    def __init__(self):
        self.bad_losses, self.skipped = 0, 0

    def begin(self, names: list[str], epoch: int) -> None:
        """Begin an epoch; `names` are those of the terms given to `note`."""
        self.names, self.epoch = names, epoch
        self.steps, self.finite, self.norms, self.terms = [], [], [], []

    def note(self, rows: list[Tensor], norm: Tensor, step: int) -> None:
        """Record the terms (a row per batch) and gradient norm of an optimizer step, on the device."""
        terms = torch.stack(rows).sum(dim=0)
        self.steps.append(step)
        self.terms.append(terms)
        self.finite.append(terms.isfinite().all())
        self.norms.append(norm.isfinite())

    def check(self, scaler: GradScaler) -> None:
        """Count the steps without a finite loss or gradient; a collective.

        Raises:
            utils.Diverged: 3 losses or 20 gradients in a row are not finite, or the gradient scale is below 1.
        """
        bad = utils.sum_over_ranks(1 - torch.stack(self.finite).long()).tolist()
        skipped = (~torch.stack(self.norms)).tolist()
        for step, terms, bad_loss, skip in zip(self.steps, self.terms, bad, skipped, strict=True):
            self.bad_losses = self.bad_losses + 1 if bad_loss else 0
            self.skipped = self.skipped + 1 if skip else 0
            where = f"epoch {self.epoch}, step {step}"
            if bad_loss:
                name = self._bad_term(terms)
                utils.log(f"warning: {name} is not finite in {where}; all ranks skipped the step")
                if self.bad_losses >= MAX_BAD_LOSSES:
                    raise utils.Diverged(f"{name} was not finite in {MAX_BAD_LOSSES} steps in a row, up to {where}")
            if self.skipped >= MAX_SKIPPED:
                raise utils.Diverged(f"{MAX_SKIPPED} steps in a row had no finite gradient, up to {where}")
        if scaler.get_scale() < 1:
            raise utils.Diverged(f"the gradient scale fell to {scaler.get_scale():g} in epoch {self.epoch}")
        self.begin(self.names, self.epoch)

    def _bad_term(self, terms: Tensor) -> str:
        finite = terms.isfinite().tolist()
        mine = [name for name, good in zip(self.names, finite, strict=True) if not good and name != "loss"]
        found = [f"term {names[0]} of rank {r}" for r, names in enumerate(utils.gather_objects(mine)) if names]
        return found[0] if found else "the loss"


class Console:
    """DeiT's console line: progress, eta, learning rate, terms, times, images per second, memory."""

    def __init__(self, header: str, num_steps: int, start_step: int, device: torch.device):
        self.header, self.num_steps, self.start_step, self.device = header, num_steps, start_step, device
        self.started = time.perf_counter()
        self.data_time, self.images = 0.0, 0

    def timed(self, loader: Iterable) -> Iterator:
        """Iterate over the loader and add up the time spent waiting for it."""
        waiting_since = time.perf_counter()
        for batch in loader:
            self.data_time += time.perf_counter() - waiting_since
            yield batch
            waiting_since = time.perf_counter()

    def line(self, step: int, lr: float, averages: dict[str, float]) -> None:
        """Log a line after batch `step`."""
        done = step + 1 - self.start_step
        elapsed = time.perf_counter() - self.started
        eta = datetime.timedelta(seconds=int(elapsed / done * (self.num_steps - step - 1)))
        terms = "  ".join(f"{name}: {value:.4f}" for name, value in averages.items())
        progress = f"[{step + 1:>{len(str(self.num_steps))}}/{self.num_steps}]"
        times = f"time: {elapsed / done:.4f}  data: {self.data_time / done:.4f}  img/s: {self.images / elapsed:.1f}"
        if self.device.type == "cuda":
            times += f"  max mem: {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f}"
        utils.log(f"{self.header}  {progress}  eta: {eta}  lr: {lr:.6f}  {terms}  {times}")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device,
    prepare: nn.Module,
    amp_dtype: torch.dtype = torch.float32,
    sharded: bool = True,
    should_stop: Callable[[], int] = lambda: 0,
    classes: list[int] | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> dict | None:
    """Return cross-entropy and accuracy over the images of all ranks, counting each image once.

    Args:
        model: images -> logits (B, classes), not wrapped in DDP.
        loader: yields uint8 images and int64 labels; the ranks' loaders hold disjoint shards if `sharded`.
        device, prepare, amp_dtype, should_stop: as in `train_one_epoch`.
        classes: the model's outputs to choose among, in the order of the labels; None for all.
        observe: called with the logits (B, classes) of each batch.

    Returns:
        {"loss": mean over images, "acc1", "acc5": percent, "correct1", "correct5", "images": counts}; top-5 is over
        min(5, classes). None if a stop was requested.
    """
    model.eval()
    prepare.eval()
    index = None if classes is None else torch.tensor(classes, device=device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct1, correct5: counts stay exact
    images = 0
    # Shards differ by up to one image, so loaders may differ by one batch.
    batches = max(utils.gather_objects(len(loader)))  # type: ignore[arg-type]
    for batch in itertools.chain(loader, itertools.repeat(None, batches - len(loader))):  # type: ignore[arg-type]
        if should_stop():
            return None
        if batch is None:
            continue
        inputs, labels = to_device(batch, device)
        with autocast(device, amp_dtype):
            logits = model(prepare(inputs))
        logits = logits.float()
        if index is not None:
            logits = logits[:, index]
        if observe is not None:
            observe(logits)
        hits = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).sum(dim=0)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss.double(), hits[0].double(), hits.sum().double()])
        images += len(labels)
    if sharded:
        utils.sum_over_ranks(totals)
        images = sum(utils.gather_objects(images))
    loss, correct1, correct5 = totals.tolist()
    return {
        "loss": loss / images,
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "correct1": int(correct1),
        "correct5": int(correct5),
        "images": images,
    }
