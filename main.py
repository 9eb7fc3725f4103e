"""Train a student by spectral feature matching, or score a checkpoint: flags, wiring, and the epoch loop."""

import argparse
import contextlib
import datetime
import functools
import inspect
import itertools
import math
import resource
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import PlateauLRScheduler, create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3, distribute_bn
from torch import nn
from torch.amp import GradScaler
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import attention
import datasets
import losses
import models
import samplers
import spectral
import utils
from engine import DivergenceWatch, evaluate, train_one_epoch
from utils import Parser, key_values, number

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
INTERPOLATIONS = ("bicubic", "bilinear", "random")
COMPILE = ("none", "teacher", "both")
SPECTRA_IMAGES = 32  # those of the paper's analysis

PART = number(float, 0, 1)  # a probability or a share
AMOUNT = number(float, 0)
POSITIVE = number(float, 0, ends=False)
COUNT = number(int, 0)
AT_LEAST_ONE = number(int, 1)
ON_OFF = argparse.BooleanOptionalAction


def get_args_parser():
    parser = Parser("Distil a vision transformer by spectral feature matching.")
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_student_flags(parser.add_argument_group("student").add_argument)
    add_teacher_flags(parser.add_argument_group("teacher and distillation").add_argument)
    add_spectral_flags(parser.add_argument_group("spectral").add_argument)
    add_optimisation_flags(parser.add_argument_group("optimisation").add_argument)
    add_augmentation_flags(parser.add_argument_group("augmentation").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    for flag in REFUSED:
        parser.add_argument(flag, nargs="?", const=True, help=argparse.SUPPRESS)
    return parser


def add_data_flags(add):
    add("--data-set", default="IMNET", choices=datasets.DATA_SETS, help="data set; GRATINGS is embedded")
    add("--data-path", help="folder of the data set; IMNET: train/ and val/, a folder a class in each")
    add("--inat-category", default="name", choices=datasets.INAT_CATEGORIES, help="level that is the class (INAT*)")
    add("--gratings-sizes", nargs=2, type=AT_LEAST_ONE, metavar=("TRAIN", "VAL"), help="images of GRATINGS")
    add("--input-size", type=AT_LEAST_ONE, default=224, help="side of the input images, pixels")
    share = number(float, 0.01, 1)
    add("--eval-crop-ratio", type=share, default=0.875, help="centre crop's part of the resized image")
    add("--batch-size", type=AT_LEAST_ONE, default=64, help="images a process and step")
    add("--num_workers", "--num-workers", type=COUNT, default=10, help="loader processes a process")
    add("--pin-mem", action=ON_OFF, default=True, help="page-locked batches, for faster copies to a GPU")
    add("--loader-timeout", type=AMOUNT, default=0, help="seconds to wait for a loader worker; 0: as long as it lives")
    add("--skip-bad-images", type=COUNT, default=0, help="unreadable training images to replace, a process")
    add("--repeated-aug", action=ON_OFF, default=True, help="each image of an epoch three times")


def add_student_flags(add):
    add("--model", default="deit_tiny_patch16_224", help="any timm model")
    add("--model-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="arguments of the timm model")
    add("--num-classes", type=AT_LEAST_ONE, help="classes of the head; default: those of the data set")
    add("--pretrained", action="store_true", help="start from timm's own weights")
    add("--finetune", default="", help="start from the weights of this file or URL")
    add("--drop", type=PART, default=0.0, help="dropout probability; timm's ViTs have it before the head")
    add("--drop-path", type=PART, default=0.0, help="stochastic depth probability")
    add("--attn-only", action="store_true", help="train attention, position embedding and head only")
    add("--train-mode", action=ON_OFF, default=True, help="off: no dropout and no stochastic depth")
    add("--model-ema", action=ON_OFF, default=True, help="keep a moving average of the weights")
    add("--model-ema-decay", type=number(float, 0, 1, ends=False), default=0.99996, help="its decay a step")
    add("--model-ema-force-cpu", action="store_true", help="keep it in host memory")


def add_teacher_flags(add):
    add("--distillation-type", default="none", choices=("none", "fft", "soft", "hard"), help="loss")
    add("--teacher-model", default="cait_s24_224", help="any timm model")
    add("--teacher-path", default="", help="its weights, file or URL; default: timm's own, downloaded")
    add("--teacher-kwargs", nargs="*", default=[], metavar="KEY=VALUE", help="as --model-kwargs")
    add(
        "--distillation-alpha",
        type=PART,
        default=0.5,
        help="weight of the logits' distillation; cross-entropy has 1 - alpha, in fft as well",
    )
    add("--distillation-tau", type=POSITIVE, default=1.0, help="temperature of soft distillation")


def add_spectral_flags(add):
    add("--s-id", nargs="+", type=COUNT, default=[], help="student blocks, in the order of --t-id")
    add("--t-id", nargs="+", type=COUNT, default=[], help="teacher blocks, one for each of --s-id")
    add("--w-fft", type=AMOUNT, default=0.2, help="weight of the feature loss")
    add("--distillation-beta", type=AMOUNT, default=1.0, help="further factor of the feature loss")
    add("--feature-loss", default="spectral", choices=("mse", "spectral"), help="mse: spatial twin, a control")
    add(
        "--spectral-impl",
        default="closed",
        choices=sorted(spectral.SPECTRAL_LOSSES),
        help="of the spectral loss: one number by two ways; closed is several times faster, fft the definition",
    )
    help_text = "log intensity over blocks every E epochs, at the cost of one forward of 32 images each time; 0: never"
    add("--spectra-every", type=COUNT, default=0, metavar="E", help=help_text)


def add_optimisation_flags(add):
    add("--epochs", type=AT_LEAST_ONE, default=300, help="epochs")
    add("--accum-steps", type=AT_LEAST_ONE, default=1, help="batches an optimizer step")
    add("--amp-dtype", choices=DTYPES, help="autocast dtype; default: float16 on a GPU, float32 on a CPU")
    add("--bce-loss", action="store_true", help="binary cross-entropy (DeiT III) instead of cross-entropy")
    add("--smoothing", type=PART, default=0.1, help="label smoothing")
    add("--opt", default="adamw", help="any timm optimizer")
    add("--opt-eps", type=POSITIVE, help="its epsilon; default: its own")
    add("--opt-betas", nargs="+", type=PART, help="its betas; default: its own")
    add("--clip-grad", type=POSITIVE, help="largest gradient norm; default: none")
    add("--momentum", type=PART, default=0.9, help="momentum of SGD")
    add("--weight-decay", type=AMOUNT, default=0.05, help="weight decay")
    add("--lr", type=AMOUNT, default=5e-4, help="learning rate at a global batch of 512")
    add("--unscale-lr", action="store_true", help="take --lr as it is")
    add("--sched", default="cosine", help="any timm scheduler")
    add("--lr-noise", nargs="+", type=PART, help="part or parts of the epochs with a noisy learning rate")
    add("--lr-noise-pct", type=number(float, 0, 1, ends=False), default=0.67, help="limit of that noise")
    add("--lr-noise-std", type=AMOUNT, default=1.0, help="its standard deviation")
    add("--warmup-lr", type=AMOUNT, default=1e-6, help="learning rate at the start of the warm-up")
    add("--min-lr", type=AMOUNT, default=1e-5, help="lowest learning rate of the schedule")
    add("--decay-epochs", type=POSITIVE, default=30, help="epochs between decays (step), or of the last (wsd, rsqrt)")
    add("--decay-rate", type=POSITIVE, default=0.1, help="factor of a decay (step, multistep, plateau), power (poly)")
    add("--warmup-epochs", type=COUNT, default=5, help="epochs of warm-up")
    add("--cooldown-epochs", type=COUNT, default=0, help="epochs at --min-lr after --epochs")
    add("--patience-epochs", type=COUNT, default=10, help="epochs without a gain before a decay (plateau)")


def add_augmentation_flags(add):
    add("--color-jitter", type=AMOUNT, default=0.4, help="strength; timm leaves it out where --aa is on")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's automatic augmentation, or none")
    add("--train-interpolation", default="bicubic", choices=INTERPOLATIONS, help="of the resized crop")
    add("--ThreeAugment", action="store_true", help="DeiT III's 3-Augment instead of --aa")
    add("--src", action="store_true", help="DeiT III's simple random crop")
    add("--reprob", type=PART, default=0.25, help="probability of random erasing")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="what erases")
    add("--recount", type=AT_LEAST_ONE, default=1, help="most boxes an image")
    add("--mixup", type=PART, default=0.0, help="alpha of mixup; 0: off")
    add("--cutmix", type=PART, default=0.0, help="alpha of CutMix; 0: off")
    add("--cutmix-minmax", nargs=2, type=PART, help="limits of the cut's side, instead of --cutmix")
    add("--mixup-prob", type=PART, default=1.0, help="probability of either")
    add("--mixup-switch-prob", type=PART, default=0.5, help="probability of CutMix where both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares a draw")


def add_run_flags(add):
    add("--output_dir", "--output-dir", default="", help="folder of checkpoints and logs; default: none")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add(
        "--compile",
        default="none",
        choices=COMPILE,
        help="torch.compile of the teacher, or of teacher, student and feature loss; a few minutes at the start",
    )
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of weights, order and augmentation")
    add("--resume", default="", help="checkpoint, URL, or auto: the newest whole one in --output_dir")
    add("--start_epoch", "--start-epoch", type=COUNT, help="first epoch; default: the checkpoint's next")
    add("--allow-world-size-change", action="store_true", help="go on with another number of processes than before")
    add("--overwrite", action="store_true", help="start anew in a folder that holds checkpoints")
    add("--save-every", type=COUNT, default=0, help="keep a checkpoint every so many epochs; 0: none")
    add("--eval", action="store_true", help="score the weights and stop")
    add("--eval-ema", action="store_true", help="score the moving average, too or (--eval) instead")
    add("--dist-eval", action=ON_OFF, default=True, help="share evaluation between the processes")
    add("--export", default="", metavar="FILE", help="write --resume's weights alone as safetensors, and stop")
    add("--dry-run", action="store_true", help="build all, run one batch, say what was built, and stop")
    add("--world_size", "--world-size", type=AT_LEAST_ONE, help="number of processes that is expected")
    add("--dist_url", "--dist-url", default="env://", help="rendezvous address")
    add("--dist-timeout", type=POSITIVE, default=1800, help="seconds before a hung collective ends the job")


REFUSED = {
    "--cosub": "it trains two sub-models against each other and leaves the teacher no place",
    "--resplit": "it needs augmentation splits, which this loader does not make",
}


def parse_args(argv=None):
    """Parses the flags and checks them; a second parse without defaults tells which ones were given."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    parser._defaults.clear()
    given = set(vars(parser.parse_args(argv)))
    check_args(args, given)
    return args


def check_args(args, given):
    """Checks flags by themselves and against each other, before any data or model is touched.

    Args:
        args: the parsed flags; those of REFUSED are taken out.
        given: names of the flags that were on the command line.

    Raises:
        utils.UserError: with one line.
    """
    for flag, why in REFUSED.items():
        if vars(args).pop(flag.lstrip("-")) is not None:
            raise utils.UserError(f"{flag} has no place here: {why}; leave it out")
    check_modes(args)
    check_paths(args)
    check_names(args)
    if args.eval or args.export:
        return  # a training command with --eval added is fine
    for line in without_effect(UNUSED, args, given):
        raise utils.UserError(f"{line}: leave it out")
    for line in without_effect(NOTED, args, given):
        utils.say(line)
    check_pairs(args)
    check_schedule(args, given)
    check_optimizer(args, given)
    if args.eval_ema and args.model_ema_force_cpu and torch.device(args.device).type != "cpu":
        raise utils.UserError("--eval-ema scores on --device, where --model-ema-force-cpu keeps no average: give one")
    if args.ThreeAugment and "aa" in given:
        raise utils.UserError("--aa and --ThreeAugment exclude each other: give one")
    if args.train_interpolation == "random" and (args.src or datasets.keeps_whole(args.input_size, args.ThreeAugment)):
        raise utils.UserError(
            "--train-interpolation random is of DeiT's random resized crop, which --src and small images do without: "
            "give bicubic or bilinear"
        )
    if args.cutmix_minmax and "cutmix" in given:
        raise utils.UserError("--cutmix-minmax sets the cut in place of --cutmix: give one")
    if args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1]:
        raise utils.UserError("--cutmix-minmax takes the lower limit, then the upper one")
    if mixup_wanted(args) and args.batch_size % 2:
        raise utils.UserError(
            f"--mixup and --cutmix mix pairs of images: give an even --batch-size, not {args.batch_size}"
        )
    if args.bce_loss and args.smoothing > 0:
        raise utils.UserError("--bce-loss would take every smoothed class as present: give --smoothing 0 with it")


SPECTRAL_FLAGS = ("s_id", "t_id", "w_fft", "distillation_beta", "feature_loss", "spectral_impl")
WITHOUT_MINIMUM = ("step", "multistep", "constant")  # schedules that do not know --min-lr
UNUSED = (  # (what the flags need, whether it is there, the flags)
    (
        "--distillation-type soft, hard or fft",
        lambda args: args.distillation_type != "none",
        ("distillation_alpha", "teacher_model", "teacher_path", "teacher_kwargs", *SPECTRAL_FLAGS),
    ),
    ("--distillation-type soft", lambda args: args.distillation_type == "soft", ("distillation_tau",)),
    ("--feature-loss spectral", lambda args: args.feature_loss == "spectral", ("spectral_impl",)),
    ("--data-set GRATINGS", lambda args: args.data_set == "GRATINGS", ("gratings_sizes",)),
    ("--data-set INAT or INAT19", lambda args: args.data_set.startswith("INAT"), ("inat_category",)),
    ("--model-ema", lambda args: args.model_ema, ("model_ema_decay", "model_ema_force_cpu", "eval_ema")),
    (
        "larger images or --ThreeAugment",
        lambda args: not datasets.keeps_whole(args.input_size, args.ThreeAugment),
        ("src",),
    ),
    ("a later timm", lambda args: inspect.getsource(Scheduler).count("self.noise_std") > 1, ("lr_noise_std",)),
    ("--output_dir", lambda args: args.output_dir, ("save_every", "overwrite", "spectra_every")),
)
NOTED = (  # the same, of flags that DeiT's command lines spell out or that stay while others change: said, not refused
    ("a data set of files", lambda args: args.data_set != "GRATINGS", ("data_path",)),
    ("a data set of image files", lambda args: args.data_set not in ("GRATINGS", "CIFAR"), ("skip_bad_images",)),
    ("larger images", lambda args: args.input_size > datasets.SMALL_IMAGE, ("eval_crop_ratio",)),
    (
        "--aa none or --ThreeAugment",  # timm's rule
        lambda args: args.ThreeAugment or args.aa.lower() in ("", "none") or "3a" in args.aa,
        ("color_jitter",),
    ),
    ("--train-mode", lambda args: args.train_mode, ("drop", "drop_path")),
    ("--num_workers above 0", lambda args: args.num_workers > 0, ("loader_timeout",)),
    ("--resume", lambda args: args.resume, ("allow_world_size_change",)),
    ("--device cuda", lambda args: args.device != "cpu", ("pin_mem", "model_ema_force_cpu")),
    ("a teacher", lambda args: args.compile != "teacher" or args.distillation_type != "none", ("compile",)),
    ("--mixup or --cutmix", lambda args: mixup_wanted(args), ("mixup_prob", "mixup_mode")),
    (
        "both --mixup and --cutmix",
        lambda args: args.mixup > 0 and (args.cutmix > 0 or args.cutmix_minmax),
        ("mixup_switch_prob",),
    ),
    ("--reprob above 0", lambda args: args.reprob > 0, ("remode", "recount")),
    ("--lr-noise", lambda args: args.lr_noise, ("lr_noise_pct", "lr_noise_std")),
    ("--sched plateau", lambda args: args.sched == "plateau", ("patience_epochs",)),
    ("--warmup-epochs above 0", lambda args: args.warmup_epochs > 0, ("warmup_lr",)),
    ("--sched step, wsd or rsqrt", lambda args: args.sched in ("step", "wsd", "rsqrt"), ("decay_epochs",)),
    (
        "--sched step, multistep, plateau or poly",
        lambda args: args.sched in ("step", "multistep", "plateau", "poly"),
        ("decay_rate",),
    ),
    ("a --sched that goes down to it", lambda args: args.sched not in WITHOUT_MINIMUM, ("min_lr",)),
    ("--distillation-alpha above 0", lambda args: args.distillation_alpha > 0, ("distillation_tau",)),
    (
        "--w-fft and --distillation-beta above 0",
        lambda args: args.distillation_type == "none" or args.w_fft * args.distillation_beta > 0,
        ("s_id", "t_id", "feature_loss", "spectral_impl"),
    ),
)


def without_effect(rows, args, given):
    """A line for each flag that was given and that nothing will read."""
    for needs, used, names in rows:
        for name in names:
            if name in given and not used(args):
                yield f"--{name.replace('_', '-')} has no effect without {needs}"


def check_modes(args):
    exclusive = [flag for flag in ("eval", "export", "dry_run") if getattr(args, flag)]
    if len(exclusive) > 1:
        first, second = (f"--{flag.replace('_', '-')}" for flag in exclusive[:2])
        raise utils.UserError(f"{first} and {second} exclude each other: give one")
    if args.eval and not (args.resume or args.finetune or args.pretrained):
        raise utils.UserError("--eval without weights would score a random model: give --resume FILE or --pretrained")
    if args.eval and args.eval_ema and not (args.resume or args.finetune):
        raise utils.UserError("--eval-ema: --pretrained weights have no moving average: leave it out")
    if args.pretrained and args.finetune:
        raise utils.UserError("--pretrained and --finetune both set the first weights: give one")
    if args.resume not in ("", "auto") and (args.pretrained or args.finetune):
        other = "--finetune" if args.finetune else "--pretrained"
        raise utils.UserError(f"--resume brings the weights, so {other} has no effect: leave it out")
    if args.resume == "auto" and args.start_epoch is not None:
        raise utils.UserError("--start_epoch would begin there anew at each --resume auto: name the file to resume")
    if args.resume == "auto" and not args.output_dir:
        raise utils.UserError("--resume auto looks into --output_dir, which is not given: name the run's folder")
    if args.resume and args.overwrite:
        raise utils.UserError("--resume goes on with a run and --overwrite starts anew: give one")


def check_paths(args):
    if args.data_set != "GRATINGS" and not args.export:
        if not args.data_path:
            raise utils.UserError(f"--data-set {args.data_set} needs --data-path, the folder of its images")
        if not Path(args.data_path).is_dir():
            raise utils.UserError(f"--data-path {args.data_path} is not a folder: name the folder of the data set")
    teacher_path = args.teacher_path if args.distillation_type != "none" and not args.eval else ""
    for flag, path in (("resume", args.resume), ("finetune", args.finetune), ("teacher-path", teacher_path)):
        if path and path != "auto" and "://" not in path and not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "does not exist"
            hint = f", or give --output_dir {path} --resume auto" if flag == "resume" and Path(path).is_dir() else ""
            raise utils.UserError(f"--{flag} {path} {found}: name a file of weights{hint}")


def check_names(args):
    if args.opt == "adahessian":
        raise utils.UserError(
            "--opt adahessian needs second derivatives, which this loop does not take: choose another"
        )
    models.check_name(args.model)
    if args.distillation_type != "none" and not args.eval:
        models.check_name(args.teacher_model)
    utils.check_device(args.device)
    for flag, pairs in (("--model-kwargs", args.model_kwargs), ("--teacher-kwargs", args.teacher_kwargs)):
        with utils.as_user_error(f"{flag}: ", utils.UserError):
            key_values(pairs)
    for flag, key in (("--drop", "drop_rate"), ("--drop-path", "drop_path_rate")):
        if key in key_values(args.model_kwargs):
            raise utils.UserError(f"--model-kwargs {key} would win over {flag}: give {flag} instead")


def check_pairs(args):
    if args.distillation_type == "none":
        return
    if len(args.s_id) != len(args.t_id):
        raise utils.UserError(
            f"--s-id has {len(args.s_id)} ids but --t-id has {len(args.t_id)}: give one teacher block per student block"
        )
    weight = args.w_fft * args.distillation_beta
    if weight > 0 and not args.s_id:
        raise utils.UserError("the feature loss needs --s-id and --t-id: give both, or --w-fft 0")
    if weight == 0 and args.distillation_type == "fft":
        raise utils.UserError("--distillation-type fft is the feature loss alone: give --w-fft above 0")
    if weight == 0 and args.distillation_alpha == 0:
        raise utils.UserError("the teacher has no part in this loss: give --distillation-alpha or --w-fft above 0")


def check_schedule(args, given):
    if args.warmup_epochs > args.epochs:
        if "warmup_epochs" in given:
            raise utils.UserError(
                f"--warmup-epochs {args.warmup_epochs} is longer than the run of --epochs {args.epochs}: lower it"
            )
        utils.say(f"warning: all {args.epochs} epochs are warm-up, whose default is {args.warmup_epochs} epochs")
    if args.start_epoch and args.sched == "plateau":
        raise utils.UserError("--start_epoch: --sched plateau goes by the accuracies so far: give --resume alone")
    if args.lr_noise and len(args.lr_noise) > 2:
        raise utils.UserError(f"--lr-noise takes where the noise begins and ends, not {len(args.lr_noise)} numbers")
    if args.lr_noise and args.lr_noise != sorted(set(args.lr_noise)):
        raise utils.UserError("--lr-noise ends before it begins: give the smaller number first")


def check_optimizer(args, given):
    """What timm makes of the flags of optimizer and schedule shows with any parameters."""
    plain = argparse.Namespace(**vars(args) | {"opt_eps": None, "opt_betas": None})
    defaults = build_optimizer(plain, nn.Linear(1, 1))[0].defaults
    for flag, option in (("momentum", "momentum"), ("opt_eps", "eps")):
        if flag in given and option not in defaults:
            utils.say(f"--{flag.replace('_', '-')} has no effect with --opt {args.opt}")
    num_betas = len(defaults.get("betas", ()))
    if args.opt_betas and len(args.opt_betas) != num_betas:
        raise utils.UserError(f"--opt-betas: --opt {args.opt} has {num_betas}, not {len(args.opt_betas)}")
    build_optimizer(args, nn.Linear(1, 1))


# Building


def build_datasets(args):
    """(training set or None, validation set), with uint8 transforms."""
    num_images = dict(zip(("train", "val"), args.gratings_sizes or (None, None), strict=True))

    def build(split, transform):
        with utils.as_user_error("", ValueError, OSError, RuntimeError):
            return datasets.build_dataset(
                args.data_set,
                split,
                args.data_path,
                transform,
                inat_category=args.inat_category,
                num_images=num_images[split],
            )

    dataset_val = build("val", datasets.eval_transform(args.input_size, args.eval_crop_ratio))
    if args.eval:
        return None, dataset_val
    with utils.as_user_error(f"--aa {args.aa}: ", Exception):
        transform = datasets.train_transform(
            args.input_size,
            aa=None if args.aa.lower() in ("", "none") else args.aa,
            color_jitter=args.color_jitter,
            interpolation=args.train_interpolation,
            hflip=0.0 if args.data_set == "GRATINGS" else 0.5,  # a mirrored grating is of another class
            three_augment=args.ThreeAugment,
            simple_crop=args.src,
        )
    dataset_train = build("train", transform)
    if dataset_train.classes != dataset_val.classes:
        odd = sorted(set(dataset_train.classes) ^ set(dataset_val.classes))
        raise utils.UserError(f"train and val have different classes, {odd[0]} among them: they must agree")
    return dataset_train, dataset_val


def build_loaders(args, dataset_train, dataset_val):
    """(training loader or None, its sampler, validation loader)."""
    rank, size = utils.rank(), utils.world_size()
    sharded = (size, rank) if args.dist_eval else (1, 0)
    common = {"num_workers": args.num_workers, "pin_memory": args.pin_mem and args.device != "cpu"}
    common |= {"timeout": args.loader_timeout, "worker_init_fn": utils.begin_loader_worker}
    loader_val = datasets.build_loader(
        dataset_val,
        samplers.ShardSampler(dataset_val, *sharded),
        int(1.5 * args.batch_size),
        drop_last=False,
        **common,
    )
    if dataset_train is None:
        return None, None, loader_val
    if args.repeated_aug:
        order = samplers.RASampler(dataset_train, size, rank, seed=args.seed)
    else:
        order = DistributedSampler(dataset_train, size, rank, seed=args.seed)
    sampler = samplers.SeededSampler(order, args.seed, rank)
    if len(sampler) < args.batch_size:
        raise utils.UserError(
            f"an epoch has {len(sampler)} images for each of {size} processes, "
            f"but --batch-size is {args.batch_size}: lower it"
        )
    seeded = datasets.SeededDataset(dataset_train, args.skip_bad_images)
    return datasets.build_loader(seeded, sampler, args.batch_size, drop_last=True, **common), sampler, loader_val


def build_student(args, num_classes):
    """The student on the CPU, from random, timm's or a file's weights, ready for the chosen kind of distillation."""
    with utils.main_first() if args.pretrained else contextlib.nullcontext():
        model = models.build_model(
            args.model,
            num_classes,
            input_size=args.input_size,
            kwargs=key_values(args.model_kwargs),
            pretrained=args.pretrained,
            drop=args.drop,
            drop_path=args.drop_path,
        )
    own_classes = model.pretrained_cfg["num_classes"]
    if args.pretrained and own_classes != num_classes:
        if args.eval:
            raise utils.UserError(f"--pretrained weights are for {own_classes} classes, the data set has {num_classes}")
        utils.say(
            f"--pretrained: the weights' head has {own_classes} classes, not {num_classes}; a fresh head is trained"
        )
    if args.finetune:
        with utils.as_user_error(f"--finetune {args.finetune}: ", utils.UserError):
            weights = utils.extract_weights(utils.load_checkpoint(args.finetune), ema=args.eval and args.eval_ema)
            replaced = models.load_weights(model, weights, replace_head=not args.eval)
        if replaced:
            utils.say(f"--finetune: the file's head has {replaced} classes, not {num_classes}; a fresh head is trained")
    if hasattr(model, "set_distilled_training"):
        if not args.train_mode and args.distillation_type in ("soft", "hard"):
            raise utils.UserError(f"--no-train-mode keeps the heads of {args.model} from learning apart: leave it out")
        # The distillation head takes part only where there are teacher logits to learn.
        model.set_distilled_training(args.distillation_type in ("soft", "hard"))
    if args.attn_only:
        freeze_all_but_attention(model)
    return model


def freeze_all_but_attention(model):
    """DeiT III's fine-tuning (arXiv 2203.09795): attention, position embedding and heads are trained, nothing else."""
    heads = model.pretrained_cfg["classifier"]
    heads = (heads,) if isinstance(heads, str) else heads
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise utils.UserError(f"--attn-only: {model.pretrained_cfg['architecture']} has no attention blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = ".attn." in name or name == "pos_embed" or name.startswith(tuple(heads))


def build_teacher(args, num_classes, device, student):
    """The frozen teacher on its device, or None where the kind of distillation needs none."""
    if args.distillation_type == "none":
        return None
    named = utils.as_user_error("no teacher (its weights can come from a file, --teacher-path): ", utils.UserError)
    with utils.main_first() if not args.teacher_path else contextlib.nullcontext(), named:
        model = models.build_model(
            args.teacher_model,
            num_classes,
            input_size=args.input_size,
            kwargs=key_values(args.teacher_kwargs),
            pretrained=not args.teacher_path,
        )
    own_classes = model.pretrained_cfg["num_classes"]
    if not args.teacher_path and own_classes != num_classes:
        raise utils.UserError(
            f"the teacher's weights are for {own_classes} classes and the data set has {num_classes}: "
            "give --teacher-path, the weights of a teacher of these classes"
        )
    if args.teacher_path:
        with utils.as_user_error(f"--teacher-path {args.teacher_path}: ", utils.UserError):
            models.load_weights(model, utils.extract_weights(utils.load_checkpoint(args.teacher_path)))
    scale, shift = losses.renormalisation(normalisation(student), normalisation(model), device)
    with utils.as_user_error("--t-id: ", ValueError):
        model = attention.speed_up(model.to(device))
        return losses.FrozenTeacher(model, feature_ids(args)[1], scale, shift)


def normalisation(model):
    """(mean, std) of the images that a model was made for, as timm knows them."""
    return tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])


