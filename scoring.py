"""Score or export trained weights: --eval and --export."""

from collections.abc import Iterable
from pathlib import Path

from timm.data import RealLabelsImagenet
from torch import nn

import models
import utils
from builders import build_student, match_outputs
from engine import evaluate
from export import card_facts, export_model
from flags import Flags, to_arg_lines
from utils import UserError, as_user_error, log
from weights import extract_weights, load_checkpoint, stored_args


def load_student(args: Flags, checkpoint: dict | None) -> tuple[nn.Module, list[str] | None, str]:
    """Load the student with the weights of --resume, --finetune or --pretrained.

    Returns:
        The model on the CPU, the names of its classes or None, and a description of the weights for messages.
    """
    what, source = f"--resume {args.resume}", checkpoint
    if args.finetune:
        what, source = f"--finetune {args.finetune}", load_checkpoint(args.finetune)
    elif args.pretrained:
        what = "--pretrained"
    count = args.num_classes
    if source is not None:
        with as_user_error(f"{what}: ", UserError):
            weights = extract_weights(source, ema=args.eval_ema)
            count = count or models.count_classes(args.model, weights, source.get("classes"))
    elif args.eval_ema:
        raise UserError("--eval-ema: timm's pretrained weights have no EMA: leave it out")
    model = build_student(args, count)
    if args.pretrained and model.num_classes != models.model_config(model)["num_classes"]:
        raise UserError("--pretrained with --num-classes would score an untrained head: leave out --num-classes")
    if checkpoint is not None:
        with as_user_error(f"{what}: ", UserError):
            models.load_weights(model, weights)
    names = source.get("classes") if source else models.class_names(model, args.model, True, model.num_classes)
    return model, names, what


def score(args: Flags, model: nn.Module, names, what: str, dataset, loader, scoring: dict) -> dict | None:
    """Evaluate a model, match its outputs to the data set's classes by name, and log the accuracy."""
    index = match_outputs(dataset.classes, model, args.model, names, what)
    real, options = None, {}
    if args.real_labels:
        if model.num_classes != 1000 or index is not None:
            raise UserError("--real-labels needs a model and a data set with the 1000 classes of ImageNet")
        real = real_labels(args.real_labels, [path for path, _ in dataset.samples], loader.sampler)
        options["observe"] = real.add_result
    stats = evaluate(model, loader, classes=index, **options, **scoring)
    if stats is None:
        return None
    log_accuracy(stats)
    if index is not None and len(index) < model.num_classes:
        log(f"predictions are limited to the data set's {len(index)} of the model's {model.num_classes} classes")
    if real is not None:
        shards = utils.gather_objects(real.is_correct[1]) if args.dist_eval else [real.is_correct[1]]
        hits = [hit for shard in shards for hit in shard]
        stats["real1"] = 100 * sum(hits) / max(1, len(hits))
        log(f"ReaL accuracy: {stats['real1']:.3f}% of the {len(hits)} images with ReaL labels")
    return stats


def real_labels(source: str, files: list[str], sampler: Iterable[int]) -> RealLabelsImagenet:
    """Return timm's counter of ReaL accuracy (arXiv 2006.07159) for the images of this rank, in the sampler's order."""
    need = "expected one entry for each image of ImageNet's validation set under its name, ILSVRC2012_val_00000001.JPEG"
    with as_user_error(f"--real-labels {source}: {need}: ", Exception):
        real = RealLabelsImagenet(files, real_json=None if source == "timm" else source)
        if unknown := {Path(file).name for file in files} - set(real.real_labels):
            raise ValueError(f"found {min(unknown)}")
    real.filenames = [files[i] for i in sampler]
    return real


def log_accuracy(stats: dict, name: str = "the network") -> None:
    """Log accuracies as DeiT does."""
    log(
        f"Accuracy of {name} on the {stats['images']} test images: {stats['acc1']:.3f}% "
        f"({stats['correct1']} correct; top-5 {stats['acc5']:.3f}%, loss {stats['loss']:.4f})"
    )


def export(args: Flags, path: Path, checkpoint: dict) -> None:
    """Write the checkpoint at `path` in timm's format, with class names and a model card."""
    model, names, _ = load_student(args, checkpoint)
    stored = stored_args(checkpoint)
    command = " ".join(["python main.py", *to_arg_lines(Flags(**stored))]) if stored else ""
    export_model(
        model,
        args.export,
        input_size=args.input_size,
        crop_ratio=args.eval_crop_ratio,
        classes=names,
        model_args=args.model_kwargs,
        facts=card_facts(checkpoint, path.parent / "log.txt", ema=args.eval_ema, command=command),
    )
    log(f"wrote {args.export}: config.json, model.safetensors and README.md")
