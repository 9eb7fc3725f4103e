"""Faster attention for frozen teachers, equal to timm's within rounding.

CaiT has talking heads (arXiv 2003.02436). timm mixes them by Linear layers over permuted (B, N, N, heads) copies of the
attention maps, which takes most of what such a block spends outside its large matrix products.
"""

import torch
from timm.models.cait import TalkingHeadAttn
from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from utils import UserError

TEACHER_ATTENTION = ("auto", "timm", "eager", "triton")


class TalkingHeads(nn.Module):
    """Drop-in replacement for timm's TalkingHeadAttn in evaluation: same parameters and names, no dropout.

    With A = q k^T, timm computes (W softmax(L scale A + l) + w) v, where L and W mix the heads. Here `scale` is folded
    into L, the softmax cancels l, which is the same for all keys, and w v is w times the sum of v over the keys, so it
    is added to the product. Under autocast the maps stay in half precision; the softmax computes in float32 inside and
    rounds once, as computing it in float32 and casting the result does.

    Args:
        attention: timm's module with its final weights; its layers are shared.
        kernel: `kernels.mix_softmax_mix`, used for half-precision maps on CUDA; None for PyTorch's operators.
    """

    def __init__(self, attention: TalkingHeadAttn, kernel=None):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.proj_l, self.proj_w = attention.proj_l, attention.proj_w
        self.kernel = kernel
        # Rows of L scale, W and w: one small tensor to cast in each forward instead of three.
        parts = self.proj_l.weight * self.scale, self.proj_w.weight, self.proj_w.bias[None]
        self.register_buffer("mixes", torch.cat(parts).detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        mixed = torch.empty_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
        # On a CPU one image at a time, whose maps (1.2 MB for CaiT-S24 at 224 pixels) then stay in the cache.
        size = 1 if x.device.type == "cpu" else len(x)
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, len(x), size):
                self._attend(qkv[start : start + size], mixed[start : start + size])
        return self.proj(mixed.flatten(2))

    def _attend(self, qkv: Tensor, out: Tensor) -> None:
        """Write the attention of qkv (B, N, 3, heads, C / heads) to `out` (B, N, heads, C / heads)."""
        images, tokens, _, heads, _ = qkv.shape
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # one copy of all three, none for a single image
        maps = torch.bmm(q, k.transpose(1, 2)).view(images, heads, -1)
        mixes = self.mixes.to(v.dtype)
        if self.kernel is not None and v.is_cuda and v.dtype in (torch.float16, torch.bfloat16):
            before, after, _ = self.mixes.float().split((heads, heads, 1))
            self.kernel(maps.view(images, heads, tokens, tokens), before, after)
        else:
            # bmm with a repeated weight: `weight @ maps` would fold the images into the rows, and copy the maps for it.
            before, after, _ = mixes.expand(images, -1, -1).split((heads, heads, 1), dim=1)
            weights = torch.bmm(before, maps).view(images, heads, tokens, tokens).softmax(dim=-1)
            maps = torch.bmm(after, weights.flatten(2))
        product = torch.bmm(maps.view(-1, tokens, tokens), v).unflatten(0, (images, heads))
        bias = mixes[-1][:, None] * v.unflatten(0, (images, heads)).sum(dim=2)
        torch.add(product.transpose(1, 2), bias[:, None], out=out)


def fast_attention(model: nn.Module, attention: str = "auto") -> nn.Module:
    """Replace the attention of a frozen timm model, weights loaded and on its device, and return the model.

    Talking heads (CaiT) become `TalkingHeads`. On a CPU, Swin's windows use the fused kernel that timm keeps
    experimental: it takes 10 to 25 % off the forward pass there and has not been measured on a GPU. State-dict keys and
    tensors do not change, nor do other models.

    Args:
        attention: "timm" changes nothing, "eager" uses PyTorch's operators, "triton" runs half-precision talking heads
            on CUDA in one kernel. "auto" is "eager", because the kernel has not been measured on a GPU yet.

    Raises:
        UserError: "triton" where the installed packages cannot run it.
    """
    if attention == "timm":
        return model
    kernel = _load_kernel() if attention == "triton" else None
    for module in list(model.modules()):
        if type(getattr(module, "attn", None)) is TalkingHeadAttn:
            module.attn = TalkingHeads(module.attn, kernel)
        elif type(module) is WindowAttention and module.qkv.weight.device.type == "cpu":
            module.fused_attn = True
    return model


def _load_kernel():
    try:
        from kernels import mix_softmax_mix  # Triton is not installed everywhere
    except ImportError as error:
        raise UserError(
            f"--teacher-attention triton needs Triton and torch 2.6 or newer ({error}): use eager"
        ) from None
    return mix_softmax_mix
