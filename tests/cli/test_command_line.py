"""The command line as its user has it: real processes, real files."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusion_sae import DiffusionProbe, FeatureStore
from diffusion_sae.cli import options
from diffusion_sae.cli.main import COMMANDS, main

SWEEP = Path(__file__).parents[2] / "docs" / "results" / "sweeps" / "fashion-mnist"
BINARY = Path(sys.executable).parent / "diffusion-sae"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BINARY, *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_answers_without_loading_torch(command: str) -> None:
    code = (
        "import sys; sys.argv = ['diffusion-sae', sys.argv[1], '--help']\n"
        "from diffusion_sae.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout


def test_help_takes_less_than_a_second() -> None:
    run("train", "--help")
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        assert run("train", "--help").returncode == 0
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 1


def test_maps_are_those_of_the_library() -> None:
    from diffusion_sae.analysis import maps
    from diffusion_sae.cli import report

    assert report.METHODS == maps.METHODS


def test_options_are_the_fields_of_the_configs() -> None:
    import dataclasses

    from diffusion_sae import (
        DiffusionProbeConfig,
        KSparseAutoencoderConfig,
        ProbeTrainingArguments,
        SAETrainingArguments,
        SweepConfig,
    )
    from diffusion_sae.extraction.loading import Placement
    from diffusion_sae.provenance import ExtractorConfig

    plain = {
        options.EXTRACTOR: ExtractorConfig,
        options.PLACEMENT: Placement,
        options.SAE_TRAINING: SAETrainingArguments,
        options.PROBE_TRAINING: ProbeTrainingArguments,
        options.SWEEP: SweepConfig,
    }
    for source, config in plain.items():
        read = {option.name: option.default for option in options.fields_of(*source) if not option.required}
        assert read == {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
        assert all(option.help for option in options.fields_of(*source))
    for source, config in (
        (options.SAE, KSparseAutoencoderConfig(d_in=4)),
        (options.PROBE, DiffusionProbeConfig(d_in=4)),
    ):
        assert all(hasattr(config, option.name) and option.help for option in options.fields_of(*source))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "store"
    arguments = [
        "extract",
        "fashion-mnist-mini",
        str(folder),
        "--layers",
        "up_ft1",
        "--timesteps",
        "50",
        "--limit",
        "60",
    ]
    assert main([*arguments, "--json"]) == 0
    return folder


def test_extract_train_probe_report(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "train.yaml"
    config.write_text("k: 4\nexpansion_factor: 2\nmax_steps: 30\nbatch_size: 16\n")
    sae, probe, report = (str(tmp_path / name) for name in ("sae", "probe", "report"))
    assert main(["train", str(store), "--output-dir", sae, "--config", str(config), "--max-steps", "5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["k"] == 4
    assert result["num_latents"] == 192
    assert result["steps"] == 5  # the command line comes before the file
    encode = ["encode", str(store), "--sae", sae, "--output-dir", str(tmp_path / "encoded"), "--file-rows", "40"]
    assert main([*encode, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["num_latents"], result["files"]) == (60, 192, 2)
    assert 0 < result["l0"] <= 4
    assert main(encode) == 0
    assert "60 rows in" in capsys.readouterr().out
    assert main([*encode, "--format", "safetensors"]) == 1
    assert "with another format" in capsys.readouterr().err
    assert main(["probe", str(store), "--test-store", str(store), "--output-dir", probe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] > 0.5  # it has seen these rows
    assert json.loads((tmp_path / "probe/metrics.json").read_text())["test"]["rows"] == 60
    heads = {
        "sae": ["--head", "sae", "--sae", sae, "--l1-path", "0.1"],
        "fusion": ["--head", "fusion", "--width", "8", "--num-train-epochs", "2"],
        "knn": ["--head", "knn", "--neighbors-path", "1", "3"],
    }
    for head, given in heads.items():
        assert main(["probe", str(store), "--output-dir", str(tmp_path / f"{head}-probe"), *given, "--json"]) == 0
        assert 0 <= json.loads(capsys.readouterr().out)["validation_accuracy"] <= 1
        assert json.loads((tmp_path / f"{head}-probe/config.json").read_text())["head"] == head
    assert main(["probe", str(store), "--output-dir", str(tmp_path / "none"), "--head", "sae"]) == 1
    assert "--sae belongs to --head sae, which needs it" in capsys.readouterr().err
    assert main(["report", sae, str(store), "fashion-mnist-mini", report, "--also", sae, str(store)]) == 0
    assert "FVU" in capsys.readouterr().out
    assert not (Path(report) / ".encoded").exists()
    encoded = str(tmp_path / "encoded")
    assert main(["report", sae, str(store), "fashion-mnist-mini", report, "--encoded", encoded, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert Path(result["page"]).is_file()
    assert set(result["figures"]) >= {"FVU", "L0", "Dead latents"}
    assert main(["report", sae, str(store), "emoji-mini", report, "--vocabulary", "words.txt"]) == 1
    assert "--vocabulary belongs to --clip" in capsys.readouterr().err
    assert main(["report", sae, str(store), "emoji-mini", report]) == 1
    assert "is not image 0 of the store of" in capsys.readouterr().err


def test_options_with_several_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An SAE over two timesteps, with nested dictionaries: lists of the config, which are no tuples."""
    store, sae = str(tmp_path / "store"), str(tmp_path / "sae")
    extraction = ["--layers", "up_ft1", "--timesteps", "25", "100", "--limit", "60"]
    assert main(["extract", "fashion-mnist-mini", store, *extraction]) == 0
    shape = ["--timesteps", "25", "100", "--num-latents", "64", "--matryoshka-sizes", "16", "64", "--k", "4"]
    assert main(["train", store, "--output-dir", sae, *shape, "--max-steps", "3"]) == 0
    config = json.loads((tmp_path / "sae/config.json").read_text())
    assert (config["timesteps"], config["matryoshka_sizes"]) == ([25, 100], [16, 64])
    capsys.readouterr()
    assert main(["encode", store, "--sae", sae, "--output-dir", str(tmp_path / "encoded"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 120


def test_extract_says_where_it_goes_on_and_what_it_did(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "store"
    arguments = ["extract", "fashion-mnist-mini", str(folder), "--layers", "up_ft1", "--timesteps", "50", "--json"]
    arguments += ["--limit", "30", "--shard-size", "10", "--store-dtype", "float16"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 30
    assert re.search(rf"30 images in {folder}, 0 skipped; this run: 30 images in .* s, .* rows/s", caplog.text)
    assert "resuming" not in caplog.text
    for path in folder.glob("shard-00001.*"):  # as a killed run leaves it
        path.unlink()
    caplog.clear()
    assert main(arguments) == 0
    assert "resuming at shard 2 of 3 (1 to do)" in caplog.text
    assert "this run: 10 images" in caplog.text
    assert main([*arguments, "--split", "test"]) == 1
    assert "append=True" in capsys.readouterr().err
    assert main([*arguments, "--split", "test", "--append"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 60


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the command line before those of the file, whose entries can be mappings."""
    file = tmp_path / "sweep.yaml"
    prompts = "prompts:\n  - {name: none}\n  - {prompt: 'a {}', of: other, name: wrong}\n"
    file.write_text(f"output_dir: {tmp_path}/sweep\nlimit: 40\nseeds: [0]\ntimesteps: [25]\n{prompts}")
    options = ["--config", str(file), "--timesteps", "50", "--layers", "up_ft1", "--seeds", "3", "4"]
    assert main(["sweep", *options, "--plan"]) == 0
    assert "fit 2 cells, 4 probes" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
    assert main(["sweep", *options, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["fits"] == 4 + 3 * 2  # and three baselines
    assert (result["best"][0]["layer"], result["best"][0]["timestep"], result["best"][0]["prompt"]) == (
        "up_ft1",
        50,
        "none",
    )
    assert main(["sweep", *options]) == 0
    assert re.search(r"tiny-sd +linear +label +up_ft1 t=50 none +0\.\d{3}", capsys.readouterr().out)


def test_push_takes_a_store(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []

    def push(self: FeatureStore, repo_id: str, **hub: object) -> str:
        pushed.append((self.path, repo_id, hub["revision"]))
        return "https://hub/commit"

    monkeypatch.setattr(FeatureStore, "push_to_hub", push)
    assert main(["push", str(store), "user/features", "--revision", "v1"]) == 0
    assert pushed == [(store, "user/features", "v1")]


def test_layers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["layers", "tiny-sd"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[2:]] == [
        *(f"down_ft{i}" for i in range(4)),
        "bottleneck",
        *(f"up_ft{i}" for i in range(4)),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["layers", "nope"], "'nope' is no folder, no Hub id"),
        (["extract", "/nowhere", "{tmp}/s"], "/nowhere|does not exist|doesn't exist|Couldn't"),
        (["extract", "fashion-mnist-mini", "{tmp}/s", "--split", "dev"], "no split 'dev'"),
        (["extract", "fashion-mnist-mini", "{tmp}/s", "--layers", "up_ft9"], "no layer 'up_ft9'"),
        (["extract", "fashion-mnist-mini", "{tmp}/s", "--timesteps", "1000"], "in 0…999, got 1000"),
        (["train", "{store}", "--output-dir", "{tmp}/o", "--k", "900000"], "k must be at most"),
        (["train", "{tmp}/none", "--output-dir", "{tmp}/o"], "no feature store"),
        (["train", "{store}"], "needs output_dir"),
        (["sweep"], "needs output_dir"),
        (["sweep", "--output-dir", "{tmp}/o", "--weights", "fresh"], "weights must be one of"),
        (["encode", "{store}", "--sae", "x/y"], "encode needs --output-dir"),
        (["train", "{store}", "--output-dir", "{tmp}/o", "--layer", "mid"], "layer must be one of 'up_ft1'"),
        (["train", "{store}", "--config", "{yaml}"], r"does not know 'kk' \(did you mean 'k'\?\)"),
    ],
)
def test_bad_input_is_one_message_and_exit_code_1(
    arguments: list[str], message: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    yaml = tmp_path / "bad.yaml"
    yaml.write_text("kk: 4\n")
    filled = [a.format(tmp=tmp_path, store=store, yaml=yaml) for a in arguments]
    assert main(filled) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(message, err), err
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert not (tmp_path / "o").exists()


def test_a_report_with_maps_positions_and_a_sweep(store: Path, tmp_path: Path) -> None:
    sae, positions, report = (str(tmp_path / name) for name in ("sae", "positions", "report"))
    assert main(["train", str(store), "--output-dir", sae, "--k", "4", "--max-steps", "5"]) == 0
    extract = ["extract", "fashion-mnist-mini", positions, "--pooling", "tokens", "--limit", "60"]
    assert main([*extract, "--layers", "bottleneck", "up_ft0", "up_ft1", "--timesteps", "50", "300"]) == 0
    shown = ["--map", "pca", "umap", "tsne", "--positions", positions, "--sweep", str(SWEEP)]
    assert main(["report", sae, str(store), "fashion-mnist-mini", report, *shown]) == 0
    (data,) = tmp_path.glob("report/files-*/data/report.js")
    (_, written, _) = json.loads(f"[{data.read_text().removeprefix('report(').removesuffix(');' + chr(10))}]")
    content = written["text"]
    assert content["maps"] == ["PCA of the features", "UMAP of the features", "TSNE of the features"]
    # the bottleneck has one position, and so no picture
    assert (content["pca"]["layers"], content["pca"]["timesteps"]) == (["up_ft0", "up_ft1"], [50, 300])
    best = json.loads((SWEEP / "sweep.json").read_text())["best"][0]
    assert [best["layer"], best["timestep"]] in [grid["chosen"] for grid in content["grids"]]


def test_wrong_options_exit_with_2() -> None:
    done = run("train", "store", "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stderr


def test_demo_quick(tmp_path: Path) -> None:
    done = run("demo", "--quick", "--output-dir", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert set(result["baselines"]) == {"raw pixels", "VAE latents", "random weights"}
    assert result["probe_accuracy"] > 0.4  # chance is 0.1
    assert result["label_purity"] > result["label_purity_shuffled"]
    (shown,) = tmp_path.glob("files-*/data/report.js")
    accuracy = re.search(r'"accuracy":([\d.]+)', shown.read_text())
    assert accuracy
    assert float(accuracy[1]) == pytest.approx(result["probe_accuracy"])


@pytest.mark.parametrize(
    ("problem_type", "header", "metric"),
    [
        ("multi_label_classification", "image,odd,dark", "mean_average_precision"),
        ("regression", "image,height", "r2"),
        ("single_label_classification", "image,kind", "accuracy"),
    ],
)
def test_probes_of_labels_from_a_table(
    problem_type: str, header: str, metric: str, store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = FeatureStore(store)
    columns = header.count(",")
    lines = [",".join([name, *(str((i >> c) % 2) for c in range(columns))]) for i, name in enumerate(opened.sources)]
    (tmp_path / "labels.csv").write_text("\n".join([header, *lines]) + "\n")
    command = ["probe", str(store), "--output-dir", str(tmp_path / "probe"), "--problem-type", problem_type]
    labelled = [*command, "--labels-from", str(tmp_path / "labels.csv")]
    assert main([*labelled, "--validation-store", str(store), "--json"]) == 0
    assert f"validation_{metric}" in json.loads(capsys.readouterr().out)
    assert main(labelled) == 0
    assert f"validation {metric.replace('_', ' ')} " in capsys.readouterr().out
    probe = DiffusionProbe.from_pretrained(tmp_path / "probe")
    assert probe.config.problem_type == problem_type
    names = header.split(",")[1:]
    assert list(probe.config.id2label.values()) == (["0", "1"] if columns == 1 and metric == "accuracy" else names)
    if problem_type != "single_label_classification":
        assert main(command) == 1
        assert "needs --labels-from" in capsys.readouterr().err
    assert main([*labelled, "--labels", "label"]) == 1
    assert "give one of the two" in capsys.readouterr().err
    assert main([*labelled, *[str(tmp_path / "labels.csv")] * 2]) == 1
    assert "one for each of the 1 stores, got 3" in capsys.readouterr().err
