"""Train a student by spectral feature matching, or evaluate a checkpoint: wiring and the epoch loop."""

from flags import get_args_parser, parse_args, parse_or_exit

if __name__ == "__main__":  # before the imports that take seconds, so that --help and mistakes answer at once
    ARGS = parse_or_exit()

import argparse
import datetime
import functools
import itertools
import math
import resource
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
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
from utils import UserError, as_user_error, log, rank, run_status, world_size
from weights import extract_weights, load_checkpoint, stored_args

__all__ = ["get_args_parser", "main", "parse_args"]

TERMS = ["loss", *losses.TERMS]


def main(args: argparse.Namespace) -> dict | None:
    """Do what the flags ask for; return the statistics of an evaluation."""
    if args.export:
        return export(args)

    # Set-up
    should_stop = faults.StopRequest()
    device = faults.init_distributed(args.device, args.dist_url, args.dist_timeout, args.world_size)
    models.check_name(args.model)
    if args.distillation_type != "none" and not args.eval:
        models.check_name(args.teacher_model)
    folder = None if args.eval or args.dry_run else open_output_folder(args.output_dir)
    path, checkpoint = find_checkpoint(args, folder)
    run_status.begin(folder and folder.folder)
    amp_dtype = getattr(torch, args.amp_dtype or ("float16" if device.type == "cuda" else "float32"))

    # Data
    dataset_train, dataset_val = build_datasets(args)
    num_classes = args.num_classes or len(dataset_val.classes)
    if num_classes < len(dataset_val.classes):
        raise UserError(f"--num-classes {num_classes} is less than the {len(dataset_val.classes)} of the data set")
    loader_train, sampler, loader_val = build_loaders(args, dataset_train, dataset_val, device)

    # Student, the same on all ranks; the EMA is copied before the hooks, and both come before the wrappers
    utils.seed_everything(args.seed)
    model = build_student(args, num_classes).to(device)
    prepare = datasets.Prepare(*models.normalization(model), args.reprob, args.remode, args.recount, device)
    scoring = {"device": device, "prepare": prepare, "amp_dtype": amp_dtype, "sharded": args.dist_eval}
    if args.eval:
        return score(args, model, loader_val, scoring, checkpoint)
    ema = ModelEmaV3(model, args.model_ema_decay, **ema_options(args, model)) if args.model_ema else None
    with as_user_error("--s-id: ", ValueError):
        hooks = spectral.FeatureHooks(model, feature_ids(args)[0])

    # Teacher and loss
    teacher = build_teacher(args, num_classes, device, model)
    criterion = build_criterion(args, teacher)
    check_pairs(args, model, hooks, teacher, device)

    # Optimizer and state
    optimizer, scheduler, num_epochs = build_optimizer(args, model)
    scaler = GradScaler(device.type) if amp_dtype == torch.float16 else ConstantScaler(device.type)
    state = TrainState(model, optimizer, scheduler, scaler, ema, TERMS)
    if checkpoint is not None:
        state.load(checkpoint, args)
        if folder is not None:
            folder.repair_best(path, checkpoint)
        del checkpoint  # as large as model and optimizer
    if args.start_epoch is not None:
        state.start_epoch(args.start_epoch)
        scheduler.step(max(args.start_epoch - 1, 0))
    if state.epoch >= num_epochs:
        run_status.write("done")
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
    save = functools.partial(save_state, args, state, folder)
    run_log = utils.RunLog(args.output_dir, vars(args) | {"world_size": world_size()}, state.epoch)
    should_stop.between_steps(args.dist_timeout)
    while state.epoch < num_epochs:
        epoch, start_step, began, saved = state.epoch, state.step, time.perf_counter(), True
        if not state.trained:
            sampler.set_epoch(epoch, start_step * args.batch_size)
            train(loader_train, should_stop=should_stop)
        seconds = time.perf_counter() - began
        if state.step > start_step:
            if state.trained and world_size() > 1:  # not in mid-epoch, where a run without a stop would not
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
        save(best=best, milestone=epoch if args.save_every and (epoch + 1) % args.save_every == 0 else None)
        run_status.write("running", epoch=epoch, best_accuracy=state.best_accuracy)
    run_log.close()
    if folder is not None and folder.failures:
        raise UserError(f"the last checkpoint of the run could not be written to {args.output_dir}")
    run_status.write("done", best_accuracy=state.best_accuracy, best_epoch=state.best_epoch)
    return None


def find_checkpoint(args: argparse.Namespace, folder: CheckpointFolder | None) -> tuple[Path | None, dict | None]:
    """Return path and content of the checkpoint to resume or evaluate, Nones for a new run.

    Raises:
        UserError: none is valid, or the output folder holds another run.
    """
    if args.resume == "auto":
        path, checkpoint = (folder or CheckpointFolder(args.output_dir)).load_newest()
        if path is None and (args.eval or args.export):
            raise UserError(f"--resume auto: there is no checkpoint in {args.output_dir}: name a file")
        log(f"--resume auto: {path}" if path else "--resume auto: no checkpoint yet, starting a new run")
        return path, checkpoint
    inside = bool(folder and args.resume and Path(args.resume).resolve().parent == folder.folder.resolve())
    if folder and folder.files() and not args.overwrite and not inside:
        raise UserError(f"{folder.folder} holds a run: --resume auto continues it, --overwrite starts again")
    return (Path(args.resume), load_checkpoint(args.resume)) if args.resume else (None, None)


