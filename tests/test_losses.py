"""The training loss: golden terms, each kind against a computation by hand, and a teacher that nothing changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import nn

from losses import TERMS, DistillationLoss, FrozenTeacher, hard_distillation, soft_distillation
from spectral import mse_loss, spectral_loss

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "criterion.json").read_text())
VIT = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.fixture
def batch():
    """Student and teacher logits, two pairs of maps, labels and images of 5 samples in 7 classes."""
    return {
        "student": randn(5, 7, seed=1),
        "teacher": randn(5, 7, seed=2),
        "student_maps": [randn(5, 4, 3, 3, seed=i) for i in (3, 4)],
        "teacher_maps": [randn(5, 8, 3, 3, seed=i) for i in (5, 6)],
        "labels": torch.tensor([0, 6, 2, 2, 5]),
        "images": randn(5, 3, 8, 8, seed=7),
    }


def run(batch, kind, base=smoothed, outputs=None, **options):
    criterion = DistillationLoss(base, kind, lambda images: (batch["teacher"], batch["teacher_maps"]), **options)
    outputs = batch["student"] if outputs is None else outputs
    return criterion(batch["images"], outputs, batch["student_maps"], batch["labels"])


# Terms


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['distillation_type']}")
def test_golden_terms_and_total(case):
    arrays = np.load(GOLDEN / "criterion.npz")
    inputs = {key: torch.from_numpy(arrays[f"{case['case']}/{key}"]) for key in ("student_logits", "teacher_logits")}
    labels = torch.from_numpy(arrays[f"{case['case']}/labels"])
    maps = {
        who: [torch.from_numpy(arrays[f"{case['case']}/{who}_feature_{i}"]) for i in range(3)]
        for who in ("student", "teacher")
    }
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(label_smoothing=case["label_smoothing"]),
        case["distillation_type"],
        lambda images: (inputs["teacher_logits"], maps["teacher"]),
        alpha=case["alpha"],
        tau=case["tau"],
        beta=case["beta"],
        w_fft=case["w_fft"],
    )
    if case["distillation_type"] == "none":
        criterion.teacher = None
    terms = criterion(None, inputs["student_logits"], maps["student"], labels)
    for name in ("base", "fft", "dist"):
        wanted = case["terms"].get(name, 0.0)
        torch.testing.assert_close(terms[f"loss_{name}"].item(), wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(terms["loss"].item(), case["total"], rtol=1e-6, atol=0)


def test_soft_is_the_divergence_of_the_student_from_the_teacher(batch):
    tau = 3.0
    p = torch.softmax(batch["teacher"].double() / tau, 1)
    q = torch.softmax(batch["student"].double() / tau, 1)
    expected = tau**2 * (p * (p / q).log()).sum(1).mean()
    got = soft_distillation(batch["student"], batch["teacher"], tau)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    other_way = tau**2 * (q * (q / p).log()).sum(1).mean()
    assert abs(got - other_way) > 1e-3
    torch.testing.assert_close(
        soft_distillation(batch["teacher"], batch["teacher"], tau).item(), 0.0, rtol=0, atol=1e-6
    )


def test_hard_is_cross_entropy_with_the_decision_of_the_teacher(batch):
    decisions = batch["teacher"].double().argmax(1)
    expected = -torch.log_softmax(batch["student"].double(), 1)[range(5), decisions].mean()
    for tau in (1.0, 4.0):
        got = hard_distillation(batch["student"], batch["teacher"], tau)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["soft", "hard", "fft"])
@pytest.mark.parametrize("feature_loss", [spectral_loss, mse_loss])
def test_each_kind_is_its_row_of_the_table(batch, kind, feature_loss):
    alpha, tau, beta, w_fft = 0.3, 2.0, 1.5, 0.4
    terms = run(batch, kind, alpha=alpha, tau=tau, beta=beta, w_fft=w_fft, feature_loss=feature_loss)
    base = smoothed(batch["student"], batch["labels"])
    pairs = [feature_loss(s, t) for s, t in zip(batch["student_maps"], batch["teacher_maps"], strict=True)]
    logits = {"soft": soft_distillation, "hard": hard_distillation}.get(kind)
    expected = {
        "loss_base": (1 - alpha) * base,
        "loss_fft": beta * w_fft * (pairs[0] + pairs[1]) / 2,
        "loss_dist": alpha * logits(batch["student"], batch["teacher"], tau) if logits else torch.zeros(()),
    }
    expected["loss"] = sum(expected.values())
    assert set(terms) == {"loss", *TERMS}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_without_a_teacher_the_loss_is_the_base_loss_at_full_weight(batch):
    criterion = DistillationLoss(smoothed, "none", alpha=0.9)
    terms = criterion(batch["images"], batch["student"], [], batch["labels"])
    expected = smoothed(batch["student"], batch["labels"])
    torch.testing.assert_close(terms["loss"], expected, rtol=0, atol=0)
    torch.testing.assert_close(terms["loss_base"], expected, rtol=0, atol=0)
    assert terms["loss_fft"] == terms["loss_dist"] == 0


def test_a_distilled_student_learns_labels_and_teacher_with_separate_heads(batch):
    heads = (batch["student"].requires_grad_(), randn(5, 7, seed=9).requires_grad_())
    terms = run(batch, "soft", alpha=0.5, outputs=heads)
    torch.testing.assert_close(terms["loss_base"], 0.5 * smoothed(heads[0], batch["labels"]), rtol=1e-6, atol=0)
    expected = 0.5 * soft_distillation(heads[1], batch["teacher"], 1.0)
    torch.testing.assert_close(terms["loss_dist"], expected, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(terms["loss_base"], heads, allow_unused=True, retain_graph=True)
    assert grads[0] is not None
    assert grads[1] is None
    grads = torch.autograd.grad(terms["loss_dist"], heads, allow_unused=True)
    assert grads[0] is None
    assert grads[1] is not None


def test_a_distilled_student_gives_its_heads_apart_in_training_and_their_mean_at_evaluation():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, **VIT)
    model.set_distilled_training(True)
    images = randn(2, 3, 32, 32)
    with torch.no_grad():
        one, two = model.train()(images)
        mean = model.eval()(images)
    torch.testing.assert_close(mean, (one + two) / 2, rtol=1e-6, atol=1e-6)
    assert not torch.equal(one, two)


def test_soft_labels_of_mixup_are_taken(batch):
    mixup = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=7)
    _, labels = mixup(batch["images"][:4].clone(), batch["labels"][:4])
    batch = batch | {"student": batch["student"][:4], "teacher": batch["teacher"][:4], "labels": labels}
    terms = run(batch, "soft", base=nn.CrossEntropyLoss(), alpha=0.4)
    expected = -0.6 * (labels.double() * torch.log_softmax(batch["student"].double(), 1)).sum(1).mean()
    torch.testing.assert_close(terms["loss_base"].double(), expected, rtol=1e-6, atol=0)


def test_binary_cross_entropy_can_be_the_base_loss(batch):
    base = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    labels = F.one_hot(batch["labels"], 7).float()
    terms = run(batch | {"labels": labels}, "soft", base=base, alpha=0.0)
    expected = F.binary_cross_entropy_with_logits(batch["student"].double(), labels.double())
    torch.testing.assert_close(terms["loss_base"].double(), expected, rtol=1e-6, atol=0)


def test_terms_are_float32_where_logits_and_maps_are_not(batch):
    expected = run(batch, "soft")
    for key in ("student_maps", "teacher_maps"):
        batch[key] = [x.bfloat16() for x in batch[key]]
    batch["student"], batch["teacher"] = batch["student"].bfloat16(), batch["teacher"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = run(batch, "soft")
    for name, value in terms.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=0)  # bfloat16 inputs: 8 bits


def test_student_and_teacher_need_as_many_maps(batch):
    batch["teacher_maps"].pop()
    with pytest.raises(ValueError, match=r"zip\(\)"):
        run(batch, "soft")


def test_logits_alone_are_distilled_where_no_maps_are_asked(batch):
    batch["student_maps"], batch["teacher_maps"] = [], []
    terms = run(batch, "soft", w_fft=5.0)
    assert terms["loss_fft"] == 0
    assert terms["loss_dist"] > 0


# Teacher


@pytest.fixture
def teacher_model():
    torch.manual_seed(3)
    return timm.create_model("vit_tiny_patch16_224", num_classes=7, drop_rate=0.5, drop_path_rate=0.5, **VIT)


def test_the_teacher_is_frozen_in_eval_and_outside_the_loss(teacher_model):
    teacher = FrozenTeacher(teacher_model.train(), [0, 1])
    criterion = DistillationLoss(smoothed, "soft", teacher)
    assert not any(module.training for module in teacher_model.modules())
    assert not any(parameter.requires_grad for parameter in teacher_model.parameters())
    assert not isinstance(criterion, nn.Module)  # so neither parameters(), state_dict() nor train() reach it
    assert not isinstance(teacher, nn.Module)


def test_a_step_gives_gradients_to_the_student_alone_and_leaves_the_teacher_as_it_was(teacher_model, batch):
    before = {key: value.clone() for key, value in teacher_model.state_dict().items()}
    teacher = FrozenTeacher(teacher_model, [1, 1])
    images = randn(5, 3, 32, 32).requires_grad_()
    logits, maps = teacher(images)
    assert not logits.requires_grad
    assert not any(x.requires_grad for x in maps)
    student, student_map = batch["student"].requires_grad_(), randn(5, 12, 2, 2).requires_grad_()
    criterion = DistillationLoss(smoothed, "soft", teacher)
    criterion(images, student, [student_map, student_map], batch["labels"])["loss"].backward()
    assert student.grad.abs().sum() > 0
    assert student_map.grad.abs().sum() > 0
    for key, value in teacher_model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in teacher_model.parameters())


def test_the_teacher_gives_the_same_answer_twice(teacher_model):
    teacher = FrozenTeacher(teacher_model.train(), [1])
    images = randn(2, 3, 32, 32)
    (one, maps), (two, again) = teacher(images), teacher(images)
    torch.testing.assert_close(one, two, rtol=0, atol=0)  # dropout and stochastic depth are off
    torch.testing.assert_close(maps[0], again[0], rtol=0, atol=0)


def test_a_teacher_with_its_own_normalisation_sees_the_images_it_was_made_for(teacher_model):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std, own_mean, own_std = (
        torch.tensor(v).view(3, 1, 1) for v in ([0.5] * 3, [0.25] * 3, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    for_student, for_teacher = (pixels - mean) / std, (pixels - own_mean) / own_std
    seen = []
    teacher_model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    teacher = FrozenTeacher(teacher_model, [], std / own_std, (mean - own_mean) / own_std)
    logits, _ = teacher(for_student)
    torch.testing.assert_close(seen[0], for_teacher, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, teacher_model(for_teacher), rtol=1e-4, atol=1e-5)


def test_images_of_a_teacher_with_the_same_normalisation_are_not_touched(teacher_model):
    images = randn(2, 3, 32, 32)
    seen = []
    teacher_model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    FrozenTeacher(teacher_model)(images)
    assert seen[0] is images
