"""The two students of arXiv 2511.15572 (ICML 2026), whose last features are as wide as the teacher's.

`deit_tiny_lift_patch16_224` is DeiT-Tiny with its last patch tokens lifted to twice the width;
`deit_tiny_widelast_patch16_224` is DeiT-Tiny with a last block of twice the width. Both are timm
VisionTransformers with blocks that change the width, so hooks, evaluation, export and model arguments work as usual.
Importing this module registers them with timm. Both load the checkpoints released with the paper.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, deit, generate_default_cfgs, register_model
from timm.models import vision_transformer as vit
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn


class WideningBlock(Block):
    """A pre-norm block that first projects all tokens to its own width: x <- LayerNorm(x P), without a shortcut.

    The projection and its norm exist only where the width changes. Tokens (B, N, width_in) -> (B, N, dim).
    """

    def __init__(self, width_in: int, dim: int, norm_layer: Callable[..., nn.Module], **kwargs):
        super().__init__(dim=dim, norm_layer=norm_layer, **kwargs)
        changes = width_in != dim
        self.proj_in = nn.Linear(width_in, dim, bias=False) if changes else nn.Identity()
        self.proj_norm = norm_layer(dim) if changes else nn.Identity()

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return super().forward(self.proj_norm(self.proj_in(x)), *args, **kwargs)


class LiftingBlock(Block):
    """A block followed by z = LayerNorm(P x), eps 1e-5, for each patch token. Prefix tokens become zero.

    Tokens (B, N, dim) -> (B, N, lift_dim).
    """

    def __init__(self, dim: int, lift_dim: int, **kwargs):
        super().__init__(dim=dim, **kwargs)
        self.lift = nn.Linear(dim, lift_dim, bias=False)
        self.lift_norm = nn.LayerNorm(lift_dim)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        x = super().forward(x, *args, **kwargs)
        return F.pad(self.lift_norm(self.lift(x[:, 1:])), (0, 0, 1, 0))


class WideLast(VisionTransformer):
    """A ViT with a width and a number of heads for each block.

    Args:
        widths: width of each block; default: `embed_dim`, and twice that for the last block.
        heads: attention heads of each block; default: heads as wide as those of the first block.
        embed_dim, depth, num_heads: used if `widths` and `heads` are not given.
        kwargs: further arguments of timm's VisionTransformer.

    Raises:
        ValueError: `widths`, `heads` and `depth` do not agree.
    """

    def __init__(
        self,
        widths: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        *,
        embed_dim: int = 192,
        depth: int | None = None,
        num_heads: int = 3,
        **kwargs,
    ):
        if widths is None:
            widths = [embed_dim] * ((depth or 12) - 1) + [2 * embed_dim]
        if heads is None:
            heads = [max(1, num_heads * width // widths[0]) for width in widths]
        depth = depth or len(widths)
        if not len(widths) == len(heads) == depth:
            raise ValueError(f"{len(widths)} widths and {len(heads)} heads for {depth} blocks: give one per block")
        shapes = zip([widths[0], *widths], widths, heads, strict=False)

        def block(dim, num_heads, **options):
            width_in, dim, num_heads = next(shapes)
            return WideningBlock(width_in, dim, num_heads=num_heads, **options)

        super().__init__(
            embed_dim=widths[-1],  # of the final norm and the head
            depth=depth,
            num_heads=heads[-1],
            block_fn=block,
            embed_layer=lambda **options: vit.PatchEmbed(**options | {"embed_dim": widths[0]}),
            **kwargs,
        )
        for name in ("cls_token", "pos_embed"):  # timm initialized them for the last width
            narrow = getattr(self, name).detach()[..., : widths[0]]
            setattr(self, name, nn.Parameter(narrow.new_empty(narrow.shape).copy_(narrow)))  # dense, as DDP wants it
        nn.init.normal_(self.cls_token, std=0.02)  # timm has 1e-6
        for block_info, width in zip(self.feature_info, widths, strict=True):
            block_info["num_chs"] = width


class Lift(VisionTransformer):
    """A ViT that averages lifted patch tokens for its logits; the class token only takes part in attention.

    The released model also has the final norm and head of its base, which get no gradient. They are left out here, so
    DistributedDataParallel need not search for unused parameters, and the optimizer has a state for each parameter.

    Args:
        lift_dim: width of the lifted tokens; default: twice `embed_dim`.
        embed_dim, depth, kwargs: arguments of timm's VisionTransformer.
    """

    def __init__(self, lift_dim: int | None = None, *, embed_dim: int = 192, depth: int = 12, **kwargs):
        lift_dim = lift_dim or 2 * embed_dim
        kinds = iter([Block] * (depth - 1) + [lambda **options: LiftingBlock(lift_dim=lift_dim, **options)])
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            block_fn=lambda **options: next(kinds)(**options),
            global_pool="avg",
            final_norm=False,
            **kwargs,
        )
        if self.num_prefix_tokens != 1:
            raise ValueError(f"Lift needs a class token and no further prefix token, not {self.num_prefix_tokens}")
        self.feature_info[-1]["num_chs"] = self.num_features = self.head_hidden_size = self.embed_dim = lift_dim
        # The lift and the head keep torch's default initialization, as released.
        last: Any = self.blocks[-1]
        last.lift.reset_parameters()
        self.reset_classifier(self.num_classes)


def checkpoint_filter_fn(weights: dict[str, Tensor], model: VisionTransformer) -> dict[str, Tensor]:
    """Rename the weights of a released Lift, drop its unused norm and head, and resample to the model's grid.

    WideLast needs no renaming. `models.load_weights` and timm find this function by its name.
    """
    weights = {name: value for name, value in weights.items() if not re.match(r"base_model\.(norm|head)\.", name)}
    for pattern, name in (
        (r"^base_model\.", ""),
        (r"^projections\.(\d+)", r"blocks.\1.lift"),
        (r"^layer_norms\.(\d+)", r"blocks.\1.lift_norm"),
    ):
        weights = {re.sub(pattern, name, old): value for old, value in weights.items()}
    return vit.checkpoint_filter_fn(weights, model)


# DeiT's config with the crop of DeiT's own evaluation: 224 of 256 pixels.
default_cfgs = generate_default_cfgs(
    {f"deit_tiny_{kind}_patch16_224": deit._cfg(crop_pct=0.875) for kind in ("lift", "widelast")}
)


def _build(kind: type, name: str, pretrained: bool, kwargs: dict) -> Any:
    return build_model_with_cfg(
        kind,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"},
        **{"patch_size": 16, "num_heads": 3, **kwargs},
    )


@register_model
def deit_tiny_lift_patch16_224(pretrained: bool = False, **kwargs) -> Lift:
    """DeiT-Tiny lifted to 384 channels: 5,983,528 parameters, 1.27 GMAC."""
    return _build(Lift, "deit_tiny_lift_patch16_224", pretrained, kwargs)


@register_model
def deit_tiny_widelast_patch16_224(pretrained: bool = False, **kwargs) -> WideLast:
    """DeiT-Tiny with a last block of 384 channels and 6 heads: 7,313,896 parameters, 1.54 GMAC."""
    return _build(WideLast, "deit_tiny_widelast_patch16_224", pretrained, kwargs)
