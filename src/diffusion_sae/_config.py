"""What all plain configs share: they are frozen, validated, and read and written as JSON with unknown keys refused.

No torch here: the command line reads the fields to build its options, and `--help` has to answer at once.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Self


def refuse_unknown(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Raise if a key is not allowed, naming it, the nearest allowed one, and all that are."""
    allowed = sorted(allowed)
    unknown = [key for key in given if key not in allowed]
    if unknown:
        near = {key: difflib.get_close_matches(key, allowed, n=1) for key in unknown}
        named = ", ".join(f"{key!r}" + (f" (did you mean {near[key][0]!r}?)" if near[key] else "") for key in unknown)
        raise ValueError(f"{what} does not know {named}. Known: {', '.join(allowed)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonConfig:
    """Base of the frozen dataclass configs."""

    def to_dict(self) -> dict[str, Any]:
        return {key: list(v) if isinstance(v, tuple) else v for key, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        fields = {field.name: field for field in dataclasses.fields(cls)}
        refuse_unknown(content, fields, cls.__name__)
        missing = [
            name
            for name, field in fields.items()
            if name not in content
            and field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ValueError(f"{cls.__name__} needs {', '.join(missing)}, which the given config lacks.")
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in content.items()})


def exact_keys(cls: type, content: Any, where: str) -> dict[str, Any]:
    """The content of a file as arguments of a dataclass that has it whole: missing and unknown keys are named."""
    if not isinstance(content, dict):
        raise ValueError(f"{where} is damaged: it holds a {type(content).__name__}, not an object.")  # noqa: TRY004
    known = [field.name for field in dataclasses.fields(cls)]
    missing, unknown = [n for n in known if n not in content], [n for n in content if n not in known]
    wrong = [
        f"{what} {', '.join(map(str, names))}"
        for what, names in (("lacks", missing), ("has the unknown", unknown))
        if names
    ]
    if wrong:
        raise ValueError(f"{where} is damaged: it {' and '.join(wrong)}.")
    return content


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    allowed = list(allowed)
    check(value in allowed, f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")


def check_integer(name: str, value: object, low: int, high: int | None = None) -> None:
    span = f"≥ {low}" if high is None else f"in {low}…{high}"
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    check(
        is_integer and value >= low and (high is None or value <= high),  # type: ignore[operator]
        f"{name} must be an integer {span}, got {value!r}.",
    )


def check_number(name: str, value: object, low: float, high: float | None = None, *, open_low: bool = False) -> None:
    span = f"{'>' if open_low else '≥'} {low}" + ("" if high is None else f" and ≤ {high}")
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    ok = is_number and (value > low if open_low else value >= low) and (high is None or value <= high)  # type: ignore[operator]
    check(ok, f"{name} must be a number {span}, got {value!r}.")
