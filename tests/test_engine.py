"""One epoch of training against loops by hand, and evaluation that counts every image once."""

import json
import math
import re

import pytest
import timm
import torch
import torch.nn.functional as F
from processes import finish
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader, TensorDataset

import engine
import utils
from checkpoint import TrainState
from datasets import Prepare
from engine import Console, ConstantScaler, DivergenceWatch, evaluate, train_one_epoch
from losses import TERMS, DistillationLoss, FrozenTeacher
from samplers import ShardSampler
from spectral import FeatureHooks

CPU = torch.device("cpu")
CLASSES = 7


def make_model(dropout=0.0, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(3 * 4 * 4, CLASSES, dtype=dtype)
    return nn.Sequential(nn.Flatten(), nn.Dropout(dropout), head)


def make_batches(number, size=4, seed=1, dtype=torch.float64):
    random = torch.Generator().manual_seed(seed)
    image = {"size": (size, 3, 4, 4), "generator": random, "dtype": dtype}
    return [(torch.randn(**image), torch.randint(0, CLASSES, (size,), generator=random)) for _ in range(number)]


def cross_entropy(images, outputs, maps, labels):
    assert maps == []
    loss = F.cross_entropy(outputs, labels)
    return {"loss": 3 * loss, "loss_base": loss, "loss_dist": 2 * loss}


def train(model, batches, *, resume=None, wrap=None, hooks=None, criterion=cross_entropy, **options):
    """Run train_one_epoch with plain SGD unless told otherwise; return the state."""
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=0.1)
    scaler, ema = options.pop("scaler", None) or ConstantScaler("cpu"), options.pop("ema", None)
    terms = options.pop("terms", ["loss", "loss_base", "loss_dist"])
    state = TrainState(model, optimizer, None, scaler, ema, terms)
    state.start_epoch(5)
    if resume is not None:
        state.step, state.meter = resume.step, resume.meter
    if wrap is not None:
        state.parallel = wrap(model)
    options = {"device": CPU, "prepare": nn.Identity(), "watch": DivergenceWatch()} | options
    train_one_epoch(state, batches, criterion, hooks or FeatureHooks(model), **options)
    return state


def by_hand(model, batches, lr=0.1, clip=None):
    """Train by plain gradient descent; return the loss of each step."""
    values = []
    for images, labels in batches:
        loss = F.cross_entropy(model(images), labels)
        grads = torch.autograd.grad(3 * loss, list(model.parameters()))
        norm = torch.sqrt(sum(grad.square().sum() for grad in grads))
        factor = min(1.0, clip / norm.item()) if clip else 1.0
        with torch.no_grad():
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter -= lr * factor * grad
        values.append(loss.item())
    return values


def assert_same_weights(one, other, atol=1e-12):
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=atol)


# Training


def test_an_epoch_is_one_descent_step_per_batch():
    model, twin, batches = make_model(), make_model(), make_batches(6)
    state = train(model, batches)
    values = by_hand(twin, batches)
    assert (state.step, state.trained) == (6, True)
    assert_same_weights(model, twin)
    mean = sum(values) / 6
    averages = {"loss": 3 * mean, "loss_base": mean, "loss_dist": 2 * mean}
    assert state.meter.averages() == pytest.approx(averages, rel=1e-6)


@pytest.mark.parametrize("clip", [0.01, 0.5, 1e6])
def test_the_gradient_is_clipped_to_its_norm(clip):
    model, twin, batches = make_model(), make_model(), make_batches(3)
    train(model, batches, clip_grad=clip)
    by_hand(twin, batches, clip=clip)
    assert_same_weights(model, twin, atol=1e-6 * min(clip, 1))  # clip_grad_norm_ adds 1e-6 to the norm
    moved = (model[2].weight - make_model()[2].weight).norm().item()
    assert moved <= 3 * 0.1 * clip * (1 + 1e-6)


@pytest.mark.parametrize("accum_steps", [2, 3, 4, 8])
def test_accumulated_batches_equal_one_large_batch(accum_steps):
    """Including the last group, which is incomplete."""
    batches = make_batches(7)
    groups = [batches[i : i + accum_steps] for i in range(0, 7, accum_steps)]
    large = [tuple(torch.cat(parts) for parts in zip(*group, strict=True)) for group in groups]
    model, twin = make_model(), make_model()
    state = train(model, batches, accum_steps=accum_steps, print_freq=1)
    assert state.meter.count == state.step == 7
    assert train(twin, large).meter.count == len(large)
    assert_same_weights(model, twin)


