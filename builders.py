"""From flags to objects: data, student, teacher, loss and optimizer."""

import argparse
import contextlib
import inspect
import os

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import baselines
import datasets
import faults
import losses
import models
import samplers
import spectral
import utils
from flags import mixup_active
from loaders import warn_if_shm_is_small
from utils import UserError, as_user_error, log, rank, world_size
from weights import extract_weights, load_checkpoint

# Data


def build_datasets(args: argparse.Namespace):
    """Return (training set or None, validation set), with transforms that return uint8 pixels."""

    def build(split, transform, size):
        with as_user_error("", ValueError, OSError, RuntimeError):
            return datasets.build_dataset(
                args.data_set, split, args.data_path, transform, inat_category=args.inat_category, num_images=size
            )

    transform = datasets.eval_transform(args.input_size, args.eval_crop_ratio)
    dataset_val = build("val", transform, args.gratings_sizes[1])
    if args.eval:
        return None, dataset_val
    with as_user_error(f"--aa {args.aa} with --train-interpolation {args.train_interpolation}: ", Exception):
        transform = datasets.train_transform(
            args.input_size,
            aa=None if args.aa.lower() in ("", "none") else args.aa,
            color_jitter=args.color_jitter,
            interpolation=args.train_interpolation,
            hflip=0.0 if args.data_set == "GRATINGS" else 0.5,  # a mirrored grating belongs to another class
            three_augment=args.ThreeAugment,
            simple_crop=args.src,
        )
    dataset_train = build("train", transform, args.gratings_sizes[0])
    if dataset_train.classes != dataset_val.classes:
        odd = sorted(set(dataset_train.classes) ^ set(dataset_val.classes))
        raise UserError(f"train and val must have the same classes, but only one of them has {odd[0]}")
    return dataset_train, dataset_val


