"""Converted SAEs against the released libraries, by `benchmarks/conversion.py`: their files here, and ours there."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("conversion_benchmark", ROOT / "benchmarks" / "conversion.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["conversion_benchmark"] = module
    spec.loader.exec_module(module)
    return module


def committed() -> dict[str, Any]:
    return json.loads((ROOT / "docs" / "results" / "conversion.json").read_text(encoding="utf-8"))


def cases(result: dict[str, Any]) -> dict[str, list[dict[str, str]]]:
    """All but what rounding decides."""
    return {
        part: [{name: value for name, value in row.items() if not isinstance(value, float)} for row in result[part]]
        for part in ("read", "written", "refused")
    }


@pytest.mark.slow
def test_same_latents_and_reconstructions_as_the_released_libraries(script: ModuleType) -> None:
    torch.set_num_threads(1)
    result = script.measure()
    for row in (*result["read"], *result["written"]):
        assert max(row["latents"], row["reconstruction"]) <= 1e-5, row
    assert cases(result) == cases(committed()), "run python benchmarks/conversion.py"
    assert result["versions"] == committed()["versions"]


def test_the_page_is_the_committed_result(script: ModuleType) -> None:
    page = script.PAGE.read_text(encoding="utf-8")
    assert page.partition(script.MARK)[2] == script.tables(committed())


def test_every_package_is_compared_in_its_released_version() -> None:
    result = committed()
    pinned = (ROOT / "benchmarks" / "peers" / "requirements.txt").read_text(encoding="utf-8")
    assert result["versions"].items() <= dict(re.findall(r"^([\w-]+)==(\S+)$", pinned, re.MULTILINE)).items()
    assert {row["library"] for row in result["read"]} == {"sae_lens", "sparsify", "dictionary_learning", "overcomplete"}
    assert {row["library"] for row in result["written"]} == {"sae_lens", "sparsify"}
    assert (
        max(row[part] for row in (*result["read"], *result["written"]) for part in ("latents", "reconstruction")) < 1e-5
    )
