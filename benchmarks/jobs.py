"""The two training jobs to compare: the program's own and the reference implementation."""

import functools
from typing import Any, NamedTuple

import reference
import timm
import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel

import builders
import datasets
import faults
import flags
import losses
import models
import spectral
import utils
from checkpoint import TrainState
from engine import ConstantScaler, DivergenceWatch, train_one_epoch

IDS = {  # the published pairs: student blocks, teacher blocks
    "cait_s24_224": ([0, 1, 6, 7, 8, 9, 10, 11], [0, 1, 18, 19, 20, 21, 22, 23]),
    "swin_small_patch4_window7_224": ([0, 1, 2, 3], [0, 1, 2, 3]),
}
NUM_CLASSES = 1000


class Job(NamedTuple):
    """The parts of a job; `train(loader)` trains for an epoch."""

    state: Any
    hooks: Any
    criterion: Any
    prepare: Any
    train: Any


def add_flags(parser, batch_size=16):
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="student")
    parser.add_argument("--teacher-model", default="cait_s24_224", choices=IDS, help="teacher, with random weights")
    parser.add_argument(
        "--teacher-attention", default="auto", choices=("auto", "timm", "eager", "triton"), help="own job only"
    )
    parser.add_argument(
        "--teacher-dtype", default="float32", choices=("float16", "bfloat16", "float32"), help="own job only"
    )
    parser.add_argument("--pairs", type=int, default=8, help="how many of the published pairs, from the first")
    parser.add_argument("--depth", type=int, help="blocks of both models, for a quick try; all by default")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="batch size per process")
    parser.add_argument("--input-size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--amp-dtype", default="float32", choices=("float16", "bfloat16", "float32"), help="autocast")
    parser.add_argument("--compile", default="none", choices=("none", "teacher", "both"), help="own job only")


def timm_model(name, args):
    depth = {"depth": args.depth} if args.depth else {}
    return timm.create_model(name, num_classes=NUM_CLASSES, img_size=args.input_size, **depth)


def frozen_teacher(args, ids=()):
    """The program's own teacher; `build_teacher` would load weights, but these are random."""
    model = timm_model(args.teacher_model, args).to(args.device, getattr(torch, args.teacher_dtype))
    return losses.FrozenTeacher(models.fast_attention(model, args.teacher_attention), ids)


def fast_job(args):
    """The program's own job."""
    student_ids, teacher_ids = (ids[: args.pairs] for ids in IDS[args.teacher_model])
    own = flags.parse_args(
        [
            *("--model", args.model, "--teacher-model", args.teacher_model, "--distillation-type", "soft"),
            *("--s-id", *map(str, student_ids), "--t-id", *map(str, teacher_ids), "--data-set", "GRATINGS"),
            *("--batch-size", str(args.batch_size), "--device", args.device, "--input-size", str(args.input_size)),
            *("--amp-dtype", args.amp_dtype, "--compile", args.compile),
            *(("--model-kwargs", f"depth={args.depth}") if args.depth else ()),
        ]
    )
    device, amp_dtype = torch.device(args.device), getattr(torch, args.amp_dtype)
    model = builders.build_student(own, NUM_CLASSES).to(device)
    ema = ModelEmaV3(model, own.model_ema_decay)
    hooks = spectral.FeatureHooks(model, student_ids)
    criterion = builders.build_criterion(own, model, frozen_teacher(args, teacher_ids))
    optimizer, scheduler, _ = builders.build_optimizer(own, model, criterion)
    scaler = GradScaler(device.type) if amp_dtype == torch.float16 else ConstantScaler(device.type)
    state = TrainState(model, optimizer, scheduler, scaler, ema, ["loss", *losses.TERMS], criterion)
    state.parallel = builders.wrap_model(own, model, criterion, device)
    prepare = datasets.Prepare(*models.normalization(model), own.reprob, own.remode, own.recount, device)
    should_stop = faults.StopRequest()
    should_stop.between_steps()
    options = {
        "device": device,
        "prepare": prepare,
        "watch": DivergenceWatch(),
        "seed_step": lambda *where: utils.seed_everything(utils.counter_seed(own.seed, utils.rank(), *where)),
        "should_stop": should_stop,
        "amp_dtype": amp_dtype,
    }

    def train(loader, **more):
        state.start_epoch(0)
        return train_one_epoch(state, loader, criterion, hooks, **options | more)

    return Job(state, hooks, criterion, prepare, train)


def reference_job(args):
    """Build the same job in the reference implementation."""
    device, amp_dtype = torch.device(args.device), getattr(torch, args.amp_dtype)
    student_ids, teacher_ids = (ids[: args.pairs] for ids in IDS[args.teacher_model])
    model = timm_model(args.model, args).to(device)
    ema = reference.Ema(model, 0.99996)
    hooks = spectral.FeatureHooks(model, student_ids)
    teacher = losses.FrozenTeacher(timm_model(args.teacher_model, args).to(device), teacher_ids)
    base = nn.CrossEntropyLoss(label_smoothing=0.1)
    criterion = losses.DistillationLoss(base, "soft", teacher, feature_loss=reference.spectral_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    scaler = GradScaler(device.type, enabled=amp_dtype == torch.float16)
    state = TrainState(model, optimizer, None, scaler, ema, ["loss", *losses.TERMS], criterion)
    if utils.world_size() > 1:
        state.parallel = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    options = {"criterion": criterion, "hooks": hooks, "device": device, "amp_dtype": amp_dtype}
    return Job(state, hooks, criterion, nn.Identity(), functools.partial(reference.train, state, **options))


JOBS = {"reference": reference_job, "fast": fast_job}


def synthetic_batches(args, steps):
    """Return {job: batches in memory}, with float32 or uint8 images, pinned for a GPU."""
    shape = (args.batch_size, 3, args.input_size, args.input_size)
    pixels, labels = torch.randint(256, shape, dtype=torch.uint8), torch.randint(NUM_CLASSES, (args.batch_size,))
    batches = {"reference": (pixels.float() / 255, labels), "fast": (pixels, labels)}
    if args.device != "cpu":
        batches = {name: tuple(tensor.pin_memory() for tensor in batch) for name, batch in batches.items()}
    return {name: [batch] * steps for name, batch in batches.items()}


class Parts:
    """The parts of a job's training step, as functions without arguments that can be called repeatedly."""

    def __init__(self, job, images, labels, amp_dtype):
        self.job, self.images, self.labels = job, images, labels
        self.autocast = torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32)
        self.maps = self._run_student()[1]
        self.teacher_maps = self.teacher()[1]
        self.student()  # computes gradients for the optimizer

    def _run_student(self):
        with self.autocast:
            return self.job.state.parallel(self.images), self.job.hooks.pop()

    def student(self):
        """Run forward and backward without distillation."""
        self.job.state.optimizer.zero_grad()
        self.job.criterion.base_criterion(self._run_student()[0].float(), self.labels).backward()

    def teacher(self):
        with self.autocast:
            return self.job.criterion.teacher(self.images)

    def feature_loss(self):
        """Run forward and backward of all pairs, each on a new leaf with the layout of the hook's map."""
        for student, teacher in zip(self.maps, self.teacher_maps, strict=True):
            self.job.criterion.feature_loss(student.detach().requires_grad_(), teacher).backward()

    def optimizer(self):
        self.job.state.optimizer.step()

    def ema(self):
        self.job.state.ema.update(self.job.state.model)


PARTS = ("student", "teacher", "feature_loss", "optimizer", "ema")
