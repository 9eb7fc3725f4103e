"""Check published numbers that need no training: accuracies, ranks of the last block, learning rates.

    python verify.py --data-path ILSVRC2012 --weights pretrained --logs logs

prints each published number next to the measured one. Weights are read from the folder --weights, where each file is
named after its model (`cait_s24_224.pth` or `.safetensors`), or from timm's cache or hub. Missing files are listed with
their source. The exit code is 1 if a number differs, and 2 if none could be checked.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import builders
import datasets
import flags
import models
import parsing
from analyses import SHARES, one_of_each_class, rank_analysis
from engine import evaluate
from faults import exit_codes, init_distributed
from spectral import FeatureHooks, describe_blocks
from tables import align
from utils import UserError, as_user_error
from weights import extract_weights, load_checkpoint

PUBLISHED = Path(__file__).parent / "recipes" / "published.json"
TOLERANCE = 0.1  # percent; decoders and resizing differ by a few images in 50,000
STUDENTS = "thy960112/From-Per-Image-Low-Rank-to-Encoding-Mismatch on GitHub"
LOGS = "thy960112/Distillation-Dynamics on GitHub, Distillation_Dynamics/Distillation_Logs"


class Row(NamedTuple):
    """A line of the report; `verdict` is PASS, a difference, or the reason why it was not checked."""

    check: str
    published: str
    measured: str
    verdict: str


def get_args_parser() -> parsing.Parser:
    parser = parsing.Parser("Check published numbers that need no training.")
    parser.add_argument("--data-path", required=True, help="folder of ImageNet; only val/<class>/ is needed")
    parser.add_argument("--weights", default=".", help="folder of weights, each file named after its model")
    parser.add_argument("--logs", default=".", help="folder of the released logs, NAME.txt")
    parser.add_argument("--batch-size", type=parsing.number(int, 1), default=64, help="images per batch")
    parser.add_argument("--num_workers", type=parsing.number(int, 0), default=10, help="data loading workers")
    parser.add_argument("--device", default="auto", help="cuda, cuda:N or cpu; auto: cuda if there is a GPU")
    return parser


def load(model: nn.Module, args: argparse.Namespace, first_only: bool = False) -> tuple[DataLoader, nn.Module]:
    """Return a loader of all images or of the first of each class, and the module that normalizes its batches."""
    dataset = datasets.build_dataset("IMNET", "val", args.data_path, datasets.own_eval_transform(model))
    images = one_of_each_class(datasets.labels(dataset)) if first_only else None
    loader = datasets.build_loader(dataset, images, args.batch_size, args.num_workers, drop_last=False)
    return loader, datasets.Prepare(*models.normalization(model), device=args.device).eval()


def build(name: str, folder: str, num_classes: int, kwargs: dict) -> nn.Module:
    """Build a model with the weights in `folder`, or with timm's own.

    Raises:
        UserError: there are no weights, or they do not fit; the message names their source.
    """
    files = [Path(folder, name + ending) for ending in (".pth", ".safetensors")]
    found = next((file for file in files if file.is_file()), None)
    source = timm.models.get_pretrained_cfg(name).hf_hub_id
    hint = f"get {source} from the Hugging Face Hub and save it as {files[1]}"
    if not source:
        hint = f"get the checkpoint from {STUDENTS} and save it as {files[0]}"
    if not (found or source):
        raise UserError(hint)
    with as_user_error(f"{hint}: ", UserError):
        model = models.build_model(name, num_classes, kwargs=kwargs, pretrained=not found)
        if found:
            models.load_weights(model, extract_weights(load_checkpoint(found)))
    return model.eval()


def check_accuracy(model: nn.Module, args: argparse.Namespace, name: str, published: float) -> Row:
    loader, prepare = load(model, args)
    found = evaluate(model, tqdm(loader, name, leave=False), device=args.device, prepare=prepare, sharded=False)
    difference = found["acc1"] - published
    verdict = "PASS" if abs(difference) <= TOLERANCE else f"differs by {difference:+.2f}"
    return Row(f"top-1 of {name}", f"{published:g}", f"{found['acc1']:.3f}", verdict)


def check_ranks(model: nn.Module, args: argparse.Namespace, name: str, published: dict[str, list[int]]) -> list[Row]:
    """Compare the dimensions of the last block's patch tokens on the first image of each class."""
    loader, prepare = load(model, args, first_only=True)
    hooks = FeatureHooks(model, [len(describe_blocks(model)) - 1])

    @torch.no_grad()
    def maps() -> Iterator[torch.Tensor]:
        for batch, _ in tqdm(loader, f"ranks of {name}", leave=False):
            model(prepare(batch.to(args.device)))
            yield hooks.pop()[0]

    found, rows = rank_analysis(maps), []
    for kind, expected in published.items():
        measured = [round(value) for value in found[kind]]
        off = [m - e for m, e in zip(measured, expected, strict=True)]
        verdict = f"differs by {off}" if any(off) else "PASS"
        what = f"{kind.upper()} dimensions of {name} at {', '.join(f'{share:.0%}' for share in SHARES)}"
        rows.append(Row(what, " ".join(map(str, expected)), " ".join(map(str, measured)), verdict))
    return rows


