"""House rules that a machine can check: imports, flags, documents, the length of functions, the time to an error."""

import ast
import re
import subprocess
import sys

import pytest
from conftest import ROOT

import analyze
import baselines
import flags
import spectral
import tables
from builders import optimizer_kwargs, scheduler_kwargs

# What each module may import of ours; new modules get a row. Imports go downwards only.
PARTS = "engine losses spectral datasets samplers models kernels students baselines checkpoint weights faults flags"
PARTS += " parsing utils"
ROWS = {
    "main": f"{PARTS} builders loaders scoring",
    "demo": "main analyze tables faults flags",
    "verify": f"{PARTS} builders analyses tables",
    "scoring": f"{PARTS} builders export",
    "analyze": f"{PARTS} builders plots analyses",
    "builders": f"{PARTS} loaders",
    "models": "kernels students model_names weights utils",
    "datasets": "gratings loaders utils",
    "tables": "plots runs",
    "runs": "flags parsing",
    "export model_names checkpoint": "weights utils",
    "losses baselines analyses": "spectral",
    "spectral": "kernels",
    "flags": "parsing utils",
    "engine loaders samplers weights faults parsing": "utils",
    "utils gratings students kernels plots": "",
}
MAY_IMPORT = {module: set(row.split()) for modules, row in ROWS.items() for module in modules.split()}
# What only these modules do without: a table needs no torch, the method needs no timm.
WITHOUT = {
    "torch": {"flags", "parsing", "runs", "tables", "plots"},
    "timm": {"spectral", "losses", "engine", "samplers", "checkpoint", "faults", "flags", "tables", "plots", "utils"},
    "torchvision": set(MAY_IMPORT) - {"datasets"},
}
# The argparse Namespace ends here; everything else takes plain values.
WIRING = {"main", "builders", "scoring", "checkpoint"}
READS_ARGS = WIRING | {"flags", "analyze", "verify", "tables", "runs", "demo"}  # with command lines of their own
MODULES = {path.stem: ast.parse(path.read_text()) for path in ROOT.glob("*.py")}
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
# Of torchrun, docker, tensorboard, tables.py, recipes/sweep.py and DeiT.
FLAGS_OF_OTHERS = {"--nproc_per_node", "--max-restarts", "--shm-size", "--full", "--ipc", "--logdir"}
FLAGS_OF_OTHERS |= {"--published", "--plot", "--vary", "--run", "--cosub", "--resplit"}


def imports(tree):
    """Yield the top-level names of everything that a module imports, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def attributes_of_args(tree):
    """Return the names that a module reads as `args.name`."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    return {node.attr for node in nodes if node.value.id == "args"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_what_the_table_allows(module):
    found = set(imports(MODULES[module]))
    assert found & set(MODULES) <= MAY_IMPORT[module]
    assert [package for package, modules in WITHOUT.items() if package in found and module in modules] == []


def test_the_engine_knows_no_distillation_mode():
    text = (ROOT / "engine.py").read_text()
    assert not [word for word in ("fft", "distillation", "teacher", ".pth", "argparse") if word in text]


def test_the_namespace_ends_in_the_wiring():
    plain = {"append", "get", "items", "setdefault"}  # other things are called args, too
    assert {name for name, tree in MODULES.items() if attributes_of_args(tree) - plain} <= READS_ARGS


def test_every_flag_is_read():
    """By WIRING or by timm's factories; a look in the checks of flags.py does not count."""

    class Recorder:
        def __init__(self, args):
            self.args, self.read = args, set()

        def __getattr__(self, name):
            self.read.add(name)
            return getattr(self.args, name)

    recorder = Recorder(flags.get_args_parser().parse_args([]))
    optimizer_kwargs(recorder), scheduler_kwargs(recorder)
    read = recorder.read.union(*(attributes_of_args(MODULES[name]) for name in WIRING))
    known = {action.dest for action in flags.get_args_parser()._actions}
    assert known - read == {"help", "local_rank", "world_size"}  # DeiT has the last one


def test_the_choices_of_flags_are_those_of_the_modules():
    """flags.py cannot import them, because they import torch."""
    assert set(flags.FEATURE_LOSSES) == {"spectral", *baselines.PAIR_LOSSES, *baselines.PROJECTORS}
    choices = {action.dest: action.choices for action in flags.get_args_parser()._actions}
    assert set(choices["spectral_impl"]) == set(spectral.SPECTRAL_IMPLEMENTATIONS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_flags_named_in_a_document_exist(document):
    text = document.read_text()
    named = {*re.findall(r"`([\w./-]+\.(?:py|md|args|slurm|sh))`", text), *re.findall(r"@(recipes/\S+\.args)", text)}
    links = {(document.parent / link).resolve() for link in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)}
    missing = {name for name in named if not (ROOT / name).exists()}
    missing |= {str(path.relative_to(ROOT)) for path in links if not path.exists()}
    assert missing <= {"run.args"}
    parsers = (flags.get_args_parser(), analyze.get_args_parser(), tables.get_args_parser())
    known = {name for parser in parsers for action in parser._actions for name in action.option_strings}
    assert set(re.findall(r"(?<![\w-])--\w[\w-]*", text)) - known <= FLAGS_OF_OTHERS


MISTAKES = ["--help", "--lr nan", "--distillation-type soft", "--data-path missing", "@missing.args"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", MISTAKES)
def test_help_and_mistakes_need_no_torch_and_half_a_second(arguments):
    program = """
import resource, runpy, sys
try:
    runpy.run_path("main.py", run_name="__main__")
except SystemExit as end:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{end.code} {'torch' in sys.modules} {usage.ru_utime + usage.ru_stime}")
"""
    command = [sys.executable, "-c", program, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    code, torch_imported, seconds = done.stdout.split()[-3:]
    assert (code, torch_imported) == ("0" if arguments == "--help" else "2", "False")
    assert len(done.stderr.splitlines()) == (arguments != "--help")
    assert float(seconds) < 0.5


def test_only_main_is_longer_than_50_lines():
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (name, node.name) != ("main", "main"):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno + 1 if body else 0
                assert length <= 50, f"{name}.py: {node.name} has {length} lines"
