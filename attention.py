"""Faster attention for frozen teachers, equal to timm's within rounding.

CaiT has talking heads (arXiv 2003.02436), which timm mixes by Linear layers over permuted (B, N, N, heads) copies of
the attention maps: most of what such a block spends outside its large matrix products.
"""

import torch
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn


class TalkingHeads(nn.Module):
    """A drop-in for timm's TalkingHeadAttn in evaluation: the same parameters under the same names, no dropout.

    Mixing heads is a matrix product with the (heads, heads) weights on maps (heads, N * N) as they lie. The bias of
    the mix before the softmax is the same for all keys, so the softmax cancels it.

    Args:
        attention: timm's module, whose layers are shared.
    """

    def __init__(self, attention: TalkingHeadAttn):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.proj_l, self.proj_w = attention.proj_l, attention.proj_w

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, N, C)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        mixed = torch.empty_like(qkv[:, :, 0])
        # On a CPU an image at a time, whose maps (1.2 MB for CaiT-S24 at 224 pixels) then stay in the cache.
        size = 1 if x.device.type == "cpu" else len(x)
        for start in range(0, len(x), size):
            piece = slice(start, start + size)
            mixed[piece] = self._attend(*qkv[piece].permute(2, 0, 3, 1, 4))
        return self.proj(mixed.flatten(2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Three times (B, heads, N, C / heads) -> (B, N, heads, C / heads)."""
        images = len(q)
        # bmm throughout: `weight @ maps` would fold the images into the rows, and copy the maps for it.
        before, after = (layer.weight.expand(images, -1, -1) for layer in (self.proj_l, self.proj_w))
        maps = torch.bmm((q * self.scale).flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
        shape = maps.shape
        maps = torch.bmm(before, maps.view(images, self.num_heads, -1)).view(shape).softmax(dim=-1)
        maps = torch.baddbmm(self.proj_w.bias[:, None], after, maps.view(images, self.num_heads, -1)).view(shape)
        return torch.bmm(maps, v.flatten(0, 1)).unflatten(0, (images, -1)).transpose(1, 2)


def speed_up(model: nn.Module) -> nn.Module:
    """Makes the attention of a frozen timm model faster, on the device where it is, and returns the model.

    Talking heads (CaiT) become `TalkingHeads`. The windows of Swin use the fused kernel that timm holds back as
    experimental, on a CPU, where it takes a tenth to a quarter off the forward pass; on a GPU it was never measured.
    State-dict keys and tensors stay what they are, and so do other models.
    """
    for module in list(model.modules()):
        if type(getattr(module, "attn", None)) is TalkingHeadAttn:
            module.attn = TalkingHeads(module.attn)
        elif type(module) is WindowAttention and module.qkv.weight.device.type == "cpu":
            module.fused_attn = True
    return model
