"""Write a trained model in timm's format, for `timm.create_model`, `hf upload` and timm's ONNX export."""

import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg
from timm.models._hub import save_for_hf
from torch import nn

import utils
from weights import model_config, stored_args

CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- knowledge-distillation
---
# {title}

{details}

## Usage

```python
import timm

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # or "hf-hub:OWNER/NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

Older releases of timm take `timm.create_model("{architecture}", checkpoint_path="FOLDER/model.safetensors", ...)`
with the `model_args` of `config.json`.
"""


def export_model(
    model: nn.Module,
    folder: str | Path,
    *,
    input_size: int,
    crop_ratio: float = 0.875,
    classes: Sequence[str] | None = None,
    model_args: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write config.json, model.safetensors and README.md (the model card).

    Args:
        model: a model of `models.build_model`. Its `pretrained_cfg` is replaced by the exported one.
        folder: created if it does not exist.
        input_size: side of the images in pixels.
        crop_ratio: side of the center crop for evaluation over the shorter side of the resized image.
        classes: names of the classes in the order of the logits.
        model_args: further arguments of the model, such as {"embed_dim": 24}.
        facts: entries of the model card, such as `card_facts`.

    Raises:
        UserError: the files cannot be written, or timm cannot describe the model.
    """
    kept = ("architecture", "fixed_input_size", "mean", "std", "pool_size", "first_conv", "classifier")
    config = {key: value for key, value in model_config(model).items() if key in kept}
    config |= {"input_size": (3, input_size, input_size), "crop_pct": crop_ratio}
    args = dict(model_args or {})
    if config.get("fixed_input_size"):
        args.setdefault("img_size", input_size)
    labels = {"label_names": list(classes)} if classes else {}
    details = "\n".join(f"- **{name}:** {value}" for name, value in (facts or {}).items())
    card = CARD.format(title=Path(folder).resolve().name, details=details, architecture=config["architecture"])
    with utils.as_user_error(f"cannot export to {folder}: ", Exception):
        model.pretrained_cfg = PretrainedCfg(**config, num_classes=cast(int, model.num_classes)).to_dict()
        save_for_hf(model, str(folder), model_config=labels, model_args=args, safe_serialization=True)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")


def card_facts(checkpoint: Mapping[str, Any], log: Path, *, ema: bool = False, command: str = "") -> dict[str, str]:
    """Return the entries of a model card: accuracy, recipe, teacher, command line and versions.

    Args:
        checkpoint: the exported checkpoint, with its epoch and the flags of its run.
        log: the run's log.txt, which has the accuracy, or a file that does not exist.
        ema: the exported weights are the moving average.
        command: the command line that repeats the run.
    """
    args = {**stored_args(checkpoint), "world_size": checkpoint.get("world_size")}
    facts = {}
    stats = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
    metric = "test_ema_acc" if ema else "test_acc"
    for line in stats:
        if line["epoch"] == checkpoint.get("epoch") and f"{metric}1" in line:
            accuracy = f"top-1 {line[f'{metric}1']:.2f}%, top-5 {line[f'{metric}5']:.2f}%"
            data_set = args.get("data_set")
            if data_set == "IMNET":  # any folder of images
                data_set = Path(args["data_path"]).name
            facts["Accuracy"] = f"{accuracy} on {data_set}, epoch {line['epoch']}"
    facts["Weights"] = "moving average" if ema else "as trained"
    recipe = ("epochs", "input_size", "batch_size", "accum_steps", "world_size", "opt", "lr", "weight_decay", "sched")
    settings = [f"{key.replace('_', ' ')} {args[key]}" for key in recipe if args.get(key) is not None]
    if settings:
        facts["Recipe"] = ", ".join(settings)
    if args.get("distillation_type", "none") != "none":
        blocks = f"; student blocks {args['s_id']}, teacher blocks {args['t_id']}" if args.get("s_id") else ""
        facts["Teacher"] = f"{args['teacher_model']} ({args['distillation_type']} distillation{blocks})"
    if command:
        facts["Command line"] = f"`{command}`"
    facts["Versions"] = f"Python {platform.python_version()}, torch {torch.__version__}, timm {timm.__version__}"
    return facts