def build_loaders(args: argparse.Namespace, dataset_train, dataset_val, model: nn.Module, device: torch.device):
    """Return (training loader or None, its sampler, validation loader)."""
    shards = (world_size(), rank()) if args.dist_eval else (1, 0)
    common = {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda"}
    common |= {"timeout": args.loader_timeout, "worker_init_fn": faults.begin_loader_worker}
    datasets.check_images(dataset_val)  # now, not after hours of training
    order = samplers.ShardSampler(dataset_val, *shards)
    loader_val = datasets.build_loader(dataset_val, order, int(1.5 * args.batch_size), drop_last=False, **common)
    if dataset_train is None:
        return None, None, loader_val
    if args.repeated_aug:
        # Blocks let each process decode an image once; BatchNorm would see its copies together.
        block = None if models.has_batch_norm(model) else args.batch_size
        order = samplers.RASampler(dataset_train, world_size(), rank(), seed=args.seed, block=block)
    else:
        order = DistributedSampler(dataset_train, world_size(), rank(), seed=args.seed)
    sampler = samplers.SeededSampler(order, args.seed, rank())
    if len(sampler) < args.batch_size:
        counts = f"an epoch has {len(sampler)} images per process, but --batch-size is {args.batch_size}"
        raise UserError(f"{counts}: lower it")
    # Every process of this machine holds training batches, and validation batches 1.5 times as large.
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    warning = warn_if_shm_is_small(
        3 * args.input_size**2 * args.batch_size * 5 // 2, args.num_workers * local_processes
    )
    if warning:
        log(f"warning: {warning}")
    seeded = datasets.SeededDataset(dataset_train, args.skip_bad_images)
    return datasets.build_loader(seeded, sampler, args.batch_size, drop_last=True, **common), sampler, loader_val


def build_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    """Return timm's mixup and CutMix, or None if both are off."""
    if not mixup_active(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


# Models and loss


def build_student(args: argparse.Namespace, num_classes: int | None) -> nn.Module:
    """Build the student on the CPU, with random weights, timm's or a file's, for the kind of distillation."""
    hint = "--pretrained (weights can also come from a file, --finetune): " if args.pretrained else ""
    with utils.rank_zero_first() if args.pretrained else contextlib.nullcontext(), as_user_error(hint, UserError):
        model = models.build_model(
            args.model,
            num_classes,
            input_size=args.input_size,
            kwargs=args.model_kwargs,
            pretrained=args.pretrained,
            drop=args.drop,
            drop_path=args.drop_path,
        )
    if args.pretrained and num_classes not in (None, model.pretrained_cfg["num_classes"]):
        log(f"--pretrained: the weights are for {model.pretrained_cfg['num_classes']} classes: training a new head")
    if args.finetune:
        with as_user_error(f"--finetune {args.finetune}: ", UserError):
            weights = extract_weights(load_checkpoint(args.finetune), ema=args.eval and args.eval_ema)
            note = models.load_weights(model, weights, head="own" if args.eval else "fresh")
        if note:
            log(f"--finetune: {note}")
    if hasattr(model, "set_distilled_training"):
        distills_logits = args.distillation_type in ("soft", "hard")
        if not args.train_mode and distills_logits:
            raise UserError(f"--no-train-mode cannot train the two heads of {args.model} separately: leave it out")
        model.set_distilled_training(distills_logits)
    if args.attn_only:
        models.freeze_all_but_attention(model)
    if args.batch_size == 1 and args.train_mode and not args.eval and models.has_batch_norm(model):
        raise UserError(f"--batch-size 1: {args.model} has BatchNorm, which needs several images: give 2 or more")
    return model


def ema_options(args: argparse.Namespace, model: nn.Module) -> dict:
    """Return ModelEmaV3's options; averaging a buffer that is infinite by design would make it NaN."""
    infinite = any(not buffer.isfinite().all() for buffer in model.buffers() if buffer.is_floating_point())
    return {"device": "cpu" if args.model_ema_force_cpu else None, "exclude_buffers": infinite}


def match_outputs(classes: list[str], model: nn.Module, name: str, known: list[str] | None, what: str):
    """Return the index of the model's output for each class of the data set; None if the two agree in order.

    Args:
        classes: class names of the data set.
        model, name: the model and its timm name.
        known: class names of its outputs; None if its weights do not name them.
        what: description of the weights, for messages.

    Raises:
        UserError: the model does not know a class, or its outputs have no names and the counts differ.
    """
    if known is None:  # as in the ImageNet checkpoints of DeiT's authors
        imagenet = models.class_names(model, name, True, model.num_classes)
        known = imagenet if imagenet and set(classes) <= set(imagenet) else None
    if known is None:
        if len(classes) != model.num_classes:
            raise UserError(f"{what} has {model.num_classes} unnamed classes, but the data set has {len(classes)}")
        log(f"{what} does not name its classes, so they are matched by position")
        return None
    with as_user_error(f"{what}: ", ValueError):
        index = datasets.match_classes(classes, known)
    return None if index == list(range(len(known))) else index


def build_teacher(args: argparse.Namespace, checkpoint: dict | None, classes: list[str], device, student: nn.Module):
    """Return the frozen teacher on its device, or None without distillation.

    Args:
        checkpoint: the content of --teacher-path; None for timm's weights.
        classes: class names of the data set.
    """
    if args.distillation_type == "none":
        return None
    weights, known, count, what = None, None, None, f"the teacher {args.teacher_model}"
    needs_logits = args.distillation_type != "fft"
    if checkpoint is not None:
        what, known = f"--teacher-path {args.teacher_path}", checkpoint.get("classes")
        with as_user_error(f"{what}: ", UserError):
            weights = extract_weights(checkpoint)
        count = models.count_classes(args.teacher_model, weights, known)
    # Rank 0 downloads timm's weights first.
    hint = "" if args.teacher_path else " (its weights can come from a file, --teacher-path)"
    named = as_user_error(f"{what}{hint}: ", UserError)
    with utils.rank_zero_first() if not args.teacher_path else contextlib.nullcontext(), named:
        model, size = models.build_teacher(
            args.teacher_model,
            count,
            input_size=args.input_size,
            kwargs=args.teacher_kwargs,
            weights=weights,
            head="own" if needs_logits else "fresh",
        )
    index = None
    if needs_logits:
        known = known or models.class_names(model, args.teacher_model, weights is None, model.num_classes)
        fix = "" if args.teacher_path else "; or fine-tune it on these classes and give --teacher-path"
        try:
            index = match_outputs(classes, model, args.teacher_model, known, what)
        except UserError as error:
            raise UserError(f"{error}{fix}") from error
        outputs = model.num_classes if index is None else len(index)
        if outputs != student.num_classes:
            counts = f"{what} gives {outputs} logits, but the student {student.num_classes}"
            raise UserError(f"{counts}: leave --num-classes out")
    if size != args.input_size:
        log(f"{what} takes images of {size} pixels: the student's images ({args.input_size} pixels) are resized for it")
    scale, shift = losses.renormalization(models.normalization(student), models.normalization(model), device)
    model = models.fast_attention(model.to(device, getattr(torch, args.teacher_dtype)), args.teacher_attention)
    with as_user_error("--t-id: ", ValueError):
        return losses.FrozenTeacher(model, feature_ids(args, student, model)[1], scale, shift, size, index)


def feature_ids(args: argparse.Namespace, student: nn.Module, teacher: nn.Module | None) -> tuple[list, list]:
    """Return (student ids, teacher ids), both empty if the feature loss has weight 0.

    Raises:
        UserError: no ids are given, or `all` is given for models with different numbers of blocks.
    """
    if teacher is None or args.w_fft * args.distillation_beta == 0:
        return [], []
    with as_user_error("", ValueError):
        counts = [len(spectral.describe_blocks(model)) for model in (student, teacher)]
    if not args.s_id:
        raise UserError(
            f"the feature loss needs --s-id and --t-id: {args.model} has blocks 0 to {counts[0] - 1}, "
            f"{args.teacher_model} 0 to {counts[1] - 1}; `python analyze.py --model {args.teacher_model} --suggest 8 "
            f"--student {args.model} --data-path ...` suggests pairs; --w-fft 0 turns the loss off"
        )
    if "all" not in args.s_id + args.t_id:
        return args.s_id, args.t_id
    if args.s_id != ["all"] or args.t_id != ["all"] or counts[0] != counts[1]:
        raise UserError(f"--s-id all --t-id all needs models with equally many blocks, not {counts[0]} and {counts[1]}")
    return list(range(counts[0])), list(range(counts[1]))


def build_criterion(args: argparse.Namespace, student: nn.Module, teacher) -> losses.DistillationLoss:
    """Build the training loss; its trainable parts, if any, are on the CPU."""
    feature_loss = spectral.SPECTRAL_IMPLEMENTATIONS[args.spectral_impl]
    if args.feature_loss != "spectral" and teacher is not None:
        widths = [
            [spectral.describe_blocks(model)[i]["num_chs"] for i in ids]
            for model, ids in zip((student, teacher.model), feature_ids(args, student, teacher.model), strict=True)
        ]
        feature_loss = baselines.build_feature_loss(args.feature_loss, *widths, seed=args.seed)
    base: nn.Module
    if args.bce_loss:
        base = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    else:  # mixup smooths the labels itself
        base = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup_active(args) else args.smoothing)
    return losses.DistillationLoss(
        base,
        args.distillation_type,
        teacher,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
        beta=args.distillation_beta,
        w_fft=args.w_fft,
        feature_loss=feature_loss,
    )


@torch.no_grad()
def check_pairs(args: argparse.Namespace, model: nn.Module, hooks, criterion, device: torch.device) -> None:
    """Run random images through both models, check their maps, and log each pair and what is pooled."""
    teacher, size = criterion.teacher, (2, 3, args.input_size, args.input_size)
    images = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(device)
    with forward_errors(args.model, args.input_size):
        model.eval()(images)
        student_maps = hooks.pop()
    if teacher is None:
        return
    with forward_errors(args.teacher_model, teacher.size):
        _, teacher_maps = teacher(images)
    if not hooks.ids:
        return
    for flag, network, inputs, ids in (
        ("--s-id", model, images, hooks.ids),
        ("--t-id", teacher.model, teacher.prepare(images), teacher.hooks.ids),
    ):
        with as_user_error(f"{flag}: ", ValueError):
            spectral.check_raster_order(network, inputs, ids)
    with as_user_error(f"--feature-loss {args.feature_loss}: ", ValueError):
        criterion.feature_term(student_maps, teacher_maps)
    blocks = spectral.describe_blocks(model), spectral.describe_blocks(teacher.model)
    for i, j, s, t in zip(hooks.ids, teacher.hooks.ids, student_maps, teacher_maps, strict=True):
        common = spectral.align(s, t)[0].shape
        pooled = [name for name, map in (("student", s), ("teacher", t)) if map.shape != common]
        note = f"{' and '.join(pooled)} pooled to {list(common[1:])}" if pooled else "same shape"
        pair = f"{blocks[0][i]['module']} {list(s.shape[1:])} <- teacher {blocks[1][j]['module']} {list(t.shape[1:])}"
        log(f"student {pair}: {note}")


@contextlib.contextmanager
def forward_errors(name: str, size: int):
    """Turn errors of a forward pass into a UserError, except those of a full or broken GPU."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{name} with images of {size} pixels: {utils.one_line(error)}") from error


def wrap_model(args: argparse.Namespace, model: nn.Module, criterion, device: torch.device) -> nn.Module:
    """Return the student compiled and in DDP if requested; compile the criterion's parts in place.

    Evaluation, optimizer and checkpoints use the bare student. Hooks are compiled along with their models.
    """
    wrapped = model
    if args.compile in ("teacher", "both"):
        criterion.compile(feature_loss=args.compile == "both")
    if args.compile == "both":
        wrapped = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    if world_size() == 1:
        return wrapped
    options = {"device_ids": [device] if device.type == "cuda" else None, "gradient_as_bucket_view": True}
    if not models.has_batch_norm(model):
        # Other buffers, such as Swin's, are constants and need no broadcast before each forward pass.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.14
        options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    return DistributedDataParallel(wrapped, **options)


def build_optimizer(args: argparse.Namespace, model: nn.Module, criterion: nn.Module):
    """Return (optimizer of model and criterion, scheduler, number of epochs with the cool-down)."""
    global_batch = args.batch_size * args.accum_steps * world_size()
    options = optimizer_kwargs(args) | {"lr": args.lr if args.unscale_lr else args.lr * global_batch / 512}
    if args.opt == "adamw":
        options["fused"] = True  # reads the scaler's result on the device; other optimizers wait for it at every step
    with as_user_error(f"--opt {args.opt} with these --opt-* flags: ", Exception):
        optimizer = create_optimizer_v2(model, **options)
    trained = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    if trained:
        optimizer.add_param_group({"params": trained})
    with as_user_error(f"--sched {args.sched}: ", Exception):
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
        if scheduler is None:  # older releases of timm do not raise
            raise ValueError("timm has no such scheduler")
    return optimizer, scheduler, num_epochs
