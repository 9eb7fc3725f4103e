"""Train a student by spectral feature matching, evaluate it or export it. `main` reads from top to bottom."""

import os

from flags import Flags, complete_args, complete_teacher, get_args_parser, parse_args, parse_or_exit, to_arg_lines

if __name__ == "__main__":  # before the slow imports, so that --help and errors in the flags appear at once
    LAUNCHER = os.getppid()
    ARGS = parse_or_exit()

import contextlib
import datetime
import functools
import itertools
import math
import resource
import time
from pathlib import Path

import torch
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.amp import GradScaler
from torch.distributed.elastic.multiprocessing.errors import record

import datasets
import faults
import losses
import models
import spectral
import utils
from builders import (
    build_criterion,
    build_datasets,
    build_loaders,
    build_mixup,
    build_optimizer,
    build_student,
    build_teacher,
    check_pairs,
    ema_options,
    feature_ids,
    wrap_model,
)
from checkpoint import CheckpointFolder, TrainState, open_output_folder
from engine import ConstantScaler, DivergenceWatch, evaluate, train_one_epoch
from loaders import LoaderError
from scoring import export, load_student, log_accuracy, score
from utils import UserError, as_user_error, log, rank, run_status, world_size
from weights import load_checkpoint, stored_args

__all__ = ["get_args_parser", "main", "parse_args"]

TERMS = ["loss", *losses.TERMS]


