"""The command line: DeiT's flags and ours, in groups, and the checks that flags alone allow.

Neither torch nor timm is imported here, so help and mistakes appear at once.
"""

import argparse
import ast
import math
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils import UserError, as_user_error, error_line

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "GRATINGS")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
DTYPES = ("float16", "bfloat16", "float32")
FEATURE_LOSSES = ("spectral", "mse", "mse_plain", "manifold", "projector", "projector_trained")
SMALL_IMAGE = 32  # DeiT's rule: up to this size, crops are of the whole image with a border of 4 pixels


class Flags(argparse.Namespace):
    """The flags of a run; `given` holds the names of those on the command line."""

    __slots__ = ("given",)  # kept out of vars()


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reads `@file` arguments as a shell would, with # comments, and raises UserError."""

    def __init__(self, description: str):
        style = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, fromfile_prefix_chars="@", allow_abbrev=False, formatter_class=style)

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            words = shlex.split(arg_line.lstrip("\ufeff"), comments=True)
        except ValueError as error:
            self.error(f"cannot read the line {arg_line.strip()} of an argument file: {error}")
        return [os.path.expanduser(word) for word in words]

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        try:
            return super().parse_args(args, namespace)
        except RecursionError:
            self.error("an argument file includes itself")
        except UnicodeDecodeError as error:
            self.error(f"an argument file is not UTF-8 text: {error}")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def key_values(pairs: Sequence[str]) -> dict:
    """Return ["depth=4", "name=abc"] as {"depth": 4, "name": "abc"}, with values read as Python literals if they are.

    Raises:
        UserError: a pair is not KEY=VALUE.
    """
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"expected KEY=VALUE, got {pair}")
        try:
            result[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            result[key] = value
    return result


def stored_kwargs(value: dict | list) -> dict:
    """Return the model arguments of a checkpoint; runs before version 0.2 stored KEY=VALUE words."""
    return key_values(value) if isinstance(value, list) else value


class KeyValues(argparse.Action):
    """Collect KEY=VALUE words in a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        with as_user_error(f"{option_string}: ", UserError):
            setattr(namespace, self.dest, key_values(values))


def number(kind: type, low: float, high: float = math.inf, *, ends: bool = True) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float in [low, high], or in (low, high) without `ends`."""
    brackets = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
    name = "a whole number" if kind is int else "a number"
    expected = f"{name} in {brackets[0]}{low:g}, {high:g}{brackets[1]}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}") from None
        inside = low <= value <= high if ends else low < value < high
        if not inside or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return parse


def block_id(text: str) -> int | str:
    """Read a block id, or `all`."""
    return text if text == "all" else COUNT(text)


FRACTION = number(float, 0, 1)
NON_NEGATIVE = number(float, 0)
POSITIVE = number(float, 0, ends=False)
COUNT = number(int, 0)
AT_LEAST_ONE = number(int, 1)
ON_OFF = argparse.BooleanOptionalAction
NOT_SUPPORTED = {
    "--cosub": "--cosub is not supported: it trains two sub-models against each other, without a teacher",
    "--resplit": "--resplit is not supported: the loader makes no augmentation splits",
    "--local-rank": "--local-rank comes from torch.distributed.launch: start with python -m torch.distributed.run",
}