def check_schedule(log: Path, batch: int) -> Row:
    """Compare the learning rates in a released log with those that main.py sets under the default flags."""
    check = f"learning rates of {log.stem}"
    if not log.is_file():
        return Row(check, "", "", f"not checked: get {log.name} from {LOGS} and give its folder as --logs")
    logged = [json.loads(line)["train_lr"] for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    settings = f"--data-set GRATINGS --epochs {len(logged)} --batch-size {batch} --device cpu"
    optimizer, scheduler, _ = builders.build_optimizer(flags.parse_args(settings.split()), nn.Linear(1, 1), nn.Module())
    ours = []
    for epoch in range(len(logged)):
        ours.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    worst = max(abs(a - b) / b for a, b in zip(ours, logged, strict=True))
    verdict = "PASS" if worst < 1e-9 else f"differs by {worst:.1e} of the rate"
    return Row(check, f"{max(logged):.6e} at most", f"{max(ours):.6e} at most", verdict)


def check_model(name: str, args: argparse.Namespace, published: dict) -> list[Row]:
    """Run the checks of a model, or report that its weights are missing."""
    top1 = {**published["teachers"], **published["checkpoints"]}.get(name)
    try:
        kwargs = published.get("model_kwargs", {}).get(name, {})
        model = build(name, args.weights, published.get("num_classes", 1000), kwargs).to(args.device)
    except UserError as error:
        return [Row(name, "" if top1 is None else f"{top1:g}", "", f"not checked: {error}")]
    rows = [] if top1 is None else [check_accuracy(model, args, name, top1)]
    return rows + check_ranks(model, args, name, published["ranks"][name]) if name in published["ranks"] else rows


def main(argv: Sequence[str] | None = None, published: dict | None = None) -> int:
    """Run all checks, print the report, and return the exit code; `published` stands for recipes/published.json."""
    args = get_args_parser().parse_args(argv)
    args.device = init_distributed(args.device)
    published = published or json.loads(PUBLISHED.read_text(encoding="utf-8"))
    with as_user_error("", ValueError, OSError, RuntimeError):
        found = len(set(datasets.labels(datasets.build_dataset("IMNET", "val", args.data_path))))
    if found != published.get("num_classes", 1000):
        raise UserError(f"{args.data_path}/val has {found} classes, not 1000: give ImageNet-1K")
    names = dict.fromkeys((*published["teachers"], *published["checkpoints"], *published["ranks"]))
    rows = [row for name in names for row in check_model(name, args, published)]
    logs = [row for row in published["results"] if row["log"] and row["global_batch"]]
    rows += [check_schedule(Path(args.logs, f"{row['log']}.txt"), row["global_batch"]) for row in logs]
    print("\n".join(align([row._asdict() for row in rows])))
    passed = sum(row.verdict == "PASS" for row in rows)
    skipped = sum(row.verdict.startswith("not checked") for row in rows)
    print(f"\n{passed} passed, {len(rows) - passed - skipped} differ, {skipped} not checked")
    return 2 if skipped == len(rows) else int(passed + skipped < len(rows))


if __name__ == "__main__":
    with exit_codes():
        sys.exit(main())
