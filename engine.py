"""One epoch of training, and evaluation."""

import contextlib
import datetime
import functools
import itertools
import time

import torch
import torch.nn.functional as F

import utils

MAX_BAD_LOSSES = 3  # steps in a row whose loss is not finite
MAX_SKIPPED = 20  # steps in a row whose gradient is not finite


def train_one_epoch(
    model,
    hooks,
    criterion,
    loader,
    *,
    optimizer,
    scaler,
    meter,
    epoch,
    device,
    prepare,
    seed_step,
    should_stop,
    start_step=0,
    amp_dtype=torch.float32,
    accum_steps=1,
    clip_grad=None,
    mixup=None,
    update_ema=None,
    watch=None,
    train_mode=True,
    print_freq=10,
):
    """Trains for one epoch, or until a stop is asked for.

    Args:
        model: images -> logits, or a pair of logits; in DistributedDataParallel where there are several processes.
        hooks: its `pop()` gives the maps of the model's latest forward.
        criterion: (images, outputs, maps, labels) -> dict of scalar terms, whose `loss` is minimised.
        loader: yields uint8 images (B, 3, H, W) and int64 labels (B,), from `start_step` on.
        scaler: a GradScaler. It is enabled in every precision, because it skips a step whose gradient is not finite,
            with a fused optimizer without asking the device; where no scaling is wanted its scale is a constant 1.
        meter: a utils.Meter of the terms; keeps the epoch's sums across a resume.
        prepare: uint8 images on the device -> float32 input.
        seed_step: called with (epoch, batch of it) before each batch to seed its randomness.
        should_stop: collective; true when the processes are to stop at this step boundary.
        start_step: batches of this epoch that are done already.
        amp_dtype: autocast's dtype; float32 switches autocast off.
        accum_steps: batches per optimizer step. A last group that is not full counts with its own size.
        clip_grad: largest gradient norm, or None.
        mixup: (images, labels) -> (images, labels), or None.
        update_ema: called after each optimizer step, or None.
        watch: the run's DivergenceWatch, which counts across epochs; None for one of this epoch alone.
        train_mode: False keeps the model in eval mode (no dropout) while it trains.
        print_freq: batches between console lines; between them this function never waits for the device.

    Returns:
        The number of batches done; less than the epoch's where a stop was asked for.

    Raises:
        utils.Diverged: on all processes at once.
    """
    model.train(train_mode)
    prepare.train()
    num_steps = start_step + len(loader)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    watch = watch or DivergenceWatch()
    watch.begin(list(meter.sums), epoch)
    buffers = BufferGuard(model)
    console = Console(f"Epoch: [{epoch}]", num_steps, start_step, device)
    rows = []
    optimizer.zero_grad(set_to_none=True)
    for step, (images, labels) in enumerate(console.timed(loader), start_step):
        seed_step(epoch, step)
        first, last = accumulation_group(step, num_steps, accum_steps)
        if step == first:
            buffers.keep()
        images, labels = to_device((images, labels), device)
        images = prepare(images)
        if mixup is not None:
            images, labels = mixup(images, labels)
        with gradients_synchronised(model, step == last):
            with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                outputs = model(images)
                terms = criterion(images, outputs, hooks.pop(), labels)
            scaler.scale(spoil_unless_finite(terms["loss"]) / (last - first + 1)).backward()
        rows.append(torch.stack([terms[name].detach() for name in meter.sums]))
        console.count_images(len(images))
        if step != last:
            continue
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_grad or torch.finfo(torch.float32).max)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        buffers.put_back_unless(norm.isfinite())
        if update_ema is not None:
            update_ema()
        watch.note(rows[-(last - first + 1) :], norm, step)
        stop = should_stop()
        if stop or len(rows) >= print_freq or step + 1 == num_steps:
            for row in torch.stack(rows).tolist():
                meter.add(row)
            rows.clear()
            watch.check(scaler)
            console.line(step, optimizer.param_groups[0]["lr"], meter.averages())
        if stop:
            return step + 1
    return num_steps


def to_device(batch, device):
    """The tensors of a batch on the device.

    On a GPU they are copied on a stream of their own, beside the steps that still compute there. Only the copy is
    early: what draws random numbers stays inside its seeded step.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in batch]
    copies, computing = copy_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(copies):
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
    computing.wait_stream(copies)
    for tensor in batch:
        tensor.record_stream(computing)  # its memory is not given away while a step still reads it
    return batch


@functools.cache
def copy_stream(device):
    return torch.cuda.Stream(device)


def accumulation_group(step, num_steps, accum_steps):
    """First and last batch of the group of batches that share the optimizer step of batch `step`."""
    first = step // accum_steps * accum_steps
    return first, min(first + accum_steps, num_steps) - 1


def gradients_synchronised(model, wanted):
    """DistributedDataParallel adds gradients up over the processes only in the last batch of a group."""
    return model.no_sync() if not wanted and hasattr(model, "no_sync") else contextlib.nullcontext()


def spoil_unless_finite(loss):
    """The loss, with a gradient of nan where it is not finite: some losses are infinite and their gradient is not.

    The sum over the processes carries the nan to all of them, and the scaler skips the step on each.
    """
    return loss * (1 + 0 * loss.detach())


class BufferGuard:
    """Puts a model's buffers back after a skipped step: BatchNorm's statistics have seen the bad batch by then."""

    def __init__(self, model):
        norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]

    def keep(self):
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def put_back_unless(self, finite):
        """finite: bool scalar on the device, which is not waited for."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, kept))


