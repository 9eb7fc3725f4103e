"""From flags to objects: data, student, teacher, loss and optimizer."""

import argparse
import contextlib
import functools
import inspect

import torch
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import attention
import baselines
import datasets
import faults
import losses
import models
import samplers
import spectral
import students  # noqa: F401 registers its models with timm
import utils
from flags import mixup_active
from utils import UserError, as_user_error, log, rank, world_size
from weights import extract_weights, load_checkpoint

# Data


def build_datasets(args: argparse.Namespace):
    """Return (training set or None, validation set), with transforms to uint8 pixels."""

    def build(split, transform, size):
        with as_user_error("", ValueError, OSError, RuntimeError):
            return datasets.build_dataset(
                args.data_set, split, args.data_path, transform, inat_category=args.inat_category, num_images=size
            )

    transform = datasets.eval_transform(args.input_size, args.eval_crop_ratio)
    dataset_val = build("val", transform, args.gratings_sizes[1])
    if args.eval:
        return None, dataset_val
    with as_user_error(f"--aa {args.aa}: ", Exception):
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


def build_loaders(args: argparse.Namespace, dataset_train, dataset_val, device: torch.device):
    """Return (training loader or None, its sampler, validation loader)."""
    shards = (world_size(), rank()) if args.dist_eval else (1, 0)
    common = {"num_workers": args.num_workers, "pin_memory": args.pin_mem and device.type == "cuda"}
    common |= {"timeout": args.loader_timeout, "worker_init_fn": faults.begin_loader_worker}
    order = samplers.ShardSampler(dataset_val, *shards)
    loader_val = datasets.build_loader(dataset_val, order, int(1.5 * args.batch_size), drop_last=False, **common)
    if dataset_train is None:
        return None, None, loader_val
    sampler_class = samplers.RASampler if args.repeated_aug else DistributedSampler
    order = sampler_class(dataset_train, world_size(), rank(), seed=args.seed)
    sampler = samplers.SeededSampler(order, args.seed, rank())
    if len(sampler) < args.batch_size:
        counts = f"an epoch has {len(sampler)} images per process, but --batch-size is {args.batch_size}"
        raise UserError(f"{counts}: lower it")
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