def test_an_epoch_in_two_pieces_equals_a_whole_one():
    model, twin, batches = make_model(), make_model(), make_batches(7)
    whole = train(model, batches)
    answers = iter([False, False, True])
    first = train(twin, batches, should_stop=lambda: next(answers))
    assert (first.step, first.trained, first.meter.count) == (3, False, 3)
    seeds = []
    second = train(twin, batches[3:], resume=first, seed_step=lambda epoch, step: seeds.append((epoch, step)))
    assert (second.step, second.trained) == (7, True)
    assert seeds == [(5, step) for step in range(3, 7)]
    assert second.meter.averages() == whole.meter.averages()
    assert_same_weights(model, twin, atol=0)


def test_a_stop_waits_for_the_end_of_a_group():
    state = train(make_model(), make_batches(8), accum_steps=3, should_stop=lambda: True)
    assert state.meter.count == state.step == 3


def test_mixup_makes_the_images_and_labels_of_the_step():
    mixup = Mixup(mixup_alpha=1.0, label_smoothing=0.1, num_classes=CLASSES)
    seen, made = [], []

    def mix(images, labels):
        made.append(mixup(images, labels))
        return made[-1]

    def criterion(images, outputs, maps, labels):
        seen.append((images, labels))
        return cross_entropy(images, outputs, maps, labels)

    train(make_model(dtype=torch.float32), make_batches(2, dtype=torch.float32), mixup=mix, criterion=criterion)
    assert [[id(part) for part in step] for step in seen] == [[id(part) for part in step] for step in made]
    assert seen[1][1].shape == (4, CLASSES)


def test_the_moving_average_follows_every_optimizer_step():
    model, batches = make_model(), make_batches(5)
    ema = ModelEmaV3(model, decay=0.9)
    twin = make_model()
    expected = {name: value.clone() for name, value in twin.state_dict().items()}
    for group in (batches[0:2], batches[2:4], batches[4:]):
        by_hand(twin, [tuple(torch.cat(parts) for parts in zip(*group, strict=True))])
        expected = {name: 0.9 * expected[name] + 0.1 * value for name, value in twin.state_dict().items()}
    train(model, batches, ema=ema, accum_steps=2)
    torch.testing.assert_close(dict(ema.module.state_dict()), expected, rtol=0, atol=1e-12)


def test_random_erasing_is_on_in_training_and_off_in_evaluation():
    prepare = Prepare([0.0] * 3, [1.0] * 3, reprob=1.0, remode="const")
    images = [(torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))]
    seen = []
    model = make_model(dtype=torch.float32)
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    prepare.eval()
    train(model, images, prepare=prepare)
    evaluate(model, images, prepare=prepare, device=CPU)
    assert (seen[0] == 0).any()
    assert (seen[1] == 1).all()


def test_a_loss_scale_leaves_the_step_as_it_is():
    model, twin = make_model(dtype=torch.float32), make_model(dtype=torch.float32)
    batches = make_batches(3, dtype=torch.float32)
    train(model, batches, scaler=GradScaler("cpu", init_scale=2.0**10), clip_grad=0.5)
    train(twin, batches, clip_grad=0.5)
    assert_same_weights(model, twin, atol=1e-6)


CONSOLE = re.compile(
    r"Epoch: \[5\]  \[ ?(\d+)/25\]  eta: \d:\d\d:\d\d  lr: 0\.100000  loss: \d+\.\d{4}  loss_base: \d+\.\d{4}  "
    r"loss_dist: \d+\.\d{4}  time: \d+\.\d{4}  data: \d+\.\d{4}  img/s: \d+\.\d"
)


def test_the_console_has_a_line_every_ten_steps_and_at_the_end(capsys):
    train(make_model(), make_batches(25))
    lines = capsys.readouterr().out.splitlines()
    matches = [CONSOLE.fullmatch(line) for line in lines]
    assert all(matches), lines
    assert [int(match[1]) for match in matches] == [10, 20, 25]


def test_the_console_shows_remaining_and_waiting_time(monkeypatch, capsys):
    """4 of 10 steps in 20 s leave 30 s; the loader took 2 s per batch."""
    now = [100.0]
    monkeypatch.setattr(engine.time, "perf_counter", lambda: now[0])
    console = Console("x", 10, 0, CPU)

    def slow_loader():
        for _ in range(4):
            now[0] += 2
            yield None

    for _ in console.timed(slow_loader()):
        now[0] += 3
    console.line(3, 0.1, {})
    printed = capsys.readouterr().out
    assert "eta: 0:00:30" in printed
    assert "time: 5.0000  data: 2.0000" in printed


# Divergence


def spoiled(bad_steps, term="loss_dist", value=math.nan):
    """A criterion whose term is not finite in these steps."""
    steps = iter(range(10**6))

    def criterion(images, outputs, maps, labels):
        terms = cross_entropy(images, outputs, maps, labels)
        if next(steps) in bad_steps:
            terms[term] = terms[term] * value
            terms["loss"] = terms["loss_base"] + terms["loss_dist"]
        return terms

    return criterion


