"""The command line: DeiT's flags and ours, and the checks that need nothing but the flags.

This module imports neither torch nor timm, so help and errors appear at once.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from parsing import KeyValues, Parser, number, stored_kwargs
from parsing import key_values as key_values  # for callers of this module
from utils import UserError, error_line

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "GRATINGS")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
DTYPES = ("float16", "bfloat16", "float32")
FEATURE_LOSSES = ("spectral", "mse", "mse_plain", "manifold", "projector", "projector_trained")


class Flags(argparse.Namespace):
    """The flags of a run; `given` is the set of those on the command line, by name."""

    __slots__ = ("given",)  # kept out of vars()

    def replace(self, **changes: Any) -> "Flags":
        """Return a copy with other values."""
        copy = Flags(**vars(self) | changes)
        copy.given = self.given
        return copy


def block_id(text: str) -> int | str:
    """Read a block id, or `all`."""
    return text if text == "all" else COUNT(text)


FRACTION = number(float, 0, 1)
INSIDE = number(float, 0, 1, ends=False)
NON_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, ends=False)
COUNT = number(int, 0)
AT_LEAST_ONE = number(int, 1)
ON_OFF = argparse.BooleanOptionalAction


def from_old_launcher(text: str) -> NoReturn:
    """Refuse --local-rank."""
    raise argparse.ArgumentTypeError(
        "it comes from torch.distributed.launch: start with python -m torch.distributed.run"
    )


def get_args_parser() -> Parser:
    """Return the parser of main.py."""
    parser = Parser("Distill a vision transformer by spectral feature matching.")
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_student_flags(parser.add_argument_group("student").add_argument)
    add_teacher_flags(parser.add_argument_group("teacher and distillation").add_argument)
    add_optimization_flags(parser.add_argument_group("optimization").add_argument)
    add_augmentation_flags(parser.add_argument_group("augmentation").add_argument)
    add_run_flags(parser.add_argument_group("run"))
    return parser


def add_data_flags(add) -> None:
    add("--data-set", default="IMNET", choices=DATA_SETS, help="IMNET: any folder of images; GRATINGS needs no files")
    add("--data-path", help="folder of the data set; IMNET: train/ and val/ with one folder per class")
    add("--inat-category", default="name", choices=INAT_CATEGORIES, help="taxonomic level of the classes (INAT*)")
    size = number(int, 1, 10**8)
    add("--gratings-sizes", nargs=2, type=size, default=[6000, 3000], help="number of GRATINGS images in train and val")
    add("--input-size", type=AT_LEAST_ONE, default=224, help="image size in pixels")
    add("--eval-crop-ratio", type=number(float, 0.01, 1), default=0.875, help="center crop ratio for evaluation")
    add("--batch-size", type=AT_LEAST_ONE, default=64, help="batch size per process")
    add("--num_workers", "--num-workers", type=COUNT, default=10, help="data loading workers per process")
    add("--pin-mem", action=ON_OFF, default=True, help="pin CPU memory in the data loader")
    add("--loader-timeout", type=NON_NEGATIVE, default=0, help="seconds to wait for a batch; 0: forever")
    add("--skip-bad-images", type=COUNT, default=0, help="number of unreadable training images to replace, per process")
    add("--repeated-aug", action=ON_OFF, default=True, help="each epoch uses a third of the images, three times each")


def add_student_flags(add) -> None:
    add("--model", default="deit_tiny_patch16_224", help="timm model to train")
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help="timm model arguments")
    add("--num-classes", type=AT_LEAST_ONE, help="number of classes; default: the data set's")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--finetune", default="", help="start from the weights in this file or URL")
    add("--drop", type=FRACTION, default=0.0, help="dropout rate")
    add("--drop-path", type=FRACTION, default=0.0, help="stochastic depth rate")
    add("--attn-only", action="store_true", help="train only attention, position embedding and head")
    add("--train-mode", action=ON_OFF, default=True, help="--no-train-mode: train in eval mode, without dropout")
    add("--model-ema", action=ON_OFF, default=True, help="keep an exponential moving average of the weights")
    add("--model-ema-decay", type=INSIDE, default=0.99996, help="EMA decay per optimizer step")
    add("--model-ema-force-cpu", action="store_true", help="keep the EMA on the CPU, which slows down every step")


def add_teacher_flags(add) -> None:
    help_text = "soft or hard: distill the teacher's logits and features; fft: its features only"
    add("--distillation-type", default="none", choices=("none", "fft", "soft", "hard"), help=help_text)
    add("--teacher-model", default="cait_s24_224", help="timm model of the teacher")
    add("--teacher-path", default="", help="teacher weights, a file or URL; default: timm's pretrained weights")
    add("--teacher-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help="teacher's arguments")
    kinds = ("auto", "timm", "eager", "triton")
    help_text = "attention of a CaiT or Swin teacher; eager: faster than timm's; triton: one GPU kernel; auto: eager"
    add("--teacher-attention", default="auto", choices=kinds, help=help_text)
    add("--teacher-dtype", default="float32", choices=DTYPES, help="dtype of the teacher: weights and maps")
    help_text = "weight of logit distillation; cross-entropy is weighted by 1 - alpha, also with fft"
    add("--distillation-alpha", type=FRACTION, default=0.5, help=help_text)
    add("--distillation-tau", type=POSITIVE, default=1.0, help="temperature of soft distillation")
    help_text = "student blocks to match: indices into timm's feature_info (ViT: blocks, Swin: stages), or all"
    add("--s-id", nargs="+", type=block_id, default=[], help=help_text)
    add("--t-id", nargs="+", type=block_id, default=[], help="teacher blocks, one per student block, or all")
    add("--w-fft", type=NON_NEGATIVE, default=0.2, help="weight of the feature loss")
    add("--distillation-beta", type=NON_NEGATIVE, default=1.0, help="another factor of --w-fft")
    help_text = "spectral: the paper's; mse: its control, MSE with the same weight; the others: of other papers"
    add("--feature-loss", default="spectral", choices=FEATURE_LOSSES, help=help_text)
    help_text = "how to compute the spectral loss; both give the same value, and closed is several times faster"
    add("--spectral-impl", default="closed", choices=("closed", "fft"), help=help_text)


def add_optimization_flags(add) -> None:
    add("--epochs", type=AT_LEAST_ONE, default=300, help="number of epochs")
    add("--accum-steps", type=AT_LEAST_ONE, default=1, help="batches per optimizer step")
    add("--amp-dtype", choices=DTYPES, help="autocast dtype; default: float16 on a GPU, float32 on a CPU")
    add("--bce-loss", action="store_true", help="binary cross-entropy (DeiT III) instead of cross-entropy")
    add("--smoothing", type=FRACTION, default=0.1, help="label smoothing")
    add("--opt", default="adamw", help="timm optimizer")
    add("--opt-eps", type=POSITIVE, help="optimizer epsilon; default: the optimizer's")
    add("--opt-betas", nargs="+", type=FRACTION, help="optimizer betas; default: the optimizer's")
    add("--clip-grad", type=POSITIVE, help="largest gradient norm; default: no clipping")
    add("--momentum", type=FRACTION, default=0.9, help="SGD momentum")
    add("--weight-decay", type=NON_NEGATIVE, default=0.05, help="weight decay")
    add("--lr", type=NON_NEGATIVE, default=5e-4, help="learning rate for a global batch of 512")
    add("--unscale-lr", action="store_true", help="do not scale --lr with the global batch")
    add("--sched", default="cosine", help="timm scheduler")
    add("--lr-noise", nargs="+", type=FRACTION, help="start (and end) of learning rate noise, as parts of the run")
    add("--lr-noise-pct", type=INSIDE, default=0.67, help="largest relative noise")
    add("--lr-noise-std", type=NON_NEGATIVE, default=1.0, help="standard deviation of the noise")
    add("--warmup-lr", type=NON_NEGATIVE, default=1e-6, help="initial learning rate of the warm-up")
    add("--min-lr", type=NON_NEGATIVE, default=1e-5, help="lower bound of the schedule")
    add("--decay-epochs", type=POSITIVE, default=30, help="epochs between decays (step) or of the final decay (wsd)")
    add("--decay-rate", type=POSITIVE, default=0.1, help="decay factor (step, multistep) or power (poly)")
    add("--warmup-epochs", type=COUNT, default=5, help="warm-up epochs")
    add("--cooldown-epochs", type=COUNT, default=0, help="extra epochs at --min-lr (cosine, tanh, poly)")
    add("--patience-epochs", type=COUNT, default=10, help="accepted because DeiT has it; has no effect")


def add_augmentation_flags(add) -> None:
    add("--color-jitter", type=NON_NEGATIVE, default=0.4, help="color jitter; timm skips it when --aa is used")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy, or none")
    kinds = ("bicubic", "bilinear", "random")
    add("--train-interpolation", default="bicubic", choices=kinds, help="interpolation of training crops")
    add("--ThreeAugment", action="store_true", help="DeiT III's 3-Augment instead of --aa")
    add("--src", action="store_true", help="DeiT III's simple random crop")
    add("--reprob", type=FRACTION, default=0.25, help="random erasing probability")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="fill value for erased pixels")
    add("--recount", type=AT_LEAST_ONE, default=1, help="maximum number of erased boxes per image")
    add("--mixup", type=FRACTION, default=0.0, help="mixup alpha; 0: off")
    add("--cutmix", type=FRACTION, default=0.0, help="CutMix alpha; 0: off")
    add("--cutmix-minmax", nargs=2, type=FRACTION, help="limits of CutMix's box size, instead of --cutmix")
    add("--mixup-prob", type=FRACTION, default=1.0, help="probability of mixup or CutMix")
    add("--mixup-switch-prob", type=FRACTION, default=0.5, help="probability of CutMix when both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="scope of a mixing coefficient")


def add_run_flags(group) -> None:
    add = group.add_argument
    add("--output_dir", "--output-dir", default="", help="folder for checkpoints and logs; default: write nothing")
    add("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda if there is a GPU")
    kinds = ("auto", "none", "teacher", "both")
    add("--compile", default="auto", choices=kinds, help="models to torch.compile, which takes minutes; auto: none")
    add("--deterministic", action="store_true", help="use deterministic GPU kernels, which are slower")
    add("--import", dest="import_module", default="", metavar="MODULE", help="module that registers models with timm")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of weights, sample order and augmentation")
    add_start = group.add_mutually_exclusive_group().add_argument
    add_start("--resume", default="", help="checkpoint, URL, or auto: the newest valid one in --output_dir")
    add_start("--overwrite", action="store_true", help="start over in a folder that contains a run")
    add("--start_epoch", "--start-epoch", type=COUNT, help="first epoch; default: the one after the checkpoint's")
    add("--save-every", type=COUNT, default=0, metavar="N", help="keep a checkpoint every N epochs; 0: never")
    add_mode = group.add_mutually_exclusive_group().add_argument
    add_mode("--eval", action="store_true", help="evaluate the weights and exit")
    add_mode("--export", default="", metavar="FOLDER", help="write the weights of --resume in timm's format and exit")
    add_mode("--dry-run", action="store_true", help="train for two steps, report the cost, and write nothing")
    add("--eval-ema", action="store_true", help="also evaluate the EMA; with --eval: only the EMA")
    add("--dist-eval", action=ON_OFF, default=True, help="split the validation set between processes")
    help_text = "with --eval on ImageNet: also score against the ReaL labels, timm's or those in FILE"
    add("--real-labels", nargs="?", const="timm", default="", metavar="FILE", help=help_text)
    add("--wandb", default="", metavar="PROJECT", help="also log to this Weights & Biases project (pip install wandb)")
    add("--local-rank", "--local_rank", type=from_old_launcher, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    add("--world_size", "--world-size", type=AT_LEAST_ONE, help="accepted because DeiT has it; has no effect")
    add("--dist_url", "--dist-url", default="env://", help="rendezvous URL of torch.distributed")
    add("--dist-timeout", type=POSITIVE, default=1800, help="seconds before a hung collective ends the job")


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """Parse and check the flags of main.py; raise a UserError about the first mistake."""
    parser = get_args_parser()
    args = parser.parse_args(argv, Flags())
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = set(vars(parser.parse_args(argv)))
    check_modes(args)
    check_paths(args)
    if not (args.eval or args.export):  # a training command with --eval added is fine
        check_distillation(args)
        check_optimization(args)
        check_augmentation(args)
    return args


FROM_CHECKPOINT = ("model", "model_kwargs", "num_classes", "input_size", "eval_crop_ratio", "data_set", "data_path")
FROM_CHECKPOINT += ("inat_category", "gratings_sizes")


def complete_args(args: Flags, stored: dict) -> Flags:
    """Return the flags, with model and data of a checkpoint's run where they are not given."""
    taken = {name: stored[name] for name in FROM_CHECKPOINT if name in stored and name not in args.given}
    if "model_kwargs" in taken:
        taken["model_kwargs"] = stored_kwargs(taken["model_kwargs"])
    completed = args.replace(**taken)
    check_data_path(completed)
    return completed


