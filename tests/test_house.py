"""The house rules that a machine can check: who imports whom, and that every flag is read."""

import ast
import re

import pytest
from conftest import ROOT

import main

# What each module may import of ours.
MAY_IMPORT = {
    "main": {"engine", "losses", "spectral", "datasets", "samplers", "models", "attention", "utils"},
    "engine": {"utils"},
    "losses": {"spectral"},
    "spectral": set(),
    "datasets": set(),
    "samplers": set(),
    "models": {"model_names", "weights", "utils"},
    "model_names": {"weights", "utils"},
    "weights": {"utils"},
    "export": {"weights", "utils"},
    "checkpoint_loading_draft": {"utils"},
    "attention": set(),
    "utils": set(),
    "tables": set(),
    "analyze": {"spectral", "datasets", "samplers", "models", "utils"},
}
# What only some may import of others'.
OTHERS = {
    "torch": set(MAY_IMPORT) - {"tables"},
    "timm": {"main", "models", "model_names", "weights", "export", "checkpoint_loading_draft", "attention", "datasets"},
    "torchvision": {"datasets"},
}


def imports(module):
    """Top-level names of everything that a module imports, wherever in it."""
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_every_module_has_its_place_in_the_table():
    assert {path.stem for path in ROOT.glob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_what_its_place_allows(module):
    found = set(imports(module))
    assert found & set(MAY_IMPORT) <= MAY_IMPORT[module]
    for package, allowed in OTHERS.items():
        assert package not in found or module in allowed


def test_the_engine_knows_no_transform_and_no_mode():
    text = (ROOT / "engine.py").read_text()
    assert not [word for word in ("fft", "distillation", "teacher", ".pth", "argparse", "args.") if word in text]


def test_the_readme_names_every_flag_and_files_that_there_are():
    text = (ROOT / "README.md").read_text()
    flags = re.findall(r"`(--[\w-]+\*?)`", text)
    known = [action.option_strings for action in main.get_args_parser()._actions if action.dest != "help"]
    for names in known:
        whole = any(name in flags for name in names)
        assert whole or any(flag.endswith("*") and names[0].startswith(flag[:-1]) for flag in flags), names
    for name in re.findall(r"`((?:tests/)?test_\w+\.py)`", text):
        assert (ROOT / "tests" / name.removeprefix("tests/")).exists(), name


def test_every_flag_is_read():
    """Reading means `args.name` outside the checks, where a flag could be looked at and then ignored."""
    tree = ast.parse((ROOT / "main.py").read_text())
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("check_")]
    read = {
        node.attr
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args"
    }
    refused = {flag.lstrip("-") for flag in main.REFUSED}
    flags = {action.dest for action in main.get_args_parser()._actions} - {"help"} - refused
    assert flags - read == set()


def test_only_main_is_long():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (path.stem, node.name) != ("main", "main"):
                length = node.end_lineno - node.body[0].lineno + 1  # without signature and decorators
                has_docstring = ast.get_docstring(node) is not None
                length -= node.body[0].end_lineno - node.body[0].lineno + 1 if has_docstring else 0
                assert length <= 50, f"{path.name}: {node.name} has {length} lines"