def build_student(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the student on the CPU, with random weights, timm's or a file's, set up for the kind of distillation."""
    with utils.rank_zero_first() if args.pretrained else contextlib.nullcontext():
        model = models.build_model(
            args.model,
            num_classes,
            input_size=args.input_size,
            kwargs=args.model_kwargs,
            pretrained=args.pretrained,
            drop=args.drop,
            drop_path=args.drop_path,
        )
    own_classes = model.pretrained_cfg["num_classes"]
    if args.pretrained and own_classes != num_classes:
        message = f"the pretrained weights are for {own_classes} classes, the data set has {num_classes}"
        if args.eval:
            raise UserError(message)
        log(f"{message}: training a new head")
    if args.finetune:
        with as_user_error(f"--finetune {args.finetune}: ", UserError):
            weights = extract_weights(load_checkpoint(args.finetune), ema=args.eval and args.eval_ema)
            replaced = models.load_weights(model, weights, replace_head=not args.eval)
        if replaced:
            log(f"--finetune: the file's head has {replaced} classes, not {num_classes}: training a new head")
    if hasattr(model, "set_distilled_training"):
        distills_logits = args.distillation_type in ("soft", "hard")
        if not args.train_mode and distills_logits:
            raise UserError(f"--no-train-mode cannot train the two heads of {args.model} separately: leave it out")
        model.set_distilled_training(distills_logits)
    if args.attn_only:
        models.freeze_all_but_attention(model)
    if args.batch_size == 1 and args.train_mode and not args.eval and has_batch_norm(model):
        raise UserError(f"--batch-size 1: {args.model} has BatchNorm, which needs several images: give 2 or more")
    return model


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has layers of BatchNorm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def ema_options(args: argparse.Namespace, model: nn.Module) -> dict:
    """Return ModelEmaV3's options; averaging a buffer that is infinite by design would make it NaN."""
    infinite = any(not buffer.isfinite().all() for buffer in model.buffers() if buffer.is_floating_point())
    return {"device": "cpu" if args.model_ema_force_cpu else None, "exclude_buffers": infinite}


def build_teacher(args: argparse.Namespace, num_classes: int, device: torch.device, student: nn.Module):
    """Return the frozen teacher on its device, or None without distillation."""
    if args.distillation_type == "none":
        return None
    named = as_user_error("no teacher (its weights can come from a file, --teacher-path): ", UserError)
    with utils.rank_zero_first() if not args.teacher_path else contextlib.nullcontext(), named:
        model = models.build_model(
            args.teacher_model,
            num_classes,
            input_size=args.input_size,
            kwargs=args.teacher_kwargs,
            pretrained=not args.teacher_path,
        )
    own_classes = model.pretrained_cfg["num_classes"]
    if not args.teacher_path and own_classes != num_classes:
        raise UserError(
            f"the teacher's weights are for {own_classes} classes and the data set has {num_classes}: "
            "give --teacher-path, the weights of a teacher for these classes"
        )
    if args.teacher_path:
        with as_user_error(f"--teacher-path {args.teacher_path}: ", UserError):
            models.load_weights(model, extract_weights(load_checkpoint(args.teacher_path)))
    scale, shift = losses.renormalization(models.normalization(student), models.normalization(model), device)
    with as_user_error("--t-id: ", ValueError):
        model = attention.speed_up(model.to(device))
        return losses.FrozenTeacher(model, feature_ids(args)[1], scale, shift)


def feature_ids(args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Return (student ids, teacher ids), empty if the feature loss has no weight."""
    used = args.distillation_type != "none" and args.w_fft * args.distillation_beta > 0
    return (args.s_id, args.t_id) if used else ([], [])


def build_criterion(args: argparse.Namespace, student: nn.Module, teacher) -> losses.DistillationLoss:
    """Return the training loss; its trained parts, if any, are on the CPU."""
    feature_loss = spectral.SPECTRAL_IMPLEMENTATIONS[args.spectral_impl]
    if args.feature_loss != "spectral" and teacher is not None:
        widths = [
            [spectral.describe_blocks(model)[i]["num_chs"] for i in ids]
            for model, ids in zip((student, teacher.model), feature_ids(args), strict=True)
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
def check_pairs(args: argparse.Namespace, model: nn.Module, hooks, teacher, device: torch.device) -> None:
    """Run an image of noise through both models, check their maps, and log which are matched and what is pooled."""
    size = (1, 3, args.input_size, args.input_size)
    image = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(device)
    with forward_errors(args.model, args.input_size):
        model.eval()(image)
        student_maps = hooks.pop()
        spectral.check_raster_order(model, image, hooks.ids)
    if teacher is None:
        return
    with forward_errors(args.teacher_model, args.input_size):
        _, teacher_maps = teacher(image)
        spectral.check_raster_order(teacher.model, image, teacher.hooks.ids)
    blocks = (spectral.describe_blocks(model), spectral.describe_blocks(teacher.model)) if hooks.ids else ()
    for i, j, s, t in zip(hooks.ids, teacher.hooks.ids, student_maps, teacher_maps, strict=True):
        common = spectral.align(s, t)[0].shape
        pooled = [name for name, map in (("student", s), ("teacher", t)) if map.shape != common]
        note = f"{' and '.join(pooled)} pooled to {list(common[1:])}" if pooled else "same shape"
        pair = f"{blocks[0][i]['module']} {list(s.shape[1:])} <- {blocks[1][j]['module']} {list(t.shape[1:])}"
        log(f"student {pair} teacher: {note}")


@contextlib.contextmanager
def forward_errors(name: str, size: int):
    """Report that a model cannot take the images; a GPU that is full or broken is reported as it is."""
    try:
        yield
    except (torch.cuda.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.cuda.OutOfMemoryError)):
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"{name} with images of {size} pixels: {utils.one_line(error)}") from error


def wrap_model(args: argparse.Namespace, model: nn.Module, criterion, device: torch.device) -> nn.Module:
    """Return the student to train with: compiled and in DDP where asked. The criterion's parts are compiled in place.

    Evaluation, optimizer and checkpoints keep the bare student. Hooks are compiled along with their models.
    """
    wrapped = model
    if args.compile != "none" and can_compile(device):
        compiled = functools.partial(torch.compile, dynamic=False)
        if criterion.teacher is not None:
            criterion.teacher.model = compiled(criterion.teacher.model)
        if args.compile == "both":
            wrapped = compiled(model)
            if criterion.feature_loss is not spectral.spectral_loss:  # complex numbers have no compiler
                criterion.feature_loss = compiled(criterion.feature_loss)
    if world_size() == 1:
        return wrapped
    options = {"device_ids": [device] if device.type == "cuda" else None, "gradient_as_bucket_view": True}
    if not has_batch_norm(model):
        # Other buffers, such as Swin's, are constants: no need to send rank 0's before every forward.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters  # torch 2.14
        options["forward_sync_buffers" if renamed else "broadcast_buffers"] = False
    return DistributedDataParallel(wrapped, **options)


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile works here, and log why not."""
    try:
        torch.compile(torch.cos)(torch.zeros(2, device=device))
    except Exception as error:
        log(f"--compile: no compiler works here, so nothing is compiled: {str(error).strip().splitlines()[0]}")
        return False
    return True


def build_optimizer(args: argparse.Namespace, model: nn.Module, criterion: nn.Module):
    """Return (optimizer of model and criterion, scheduler, number of epochs with the cool-down)."""
    global_batch = args.batch_size * args.accum_steps * world_size()
    options = optimizer_kwargs(args) | {"lr": args.lr if args.unscale_lr else args.lr * global_batch / 512}
    if args.opt == "adamw":
        options["fused"] = True  # reads the scaler's verdict on the device; others wait for it in every step
    with as_user_error(f"--opt {args.opt}: ", Exception):
        optimizer = create_optimizer_v2(model, **options)
    trained = [parameter for parameter in criterion.parameters() if parameter.requires_grad]
    if trained:
        optimizer.add_param_group({"params": trained})
    with as_user_error(f"--sched {args.sched}: ", Exception):
        scheduler, num_epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args))
        if scheduler is None:  # older releases of timm do not raise
            raise ValueError("timm has no such scheduler")
    return optimizer, scheduler, num_epochs
