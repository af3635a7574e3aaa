"""Which of the paper's observations the embedded models show: the sweeps, their figures, and docs/findings.md.

    python examples/findings.py                 # runs or resumes both sweeps, then writes results, figures and page
    python examples/findings.py --write-only    # figures and page again, from docs/results/sweeps/

The sweeps are `embedded_sweep.yaml` (Fashion-MNIST) and `emoji_sweep.yaml`; their tables go to `docs/results/sweeps/`.
"""

import argparse
import shutil
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from diffusion_sae import Sweep, SweepConfig
from diffusion_sae._files import write_atomically
from diffusion_sae.analysis.sweep.results import RESULTS, SUMMARY, SweepResults
from diffusion_sae.report.sweep import findings_tables, sweep_figures
from diffusion_sae.report.sweep_observations import interval, place

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {"fashion-mnist": "embedded_sweep.yaml", "emoji": "emoji_sweep.yaml"}
TITLES = {"fashion-mnist": "Fashion-MNIST", "emoji": "Emoji in a style that no probe was trained on"}
Answer = dict[str, Any]
SMALL = 250
"""The largest timestep that is called small: a quarter of the 1,000 steps of both models' schedule."""


def run(name: str, results: Path) -> None:
    """One sweep, and its table and summary into `results`."""
    config = SweepConfig.from_dict(yaml.safe_load((ROOT / "examples" / SWEEPS[name]).read_text(encoding="utf-8")))
    Sweep(config).run()
    for file in (RESULTS, SUMMARY):
        target = results / name / file
        write_atomically(target, lambda path, file=file: shutil.copyfile(Path(config.output_dir) / file, path))


def decided(margins: Iterable[Answer]) -> str:
    """Yes if all margins are above 0 beyond the noise, no if one is below it beyond the noise."""
    margins = list(margins)
    if any(one["high"] < 0 for one in margins):
        return "no"
    return "yes" if all(one["low"] > 0 for one in margins) else "undecided"


def inner_layer(answer: Answer) -> tuple[str, str]:
    ends = [answer[name] for name in ("first layer", "last layer") if name in answer]
    text = "; ".join(f"{interval(one)} over {place(one['other'])}" for one in ends)
    for name in ("first", "last"):
        if f"{name} layer" not in answer:
            return "no", f"{place(answer)} is the grid's {name} layer; {text}"
    return decided(ends), f"{place(answer)}: {text}"


def small_timestep(answer: Answer) -> tuple[str, str]:
    others = {one["other"]["timestep"]: one for one in answer["timesteps"]}
    least, most = min([*others, answer["timestep"]]), max([*others, answer["timestep"]])
    text = "; ".join(f"{interval(others[t])} over t = {t}" for t in (least, most) if t in others)
    for t, name in ((least, "beginning"), (most, "end")):
        if t not in others:
            return "no", f"{place(answer)} is at the {name} of the grid; {text}"
    if answer["timestep"] > SMALL:
        return "no", f"{place(answer)} is not small; {text}"
    return decided([others[least], others[most]]), f"{place(answer)}: {text}"


def learned(best: Answer) -> tuple[str, str]:
    one = best["margins"]["random weights"]
    text = f"{100 * best['accuracy']:.1f} against {100 * one['accuracy']:.1f} %: {interval(one)}"
    return decided([one]), text


def beyond_input(best: Answer) -> tuple[str, str]:
    inputs = [best["margins"][name] for name in ("pixels", "latents")]
    texts = [f"{interval(one)} over {name}" for name, one in zip(("pixels", "VAE latents"), inputs, strict=True)]
    return decided(inputs), "; ".join(texts)


def wrong_prompt(answer: Answer) -> tuple[str, str] | None:
    """By the mean over the grid: one cell can go either way. Against no text, and where there is one against another
    text, which is the same for all images.
    """
    found = [one for one in answer["prompts over the grid"] if one["mine"]["prompt"] == "wrong class"]
    texts = [
        f"{interval(one)} against {one['other']['prompt']} in the mean of {one['cells']} cells, of which "
        f"{one['lower']} are lower"
        for one in found
    ]
    verdict = "no" if any(one["low"] > 0 for one in found) else "undecided"
    if all(one["high"] < 0 for one in found):
        verdict = "yes"
    return (verdict, "; ".join(texts)) if found else None