def feature_ids(args):
    """(student ids, teacher ids); none where the feature loss has no weight."""
    used = args.distillation_type != "none" and args.w_fft * args.distillation_beta > 0
    return (args.s_id, args.t_id) if used else ([], [])


def build_criterion(args, teacher):
    if args.bce_loss:
        base = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    else:  # mixup smooths the labels itself
        base = nn.CrossEntropyLoss(label_smoothing=0.0 if mixup_wanted(args) else args.smoothing)
    return losses.DistillationLoss(
        base,
        args.distillation_type,
        teacher,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
        beta=args.distillation_beta,
        w_fft=args.w_fft,
        feature_loss=spectral.FEATURE_LOSSES["mse" if args.feature_loss == "mse" else args.spectral_impl],
    )


def mixup_wanted(args):
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None


def build_mixup(args, num_classes):
    if not mixup_wanted(args):
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


def build_optimizer(args, model):
    """(optimizer, scheduler, number of epochs with the cool-down)."""
    global_batch = args.batch_size * args.accum_steps * utils.world_size()
    lr = args.lr if args.unscale_lr else args.lr * global_batch / 512
    # The fused kernel takes the scaler's verdict on the gradient on the device; others make every step wait for it.
    options = {"eps": args.opt_eps, "betas": args.opt_betas, "fused": True if args.opt == "adamw" else None}
    with utils.as_user_error(f"--opt {args.opt}: timm cannot build it: ", Exception):
        optimizer = create_optimizer_v2(
            model,
            opt=args.opt,
            lr=lr,
            weight_decay=args.weight_decay,
            momentum=args.momentum,
            **{name: value for name, value in options.items() if value is not None},
        )
    with utils.as_user_error(f"--sched {args.sched}: ", Exception):
        scheduler, num_epochs = create_scheduler_v2(
            optimizer,
            sched=args.sched,
            num_epochs=args.epochs,
            decay_epochs=args.decay_epochs,
            cooldown_epochs=args.cooldown_epochs,
            patience_epochs=args.patience_epochs,
            decay_rate=args.decay_rate,
            min_lr=args.min_lr,
            # timm's plateau would keep the warm-up's rate where there is no warm-up.
            warmup_lr=args.warmup_lr if args.warmup_epochs or args.sched != "plateau" else lr,
            warmup_epochs=args.warmup_epochs,
            noise=args.lr_noise,
            noise_pct=args.lr_noise_pct,
            noise_std=args.lr_noise_std,
        )
        if args.cooldown_epochs and num_epochs == args.epochs:
            raise ValueError("timm's schedule of this name has no cool-down: leave --cooldown-epochs out")
        if scheduler is None:  # what older releases of timm say of an unknown name
            raise ValueError("timm has no such scheduler")
    return optimizer, scheduler, num_epochs