class DivergenceWatch:
    """Stops all processes together when training has broken down; looks at the device only in `check`.

    The gradient is summed over the processes before it is tested, so all of them skip the same steps. What one process
    alone knows, that its own loss is not finite, is shared in `check`. Steps in a row are counted across epochs.
    """

    def __init__(self):
        self.bad_losses, self.skipped = 0, 0

    def begin(self, names, epoch):
        """Begins an epoch; `names` are those of the terms in `note`."""
        self.names, self.epoch = names, epoch
        self.steps, self.finite, self.norms, self.terms = [], [], [], []

    def note(self, rows, norm, step):
        """Takes the terms (rows of numbers) and the gradient norm of an optimizer step; both stay on the device."""
        terms = torch.stack(rows).sum(dim=0)
        self.steps.append(step)
        self.terms.append(terms)
        self.finite.append(terms.isfinite().all())
        self.norms.append(norm.isfinite())

    def check(self, scaler):
        """Counts steps without a finite loss or gradient.

        Raises:
            utils.Diverged: three losses in a row, 20 gradients in a row, or a gradient scale under 1.
        """
        bad = utils.sum_over_ranks(1 - torch.stack(self.finite).long()).tolist()
        skipped = (~torch.stack(self.norms)).tolist()
        for step, terms, bad_loss, skip in zip(self.steps, self.terms, bad, skipped, strict=True):
            self.bad_losses = self.bad_losses + 1 if bad_loss else 0
            self.skipped = self.skipped + 1 if skip else 0
            where = f"epoch {self.epoch}, step {step}"
            if bad_loss:
                name = self._bad_term(terms)
                utils.say(f"warning: {name} is not finite in {where}; the step was skipped on all processes")
                if self.bad_losses >= MAX_BAD_LOSSES:
                    raise utils.Diverged(f"{name} was not finite {MAX_BAD_LOSSES} steps in a row, {where}")
            if self.skipped >= MAX_SKIPPED:
                raise utils.Diverged(f"{MAX_SKIPPED} steps in a row were skipped for their gradient, up to {where}")
        if scaler.get_scale() < 1:
            raise utils.Diverged(
                f"the gradient scale fell to {scaler.get_scale():g} in epoch {self.epoch}: no step counts"
            )
        self.steps, self.finite, self.norms, self.terms = [], [], [], []

    def _bad_term(self, terms):
        finite = terms.isfinite().tolist()
        mine = [name for name, good in zip(self.names, finite, strict=True) if not good and name != "loss"]
        found = [f"term {names[0]} of rank {r}" for r, names in enumerate(utils.gather_objects(mine)) if names]
        return found[0] if found else "the loss"


class Console:
    """DeiT's console line: progress, eta, learning rate, terms, times, images a second, memory."""

    def __init__(self, header, num_steps, start_step, device):
        self.header, self.num_steps, self.device = header, num_steps, device
        self.start_step, self.started = start_step, time.perf_counter()
        self.data_time, self.images = 0.0, 0

    def timed(self, loader):
        """Iterates over the loader and adds up the time spent waiting for it."""
        waiting_since = time.perf_counter()
        for batch in loader:
            self.data_time += time.perf_counter() - waiting_since
            yield batch
            waiting_since = time.perf_counter()

    def count_images(self, number):
        self.images += number * utils.world_size()

    def line(self, step, lr, averages):
        done = step + 1 - self.start_step
        elapsed = time.perf_counter() - self.started
        eta = datetime.timedelta(seconds=int(elapsed / done * (self.num_steps - step - 1)))
        terms = "  ".join(f"{name}: {value:.4f}" for name, value in averages.items())
        line = (
            f"{self.header}  [{step + 1:>{len(str(self.num_steps))}}/{self.num_steps}]  eta: {eta}  lr: {lr:.6f}  "
            f"{terms}  time: {elapsed / done:.4f}  data: {self.data_time / done:.4f}  "
            f"img/s: {self.images / elapsed:.1f}"
        )
        if self.device.type == "cuda":
            line += f"  max mem: {torch.cuda.max_memory_allocated(self.device) / 2**20:.0f}"
        utils.say(line)


@torch.inference_mode()
def evaluate(model, loader, *, device, prepare, amp_dtype=torch.float32, sharded=True, should_stop=None):
    """Cross-entropy and accuracy over all images of all processes' loaders, each counted once.

    Args:
        model: bare model, images -> logits (B, classes).
        loader: yields uint8 images and int64 labels; the processes' loaders hold disjoint shards where `sharded`.
        device, prepare, amp_dtype, should_stop: as in `train_one_epoch`.

    Returns:
        {"loss": mean over images, "acc1", "acc5": percent, "correct1", "correct5", "images": counts}. acc5 is over
        the best min(5, classes). None where a stop was asked for.
    """
    model.eval()
    prepare.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, correct1, correct5, images: counts stay exact
    most = max(utils.gather_objects(len(loader)))  # as shards differ by an image, loaders may differ by a batch
    for batch in itertools.chain(loader, itertools.repeat(None, most - len(loader))):
        if should_stop is not None and should_stop():
            return None
        if batch is None:
            continue
        images, labels = to_device(batch, device)
        images = prepare(images)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            logits = model(images)
        logits = logits.float()
        ranks = (logits.topk(min(5, logits.shape[1])).indices == labels[:, None]).sum(dim=0)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([loss.double(), ranks[0].double(), ranks.sum().double(), loss.new_tensor(len(labels))])
    if sharded:
        utils.sum_over_ranks(totals)
    loss, correct1, correct5, images = totals.tolist()
    return {
        "loss": loss / images,
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "correct1": int(correct1),
        "correct5": int(correct5),
        "images": int(images),
    }
