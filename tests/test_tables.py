"""The tables of docs are those of the result files, and say what they hold."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))  # of what it imports from beside it
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def test_every_table_is_of_its_result_file(tables: ModuleType) -> None:
    for name in tables.PAGES:
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert tables.MARK.search(text)
        assert tables.filled(text, ROOT / "docs" / "results") == text, f"{name}: run python benchmarks/tables.py"


def test_a_recovery_table_has_the_numbers_of_its_result(tables: ModuleType) -> None:
    spread = {"mean": 0.5, "min": 0.25, "max": 0.75}
    line = dict.fromkeys(("found", "mean_max_cosine", "dead in 65,536", "explained"), spread)
    result = {
        "command": "python a.py",
        "machine": {"processor": "P", "cores": 2, "load_at_start": 0.25},
        "summary": [line | {"setting": [64, 512, 1024, 16], "contender": "ours, own recipe", "seeds": [2, 3]}],
    }
    rows = tables.recovery(result).splitlines()
    cells = ["d 64, 512 directions, n 1,024, k 16", "ours, own recipe", "2", *4 * ["0.500 (0.250 to 0.750)"]]
    assert rows[2] == f"| {' | '.join(cells)} |"
    assert rows[-1].startswith("`python a.py`; 2 cores, P, load 0.2 when it began.")


def test_a_mark_without_a_table_is_refused(tables: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="There is no table 'speeds'; known: training"):
        tables.filled("<!-- table: speeds -->\n<!-- end -->", tmp_path)