def build_probe(args, model, teacher, dataset_val, prepare, device):
    """epoch -> what --spectra-every adds to its line: the student's intensity curve, and the first time the teacher's.

    The images are those that analyze.py takes, whatever the run's seed. Nothing random is drawn, so that training with
    and without this is the same.
    """
    if not args.spectra_every:
        return lambda epoch: {}
    with utils.as_user_error("--spectra-every: ", ValueError):
        for network in [model] if teacher is None else [model, teacher.model]:
            spectral.describe_blocks(network)
    images = datasets.load_batch(dataset_val, samplers.random_subset(len(dataset_val), SPECTRA_IMAGES, seed=0))

    def probe(epoch):
        if (epoch + 1) % args.spectra_every or utils.rank() != 0:
            return {}
        inputs = prepare.eval()(images.to(device))
        curves = {"student_intensity": spectral.intensity_curve(model, inputs)}
        if teacher is not None and epoch + 1 == args.spectra_every:
            curves["teacher_intensity"] = spectral.intensity_curve(teacher.model, inputs, forward=teacher)
        return curves

    return probe


def wrap_models(args, model, criterion, device):
    """Returns the student to train with: compiled where --compile says so, and parallel where processes are several.

    What the criterion holds is compiled in place. The student itself stays bare for evaluation, optimizer and
    checkpoints. Hooks are compiled along with their models.
    """
    wrapped = model
    if args.compile != "none" and can_compile(device):
        compiled = functools.partial(torch.compile, dynamic=False)
        if criterion.teacher is not None:
            criterion.teacher.model = compiled(criterion.teacher.model)
        if args.compile == "both":
            wrapped = compiled(model)
        if args.compile == "both" and criterion.feature_loss is not spectral.spectral_loss:
            criterion.feature_loss = compiled(criterion.feature_loss)  # there is no compiler for complex numbers
    if utils.world_size() == 1:
        return wrapped
    device_ids = [device] if device.type == "cuda" else None
    return DistributedDataParallel(wrapped, device_ids=device_ids, gradient_as_bucket_view=True)