def save_state(args, state: TrainState, folder: CheckpointFolder | None, best=False, milestone=None) -> bool:
    """Save the state if there is an output folder; return whether it was saved."""
    if folder is None:
        return False
    return folder.save(state.to_dict(args), best=best, milestone=milestone, ignore=state.infinite)


def stop_early(number: int, state: TrainState, saved: bool) -> None:
    """End a run in mid-epoch.

    Raises:
        utils.Stopped: always.
    """
    then = "--resume auto continues here" if saved else "this state was not saved"
    raise utils.Stopped(number, f" in epoch {state.epoch} after step {state.step}: {then}")


# Evaluation and reports


def score(args: argparse.Namespace, model: nn.Module, loader, scoring: dict, checkpoint: dict | None) -> dict | None:
    """Evaluate the weights that --resume, --finetune or --pretrained name."""
    if checkpoint is not None:
        with as_user_error(f"--resume {args.resume}: ", UserError):
            models.load_weights(model, extract_weights(checkpoint, ema=args.eval_ema))
        stored = stored_args(checkpoint)
        for name in ("data_set", "input_size", "eval_crop_ratio"):
            if stored.get(name, getattr(args, name)) != getattr(args, name):
                log(f"--eval: the run used {name} {stored[name]}, this evaluation uses {getattr(args, name)}")
    stats = evaluate(model, loader, **scoring)
    log_accuracy(stats)
    return stats


def log_accuracy(stats: dict, name: str = "the network") -> None:
    """Log accuracies as DeiT does."""
    log(
        f"Accuracy of {name} on the {stats['images']} test images: {stats['acc1']:.3f}% "
        f"({stats['correct1']} correct; top-5 {stats['acc5']:.3f}%, loss {stats['loss']:.4f})"
    )


def epoch_stats(state: TrainState, test: dict, test_ema: dict) -> dict:
    """Return the line of log.txt for a validated epoch, under DeiT's names, and log the accuracies."""
    stats = {"train_lr": state.optimizer.param_groups[0]["lr"]}
    stats |= {f"train_{name}": value for name, value in state.meter.averages(over_ranks=True).items()}
    for prefix, scores, name in (("test", test, "the network"), ("test_ema", test_ema, "the EMA")):
        if scores:
            log_accuracy(scores, name)
            stats |= {f"{prefix}_{key}": scores[key] for key in ("loss", "acc1", "acc5")}
    return stats | {"epoch": state.epoch, "n_parameters": num_parameters(state.model)}


def num_parameters(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def log_run(args: argparse.Namespace, state: TrainState, dataset_train, dataset_val, num_epochs: int) -> None:
    """Log what is about to be trained, and warn where a default does not fit."""
    lr, sizes = state.optimizer.param_groups[0]["initial_lr"], (world_size(), args.batch_size, args.accum_steps)
    log(f"{len(dataset_train)} training and {len(dataset_val)} validation images; learning rate {lr:.4g}")
    log(f"global batch {math.prod(sizes)}: {sizes[0]} processes x {sizes[1]} images x {sizes[2]} accumulated")
    log(f"{args.model}: {num_parameters(state.model)} parameters; epochs {state.epoch} to {num_epochs - 1}")
    if args.min_lr > lr and args.sched not in ("step", "multistep", "constant"):
        log(f"warning: --min-lr {args.min_lr:g} is above this learning rate")
    if args.warmup_epochs > args.epochs:
        log(f"warning: all {args.epochs} epochs are warm-up, which lasts {args.warmup_epochs} epochs by default")
    if not args.output_dir:
        log("warning: nothing of this run is saved, because --output_dir is not given")


def dry_run(args: argparse.Namespace, state: TrainState, train, loader, device: torch.device, num_epochs: int) -> None:
    """Train two optimizer steps, and log what the second one cost and what the run would."""
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


def export(args: argparse.Namespace) -> None:
    """Write the weights of --resume, or their EMA, for timm.create_model(checkpoint_path=...)."""
    if not args.export.endswith(".safetensors"):
        raise UserError(f"--export {args.export}: timm knows the format by the ending .safetensors")
    weights = extract_weights(find_checkpoint(args, None)[1], ema=args.eval_ema)
    # Clones, because the format holds no tensors that share memory.
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    with as_user_error(f"--export {args.export}: ", OSError, SafetensorError):
        utils.write_atomically(args.export, lambda file: file.write(save(weights)))
    log(f"wrote {len(weights)} tensors to {args.export}")


@record
def run(args: argparse.Namespace) -> None:
    """Run the program; torchrun learns of an error that is not the user's through `record`."""
    faults.end_with_launcher()
    with faults.exit_codes(datasets.BadImageError):
        main(args)
        faults.leave_distributed()


if __name__ == "__main__":
    run(ARGS)
