"""Names of models, their sources, and the names of the classes that their weights predict."""

import difflib
from collections.abc import Mapping
from typing import Any

import timm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

import utils
from weights import model_config

# How timm reads the config.json of models from each source.
CONFIG_READERS: dict[str, Any] = {"hf-hub": timm.models.load_model_config_from_hf}
if hasattr(timm.models._hub, "load_model_config_from_path"):  # not in older releases
    CONFIG_READERS["local-dir"] = timm.models._hub.load_model_config_from_path


def split_name(name: str) -> tuple[str, str]:
    """Return (source, identifier); the source is "" for timm's own models, such as timm/resnet18."""
    source, colon, identifier = name.partition(":")
    return (source, identifier) if colon else ("", name.removeprefix("timm/"))


def check_name(name: str) -> None:
    """Raise a UserError unless timm has a model of this name, and the pretrained tag if one is given.

    `hf-hub:owner/name` and `local-dir:FOLDER` are accepted as well, if the installed timm supports them.
    """
    source, identifier = split_name(name)
    if source and source not in CONFIG_READERS:
        raise utils.UserError(f"model {name}: this timm has no {source} models, only {', '.join(CONFIG_READERS)}")
    if not source and not timm.is_model(identifier):
        raise utils.UserError(f"timm has no model {name}: try {' or '.join(similar_names(identifier))}")
    if not source:
        with utils.as_user_error("", RuntimeError):
            timm.models.get_pretrained_cfg(identifier)


def similar_names(name: str) -> list[str]:
    """Return the three timm models whose names begin most like this one."""

    def similarity(other):
        return difflib.SequenceMatcher(None, name, other[: len(name)]).ratio()

    return sorted(timm.list_models(), key=similarity, reverse=True)[:3]


def pretrained_config(name: str) -> dict[str, Any]:
    """Return timm's pretrained_cfg for a model name, read from its source; {} if there is none."""
    source, identifier = split_name(name)
    if source:
        with utils.as_user_error(f"model {name}: cannot read its config.json: ", Exception):
            return CONFIG_READERS[source](identifier)[0]
    config = timm.models.get_pretrained_cfg(identifier)
    return config.to_dict() if config else {}


def class_names(model: nn.Module, name: str, pretrained: bool, num_classes: int) -> list[str] | None:
    """Return the names of the classes that a model predicts, in the order of its logits, or None.

    They come from the config of the weights; for timm's own ImageNet weights they are WordNet ids ("n01440764"). There
    are none for a model without pretrained weights or with a head for other classes.
    """
    config = model_config(model)
    if not pretrained or config["num_classes"] != num_classes:
        return None
    names = config.get("label_names")
    if not names and (name.startswith("hf-hub:timm/") or not split_name(name)[0]):
        subset = infer_imagenet_subset(config)
        names = ImageNetInfo(subset).label_names() if subset else None
    if isinstance(names, Mapping):  # {"0": name}, from JSON
        names = [names[index] for index in sorted(names, key=int)]
    return list(names) if names and len(names) == num_classes else None
