"""The plain formulation of each part, as one writes it without a thought of time: what the benchmarks compare with."""

import copy

import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

AUGMENTATION = "rand-m9-mstd0.5-inc1"


def spectral_loss(student, teacher):
    """Two transforms of NCHW copies, real and imaginary parts stacked."""
    student, teacher = student.float().contiguous(), teacher.float().contiguous()
    if teacher.shape != student.shape:
        teacher = F.adaptive_avg_pool3d(teacher.unsqueeze(1), student.shape[1:]).squeeze(1)
    return F.mse_loss(_stacked_spectrum(student), _stacked_spectrum(teacher))


def _stacked_spectrum(x):
    spectrum = torch.fft.rfft2(x, norm="ortho")
    return torch.stack((spectrum.real, spectrum.imag), dim=-1)


class Ema:
    """A moving average of the weights, a tensor at a time."""

    def __init__(self, model, decay):
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model):
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            average.copy_(self.decay * average + (1 - self.decay) * value)


def train(model, hooks, criterion, loader, *, optimizer, scaler, ema, device, amp_dtype):
    """An epoch; float images come from the loader, and every step waits for the device."""
    model.train()
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
            outputs = model(images)
            terms = criterion(images, outputs, hooks.pop(), labels)
        optimizer.zero_grad()
        scaler.scale(terms["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ema.update(getattr(model, "module", model))
        for value in terms.values():
            value.item()


def loader(folder, sampler, batch_size, num_workers, input_size=224):
    """DeiT's recipe up to float images in the workers, collated as they are; every sample decodes its file."""
    transform = create_transform(
        input_size,
        is_training=True,
        auto_augment=AUGMENTATION,
        interpolation="bicubic",
        re_prob=0.25,
    )
    dataset = ImageFolder(folder, transform=transform)
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, num_workers=num_workers, drop_last=True)