def complete_teacher(args: Flags, stored: dict) -> Flags:
    """Return the flags with model and arguments of the teacher's run where --teacher-model does not say otherwise."""
    model = stored.get("model")
    if model is None or ("teacher_model" in args.given and args.teacher_model != model):
        return args
    kwargs = args.teacher_kwargs if "teacher_kwargs" in args.given else stored_kwargs(stored.get("model_kwargs", {}))
    return args.replace(teacher_model=model, teacher_kwargs=kwargs)


def to_arg_lines(args: argparse.Namespace) -> list[str]:
    """Return an argument file that repeats the run, without --overwrite and a --resume in its own folder."""
    resume, folder = (Path(getattr(args, name, "")).resolve() for name in ("resume", "output_dir"))
    left_out = ("overwrite", *(("resume", "start_epoch") if resume.parent == folder else ()))
    lines = []
    for action in get_args_parser()._actions:
        value = getattr(args, action.dest, action.default)
        if value == action.default or action.default is argparse.SUPPRESS or action.dest in left_out:
            continue
        flag = action.option_strings[0]
        if isinstance(value, bool):
            lines.append(flag if value else flag.replace("--", "--no-", 1))
            continue
        values = [f"{k}={v!r}" for k, v in value.items()] if isinstance(value, dict) else value
        words = map(str, values if isinstance(values, (list, tuple)) else [values])
        lines.append(" ".join([flag, *map(shlex.quote, words)]))
    return lines


