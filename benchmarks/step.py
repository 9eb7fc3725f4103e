"""The parts of a training step on random images, each as the program runs it beside its plain formulation."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

import common
import jobs

import main as program


class Parts:
    """The parts of one job's step, each a function without arguments that can be run again and again."""

    def __init__(self, job, images, labels, amp_dtype):
        self.job, self.images, self.labels = job, images, labels
        self.autocast = torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32)
        self.logits, self.maps = self.run_student()
        self.teacher_maps = self.teacher()[1]
        self.student()  # leaves gradients for the optimizer

    def run_student(self):
        with self.autocast:
            return self.job.student(self.images), self.job.hooks.pop()

    def student(self):
        """Forward and backward, without the distillation."""
        self.job.optimizer.zero_grad()
        self.job.criterion.base_criterion(self.run_student()[0].float(), self.labels).backward()

    def teacher(self):
        with self.autocast:
            return self.job.criterion.teacher(self.images)

    def feature_loss(self):
        """Forward and backward of all pairs."""
        loss = self.job.criterion.feature_loss
        for student, teacher in zip(self.maps, self.teacher_maps, strict=True):
            # A fresh leaf with the layout of the map that the hook gave.
            loss(student.detach().requires_grad_(), teacher).backward()

    def optimizer(self):
        self.job.optimizer.step()

    def ema(self):
        self.job.ema.update(self.job.model)


PARTS = ("student", "teacher", "feature_loss", "optimizer", "ema")


def main():
    parser = common.parser(__doc__, repeats=9)
    jobs.add_flags(parser)
    args = parser.parse_args()
    common.start(args)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=args.device)
    labels = torch.randint(jobs.NUM_CLASSES, (args.batch_size,), device=args.device)
    amp_dtype = program.DTYPES[args.amp_dtype]
    plain = Parts(jobs.plain_job(args), images, labels, amp_dtype)
    fast = Parts(jobs.fast_job(args), images, labels, amp_dtype)
    results = {}
    for part in PARTS:
        results[part] = common.interleave({"plain": getattr(plain, part), "fast": getattr(fast, part)}, args)
        common.report(part, results[part], "plain", args.batch_size)
    whole = {
        name: [sum(row) for row in zip(*(results[part][name] for part in PARTS), strict=True)]
        for name in ("plain", "fast")
    }
    common.report("sum of the parts", whole, "plain", args.batch_size)
    common.write_json(args, seconds=results)


if __name__ == "__main__":
    main()