def can_compile(device):
    """Tries the compiler on next to nothing, and says why it does not work where it does not."""
    try:
        torch.compile(torch.cos)(torch.zeros(2, device=device))
    except Exception as error:
        reason = " ".join(str(error).split("\n\n")[0].split())
        utils.say(f"--compile: no compiler works here, so nothing is compiled: {reason}")
        return False
    return True


class ConstantScaler(GradScaler):
    """A GradScaler whose scale stays 1: it only skips steps whose gradient is not finite."""

    def __init__(self, device):
        super().__init__(device, init_scale=1.0)

    def update(self):
        super().update(new_scale=1.0)


# State


class RunState:
    """Everything that a resume needs: models, optimizer, schedule, and how far the run has come.

    `epoch` is the epoch in progress, `step` the batches done of it, `meter` holds its sums so far.
    """

    def __init__(self, model, optimizer, scheduler, scaler, ema):
        self.model, self.optimizer, self.scheduler, self.scaler, self.ema = model, optimizer, scheduler, scaler, ema
        self.epoch, self.step, self.meter = 0, 0, new_meter()
        self.best_accuracy, self.best_epoch = 0.0, -1

    def finish_epoch(self, accuracy):
        """Notes a whole epoch; returns whether its accuracy, percent, is the best so far."""
        best = accuracy > self.best_accuracy or self.best_epoch < 0
        if best:
            self.best_accuracy, self.best_epoch = accuracy, self.epoch
        self.epoch, self.step, self.meter = self.epoch + 1, 0, new_meter()
        return best

    def to_dict(self, args):
        """Tensors and plain types, under DeiT's keys where it has them; `epoch` is the last whole epoch, as there."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self._plateau_state(),
            "scaler": None if isinstance(self.scaler, ConstantScaler) else self.scaler.state_dict(),
            "model_ema": self.ema.module.state_dict() if self.ema is not None else None,
            "epoch": self.epoch - 1,
            "step": self.step,
            "meter": self.meter.state_dict(),
            "max_accuracy": self.best_accuracy,
            "best_epoch": self.best_epoch,
            "world_size": utils.world_size(),
            "args": vars(args),
        }

    def load(self, checkpoint, args):
        """Goes on where a checkpoint of ours, of DeiT or of the original stands.

        The flags win over what the file says of learning rate and schedule, plateau's excepted; differences are said.

        Raises:
            utils.UserError: the file does not fit.
        """
        weights, own = utils.extract_weights(checkpoint), self.model.state_dict()
        changed = [key for key in weights.keys() & own.keys() if weights[key].shape != own[key].shape]
        if changed:  # the optimizer's moments would not fit
            raise utils.UserError(
                f"--resume: the file is of another model or image size ({changed[0]}): use --finetune"
            )
        models.load_weights(self.model, weights)
        self._load_optimizer(checkpoint["optimizer"])
        if checkpoint.get("scaler") and not isinstance(self.scaler, ConstantScaler):
            self.scaler.load_state_dict(checkpoint["scaler"])
        if self.ema is not None and checkpoint.get("model_ema"):
            models.load_weights(self.ema.module, utils.extract_weights(checkpoint, ema=True))
        elif self.ema is not None:
            utils.say("--resume: the file holds no moving average; it starts from the weights")
            self.ema.set(self.model)
        self.epoch, self.step = checkpoint["epoch"] + 1, resumed_step(args, checkpoint)
        if self.step:
            self.meter.load_state_dict(checkpoint["meter"])
        self.best_accuracy, self.best_epoch = checkpoint.get("max_accuracy", 0.0), checkpoint.get("best_epoch", -1)
        say_changes(args, utils.stored_args(checkpoint))
        self._set_schedule(checkpoint)

    def start_at(self, epoch):
        """Begins with the given epoch, whatever was loaded."""
        self.epoch, self.step, self.meter = epoch, 0, new_meter()
        self.scheduler.step(max(epoch - 1, 0))

    def _set_schedule(self, checkpoint):
        """A schedule is a function of the epoch, but for plateau, which is one of the accuracies so far."""
        stored = checkpoint.get("lr_scheduler") or {}
        if not isinstance(self.scheduler, PlateauLRScheduler):
            if self.epoch > 0:
                self.scheduler.step(self.epoch - 1)
        elif stored.keys() >= PLATEAU_STATE:
            vars(self.scheduler.lr_scheduler).update({name: stored[name] for name in PLATEAU_STATE})
            self.scheduler.restore_lr = stored["restore_lr"]
            for group, lr in zip(self.optimizer.param_groups, stored["lr"], strict=True):
                group["lr"] = lr
            utils.say("--resume: --sched plateau goes on with the learning rate of the file, whatever --lr is")

    def _plateau_state(self):
        if not isinstance(self.scheduler, PlateauLRScheduler):
            return None
        state = {name: getattr(self.scheduler.lr_scheduler, name) for name in sorted(PLATEAU_STATE)}
        lr = [group["lr"] for group in self.optimizer.param_groups]
        return state | {"restore_lr": self.scheduler.restore_lr, "lr": lr}

    def _load_optimizer(self, stored):
        flags = [{k: v for k, v in group.items() if k in FLAGGED} for group in self.optimizer.param_groups]
        with utils.as_user_error("--resume: the file's optimizer does not fit: ", ValueError, KeyError):
            groups = [group | flag for group, flag in zip(stored["param_groups"], flags, strict=True)]
            self.optimizer.load_state_dict({**stored, "param_groups": groups})


PLATEAU_STATE = {"best", "num_bad_epochs", "cooldown_counter", "last_epoch"}
# Options of an optimizer that flags set, or that are a matter of speed.
FLAGGED = ("lr", "initial_lr", "weight_decay", "betas", "eps", "momentum", "fused", "foreach")


def new_meter():
    return utils.Meter(["loss", *losses.TERMS])


def milestone(args, epoch):
    return epoch if args.save_every and (epoch + 1) % args.save_every == 0 else None


def say_changes(args, stored):
    for name, value in vars(args).items():
        if name not in ("resume", "start_epoch", "overwrite") and name in stored and stored[name] != value:
            utils.say(f"--resume: {name} was {stored[name]} and is {value} from now on")


def resumed_step(args, checkpoint):
    """The step of the epoch in progress to go on with, also where a step has other images than before."""
    step, stored = checkpoint.get("step", 0), utils.stored_args(checkpoint)
    before = stored.get("batch_size", args.batch_size) * checkpoint.get("world_size", utils.world_size())
    now = args.batch_size * utils.world_size()
    if before == now and stored.get("accum_steps", args.accum_steps) == args.accum_steps:
        return step
    return step * before // now // args.accum_steps * args.accum_steps


def find_resume(args, folder):
    """The checkpoint to go on from (or to score), or None for a fresh run.

    Raises:
        utils.UserError: there is none that is whole, or it does not belong to this command line or folder.
    """
    if args.resume == "auto":
        path, checkpoint = (folder or utils.CheckpointFolder(args.output_dir)).load_newest()
        if path is None and (args.eval or args.export):
            raise utils.UserError(f"--resume auto: there is no checkpoint in {args.output_dir}: name a file")
        utils.say(f"--resume auto: {path}" if path else "--resume auto: no checkpoint yet, a fresh run")
        if path and (args.finetune or args.pretrained):
            utils.say("--resume auto brings the weights, so --finetune or --pretrained has no effect")
    else:
        inside = folder is not None and Path(args.resume).resolve().parent == folder.folder.resolve()
        if folder is not None and not args.overwrite and folder.files() and not (args.resume and inside):
            raise utils.UserError(
                f"{folder.folder} holds a run: --resume auto goes on with it, --overwrite starts anew"
            )
        checkpoint = utils.load_checkpoint(args.resume) if args.resume else None
    if checkpoint is not None and not (args.eval or args.export):
        check_resume(args, checkpoint)
        match_world_size(args, checkpoint)
    return checkpoint


def check_resume(args, checkpoint):
    missing = [key for key in ("model", "optimizer", "epoch") if key not in checkpoint]
    if missing:
        raise utils.UserError(f"--resume: the file has no '{missing[0]}', so training cannot go on: use --finetune")
    before = utils.stored_args(checkpoint).get("opt", args.opt)
    if before != args.opt:
        raise utils.UserError(f"--resume: --opt was {before} and is {args.opt}: use --finetune to start with another")


def match_world_size(args, checkpoint):
    before, now = checkpoint.get("world_size", utils.world_size()), utils.world_size()
    if before == now:
        return
    change = f"{before} processes wrote the checkpoint and {now} are here"
    if not args.allow_world_size_change:
        raise utils.UserError(f"--resume: {change}: start {before}, or give --allow-world-size-change")
    utils.say(
        f"--resume: {change}: from now on a step has {args.batch_size * args.accum_steps * now} images, the learning "
        "rate follows unless --unscale-lr is given, and each process sees other images in another augmentation"
    )


def stop_early(args, state, folder, number, num_steps):
    """Saves the run in the middle of an epoch and ends it.

    Raises:
        utils.Stopped: always.
    """
    saved = folder is not None and folder.save(state.to_dict(args))
    then = "--resume auto goes on from here" if saved else "this state was not saved"
    raise utils.Stopped(number, f" in epoch {state.epoch}, after step {state.step} of {num_steps}: {then}")


# What was built, in words


@torch.no_grad()
def describe_pairs(args, model, hooks, teacher, device):
    """Runs a black image through both models and says which map is matched with which, and what is pooled."""
    image = torch.zeros(1, 3, args.input_size, args.input_size, device=device)
    with utils.as_user_error(
        f"--input-size {args.input_size} does not fit {args.model}: ", AssertionError, RuntimeError
    ):
        model.eval()(image)
        student_maps = hooks.pop()
    if teacher is None:
        return
    name = args.teacher_model
    with utils.as_user_error(f"--input-size {args.input_size} does not fit {name}: ", AssertionError, RuntimeError):
        _, teacher_maps = teacher(image)
    if not hooks.ids:
        return
    blocks = spectral.describe_blocks(model), spectral.describe_blocks(teacher.model)
    utils.say(f"pairs of blocks (student {args.model}, teacher {args.teacher_model}):")
    for i, j, s, t in zip(hooks.ids, teacher.hooks.ids, student_maps, teacher_maps, strict=True):
        aligned = spectral.align(s, t)
        pooled = [who for who, a, b in (("student", s, aligned[0]), ("teacher", t, aligned[1])) if a.shape != b.shape]
        note = f"{' and '.join(pooled)} pooled to {list(aligned[0].shape[1:])}" if pooled else "same shape"
        utils.say(
            f"  {blocks[0][i]['module']} {list(s.shape[1:])} <- {blocks[1][j]['module']} {list(t.shape[1:])}: {note}"
        )


def dry_run(args, train, loader, device, num_epochs):
    """Trains on two optimizer steps' batches, and says what the second one cost and what the run would."""
    batches = list(itertools.islice(loader, 2 * args.accum_steps))
    train(batches[: args.accum_steps], meter=new_meter(), epoch=0)  # warm-up
    timed = batches[args.accum_steps :] or batches
    began = time.perf_counter()
    train(timed, meter=new_meter(), epoch=0)
    seconds = (time.perf_counter() - began) / len(timed)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = datetime.timedelta(seconds=int(seconds * len(loader) * num_epochs))
    utils.say(f"dry run: {memory / 2**20:.0f} MiB a process, {seconds:.3f} s a step without waiting for images")
    utils.say(f"dry run: {len(loader)} steps an epoch, {num_epochs} epochs: {total} of training; nothing was written")