def other_text(answer: Answer) -> tuple[str, str] | None:
    """The control of a wrong class: whether a text that is the same for all images does harm, too."""
    for one in answer["prompts over the grid"]:
        names = (one["mine"]["prompt"], one["other"]["prompt"])
        if sorted(names) == ["empty", "other text"]:
            lower = one["high"] < 0 if names[0] == "other text" else one["low"] > 0
            higher = one["low"] > 0 if names[0] == "other text" else one["high"] < 0
            verdict = "yes" if lower else "no" if higher else "undecided"
            return verdict, f"{names[0]} {interval(one)} against {names[1]} in the mean of {one['cells']} cells"
    return None


def other_granularity(answer: Answer) -> list[tuple[str, str]]:
    """Of the other labels against this one: whether they are best known at another layer."""
    found = []
    for one in answer["labels"]:
        # at one layer the margin is of two timesteps, and says nothing about layers
        verdict = "no" if one["mine"]["layer"] == one["other"]["layer"] else decided([one])
        text = f"{one['mine']['label']} at its best, {place(one['mine'])}, over {place(one['other'])}: {interval(one)}"
        found.append((verdict, text))
    return found


def verdicts(data: str, results: SweepResults) -> list[list[str]]:
    """Rows of (observation, data with model, label and head, verdict, margins in points)."""
    rows = []

    def add(observation: str, of: Answer, found: tuple[str, str] | None) -> None:
        if found is not None:
            rows.append([observation, f"{data}: {of['model']}, {of['label']}, {of['head']}", found[0], found[1]])

    asked: list[tuple[str, str, Callable[[Answer], Any]]] = [
        ("An inner layer is better than the first and the last", "observations", inner_layer),
        ("A small timestep is better than t = 0 and than the largest", "observations", small_timestep),
        ("Training taught it: better than the same network with random weights", "best", learned),
        ("Better than pixels and the VAE's latents", "best", beyond_input),
        ("A prompt with a wrong class does harm", "observations", wrong_prompt),
        ("Another text, the same for all images, does harm", "observations", other_text),
    ]
    for observation, where, answer_of in asked:
        for one in results.summary[where]:
            add(observation, one, answer_of(one))
    for one in results.summary["observations"]:
        for found in other_granularity(one):
            add("Coarse and fine classes are best known at different layers", one, found)
    return rows


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines)


def in_words(rows: list[list[str]]) -> str:
    """One line an observation: how often each verdict."""
    counts: dict[str, list[str]] = {}
    for observation, _, verdict, _ in rows:
        counts.setdefault(observation, []).append(verdict)
    lines = []
    for observation, found in counts.items():
        parts = [f"{found.count(verdict)} {verdict}" for verdict in ("yes", "no", "undecided") if verdict in found]
        lines.append(f"- {observation}: {', '.join(parts)}.")
    return "\n".join(lines)


def architectures(all_results: dict[str, SweepResults]) -> str:
    """U-Net against DiT, each at its best cell."""
    rows = []
    for name, results in all_results.items():
        for best in results.summary["best"]:
            for rival, one in best["margins"].items():
                if best["model"] == "tiny-sd" and rival == "best of tiny-dit":
                    mine, other = 100 * best["accuracy"], 100 * one["accuracy"]
                    rows.append([TITLES[name], best["label"], f"{mine:.1f}", f"{other:.1f}", interval(one)])
    return table(["data", "label", "tiny-sd (%)", "tiny-dit (%)", "margin in points [95 % interval]"], rows)