def test_a_step_whose_loss_is_not_finite_is_skipped_and_named(capsys):
    model, twin, batches = make_model(), make_model(), make_batches(6)
    meter = train(model, batches, criterion=spoiled({2, 3})).meter
    by_hand(twin, batches[:2] + batches[4:])
    assert_same_weights(model, twin)
    assert meter.count == 4
    assert all(math.isfinite(value) for value in meter.averages().values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "not finite" in line]
    assert len(lines) == 2
    assert "term loss_dist of rank 0 is not finite in epoch 5, step 2" in lines[0]


def test_a_step_with_an_infinite_loss_leaves_batchnorm_alone():
    """The gradient is finite."""
    model, twin = (nn.Sequential(nn.BatchNorm2d(3, dtype=torch.float64), make_model()) for _ in range(2))
    steps = iter([0, torch.inf, 0])

    def criterion(*inputs):
        terms = cross_entropy(*inputs)
        return terms | {"loss": terms["loss"] + next(steps)}

    batches = make_batches(3)
    train(model, batches, criterion=criterion)
    train(twin, [batches[0], batches[2]])
    assert model[0].num_batches_tracked == 3
    twin[0].num_batches_tracked += 1
    assert_same_weights(model, twin, atol=0)


def test_bad_losses_with_good_ones_between_do_not_end_training():
    state = train(make_model(), make_batches(12), criterion=spoiled({0, 1, 3, 4, 6, 7, 9, 10}))
    assert state.step == 12


@pytest.mark.parametrize(
    ("bad", "ends"), [(range(1, 21), True), (range(1, 20), False), ({*range(1, 16), *range(17, 30)}, False)]
)
def test_twenty_bad_gradients_in_a_row_end_training(bad, ends):
    model, steps = make_model(), iter(range(10**6))
    model[2].weight.register_hook(lambda grad: grad * (math.inf if next(steps) in bad else 1))
    if ends:
        with pytest.raises(utils.Diverged, match=r"20 steps in a row had no finite gradient.*epoch 5, step 20"):
            train(model, make_batches(30))
    else:
        assert train(model, make_batches(30)).step == 30
    assert model[2].weight.isfinite().all()


def test_a_gradient_scale_under_one_ends_training():
    """A collapsed scaler skips every step while the loss stays finite; the original does not notice."""
    model = make_model(dtype=torch.float32)
    model[2].weight.register_hook(lambda grad: grad * math.inf)
    scaler = GradScaler("cpu", init_scale=4.0)  # halves with every skipped step
    with pytest.raises(utils.Diverged, match=r"gradient scale fell to .* in epoch 5"):
        train(model, make_batches(10, dtype=torch.float32), scaler=scaler, print_freq=4)


# Evaluation