def score(args, model, loader, scoring, checkpoint):
    """--eval: the accuracy of the weights that --resume, --finetune or --pretrained gave."""
    if checkpoint is not None:
        with utils.as_user_error(f"--resume {args.resume}: ", utils.UserError):
            models.load_weights(model, utils.extract_weights(checkpoint, ema=args.eval_ema))
        stored = utils.stored_args(checkpoint)
        for name in ("data_set", "input_size", "eval_crop_ratio"):
            if stored.get(name, getattr(args, name)) != getattr(args, name):
                flag = f"--{name.replace('_', '-')}"
                utils.say(f"--eval: the run had {flag} {stored[name]}, this scores with {flag} {getattr(args, name)}")
    return say_accuracy(evaluate(model, loader, **scoring))


def say_accuracy(stats, name="the network"):
    utils.say(
        f"Accuracy of {name} on the {stats['images']} test images: {stats['acc1']:.3f}% "
        f"({stats['correct1']} correct; top-5 {stats['acc5']:.3f}%, loss {stats['loss']:.4f})"
    )
    return stats


def export(args):
    """--export: the weights, or with --eval-ema their moving average, for timm.create_model(checkpoint_path=...)."""
    checkpoint = find_resume(args, None)
    if checkpoint is None:
        raise utils.UserError("--export needs the checkpoint to export: give --resume FILE")
    if not args.export.endswith(".safetensors"):
        raise utils.UserError(
            f"--export {args.export}: the name must end in .safetensors, by which timm knows the format"
        )
    weights = utils.extract_weights(checkpoint, ema=args.eval_ema)
    # Clones, because the format holds no tensors that share memory.
    weights = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in weights.items()}
    with utils.as_user_error(f"--export {args.export}: ", OSError, SafetensorError):
        utils.write_atomically(args.export, lambda file: file.write(save(weights)))
    utils.say(f"wrote {len(weights)} tensors to {args.export}")


