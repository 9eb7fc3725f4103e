"""An argument parser with argument files and one-line errors, and the types of its arguments. Imports no torch."""

import argparse
import ast
import contextlib
import math
import os
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from utils import UserError, as_user_error


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show defaults, except of switches and of flags that have none."""

    def _get_help_string(self, action):
        has_none = action.default is False or action.default in (None, "", [], {})
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reads `@file` arguments as a shell would, with # comments, and raises UserError."""

    def __init__(self, description: str):
        super().__init__(
            description=description, formatter_class=HelpFormatter, fromfile_prefix_chars="@", allow_abbrev=False
        )

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        try:
            words = shlex.split(arg_line.lstrip("\ufeff"), comments=True)
        except ValueError as error:
            self.error(f"cannot read the line {arg_line.strip()} of an argument file: {error}")
        return [os.path.expanduser(word) for word in words]

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        try:
            return super().parse_args(args, namespace)
        except RecursionError:
            self.error("an argument file includes itself")
        except UnicodeDecodeError as error:
            self.error(f"an argument file is not UTF-8 text: {error}")

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def key_values(pairs: Sequence[str]) -> dict:
    """Return KEY=VALUE words as a dict, reading values as Python literals if they are; else raise a UserError."""
    result = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise UserError(f"expected KEY=VALUE, got {pair}")
        result[key] = value
        with contextlib.suppress(ValueError, SyntaxError):
            result[key] = ast.literal_eval(value)
    return result


def stored_kwargs(value: dict | list) -> dict:
    """Return the model arguments of a checkpoint; before version 0.2 they were stored as KEY=VALUE words."""
    return key_values(value) if isinstance(value, list) else value


class KeyValues(argparse.Action):
    """Collect KEY=VALUE words in a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        with as_user_error(f"{option_string}: ", UserError):
            setattr(namespace, self.dest, key_values(values))


def number(kind: type, low: float, high: float = math.inf, *, ends: bool = True) -> Callable[[str], Any]:
    """Return an argparse type: a finite int or float in [low, high], or in (low, high) without `ends`."""
    left, right = "[]" if ends and math.isfinite(high) else "[)" if ends else "()"
    name = "a whole number" if kind is int else "a number"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        inside = low <= value <= high if ends else low < value < high
        if not inside or math.isinf(value):
            raise argparse.ArgumentTypeError(f"expected {name} in {left}{low:g}, {high:g}{right}, got {text}")
        return value

    return parse