def main(args: Flags) -> dict | None:
    """Train, evaluate or export, as the flags say; return the scores if evaluating."""
    # Set-up
    should_stop = faults.StopRequest()
    device = faults.init_distributed(args.device, args.dist_url, args.dist_timeout)
    set_numerics(args.deterministic)
    if args.import_module:
        models.import_models(args.import_module)
    folder = None if args.eval or args.export or args.dry_run else open_output_folder(args.output_dir)
    path, checkpoint = find_checkpoint(args, folder)
    if checkpoint is not None and (args.eval or args.export or args.resume != "auto"):
        args = complete_args(args, stored_args(checkpoint))
    models.check_name(args.model)
    if args.export:
        return export(args, path, checkpoint)
    teacher_file = None
    if args.distillation_type != "none" and not args.eval:
        if args.teacher_path:
            teacher_file = load_checkpoint(args.teacher_path)
            args = complete_teacher(args, stored_args(teacher_file))
        models.check_name(args.teacher_model)
    run_status.begin(folder and folder.folder)
    amp_dtype = getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))

    # Data
    dataset_train, dataset_val = build_datasets(args)
    scoring = {"device": device, "amp_dtype": amp_dtype, "sharded": args.dist_eval}
    if args.eval:
        model, names, what = load_student(args, checkpoint)
        _, _, loader = build_loaders(args, None, dataset_val, model, device)
        scoring["prepare"] = datasets.Prepare(*models.normalization(model), device=device)
        return score(args, model.to(device), names, what, dataset_val, loader, scoring)
    classes = dataset_train.classes
    num_classes = args.num_classes or len(classes)
    if num_classes < len(classes):
        raise UserError(f"--num-classes {num_classes} is too low: the data set has {len(classes)} classes")
    if checkpoint is not None and checkpoint.get("classes", classes) != classes:
        odd = sorted(set(classes) ^ set(checkpoint["classes"])) or ["their order"]
        raise UserError(f"--resume: the data set's classes differ from the run's ({odd[0]}): use --finetune")

    # Student, identical on all ranks. Copy the EMA before adding hooks, and add hooks before DDP and torch.compile.
    utils.seed_everything(args.seed)
    model = build_student(args, num_classes).to(device)
    loader_train, sampler, loader_val = build_loaders(args, dataset_train, dataset_val, model, device)
    erasing = args.reprob, args.remode, args.recount
    scoring["prepare"] = prepare = datasets.Prepare(*models.normalization(model), *erasing, device=device)
    ema = ModelEmaV3(model, args.model_ema_decay, **ema_options(args, model)) if args.model_ema else None

    # Teacher and loss
    teacher = build_teacher(args, teacher_file, classes, device, model)
    del teacher_file
    with as_user_error("--s-id: ", ValueError):
        hooks = spectral.FeatureHooks(model, feature_ids(args, model, teacher and teacher.model)[0])
    criterion = build_criterion(args, model, teacher).to(device)
    check_pairs(args, model, hooks, criterion, device)

    # Optimizer and state
    optimizer, scheduler, num_epochs = build_optimizer(args, model, criterion)
    scaler = GradScaler(device.type) if amp_dtype == torch.float16 else ConstantScaler(device.type)
    state = TrainState(model, optimizer, scheduler, scaler, ema, TERMS, criterion)
    if checkpoint is not None:
        state.load(checkpoint, args)
        if folder is not None:
            folder.repair_best(checkpoint)
        del checkpoint  # as large as the model and its optimizer
    if args.start_epoch is not None:
        state.start_epoch(args.start_epoch)
        scheduler.step(max(args.start_epoch - 1, 0))
    if state.epoch >= num_epochs:
        run_status.write("done", best_accuracy=state.best_accuracy, best_epoch=state.best_epoch)
        return log(f"nothing to do: {state.epoch} of {num_epochs} epochs are done")
    state.parallel = wrap_model(args, model, criterion, device)
    log_run(args, state, dataset_train, dataset_val, num_epochs)

    # Loop
    train = functools.partial(
        train_one_epoch,
        state,
        criterion=criterion,
        hooks=hooks,
        device=device,
        prepare=prepare,
        watch=DivergenceWatch(),
        seed_step=lambda *where: utils.seed_everything(utils.counter_seed(args.seed, rank(), *where)),
        mixup=build_mixup(args, num_classes),
        amp_dtype=amp_dtype,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        train_mode=args.train_mode,
    )
    if args.dry_run:
        return dry_run(args, state, train, loader_train, device, num_epochs)
    if folder is not None and args.overwrite:
        folder.clear()
    save = functools.partial(save_state, args, state, folder, classes)
    run_log = utils.RunLog(args.output_dir, vars(args) | {"world_size": world_size()}, state.epoch, args.wandb)
    write_arguments(args)
    should_stop.between_steps(args.dist_timeout)
    with contextlib.closing(run_log):
        while state.epoch < num_epochs:
            epoch, start_step, began, saved = state.epoch, state.step, time.perf_counter(), True
            if not state.trained:
                sampler.set_epoch(epoch, start_step * args.batch_size)
                train(loader_train, should_stop=should_stop)
            seconds = time.perf_counter() - began
            if state.step > start_step:
                if world_size() > 1:
                    for network in (model, ema.module) if args.eval_ema else (model,):
                        distribute_bn(network, world_size())
                saved = save()  # before validation, which may fail
            if not state.trained:
                stop_early(should_stop.number, state, saved)
            test = evaluate(model, loader_val, should_stop=should_stop, **scoring)
            test_ema = (
                evaluate(ema.module, loader_val, should_stop=should_stop, **scoring) if test and args.eval_ema else {}
            )
            if test is None or test_ema is None:
                stop_early(should_stop.number, state, saved)
            images = (state.step - start_step) * args.batch_size * world_size()
            stats = epoch_stats(state, test, test_ema) | {"seconds": seconds, "images_per_second": images / seconds}
            scheduler.step(epoch)
            best = state.finish_epoch(test["acc1"])
            log(f"Max accuracy: {state.best_accuracy:.3f}% in epoch {state.best_epoch}")
            run_log.epoch(stats)
            # Before the save, for which all ranks wait: a slow write cannot come after the status of one that failed.
            run_status.write("running", epoch=epoch, best_accuracy=state.best_accuracy)
            save(best=best, milestone=epoch if args.save_every and (epoch + 1) % args.save_every == 0 else None)
    if run_log.lost:
        raise UserError(f"epochs {run_log.lost} are missing from log.txt, because they could not be written")
    if folder is not None and folder.failures:
        raise UserError(f"the run's last checkpoint could not be written to {args.output_dir}")
    run_status.write("done", best_accuracy=state.best_accuracy, best_epoch=state.best_epoch)
    return None