def main(args):
    if args.export:
        return export(args)

    # Set-up
    should_stop = utils.StopRequest()
    device = utils.init_distributed(args.device, args.dist_url, args.dist_timeout, args.world_size)
    folder = utils.open_output_folder(None if args.eval or args.dry_run else args.output_dir)
    if folder is not None and folder.begun_by_launcher():  # --max-restarts: it goes on, however it was started
        args = argparse.Namespace(**vars(args) | {"resume": "auto", "overwrite": False, "start_epoch": None})
    checkpoint = find_resume(args, folder)
    utils.run_status.begin(folder and folder.folder)
    amp_dtype = DTYPES[args.amp_dtype or ("float16" if device.type == "cuda" else "float32")]

    # Data
    dataset_train, dataset_val = build_datasets(args)
    num_classes = args.num_classes or len(dataset_val.classes)
    if num_classes < len(dataset_val.classes):
        raise utils.UserError(
            f"--num-classes {num_classes} is less than the {len(dataset_val.classes)} of the data set"
        )
    loader_train, sampler, loader_val = build_loaders(args, dataset_train, dataset_val)

    # Student, alike on all processes; its moving average is a copy made before the hooks, and both before the wrappers
    utils.seed_everything(args.seed)
    model = build_student(args, num_classes).to(device)
    prepare = datasets.Prepare(*normalisation(model), args.reprob, args.remode, args.recount, device)
    scoring = {"device": device, "prepare": prepare, "amp_dtype": amp_dtype, "sharded": args.dist_eval}
    if args.eval:
        return score(args, model, loader_val, scoring, checkpoint)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, device="cpu" if args.model_ema_force_cpu else None)
    with utils.as_user_error("--s-id: ", ValueError):
        hooks = spectral.FeatureHooks(model, feature_ids(args)[0])

    # Teacher and loss
    teacher = build_teacher(args, num_classes, device, model)
    criterion = build_criterion(args, teacher)
    describe_pairs(args, model, hooks, teacher, device)
    probe = build_probe(args, model, teacher, dataset_val, prepare, device)

    # Optimizer
    optimizer, scheduler, num_epochs = build_optimizer(args, model)
    scaler = GradScaler(device.type) if amp_dtype == torch.float16 else ConstantScaler(device.type)

    # Resume
    state = RunState(model, optimizer, scheduler, scaler, ema)
    if checkpoint is not None:
        state.load(checkpoint, args)
        del checkpoint  # as large as the model and the optimizer
    if args.start_epoch is not None:
        state.start_at(args.start_epoch)
    if state.epoch >= num_epochs:
        utils.run_status.write("done")
        return utils.say(f"nothing to do: {state.epoch} of {num_epochs} epochs are done")

    # Loop
    parallel = wrap_models(args, model, criterion, device)
    batch, lr = (utils.world_size(), args.batch_size, args.accum_steps), optimizer.param_groups[0]["initial_lr"]
    utils.say(f"{len(dataset_train)} training and {len(dataset_val)} validation images; learning rate {lr:.4g}")
    utils.say(f"global batch {math.prod(batch)}: {batch[0]} processes x {batch[1]} images x {batch[2]} accumulated")
    if args.min_lr > lr and args.sched not in WITHOUT_MINIMUM:
        utils.say(f"warning: --min-lr {args.min_lr:g} is above this learning rate")
    if folder is None:
        utils.say("warning: nothing of this run is kept, because there is no --output_dir")
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    utils.say(
        f"{args.model}: {num_parameters} parameters, {num_classes} classes; epochs {state.epoch} to {num_epochs - 1}"
    )
    train = functools.partial(
        train_one_epoch,
        parallel,
        hooks,
        criterion,
        optimizer=optimizer,
        scaler=scaler,
        device=device,
        prepare=prepare,
        seed_step=lambda *where: utils.seed_everything(samplers.counter_seed(args.seed, utils.rank(), *where)),
        should_stop=should_stop,
        amp_dtype=amp_dtype,
        accum_steps=args.accum_steps,
        clip_grad=args.clip_grad,
        mixup=build_mixup(args, num_classes),
        update_ema=ema and functools.partial(ema.update, model),
        watch=DivergenceWatch(),
        train_mode=args.train_mode,
    )
    if args.dry_run:
        return dry_run(args, train, loader_train, device, num_epochs)
    if folder is not None and args.overwrite:
        folder.clear()
    log = utils.RunLog(args.output_dir, vars(args) | {"world_size": utils.world_size()}, state.epoch)
    should_stop.between_steps(args.dist_timeout)
    while state.epoch < num_epochs:
        epoch, began, start_step = state.epoch, time.perf_counter(), state.step
        sampler.set_epoch(epoch, start_step * args.batch_size)
        num_steps = start_step + len(loader_train)
        state.step = train(loader_train, meter=state.meter, epoch=epoch, start_step=start_step)
        seconds = time.perf_counter() - began
        whole = state.step == num_steps
        if utils.world_size() > 1:
            for network in (model, ema.module) if args.eval_ema else (model,):
                distribute_bn(network, utils.world_size())
        test = evaluate(model, loader_val, should_stop=should_stop, **scoring) if whole else None
        test_ema = None
        if test is not None and args.eval_ema:
            test_ema = evaluate(ema.module, loader_val, should_stop=should_stop, **scoring)
        if test is None or (args.eval_ema and test_ema is None):
            stop_early(args, state, folder, should_stop.number, num_steps)
        say_accuracy(test)
        lr = optimizer.param_groups[0]["lr"]
        stats = {
            "train_lr": lr,
            **{f"train_{name}": value for name, value in state.meter.averages(over_ranks=True).items()},
            **{f"test_{name}": test[name] for name in ("loss", "acc1", "acc5")},
            "epoch": epoch,
            "n_parameters": num_parameters,
            "seconds": seconds,
            "images_per_second": (num_steps - start_step) * args.batch_size * utils.world_size() / seconds,
        }
        if test_ema is not None:
            say_accuracy(test_ema, "the moving average")
            stats |= {f"test_ema_{name}": test_ema[name] for name in ("loss", "acc1", "acc5")}
        stats |= probe(epoch)
        scheduler.step(epoch, test["acc1"])
        best = state.finish_epoch(test["acc1"])
        utils.say(f"Max accuracy: {state.best_accuracy:.3f}% in epoch {state.best_epoch}")
        log.epoch(stats)
        if folder:
            folder.save(state.to_dict(args), best=best, milestone=milestone(args, epoch))
        utils.run_status.write("running", epoch=epoch, best_accuracy=state.best_accuracy)
    log.close()
    utils.run_status.write("done", best_accuracy=state.best_accuracy, best_epoch=state.best_epoch)


@record
def run():
    """The program. An error that is no user's is recorded for torchrun, which names the process that failed first."""
    utils.end_with_launcher()
    with utils.exit_codes(datasets.BadImageError):
        with utils.first_process_says_it():
            args = parse_args()
        main(args)
        utils.leave_distributed()


if __name__ == "__main__":
    run()
