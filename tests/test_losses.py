"""The training loss: golden terms, each kind against a computation by hand, and the frozen teacher."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from families import build, images
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy
from torch import nn

from baselines import build_feature_loss
from engine import autocast
from losses import TERMS, DistillationLoss, FrozenTeacher, hard_distillation, renormalization, soft_distillation
from spectral import SPECTRAL_IMPLEMENTATIONS, mse_loss, spectral_loss

GOLDEN = ROOT / "tests" / "golden"
CASES = json.loads((GOLDEN / "criterion.json").read_text())


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


@pytest.fixture
def batch():
    """Logits, two pairs of maps and labels of 5 samples in 7 classes."""
    return {
        "student": randn(5, 7, seed=1),
        "teacher": randn(5, 7, seed=2),
        "student_maps": [randn(5, 4, 3, 3, seed=i) for i in (3, 4)],
        "teacher_maps": [randn(5, 8, 3, 3, seed=i) for i in (5, 6)],
        "labels": torch.tensor([0, 6, 2, 2, 5]),
    }


def loss_of(batch, kind, base=smoothed, **options):
    criterion = DistillationLoss(base, kind, lambda _: (batch["teacher"], batch["teacher_maps"]), **options)
    return criterion(None, batch["student"], batch["student_maps"], batch["labels"])


@pytest.mark.parametrize("implementation", SPECTRAL_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['case']}-{case['distillation_type']}")
def test_golden_terms_and_total(case, implementation):
    arrays = np.load(GOLDEN / "criterion.npz")

    def load(name):
        return torch.from_numpy(arrays[f"{case['case']}/{name}"])

    teacher = load("teacher_logits"), [load(f"teacher_feature_{i}") for i in range(3)]
    criterion = DistillationLoss(
        nn.CrossEntropyLoss(label_smoothing=case["label_smoothing"]),
        case["distillation_type"],
        None if case["distillation_type"] == "none" else lambda images: teacher,
        **{name: case[name] for name in ("alpha", "tau", "beta", "w_fft")},
        feature_loss=SPECTRAL_IMPLEMENTATIONS[implementation],
    )
    terms = criterion(None, load("student_logits"), [load(f"student_feature_{i}") for i in range(3)], load("labels"))
    for name in ("base", "fft", "dist"):
        expected = case["terms"].get(name, 0.0)
        torch.testing.assert_close(terms[f"loss_{name}"].item(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(terms["loss"].item(), case["total"], rtol=1e-6, atol=0)


def test_soft_is_the_divergence_of_the_student_from_the_teacher(batch):
    tau = 3.0
    p, q = (torch.softmax(batch[who].double() / tau, 1) for who in ("teacher", "student"))
    expected = tau**2 * (p * (p / q).log()).sum(1).mean()
    got = soft_distillation(batch["student"], batch["teacher"], tau)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_hard_is_cross_entropy_with_the_decision_of_the_teacher(batch, tau):
    decisions = batch["teacher"].double().argmax(1)
    expected = -torch.log_softmax(batch["student"].double(), 1)[range(5), decisions].mean()
    got = hard_distillation(batch["student"], batch["teacher"], tau)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(2, 3), (2,), ()], ids=["one", "row", "all"])
def test_teacher_logits_that_are_not_finite_reach_the_loss(batch, kind, bad, where):
    """The argmax of such logits is a valid class, and training on it would go unnoticed."""
    batch["teacher"][where] = bad
    terms = loss_of(batch, kind)
    assert not terms["loss_dist"].isfinite()
    assert not terms["loss"].isfinite()


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_large_half_precision_logits_are_finite(batch, kind):
    """Their sum would overflow float16."""
    assert loss_of(batch | {"teacher": torch.full((5, 7), 6e4).half()}, kind)["loss"].isfinite()


@pytest.mark.parametrize("kind", ["soft", "hard", "fft"])
@pytest.mark.parametrize("feature_loss", [spectral_loss, mse_loss])
def test_each_kind_is_its_row_of_the_table(batch, kind, feature_loss):
    alpha, tau, beta, w_fft = 0.3, 2.0, 1.5, 0.4
    terms = loss_of(batch, kind, alpha=alpha, tau=tau, beta=beta, w_fft=w_fft, feature_loss=feature_loss)
    pairs = [feature_loss(s, t) for s, t in zip(batch["student_maps"], batch["teacher_maps"], strict=True)]
    logits = {"soft": soft_distillation, "hard": hard_distillation}.get(kind)
    expected = {
        "loss_base": (1 - alpha) * smoothed(batch["student"], batch["labels"]),
        "loss_fft": beta * w_fft * (pairs[0] + pairs[1]) / 2,
        "loss_dist": alpha * logits(batch["student"], batch["teacher"], tau) if logits else torch.zeros(()),
    }
    expected["loss"] = sum(expected.values())
    assert set(terms) == {"loss", *TERMS}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_two_heads_learn_from_labels_and_teacher_separately(batch):
    classes, distillation = heads = batch["student"], randn(5, 7, seed=9)
    terms = loss_of(batch | {"student": heads}, "soft", alpha=0.5)
    torch.testing.assert_close(terms["loss_base"], 0.5 * smoothed(classes, batch["labels"]), rtol=1e-6, atol=0)
    expected = 0.5 * soft_distillation(distillation, batch["teacher"], 1.0)
    torch.testing.assert_close(terms["loss_dist"], expected, rtol=1e-6, atol=0)


def test_without_a_teacher_the_base_loss_takes_soft_labels(batch):
    """At full weight for any alpha: of mixup with cross-entropy, and one-hot with binary cross-entropy."""
    student, labels = batch["student"][:4], batch["labels"][:4]
    _, mixed = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=7)(randn(4, 3, 8, 8), labels)
    one_hot = F.one_hot(labels, 7).float()
    for base, targets, expected in (
        (nn.CrossEntropyLoss(), mixed, -(mixed.double() * torch.log_softmax(student.double(), 1)).sum(1).mean()),
        (
            BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0),
            one_hot,
            F.binary_cross_entropy_with_logits(student.double(), one_hot.double()),
        ),
    ):
        terms = DistillationLoss(base, "none", alpha=0.9)(None, student, [], targets)
        torch.testing.assert_close(terms["loss"].double(), expected, rtol=1e-6, atol=0)


def test_terms_are_float32_for_half_logits_and_maps(batch):
    expected = loss_of(batch, "soft")
    for key in ("student_maps", "teacher_maps"):
        batch[key] = [x.bfloat16() for x in batch[key]]
    batch["student"], batch["teacher"] = batch["student"].bfloat16(), batch["teacher"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss_of(batch, "soft")
    for name, value in terms.items():
        assert value.dtype == torch.float32, name
        torch.testing.assert_close(value, expected[name], rtol=2e-2, atol=0)  # bfloat16 has 8 bits


def test_student_and_teacher_need_the_same_number_of_maps(batch):
    batch["teacher_maps"].pop()
    with pytest.raises(ValueError, match=r"zip\(\)"):
        loss_of(batch, "soft")


def test_logits_are_distilled_without_maps(batch):
    terms = loss_of(batch | {"student_maps": [], "teacher_maps": []}, "soft", w_fft=5.0)
    assert terms["loss_fft"] == 0
    assert terms["loss_dist"] > 0


def test_a_feature_loss_may_have_parameters_per_pair(batch):
    losses = build_feature_loss("projector_trained", [4, 4], [8, 8])
    terms = loss_of(batch, "fft", w_fft=1.0, feature_loss=losses)
    pairs = [loss(s, t) for loss, s, t in zip(losses, batch["student_maps"], batch["teacher_maps"], strict=True)]
    torch.testing.assert_close(terms["loss_fft"], (pairs[0] + pairs[1]) / 2, rtol=1e-6, atol=0)
    assert list(DistillationLoss(smoothed, feature_loss=losses).parameters()) == list(losses.parameters())


@pytest.fixture
def teacher_model():
    return build("vit_tiny_patch16_224", 7, drop_rate=0.5, drop_path_rate=0.5)


def test_the_loss_trains_the_student_and_not_the_teacher(teacher_model, batch):
    """The teacher is in eval mode, frozen, and neither among the loss's modules nor in its state dict."""
    before = {key: value.clone() for key, value in teacher_model.state_dict().items()}
    teacher = FrozenTeacher(teacher_model.train(), [1, 1])
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "soft", teacher).train()
    assert not any(module.training for module in teacher_model.modules())
    assert not criterion.state_dict()
    assert not list(criterion.parameters())
    x = randn(5, 3, 64, 64).requires_grad_()
    student, student_map = batch["student"].requires_grad_(), randn(5, 12, 2, 2).requires_grad_()
    criterion(x, student, [student_map, student_map], batch["labels"])["loss"].backward()
    assert student.grad.abs().sum() > 0
    assert student_map.grad.abs().sum() > 0
    assert x.grad is None
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher_model.parameters())
    torch.testing.assert_close(teacher_model.state_dict(), before, rtol=0, atol=0)


def test_an_equal_normalization_leaves_the_images_alone(teacher_model):
    same, x = ((0.5,) * 3, (0.25,) * 3), images()
    assert FrozenTeacher(teacher_model, [], *renormalization(same, same, torch.device("cpu"))).prepare(x) is x


@pytest.mark.parametrize("amp_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16])
def test_a_half_precision_teacher_needs_no_autocast(weights, amp_dtype, teacher_model):
    expected = FrozenTeacher(copy.deepcopy(teacher_model), [1])(images())
    teacher = FrozenTeacher(teacher_model.to(weights), [1])
    with autocast(torch.device("cpu"), amp_dtype):
        logits, (features,) = teacher(images())
    assert logits.dtype == features.dtype == weights
    torch.testing.assert_close(logits.float(), expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(features.float(), expected[1][0], rtol=0.05, atol=0.05)
