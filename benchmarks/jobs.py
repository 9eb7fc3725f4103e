"""The two training jobs that are compared: the program's own, made by main.py's functions, and the plain one."""

import functools
import tempfile
from typing import Any, NamedTuple

import plain
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import datasets
import losses
import main
import samplers
import spectral
import utils
from engine import train_one_epoch

IDS = {  # the published pairs: student blocks, teacher blocks
    "cait_s24_224": ([0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 18, 19, 20, 21, 22, 23]),
    "swin_small_patch4_window7_224": ([0, 1, 2, 3], [0, 1, 2, 3]),
}
NUM_CLASSES = 1000


class Job(NamedTuple):
    """A job's parts; `student` is `model` as it trains, wrapped, and `train(loader)` runs an epoch."""

    model: Any
    student: Any
    hooks: Any
    criterion: Any
    optimizer: Any
    ema: Any
    train: Any


def add_flags(parser):
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="student")
    parser.add_argument("--teacher-model", default="cait_s24_224", choices=IDS, help="teacher, with random weights")
    parser.add_argument("--pairs", type=int, default=8, help="how many of the published pairs, from the first")
    parser.add_argument("--batch-size", type=int, default=16, help="images a process and step")
    parser.add_argument("--input-size", type=int, default=224, help="side of the images, pixels")
    parser.add_argument("--amp-dtype", default="float32", choices=main.DTYPES, help="autocast dtype")
    parser.add_argument("--compile", default="none", choices=main.COMPILE, help="what the fast job compiles")


def ids_of(args):
    """(student's, teacher's) block ids."""
    return [ids[: args.pairs] for ids in IDS[args.teacher_model]]


def timm_model(name, args):
    return timm.create_model(name, num_classes=NUM_CLASSES, img_size=args.input_size)


def fast_job(args, *more):
    """The program's own job, with further flags of main.py."""
    student_ids, teacher_ids = ([str(i) for i in ids] for ids in ids_of(args))
    with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        torch.save(timm_model(args.teacher_model, args).state_dict(), file.name)
        own = main.parse_args(
            [
                *("--model", args.model, "--teacher-model", args.teacher_model, "--teacher-path", file.name),
                *("--distillation-type", "soft", "--s-id", *student_ids, "--t-id", *teacher_ids),
                *("--data-set", "GRATINGS", "--batch-size", str(args.batch_size), "--device", args.device),
                *("--input-size", str(args.input_size)),
                *("--amp-dtype", args.amp_dtype, "--compile", args.compile, *more),
            ]
        )
        device = torch.device(args.device)
        model = main.build_student(own, NUM_CLASSES).to(device)
        ema = ModelEmaV3(model, own.model_ema_decay)
        hooks = spectral.FeatureHooks(model, main.feature_ids(own)[0])
        criterion = main.build_criterion(own, main.build_teacher(own, NUM_CLASSES, device, model))
    optimizer, _, _ = main.build_optimizer(own, model)
    amp_dtype = main.DTYPES[args.amp_dtype]
    scaler = GradScaler(device.type) if amp_dtype == torch.float16 else main.ConstantScaler(device.type)
    parallel = main.wrap_models(own, model, criterion, device)
    train = functools.partial(
        train_one_epoch,
        parallel,
        hooks,
        criterion,
        optimizer=optimizer,
        scaler=scaler,
        meter=main.new_meter(),
        epoch=0,
        device=device,
        prepare=datasets.Prepare(*main.models.normalization(model), own.reprob, own.remode, own.recount, device),
        seed_step=lambda *where: utils.seed_everything(samplers.counter_seed(own.seed, utils.rank(), *where)),
        should_stop=utils.StopRequest(),
        amp_dtype=amp_dtype,
        update_ema=functools.partial(ema.update, model),
    )
    return Job(model, parallel, hooks, criterion, optimizer, ema, train)


def plain_job(args):
    """The same job in the plain formulation."""
    device = torch.device(args.device)
    student_ids, teacher_ids = ids_of(args)
    model = timm_model(args.model, args).to(device)
    ema = plain.Ema(model, 0.99996)
    hooks = spectral.FeatureHooks(model, student_ids)
    teacher = timm_model(args.teacher_model, args).to(device)
    criterion = losses.DistillationLoss(
        nn.CrossEntropyLoss(label_smoothing=0.1),
        "soft",
        losses.FrozenTeacher(teacher, teacher_ids),
        feature_loss=plain.spectral_loss,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    amp_dtype = main.DTYPES[args.amp_dtype]
    scaler = GradScaler(device.type, enabled=amp_dtype == torch.float16)
    parallel = model
    if utils.world_size() > 1:
        parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    train = functools.partial(
        plain.train,
        parallel,
        hooks,
        criterion,
        optimizer=optimizer,
        scaler=scaler,
        ema=ema,
        device=device,
        amp_dtype=amp_dtype,
    )
    return Job(model, parallel, hooks, criterion, optimizer, ema, train)
