"""Print or run a training command for each combination of varied flags.

    python recipes/sweep.py recipes/deit_tiny.args --vary w-fft=0.05,0.1,0.2,0.4 -- --data-path ILSVRC2012

Flags that vary together are joined by commas and their values by colons; a value with spaces is a list:

    --vary "s-id,t-id=0:0,11:23,0 11:0 23" --vary seed=0,1,2

Each run has its own folder, named after its values. Run this script from the root of the repository.
"""

import argparse
import itertools
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import PurePath

Variation = list[tuple[str, str]]  # (flag, value) pairs that are set together


def variations(text: str) -> list[Variation]:
    """Parse `FLAG=VALUE,VALUE` or `FLAG,FLAG=VALUE:VALUE,VALUE:VALUE`.

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    names, _, values = text.partition("=")
    flags = [name.strip().lstrip("-") for name in names.split(",")]
    choices = [value.split(":") for value in values.split(",")]
    if not all(flags) or any(len(choice) != len(flags) or not all(choice) for choice in choices):
        raise argparse.ArgumentTypeError(f"expected FLAG=A,B,... or FLAG,FLAG=A:A,B:B,..., found {text!r}")
    return [list(zip(flags, choice, strict=True)) for choice in choices]


def commands(
    recipe: str, vary: Sequence[list[Variation]], output: str, processes: int, more: Sequence[str]
) -> Iterator:
    """Yield the command of each run, a list of words; the last --vary changes fastest."""
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    for combination in itertools.product(*vary):
        chosen = [pair for variation in combination for pair in variation]
        name = ",".join(f"{flag}={value.replace(' ', '+')}" for flag, value in chosen)
        folder = PurePath(output, PurePath(recipe).stem, name.replace("/", "_"))
        flags = [word for flag, value in chosen for word in (f"--{flag}", *value.split())]
        yield [*launcher, "main.py", f"@{recipe}", *more, *flags, "--output_dir", str(folder), "--resume", "auto"]


def run(command: list[str]) -> int:
    """Run a command and return its exit code; if the sweep is stopped by a signal, let the command save its state."""
    process = subprocess.Popen(command)
    signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command as well
    signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
    return process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    """Print the commands or run them in turn; return the exit code of the first run that fails, or 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="argument file of main.py")
    parser.add_argument("--vary", action="append", required=True, type=variations, metavar="FLAG=VALUE,...")
    parser.add_argument("--output", default="Output/sweep", help="folder in which each run gets a folder")
    parser.add_argument("--processes", type=int, default=1, help="processes per run, under torch.distributed.run")
    parser.add_argument("--run", action="store_true", help="run them in turn; finished runs are skipped")
    parser.epilog = "Flags after -- are passed to every run."
    args = parser.parse_args(argv[:split])
    for command in commands(args.recipe, args.vary, args.output, args.processes, argv[split + 1 :]):
        print(shlex.join(["python", *command]), flush=True)
        if args.run and (code := run([sys.executable, *command])):
            print(f"this run ended with exit code {code}: repeat the sweep to continue from here", file=sys.stderr)
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