def size_of(results: SweepResults) -> str:
    rows = [row for row in results.rows if row["kind"] == "cell"]
    images = {role: rows[0][f"{role}_images"] for role in ("train", "validation", "test")}
    tied = statistics.median(one["tied"] for one in results.summary["observations"])
    cells = statistics.median(one["cells"] for one in results.summary["observations"])
    return (
        f"{results.summary['fits']:,} probes; {images['train']:,} training images a fit, {images['validation']:,} for "
        f"all choices, {images['test']:,} for the accuracies. In the median of model and label, {tied:g} of {cells:g} "
        "cells are not told from the best one: a best layer and timestep is one of several."
    )


PREFACE = """# What the embedded models show of the paper's observations

Revelio (arXiv 2411.16725) reports for Stable Diffusion and DiT, on photographs, that semantic information peaks at an
inner layer and a small but non-zero timestep, that layers differ in how fine the classes are that they tell apart, and
that prompts and the architecture matter. Here the same questions are put to `tiny-sd` and `tiny-dit`, which have about
a three-hundredth of the parameters, were trained on Fashion-MNIST alone, and see 32 × 32 pixels: what appears here, and
what does not, says nothing about the large models. It says what the method finds where everything can be run again:

```bash
python examples/findings.py
```

runs both sweeps (about an hour on two cores; resumed after a stop), and writes this page, its figures and the tables in
[`results/sweeps/`](results/sweeps).

**Protocol.** Linear probes on mean-pooled features; three fits a cell, each on its own 90 % of the training images; one
draw of the noise and of the random weights ([README](../README.md)'s table has five). L2 strength, layer and timestep
are chosen on validation images, and every accuracy and margin is of test images. A margin's interval is a paired
bootstrap over images and fits. *Yes* means that every interval of the row leaves 0 out on the side of the observation;
*no* that one leaves it out on the other side, or that the chosen cells themselves speak against it, whatever the
intervals: the best layer or timestep is the edge in question, the best timestep is not small, or both labels are best
known at the same layer; *undecided* all else. A timestep is small up to 250, a quarter of the schedule's 1,000 steps.
Two labels with the same best cell have no row. What a prompt with a wrong class does is judged by the mean over all
layers and timesteps, since a single cell can go either way; of tiny-sd beside that of another text, `a photo of a
house` for every image (tiny-dit takes the number of a class, and no text). Margins are not corrected for the number of
comparisons on this page: of those whose truth is 0 one in twenty leaves it out.

**Prompts that hold the class tell the model the answer.** With the class template every image is described by its own
label, test images as well, so that the probe reads the prompt; with a wrong class, by another class than its own.
Neither is a use of the model, and neither is ever taken for the best cell. They show how strongly a layer takes up its
conditioning.
"""


def write(results: Path, docs: Path) -> None:
    """The page and its figures, from the tables."""
    loaded = {name: SweepResults.read(results / name) for name in SWEEPS}
    rows = [row for name, one in loaded.items() for row in verdicts(TITLES[name].split(" ")[0], one)]
    text = [PREFACE, "## In short\n", in_words(rows), ""]
    text += [table(["observation", "where", "verdict", "margins in points [95 % interval]"], rows), ""]
    text += ["## Architectures\n", "U-Net against DiT, each at its own best layer and timestep, empty prompt.\n"]
    text += [architectures(loaded), ""]
    for name, one in loaded.items():
        text += [f"## {TITLES[name]}\n", size_of(one) + "\n", findings_tables(one)]
        for file, (caption, figure) in sweep_figures(one).items():
            target = docs / "figures" / f"{name}-{file}"
            write_atomically(target, lambda path, drawn=figure: drawn.savefig(path, format="png", dpi=110))
            text.append(f"![{caption}](figures/{target.name})\n\n*{caption}*\n")
    page = "\n".join(text)
    write_atomically(docs / "findings.md", lambda path: path.write_text(page, encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write-only", action="store_true", help="from the committed tables, without running")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of page, figures and results")
    args = parser.parse_args()
    results = args.docs / "results" / "sweeps"
    for name in () if args.write_only else SWEEPS:
        run(name, results)
    write(results, args.docs)
    print(args.docs / "findings.md")


if __name__ == "__main__":
    main()
