"""The rooms of the house: who may import whom, what may not occur in `src/`, and how light the import is."""

import ast
import graphlib
import importlib
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import diffusion_sae

ROOT = Path(diffusion_sae.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
ROOMS = ("extraction", "features", "sae", "probes", "analysis", "report", "hub", "zoo", "cli")
WORKING_ROOMS = {"extraction", "sae", "probes"}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in FILES}
PACKAGES = {module_name(path) for path in FILES if path.name == "__init__.py"}


def is_for_types(node):
    """`if TYPE_CHECKING:`"""
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node, into_functions):
    for child in ast.iter_child_nodes(node):
        if is_for_types(child):
            yield from child.orelse
            continue
        yield child
        if into_functions or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from statements(child, into_functions)


def imports(module, into_functions=True):
    """Absolute names of the modules that a module imports."""
    found = set()
    for node in statements(TREES[module], into_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if module in PACKAGES else module.split(".")[:-1]
                parts = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in TREES else base for name in names}
    return found


def room(module):
    """`extraction` of diffusion_sae.extraction.hooks; None for the modules at the top and for other libraries."""
    parts = module.split(".")
    return parts[1] if parts[0] == "diffusion_sae" and len(parts) > 1 and parts[1] in ROOMS else None


def rooms_of(module):
    return {room(name) for name in imports(module)} - {None, room(module)}


def in_room(*names):
    return [module for module in TREES if room(module) in names]


def test_the_walk_sees_the_imports():
    """Relative, absolute and within functions, but not those for types: the other tests stand on this."""
    assert set(ROOMS) >= {room(module) for module in TREES} - {None}
    assert len(TREES) > 30
    assert "diffusers" in imports("diffusion_sae.extraction.loading")  # within a function
    assert "diffusion_sae.features" in imports("diffusion_sae.extraction.extractor")
    assert "diffusion_sae._files" in imports("diffusion_sae.features.checks")
    assert "diffusion_sae.extraction.extractor" in imports("diffusion_sae.probes.pipeline")
    assert "diffusion_sae.probes.modeling" not in imports("diffusion_sae.probes.pipeline")  # for types alone
    assert not any(room(name) for name in imports("diffusion_sae"))


def test_diffusers_is_imported_in_extraction_alone():
    users = {module for module in TREES if any(name.split(".")[0] == "diffusers" for name in imports(module))}
    assert users
    assert {room(module) for module in users} == {"extraction"}


def test_extraction_sae_and_probes_do_not_import_each_other():
    for module in in_room(*WORKING_ROOMS):
        if module != "diffusion_sae.probes.pipeline":
            assert not rooms_of(module) & WORKING_ROOMS, module
    assert rooms_of("diffusion_sae.probes.pipeline") & WORKING_ROOMS == {"extraction"}


def test_the_seam_knows_no_room_beside_it():
    """Stores go to the Hub and come from it; how that is done is below them."""
    for module in in_room("features"):
        assert rooms_of(module) <= {"hub"}, module
    for module in ("provenance", "_config", "_files"):
        assert not rooms_of(f"diffusion_sae.{module}"), module


def test_hub_and_zoo_are_below_the_rooms_that_use_them():
    for module in in_room("hub", "zoo"):
        assert not rooms_of(module) & {*WORKING_ROOMS, "features", "analysis", "report"}, module


def test_arrows_point_one_way():
    for module in TREES:
        if room(module) not in ("report", "cli"):
            assert "report" not in rooms_of(module), module
        if room(module) not in ("analysis", "report", "cli"):
            assert "analysis" not in rooms_of(module), module
        if room(module) != "cli" and module != "diffusion_sae.__main__":  # which is the command line's door
            assert "cli" not in rooms_of(module), module


def test_no_import_cycle():
    """Among the imports at the top of modules; the package itself is left out, as it only registers the classes."""
    graph = {
        module: {name for name in imports(module, into_functions=False) if name in TREES} - {module, "diffusion_sae"}
        for module in TREES
    }
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(TREES)


def test_the_seam_and_its_words_load_no_torch_for_the_command_line():
    for module in ("provenance", "_config", "_files"):
        assert not {name.split(".")[0] for name in imports(f"diffusion_sae.{module}")} & {"torch", "transformers"}


def test_the_import_is_light():
    code = "import sys, diffusion_sae; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded = set(done.stdout.split())
    assert "diffusion_sae" in loaded
    assert not loaded & {"diffusers", "datasets", "matplotlib", "sklearn", "evaluate", "pandas"}


def test_public_names_resolve():
    for module, tree in TREES.items():
        assigned = [node for node in tree.body if isinstance(node, ast.Assign)]
        if any(ast.unparse(node.targets[0]) == "__all__" for node in assigned):
            loaded = importlib.import_module(module)
            assert loaded.__all__ == sorted(set(loaded.__all__)), module
            for name in loaded.__all__:
                assert getattr(loaded, name).__name__ == name, (module, name)
    assert set(diffusion_sae.__all__) <= set(dir(diffusion_sae))
    with pytest.raises(AttributeError, match="has no attribute 'NoSuchThing'"):
        _ = diffusion_sae.NoSuchThing


def test_the_fixed_public_api():
    assert set(diffusion_sae.__all__) >= {
        "DiffusionFeatureExtractor",
        "DiffusionProbe",
        "DiffusionProbeConfig",
        "FeatureStore",
        "KSparseAutoencoder",
        "KSparseAutoencoderConfig",
        "ProbeTrainer",
        "ProbeTrainingArguments",
        "SAETrainer",
        "SAETrainingArguments",
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_word_per_idea(path):
    """Banned aliases, whether as name, attribute or keyword; other libraries' keys may stand in strings."""
    tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
    names = {token.string for token in tokens if token.type == tokenize.NAME}
    assert not names & {"d_sae", "codes", "x_hat", "hidden_pre", "randn_like"}


@pytest.mark.parametrize("module", TREES)
def test_no_pickle(module):
    assert not {name.split(".")[0] for name in imports(module)} & {"pickle", "cPickle", "dill", "joblib", "shelve"}
    for node in ast.walk(TREES[module]):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called != "torch.save", module
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("allow_pickle", "False") == "False", module
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", module


@pytest.mark.parametrize("module", [module for module in TREES if room(module) != "cli"])
def test_no_print_outside_the_command_line(module):
    calls = [node for node in ast.walk(TREES[module]) if isinstance(node, ast.Call)]
    assert not [node.lineno for node in calls if ast.unparse(node.func) == "print"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules_fit_their_screens(path):
    """The aim is 300 lines; beyond 330 a module is two."""
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330