def set_numerics(deterministic: bool) -> None:
    """Use TF32 and benchmarked convolutions on GPUs, or deterministic algorithms in full precision."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.set_float32_matmul_precision("highest" if deterministic else "high")
    torch.backends.cudnn.allow_tf32 = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def find_checkpoint(args: Flags, folder: CheckpointFolder | None) -> tuple[Path | None, dict | None]:
    """Return the path and content of the checkpoint to resume or evaluate, or (None, None) for a new run.

    Raises:
        UserError: no checkpoint is valid, or the output folder already contains a run.
    """
    if args.resume == "auto":
        path, checkpoint = (folder or CheckpointFolder(args.output_dir)).load_newest()
        if path is None and (args.eval or args.export):
            raise UserError(f"--resume auto: there is no checkpoint in {args.output_dir}: give a file")
        log(f"--resume auto: {path}" if path else "--resume auto: no checkpoint yet, starting a new run")
        return path, checkpoint
    inside = bool(folder and args.resume and Path(args.resume).resolve().parent == folder.folder.resolve())
    if folder and folder.files() and not args.overwrite and not inside:
        raise UserError(f"{folder.folder} contains a run: --resume auto continues it, --overwrite starts over")
    return (Path(args.resume), load_checkpoint(args.resume)) if args.resume else (None, None)


def save_state(args, state: TrainState, folder: CheckpointFolder | None, classes, best=False, milestone=None) -> bool:
    """Save the state if there is an output folder; return whether it was saved."""
    if folder is None:
        return False
    return folder.save(state.to_dict(args, classes=classes), best=best, milestone=milestone, ignore=state.infinite)


def stop_early(number: int, state: TrainState, saved: bool) -> None:
    """Stop a run in the middle of an epoch.

    Raises:
        utils.Stopped: always.
    """
    then = "--resume auto continues here" if saved else "this state was not saved"
    raise utils.Stopped(number, f" in epoch {state.epoch} after step {state.step}: {then}")


# Reports


def epoch_stats(state: TrainState, test: dict, test_ema: dict) -> dict:
    """Log the accuracies of a validated epoch, and return its line of log.txt with DeiT's keys."""
    stats = {"train_lr": state.optimizer.param_groups[0]["lr"]}
    stats |= {f"train_{name}": value for name, value in state.meter.averages(over_ranks=True).items()}
    for prefix, scores, name in (("test", test, "the network"), ("test_ema", test_ema, "the EMA")):
        if scores:
            log_accuracy(scores, name)
            stats |= {f"{prefix}_{key}": scores[key] for key in ("loss", "acc1", "acc5")}
    return stats | {"epoch": state.epoch, "n_parameters": num_parameters(state.model)}


def write_arguments(args: Flags) -> None:
    """Write run.args, so that `main.py @run.args` repeats the run."""
    if args.output_dir and rank() == 0:
        text = "\n".join(to_arg_lines(args)) + "\n"
        with utils.warn_on(OSError, "run.args not written"):
            utils.write_atomically(Path(args.output_dir) / "run.args", lambda file: file.write(os.fsencode(text)))


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def log_run(args: Flags, state: TrainState, dataset_train, dataset_val, num_epochs: int) -> None:
    """Log the size of the run, and warn about defaults that do not suit it."""
    lr, sizes = state.optimizer.param_groups[0]["initial_lr"], (world_size(), args.batch_size, args.accum_steps)
    log(f"{len(dataset_train)} training and {len(dataset_val)} validation images; learning rate {lr:.4g}")
    log(f"global batch {math.prod(sizes)}: processes {sizes[0]} x batch size {sizes[1]} x accumulated {sizes[2]}")
    log(f"{args.model}: {num_parameters(state.model)} parameters; epochs {state.epoch} to {num_epochs - 1}")
    if args.min_lr > lr and args.sched not in ("step", "multistep", "constant"):
        log(f"warning: --min-lr {args.min_lr:g} is above the learning rate: lower it, or raise --lr")
    steps = num_epochs * len(dataset_train) // math.prod(sizes)
    if state.ema is not None and steps < 2 / (1 - args.model_ema_decay):
        advice = f"--model-ema-decay {1 - 10 / max(steps, 20):.4g}"
        log(f"warning: an EMA decay of {args.model_ema_decay:g} is too slow for {steps} steps: try {advice}")
    if args.warmup_epochs >= args.epochs:
        log(f"warning: all {args.epochs} epochs are warm-up: give --warmup-epochs (default: {args.warmup_epochs})")
    if not args.output_dir:
        log("warning: nothing will be saved, because --output_dir is not given")


def dry_run(args: Flags, state: TrainState, train, loader, device: torch.device, num_epochs: int) -> None:
    """Take two optimizer steps, and log the cost of the second one and an estimate for the run."""
    batches = list(itertools.islice(loader, 2 * args.accum_steps))
    state.start_epoch(0)
    train(batches[: args.accum_steps])  # warm-up
    timed = batches[args.accum_steps :] or batches
    state.start_epoch(0)
    began = time.perf_counter()
    train(timed)
    seconds = (time.perf_counter() - began) / len(timed)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_reserved(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = datetime.timedelta(seconds=int(seconds * len(loader) * num_epochs))
    log(f"dry run: {memory / 2**20:.0f} MiB per process, {seconds:.3f} s per step without waiting for images")
    log(f"dry run: {len(loader)} steps per epoch, {num_epochs} epochs: {total} of training; nothing was written")


@record
def run(args: Flags, launcher: int) -> None:
    """Run the program; `record` reports unexpected errors to torchrun. `launcher` is the id of the parent process."""
    faults.end_with_launcher(launcher)
    user_errors = datasets.BadImageError, LoaderError
    # Twice, because a signal may arrive at the end of the inner block, before it handles an error.
    with faults.exit_codes(*user_errors), faults.exit_codes(*user_errors):
        main(args)
        faults.leave_distributed()


if __name__ == "__main__":
    run(ARGS, LAUNCHER)
