"""The reference implementation of each part, written for simplicity rather than speed."""

import copy

import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

AUGMENTATION = "rand-m9-mstd0.5-inc1"


def spectral_loss(student, teacher):
    """Return the spectral loss from two transforms of NCHW copies, with real and imaginary parts stacked."""
    student, teacher = student.float().contiguous(), teacher.float().contiguous()
    if teacher.shape != student.shape:
        teacher = F.adaptive_avg_pool3d(teacher.unsqueeze(1), student.shape[1:]).squeeze(1)
    return F.mse_loss(_stacked_spectrum(student), _stacked_spectrum(teacher))


def _stacked_spectrum(x):
    spectrum = torch.fft.rfft2(x, norm="ortho")
    return torch.stack((spectrum.real, spectrum.imag), dim=-1)


class Ema:
    """A moving average of the weights, updated one tensor at a time."""

    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(self.decay * average + (1 - self.decay) * value)


def train(state, loader, criterion, hooks, *, device, amp_dtype):
    """Train for one epoch on float images; every step waits for the device."""
    state.model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = state.parallel(images)
            terms = criterion(images, outputs, hooks.pop(), labels)
        state.optimizer.zero_grad()
        state.scaler.scale(terms["loss"]).backward()
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        state.ema.update(state.model)
        for value in terms.values():
            value.item()


def loader(folder, sampler, batch_size, num_workers, input_size=224, pin_memory=False):
    """Build a loader of float images with DeiT's augmentation; every sample decodes its file."""
    transform = create_transform(
        input_size, is_training=True, auto_augment=AUGMENTATION, interpolation="bicubic", re_prob=0.25
    )
    return DataLoader(
        ImageFolder(folder, transform=transform),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        drop_last=True,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
    )