def parse_or_exit() -> argparse.Namespace:
    """Parse the flags of the process; on an error, print one line and exit with code 2."""
    try:
        return parse_args()
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def check_modes(args: argparse.Namespace) -> None:
    """Check the flags of evaluation, export and resuming."""
    if args.eval and not (args.resume or args.finetune or args.pretrained):
        raise UserError("--eval without weights would score a random model: give --resume FILE or --pretrained")
    if args.export and not args.resume:
        raise UserError("--export needs a checkpoint to export: give --resume FILE")
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both set the initial weights: give one")
    if args.resume not in ("", "auto") and (args.pretrained or args.finetune):
        raise UserError("--resume sets the weights: leave out --finetune and --pretrained")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto needs --output_dir: give the folder of the run")
    if args.eval_ema and not args.eval and not args.model_ema:
        raise UserError("--eval-ema evaluates the EMA, which --no-model-ema turns off: give one")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
    if restarts and args.output_dir and args.resume != "auto" and not (args.eval or args.export or args.dry_run):
        raise UserError("--max-restarts would start the run from the beginning each time: add --resume auto")


def check_paths(args: argparse.Namespace) -> None:
    """Check that the given files and folders exist."""
    if not args.resume or (args.resume == "auto" and not args.eval):  # otherwise the checkpoint may name it
        check_data_path(args)
    teacher_path = args.teacher_path if args.distillation_type != "none" and not args.eval else ""
    for flag, path in (("resume", args.resume), ("finetune", args.finetune), ("teacher-path", teacher_path)):
        if path and path != "auto" and "://" not in path and not Path(path).is_file():
            raise UserError(f"--{flag} {path} is not a file: give a file of weights, such as model_best.pth")