def make_scored(num_images, classes=CLASSES, seed=3):
    """A model that looks up its logits, with images and labels, so that the expected counts are independent of it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_images, classes, generator=generator)
    labels = torch.randint(0, classes, (num_images,), generator=generator)
    images = torch.arange(num_images, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)

    class Lookup(nn.Module):
        def forward(self, images):
            return logits[images[:, 0, 0, 0].long()]

    return Lookup(), TensorDataset(images, labels), logits


def expected_counts(dataset, logits):
    """Count by sorting, and compute the loss in float64."""
    labels = dataset.tensors[1]
    places = (logits.argsort(dim=1, descending=True) == labels[:, None]).int().argmax(dim=1)
    counts = {"correct1": (places == 0).sum().item(), "correct5": (places < 5).sum().item()}
    return counts | {"images": len(labels), "loss": F.cross_entropy(logits.double(), labels).item()}


@pytest.mark.parametrize("num_images", [1, 2, 3, 17])
@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_shards_together_have_the_counts_of_the_whole(num_images, shards, batch_size):
    model, dataset, logits = make_scored(num_images)
    total = dict.fromkeys(["images", "correct1", "correct5", "loss"], 0)
    for rank in range(min(shards, num_images)):
        loader = DataLoader(dataset, batch_size, sampler=ShardSampler(dataset, shards, rank))
        stats = evaluate(model, loader, device=CPU, prepare=nn.Identity())
        assert stats["acc1"] == 100 * stats["correct1"] / stats["images"]
        assert stats["acc5"] == 100 * stats["correct5"] / stats["images"]
        total = {name: total[name] + stats[name] * (stats["images"] if name == "loss" else 1) for name in total}
    total["loss"] /= total["images"]
    expected = expected_counts(dataset, logits)
    assert total.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert total == expected


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_up_to_five_classes_have_a_top_5_of_100_percent(classes):
    model, dataset, logits = make_scored(9, classes)
    stats = evaluate(model, DataLoader(dataset, 4), device=CPU, prepare=nn.Identity())
    assert stats["acc5"] == 100
    assert stats["correct1"] == expected_counts(dataset, logits)["correct1"]


def test_evaluation_uses_eval_mode_and_makes_no_graph():
    model = make_model(dropout=0.9)
    model.train()
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    batches = make_batches(2)
    one, two = (evaluate(model, batches, device=CPU, prepare=nn.Identity()) for _ in range(2))
    assert one == two
    assert not model.training
    assert not any(output.requires_grad for output in outputs)


def one_right_of_17():
    """Only the first image is classified correctly; padding to a multiple of the processes would count it twice."""
    model, dataset, logits = make_scored(17)
    labels = (logits.argmax(dim=1) + 1) % CLASSES
    labels[0] = logits[0].argmax()
    return model, TensorDataset(dataset.tensors[0], labels)


def distill(wrap=None, share=slice(None)):
    """Train a tiny DeiT under a tiny CaiT with blocks out of order; return its weights and the meter."""
    torch.manual_seed(0)
    kwargs = {"img_size": 32, "patch_size": 8, "num_heads": 3, "num_classes": CLASSES}
    teacher = timm.create_model("cait_xxs24_224", embed_dim=48, depth=3, **kwargs)
    model = timm.create_model("deit_tiny_patch16_224", embed_dim=24, depth=3, **kwargs)
    hooks = FeatureHooks(model, [2, 0])
    criterion = DistillationLoss(nn.CrossEntropyLoss(), "soft", FrozenTeacher(teacher, [2, 0]), w_fft=2.0)
    generator = torch.Generator().manual_seed(4)
    batches = [(torch.randn(4, 3, 32, 32, generator=generator)[share], torch.tensor([0, 3, 6, 1])[share])] * 3
    options = {"terms": ["loss", *TERMS], "hooks": hooks, "wrap": wrap, "accum_steps": 2}
    state = train(model, batches, criterion=criterion, **options)
    return model.state_dict(), state.meter


# Two processes

TWO_PROCESSES = """
import json
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
import faults, test_engine, utils
from engine import evaluate
from samplers import ShardSampler

def score(dataset, sampler=None):
    loader = DataLoader(dataset, 4, sampler=sampler)
    return evaluate(model, loader, device=device, prepare=nn.Identity(), sharded=sampler is not None)

device = faults.init_distributed("cpu")
rank = utils.rank()
result = dict(scores=dict())
for num_images in (1, 2, 3, 17):
    model, dataset, _ = test_engine.make_scored(num_images)
    result["scores"][num_images] = score(dataset, ShardSampler(dataset, 2, rank))
model, dataset = test_engine.one_right_of_17()
result["of_17"] = score(dataset, ShardSampler(dataset, 2, rank)), score(dataset)
weights, meter = test_engine.distill(DistributedDataParallel, slice(rank, None, 2))
result["terms"] = meter.averages(over_ranks=True)
result["weights"] = utils.gather_objects([value.tolist() for value in weights.values()])
if rank == 0:
    with open({}, "w") as file:
        json.dump(result, file)
faults.leave_distributed()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The results of two processes that are started as in training."""
    path = tmp_path_factory.mktemp("two") / "result.json"
    finish(0, ranks=2, before=TWO_PROCESSES.format(repr(str(path))))
    return json.loads(path.read_text())


@pytest.mark.parametrize("num_images", [1, 2, 3, 17])
@pytest.mark.slow
def test_two_processes_count_every_image_once(two_processes, num_images):
    """Also if a process has no images."""
    _, dataset, logits = make_scored(num_images)
    stats, expected = two_processes["scores"][str(num_images)], expected_counts(dataset, logits)
    assert stats["loss"] == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert {name: stats[name] for name in expected} == expected


@pytest.mark.slow
def test_two_processes_score_one_of_seventeen_as_5_88_percent(two_processes):
    """Shared or not. The original pads to 18 images, counts the first one twice, and prints 11.11."""
    for stats in two_processes["of_17"]:
        assert (stats["correct1"], stats["images"]) == (1, 17)
        assert round(stats["acc1"], 2) == 5.88


@pytest.mark.slow
def test_two_processes_train_as_one_with_their_batches_together(two_processes):
    """The hooks are on the bare student inside DistributedDataParallel; the teacher is outside."""
    weights, meter = distill()
    assert two_processes["terms"] == pytest.approx(meter.averages(), rel=1e-5)
    assert min(meter.averages().values()) > 0.001
    first, second = two_processes["weights"]
    assert first == second
    expected = [value.tolist() for value in weights.values()]
    torch.testing.assert_close([torch.tensor(v) for v in first], [torch.tensor(v) for v in expected], rtol=0, atol=1e-6)