def get_args_parser() -> Parser:
    """Return the parser of main.py."""
    parser = Parser("Distill a vision transformer by spectral feature matching.")
    add_data_flags(parser.add_argument_group("data").add_argument)
    add_student_flags(parser.add_argument_group("student").add_argument)
    add_teacher_flags(parser.add_argument_group("teacher and distillation").add_argument)
    add_optimization_flags(parser.add_argument_group("optimization").add_argument)
    add_augmentation_flags(parser.add_argument_group("augmentation").add_argument)
    add_run_flags(parser.add_argument_group("run").add_argument)
    for flag in NOT_SUPPORTED:
        names = {flag, flag.replace("-", "_").replace("__", "--")}
        parser.add_argument(*names, nargs="?", const=True, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def add_data_flags(add) -> None:
    add("--data-set", default="IMNET", choices=DATA_SETS, help="data set; GRATINGS is embedded")
    add("--data-path", help="folder of the data set; IMNET: train/ and val/ with one folder per class")
    add("--inat-category", default="name", choices=INAT_CATEGORIES, help="taxonomic level of the classes (INAT*)")
    sizes = number(int, 1, 10**8)
    add("--gratings-sizes", nargs=2, type=sizes, default=[6000, 3000], metavar=("TRAIN", "VAL"), help="GRATINGS images")
    add("--input-size", type=AT_LEAST_ONE, default=224, help="image size in pixels")
    add("--eval-crop-ratio", type=number(float, 0.01, 1), default=0.875, help="center crop ratio for evaluation")
    add("--batch-size", type=AT_LEAST_ONE, default=64, help="batch size per process")
    add("--num_workers", "--num-workers", type=COUNT, default=10, help="data loading workers per process")
    add("--pin-mem", action=ON_OFF, default=True, help="pin CPU memory in the data loader")
    add("--loader-timeout", type=NON_NEGATIVE, default=0, help="seconds to wait for a batch of a worker; 0: forever")
    add("--skip-bad-images", type=COUNT, default=0, help="unreadable training images to replace per process")
    add("--repeated-aug", action=ON_OFF, default=True, help="repeated augmentation: three copies of each image")


def add_student_flags(add) -> None:
    add("--model", default="deit_tiny_patch16_224", help="timm model to train")
    add("--model-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help="timm model arguments")
    add("--num-classes", type=AT_LEAST_ONE, help="number of classes; default: those of the data set")
    add("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add("--finetune", default="", help="start from the weights in this file or URL")
    add("--drop", type=FRACTION, default=0.0, help="dropout rate")
    add("--drop-path", type=FRACTION, default=0.0, help="stochastic depth rate")
    add("--attn-only", action="store_true", help="train only attention, position embedding and head")
    add("--train-mode", action=ON_OFF, default=True, help="off: train in eval mode, without dropout")
    add("--model-ema", action=ON_OFF, default=True, help="keep an exponential moving average of the weights")
    decay = number(float, 0, 1, ends=False)
    add("--model-ema-decay", type=decay, default=0.99996, help="EMA decay per optimizer step")
    add(
        "--model-ema-force-cpu", action="store_true", help="keep the EMA on the CPU; every step then waits for the copy"
    )


def add_teacher_flags(add) -> None:
    add("--distillation-type", default="none", choices=("none", "fft", "soft", "hard"), help="kind of distillation")
    add("--teacher-model", default="cait_s24_224", help="timm model of the teacher")
    add("--teacher-path", default="", help="teacher weights, a file or URL; default: timm's pretrained weights")
    add("--teacher-kwargs", nargs="*", action=KeyValues, default={}, metavar="KEY=VALUE", help="as --model-kwargs")
    help_text = "weight of the logit distillation; cross-entropy is weighted by 1 - alpha, with fft too"
    add("--distillation-alpha", type=FRACTION, default=0.5, help=help_text)
    kinds = ("auto", "timm", "eager", "triton")
    help_text = "attention of a CaiT or Swin teacher; auto: eager, until triton has been measured on a GPU"
    add("--teacher-attention", default="auto", choices=kinds, help=help_text)
    add("--teacher-dtype", default="float32", choices=DTYPES, help="dtype in which the teacher's weights are kept")
    add("--distillation-tau", type=POSITIVE, default=1.0, help="temperature of soft distillation")
    help_text = "student blocks to match, as indices of timm's feature_info (blocks of a ViT, stages of a Swin), or all"
    add("--s-id", nargs="+", type=block_id, default=[], help=help_text)
    add("--t-id", nargs="+", type=block_id, default=[], help="teacher blocks, one for each of --s-id, or all")
    add("--w-fft", type=NON_NEGATIVE, default=0.2, help="weight of the feature loss")
    add("--distillation-beta", type=NON_NEGATIVE, default=1.0, help="second factor of the feature loss, as published")
    help_text = "feature loss: mse has the weight W/4K of the spectral loss, the others are those of other papers"
    add("--feature-loss", default="spectral", choices=FEATURE_LOSSES, help=help_text)
    help_text = "how to compute the spectral loss; both give the same value: closed is several times faster"
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
    add("--clip-grad", type=POSITIVE, help="gradient norm to clip to; default: no clipping")
    add("--momentum", type=FRACTION, default=0.9, help="SGD momentum")
    add("--weight-decay", type=NON_NEGATIVE, default=0.05, help="weight decay")
    add("--lr", type=NON_NEGATIVE, default=5e-4, help="learning rate for a global batch of 512")
    add("--unscale-lr", action="store_true", help="use --lr as it is, whatever the global batch")
    add("--sched", default="cosine", help="timm scheduler")
    add("--lr-noise", nargs="+", type=FRACTION, help="learning rate noise: start, or start and end, as epoch fractions")
    add("--lr-noise-pct", type=number(float, 0, 1, ends=False), default=0.67, help="limit of the noise")
    add("--lr-noise-std", type=NON_NEGATIVE, default=1.0, help="standard deviation of the noise")
    add("--warmup-lr", type=NON_NEGATIVE, default=1e-6, help="initial learning rate of the warm-up")
    add("--min-lr", type=NON_NEGATIVE, default=1e-5, help="lower bound of the schedule")
    add("--decay-epochs", type=POSITIVE, default=30, help="epochs between decays (step) or of the last decay (wsd)")
    add("--decay-rate", type=POSITIVE, default=0.1, help="decay factor (step, multistep) or power (poly)")
    add("--warmup-epochs", type=COUNT, default=5, help="epochs of warm-up")
    add("--cooldown-epochs", type=COUNT, default=0, help="further epochs at --min-lr (cosine, tanh, poly)")
    add("--patience-epochs", type=COUNT, default=10, help="accepted for DeiT's command lines; has no effect")


def add_augmentation_flags(add) -> None:
    add("--color-jitter", type=NON_NEGATIVE, default=0.4, help="color jitter; timm skips it when --aa is used")
    add("--aa", default="rand-m9-mstd0.5-inc1", help="timm's AutoAugment policy, or none")
    kinds = ("bicubic", "bilinear", "random")
    add("--train-interpolation", default="bicubic", choices=kinds, help="interpolation of the random resized crop")
    add("--ThreeAugment", action="store_true", help="DeiT III's 3-Augment instead of --aa")
    add("--src", action="store_true", help="DeiT III's simple random crop")
    add("--reprob", type=FRACTION, default=0.25, help="random erasing probability")
    add("--remode", default="pixel", choices=("const", "rand", "pixel"), help="fill value for erased pixels")
    add("--recount", type=AT_LEAST_ONE, default=1, help="maximum number of erased boxes per image")
    add("--mixup", type=FRACTION, default=0.0, help="mixup alpha; 0: off")
    add("--cutmix", type=FRACTION, default=0.0, help="CutMix alpha; 0: off")
    add("--cutmix-minmax", nargs=2, type=FRACTION, help="CutMix side limits, instead of --cutmix")
    add("--mixup-prob", type=FRACTION, default=1.0, help="probability of mixup or CutMix")
    add("--mixup-switch-prob", type=FRACTION, default=0.5, help="probability of CutMix when both are on")
    add("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="scope of the mixing coefficient")


def add_run_flags(add) -> None:
    add("--output_dir", "--output-dir", default="", help="folder for checkpoints and logs; default: write nothing")
    add("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda if there is a GPU")
    kinds = ("auto", "none", "teacher", "both")
    help_text = "torch.compile, which takes minutes at the start; auto: none, until it has been measured on a GPU"
    add("--compile", default="auto", choices=kinds, help=help_text)
    add("--deterministic", action="store_true", help="deterministic GPU kernels, for exact resumes; slower")
    add("--import", dest="import_module", default="", metavar="MODULE", help="module that registers models with timm")
    add("--seed", type=number(int, 0, 2**62), default=0, help="seed of weights, order and augmentation")
    add("--resume", default="", help="checkpoint, URL, or auto: the newest valid one in --output_dir")
    add("--start_epoch", "--start-epoch", type=COUNT, help="first epoch; default: the one after the checkpoint's")
    add("--overwrite", action="store_true", help="start again in a folder that holds checkpoints")
    add("--save-every", type=COUNT, default=0, metavar="N", help="keep a checkpoint every N epochs; 0: none")
    add("--eval", action="store_true", help="evaluate the weights and exit")
    add("--eval-ema", action="store_true", help="also evaluate the EMA; with --eval: only the EMA")
    add("--dist-eval", action=ON_OFF, default=True, help="split the evaluation between processes")
    add("--export", default="", metavar="FOLDER", help="write the weights of --resume in timm's format and exit")
    help_text = "with --eval on ImageNet: also score against the ReaL labels, of timm or of this file"
    add("--real-labels", nargs="?", const="timm", default="", metavar="FILE", help=help_text)
    add("--wandb", default="", metavar="PROJECT", help="also log to this Weights & Biases project (pip install wandb)")
    add("--dry-run", action="store_true", help="build everything, train two steps, report cost, write nothing")
    add("--world_size", "--world-size", type=AT_LEAST_ONE, help="expected number of processes")
    add("--dist_url", "--dist-url", default="env://", help="rendezvous address")
    add("--dist-timeout", type=POSITIVE, default=1800, help="seconds before a hung collective ends the job")


def parse_args(argv: Sequence[str] | None = None) -> Flags:
    """Parse and check the flags of main.py.

    Args:
        argv: the flags; None for those of the process.

    Raises:
        UserError: with one line about the first mistake.
    """
    parser = get_args_parser()
    args = parser.parse_args(argv, Flags())
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    args.given = set(vars(parser.parse_args(argv)))
    for flag, message in NOT_SUPPORTED.items():
        if hasattr(args, flag.strip("-").replace("-", "_")):
            raise UserError(message)
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
    """Return the flags with model and data of a checkpoint's run where they are not given.

    Raises:
        UserError: the data set has no folder.
    """
    taken = {name: stored[name] for name in FROM_CHECKPOINT if name in stored and name not in args.given}
    if "model_kwargs" in taken:
        taken["model_kwargs"] = stored_kwargs(taken["model_kwargs"])
    completed = Flags(**vars(args) | taken)
    completed.given = args.given
    check_data_path(completed)
    return completed


def to_arg_lines(args: argparse.Namespace) -> list[str]:
    """Return the flags that differ from their defaults as lines of an argument file that repeats the run.

    Left out are --overwrite, and the --resume that continued the run in its own folder.
    """
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
    """Parse the flags of the process; a mistake is one line on stderr and exit code 2."""
    try:
        return parse_args()
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        raise SystemExit(2) from None


def check_modes(args: argparse.Namespace) -> None:
    """Check what the run is to do: train, evaluate, export, resume."""
    exclusive = [flag for flag in ("eval", "export", "dry_run") if getattr(args, flag)]
    if len(exclusive) > 1:
        first, second = (f"--{flag.replace('_', '-')}" for flag in exclusive[:2])
        raise UserError(f"{first} and {second} exclude each other: give one")
    if args.eval and not (args.resume or args.finetune or args.pretrained):
        raise UserError("--eval without weights would score a random model: give --resume FILE or --pretrained")
    if args.export and not args.resume:
        raise UserError("--export needs a checkpoint to export: give --resume FILE")
    if args.pretrained and args.finetune:
        raise UserError("--pretrained and --finetune both set the initial weights: give one")
    if args.resume not in ("", "auto") and (args.pretrained or args.finetune):
        raise UserError("--resume brings the weights: leave --finetune and --pretrained out")
    if args.resume == "auto" and not args.output_dir:
        raise UserError("--resume auto looks in --output_dir, which is not given: name the run's folder")
    if args.resume == "auto" and args.start_epoch is not None:
        raise UserError("--start_epoch with --resume auto would start there every time: name the file to resume")
    if args.real_labels and not args.eval:
        raise UserError("--real-labels needs --eval: they only change how ImageNet is scored")
    if args.resume and args.overwrite:
        raise UserError("--resume continues a run and --overwrite starts it again: give one")
    if args.eval_ema and not args.eval and not args.model_ema:
        raise UserError("--eval-ema evaluates the EMA, which --no-model-ema turns off: give one")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0")
    if restarts and args.output_dir and args.resume != "auto" and not (args.eval or args.export or args.dry_run):
        raise UserError("--max-restarts would start the run from the beginning each time: add --resume auto")


def check_paths(args: argparse.Namespace) -> None:
    """Check that the files and folders named exist."""
    if not args.resume or (args.resume == "auto" and not args.eval):  # else the checkpoint may name the data set
        check_data_path(args)
    teacher_path = args.teacher_path if args.distillation_type != "none" and not args.eval else ""
    for flag, path in (("resume", args.resume), ("finetune", args.finetune), ("teacher-path", teacher_path)):
        if path and path != "auto" and "://" not in path and not Path(path).is_file():
            found = "is a folder" if Path(path).is_dir() else "does not exist"
            hint = f", or give --output_dir {path} --resume auto" if flag == "resume" and Path(path).is_dir() else ""
            raise UserError(f"--{flag} {path} {found}: name a file of weights{hint}")


def check_data_path(args: argparse.Namespace) -> None:
    """Check that the folder of the data set exists, if it needs one."""
    if args.data_set == "GRATINGS" or args.export:
        return
    if not args.data_path:
        raise UserError(f"--data-set {args.data_set} needs --data-path, the folder of its images")
    if not Path(args.data_path).is_dir():
        raise UserError(f"--data-path {args.data_path} is not a folder: name the folder of the data set")


def check_distillation(args: Flags) -> None:
    """Check the teacher's flags; one that would be ignored is refused, because it changes what the run measures."""
    if args.distillation_type == "none":
        needs, names = "--distillation-type soft, hard or fft", DISTILLATION_FLAGS
    elif args.distillation_type != "soft":
        needs, names = "--distillation-type soft", ("distillation_tau",)
    else:
        needs, names = "", ()
    for name in names:
        if name in args.given:
            raise UserError(f"--{name.replace('_', '-')} has no effect without {needs}: leave it out")
    if args.distillation_type == "none":
        return
    if len(args.s_id) != len(args.t_id):
        counts = f"--s-id has {len(args.s_id)} ids but --t-id has {len(args.t_id)}"
        raise UserError(f"{counts}: give one teacher block per student block")
    weight = args.w_fft * args.distillation_beta
    if weight == 0 and (args.distillation_type == "fft" or args.distillation_alpha == 0):
        raise UserError("the teacher has no part in this loss: give --w-fft above 0, or --distillation-alpha above 0")


DISTILLATION_FLAGS = (
    *("distillation_alpha", "distillation_tau", "teacher_model", "teacher_path", "teacher_kwargs"),
    *("teacher_attention", "teacher_dtype"),
    *("s_id", "t_id", "w_fft", "distillation_beta", "feature_loss", "spectral_impl"),
)


def check_optimization(args: Flags) -> None:
    """Check flags of optimizer and schedule against each other."""
    if args.sched == "plateau":
        raise UserError("--sched plateau is not supported: choose a schedule that depends on the epoch alone")
    if args.opt == "adahessian":
        raise UserError("--opt adahessian is not supported: the training loop takes no second derivatives")
    if args.warmup_epochs > args.epochs and "warmup_epochs" in args.given:
        raise UserError(f"--warmup-epochs {args.warmup_epochs} is more than --epochs {args.epochs}: lower it")
    if args.lr_noise and (len(args.lr_noise) > 2 or args.lr_noise != sorted(set(args.lr_noise))):
        raise UserError("--lr-noise takes where the noise starts, or where it starts and ends, in this order")
    for key, flag in (("drop_rate", "--drop"), ("drop_path_rate", "--drop-path")):
        if key in args.model_kwargs:
            raise UserError(f"--model-kwargs {key} would override {flag}: give {flag} instead")


def check_augmentation(args: Flags) -> None:
    """Check flags of augmentation against each other."""
    if args.ThreeAugment and "aa" in args.given:
        raise UserError("--aa and --ThreeAugment exclude each other: give one")
    small = args.input_size <= SMALL_IMAGE and not args.ThreeAugment
    if args.src and small:
        raise UserError(f"--src does not apply to images of up to {SMALL_IMAGE} pixels: leave it out")
    if args.train_interpolation == "random" and (args.src or small):
        raise UserError("--train-interpolation random needs DeiT's random resized crop: give bicubic or bilinear")
    if args.cutmix_minmax and (args.cutmix or args.cutmix_minmax[0] >= args.cutmix_minmax[1]):
        raise UserError("--cutmix-minmax takes the lower limit, then the upper one, in place of --cutmix")
    if mixup_active(args) and args.batch_size % 2:
        raise UserError(f"--mixup and --cutmix mix pairs of images: give an even --batch-size, not {args.batch_size}")
    if args.bce_loss and args.smoothing > 0:
        raise UserError("--bce-loss would count every smoothed class as present: add --smoothing 0")


def mixup_active(args: argparse.Namespace) -> bool:
    """Return whether the batches are mixed."""
    return args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