def check_data_path(args: argparse.Namespace) -> None:
    """Check that the folder of the data set exists, if it needs one."""
    if args.data_set == "GRATINGS" or args.export:
        return
    if not (args.data_path and Path(args.data_path).is_dir()):
        found = f"{args.data_path} is not a folder" if args.data_path else "is missing"
        raise UserError(f"--data-path {found}: --data-set {args.data_set} needs the folder of its images")


DISTILLATION_FLAGS = ("distillation_alpha", "distillation_tau", "teacher_model", "teacher_path", "teacher_kwargs")
DISTILLATION_FLAGS += ("teacher_attention", "teacher_dtype", "s_id", "t_id", "w_fft", "distillation_beta")
DISTILLATION_FLAGS += ("feature_loss", "spectral_impl")


def check_distillation(args: Flags) -> None:
    """Check the teacher's flags; refuse those that would be ignored, because the run would not be what it seems."""
    kind = args.distillation_type
    needs = "soft, hard or fft" if kind == "none" else "soft"
    for name in DISTILLATION_FLAGS if kind == "none" else ["distillation_tau"] if kind != "soft" else []:
        if name in args.given:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} has no effect without --distillation-type {needs}: leave it out")
    if kind == "none":
        return
    if len(args.s_id) != len(args.t_id):
        counts = f"--s-id has {len(args.s_id)} ids but --t-id has {len(args.t_id)}"
        raise UserError(f"{counts}: give one teacher block per student block")
    weight = args.w_fft * args.distillation_beta
    if weight == 0 and (kind == "fft" or args.distillation_alpha == 0):
        raise UserError("the teacher would have no effect: give --w-fft or --distillation-alpha above 0")


def check_optimization(args: Flags) -> None:
    """Check the flags of the optimizer and the schedule."""
    if args.sched == "plateau":
        raise UserError("--sched plateau is not supported: choose a schedule that depends on the epoch only")
    if args.warmup_epochs > args.epochs and "warmup_epochs" in args.given:
        raise UserError(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}: lower it")


def check_augmentation(args: Flags) -> None:
    """Check the flags of augmentation."""
    if mixup_active(args) and args.batch_size % 2:
        raise UserError(f"--mixup and --cutmix mix pairs of images: give an even --batch-size, not {args.batch_size}")
    if args.bce_loss and args.smoothing > 0:
        raise UserError("--bce-loss would count every smoothed class as present: add --smoothing 0")


def mixup_active(args: argparse.Namespace) -> bool:
    """Return whether mixup or CutMix is on."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
