"""Options from config classes, read from their source without importing it: `--help` must not load torch."""

import argparse
import ast
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SEVERAL = ("tuple[", "list[")  # fields with several values
PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Option:
    """One field of a config class."""

    name: str
    annotation: str
    default: Any
    help: str
    required: bool


@cache
def fields_of(source: str, class_name: str) -> tuple[Option, ...]:
    """Fields of a config class: name, annotation, default, and the docstring below it or its line under `Args:`."""
    tree = ast.parse((PACKAGE / source).read_text(encoding="utf-8"))
    (body,) = [n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == class_name]
    described = _args_section(body)
    options = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        text = ast.get_docstring(ast.Module([following], [])) if isinstance(following, ast.Expr) else None
        # defaults are literals, or small sums of them such as 1 / 32
        default = eval(compile(ast.Expression(node.value), source, "eval"), {}) if node.value else None
        name = node.target.id
        options.append(
            Option(name, ast.unparse(node.annotation), default, text or described.get(name, ""), node.value is None)
        )
    return tuple(options)


def _args_section(body: list[ast.stmt]) -> dict[str, str]:
    text = ast.get_docstring(ast.Module(body[:1], [])) or ""
    found: dict[str, str] = {}
    name = None
    for line in text.partition("Args:\n")[2].splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 4 and ":" in line:
            name, _, rest = line.strip().partition(": ")
            found[name] = rest
        elif name and indent > 4:
            found[name] += " " + line.strip()
        else:
            break
    return found


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _parser_of(annotation: str) -> Any:
    base = annotation.removesuffix(" | None")
    if base.startswith(SEVERAL):
        base = base.partition("[")[2].rstrip("]").split(",")[0]
    base = "str" if base.startswith("str | ") else base  # what can be an object as well is named on the command line
    convert: Any = {"int": int, "float": float, "str": str}.get(base, _number)
    if annotation.startswith(SEVERAL) or not annotation.endswith("| None"):
        return convert

    def optional(text: str) -> Any:
        return None if text.lower() == "none" else convert(text)

    optional.__name__ = base  # named in argparse's message
    return optional


def add_options(
    parser: argparse.ArgumentParser, title: str, source: str, class_name: str, leave_out: Iterable[str] = ()
) -> None:
    """An option for each field; those not given stay absent, so that defaults are the config's own."""
    group = parser.add_argument_group(title)
    for option in fields_of(source, class_name):
        if option.name in leave_out:
            continue
        flag = "--" + option.name.replace("_", "-")
        default = " ".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        text = option.help + (" (required)" if option.required else f" (default: {default!r})")
        text = text.replace("%", "%%")
        if option.annotation == "bool":
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text)
        else:
            many: dict[str, Any] = {"nargs": "+"} if option.annotation.startswith(SEVERAL) else {}
            kind = _parser_of(option.annotation)
            group.add_argument(flag, type=kind, default=argparse.SUPPRESS, metavar="…", help=text, **many)


def given(args: argparse.Namespace, source: str, class_name: str, leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The options of a config class that were given, on the command line or in --config."""
    values: dict[str, Any] = {}
    for option in fields_of(source, class_name):
        if option.name in leave_out or not hasattr(args, option.name):
            continue
        value = getattr(args, option.name)
        is_tuple = isinstance(value, list) and option.annotation.startswith("tuple[")
        values[option.name] = tuple(value) if is_tuple else value
    return values


EXTRACTOR = ("provenance.py", "ExtractorConfig")
PLACEMENT = ("extraction/loading.py", "Placement")
SAE = ("sae/configuration.py", "KSparseAutoencoderConfig")
SAE_TRAINING = ("sae/training_args.py", "SAETrainingArguments")
PROBE = ("probes/configuration.py", "DiffusionProbeConfig")
PROBE_TRAINING = ("probes/training_args.py", "ProbeTrainingArguments")
SWEEP = ("analysis/sweep/config.py", "SweepConfig")
FOREIGN = ("hub/conversion/options.py", "ForeignOptions")
