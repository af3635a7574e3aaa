"""The report of a sweep: its figures, and a page of what is best, by how much, and whether that exceeds the noise."""

import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._files import write_atomically
from ..analysis.sweep.results import SweepResults
from .figures import sweeps as draw
from .figures.style import save_figure
from .sweep_observations import observation_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
OBSERVATIONS = "each a difference of two cells of the grid, or of the means of its cells under two prompts"


def write_sweep_report(folder: str | Path, output_dir: str | Path | None = None) -> dict[str, Any]:
    """Figures as PNG, `findings.md` and `index.html`, in `output_dir` or `report/` of the sweep's folder.

    Raises:
        FileNotFoundError: if the folder holds no finished sweep.
        ImportError: if matplotlib is not installed.
    """
    results = SweepResults.read(folder)
    target = Path(folder) / "report" if output_dir is None else Path(output_dir)
    figures = sweep_figures(results)
    for name, (_, figure) in figures.items():
        save_figure(figure, target / name)
    captions = {name: caption for name, (caption, _) in figures.items()}
    text = findings(results)
    markdown = "\n".join([text, *(f"![{caption}]({name})\n" for name, caption in captions.items())])
    write_atomically(target / "findings.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    page = _page(results, captions)
    write_atomically(target / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
    return {
        "page": str(target / "index.html"),
        "findings": str(target / "findings.md"),
        "figures": [str(target / name) for name in figures],
        "best": results.summary["best"],
    }


def _slug(*parts: str) -> str:
    kept = "".join(c if c.isalnum() else "-" for c in "-".join(part for part in parts if part)).lower()
    return "-".join(piece for piece in kept.split("-") if piece) + ".png"


def sweep_figures(results: SweepResults) -> dict[str, tuple[str, "Figure"]]:
    """File name → (caption, figure): all that the table has enough in it for."""
    rows = draw.pick(results.rows, kind="cell")
    figures: dict[str, tuple[str, Figure]] = {}
    for best in results.summary["best"]:
        model, head, label, prompt = (best[name] for name in ("model", "head", "label", "prompt"))
        own = draw.pick(rows, model=model, head=head, label=label, prompt=prompt, weights="trained")
        title = f"{model}, {label}, {head} probe, prompt: {prompt}"
        chosen = (best["layer"], best["timestep"])
        figures[_slug("map", model, head, label)] = (
            f"Accuracy (%) of {title}; mean of the fits. Outlined: chosen on validation images.",
            draw.accuracy_map(own, title=title, chosen=chosen),
        )
        levels = {
            name: entry["accuracy"] for name, entry in best["margins"].items() if name in ("pixels", "latents")
        } | {name: entry["accuracy"] for name, entry in best["margins"].items() if name == "random weights"}
        if len({row["timestep"] for row in own}) > 1:
            figures[_slug("curves", model, head, label)] = (
                f"Accuracy of {title}, with 95 % intervals over the fits; baselines as lines. Of more "
                "than six layers those that are best on validation images.",
                draw.layer_curves(own, title=title, levels=levels),
            )
    return figures | _of_classes_alone(rows) | _comparisons(results, rows)


def _of_classes_alone(rows: list[Row]) -> dict[str, tuple[str, "Figure"]]:
    """A map a prompt, where all of a model's prompts are made of the image's class, so that no cell is the best."""
    figures: dict[str, tuple[str, Figure]] = {}
    plain = {row["model"] for row in draw.pick(rows, prompt_of="")}
    trained = [row for row in draw.pick(rows, weights="trained") if row["model"] not in plain]
    for model, head, label, prompt in draw.ordered((r["model"], r["head"], r["label"], r["prompt"]) for r in trained):
        own = draw.pick(trained, model=model, head=head, label=label, prompt=prompt)
        title = f"{model}, {label}, {head} probe, prompt: {prompt}"
        figures[_slug("map", model, head, label, prompt)] = (
            f"Accuracy (%) of {title}; mean of the fits. The prompt tells the model the answer.",
            draw.accuracy_map(own, title=title),
        )
    return figures


def _comparisons(results: SweepResults, rows: list[Row]) -> dict[str, tuple[str, "Figure"]]:
    figures: dict[str, tuple[str, Figure]] = {}
    trained, plain = draw.pick(rows, weights="trained"), draw.pick(rows, prompt_of="")
    for head, label in draw.ordered((row["head"], row["label"]) for row in rows):
        own = draw.pick(trained, head=head, label=label)
        if len({row["prompt"] for row in own}) > 1:
            figures[_slug("prompts", head, label)] = (
                f"Prompts ({label}, {head} probe), each at its best layer. A prompt that is made of the image's class "
                "tells the model the answer.",
                draw.prompt_comparison(own),
            )
        own = draw.pick(plain, head=head, label=label)
        first = {model: draw.pick(own, model=model)[0]["prompt"] for model in draw.ordered(r["model"] for r in own)}
        own = [row for row in own if row["prompt"] == first[row["model"]]]
        if len({(row["model"], row["weights"]) for row in own}) > 1:
            figures[_slug("models", head, label)] = (
                f"Models and random weights ({label}, {head} probe), each at its best layer.",
                draw.architecture_comparison(own, title=f"{label}, {head} probe"),
            )
    for model, head in draw.ordered((row["model"], row["head"]) for row in rows):
        prompts = {best["prompt"] for best in results.summary["best"] if (best["model"], best["head"]) == (model, head)}
        for prompt in sorted(prompts)[:1]:
            own = draw.pick(trained, model=model, head=head, prompt=prompt)
            base_rates = {
                best["label"]: best["margins"]["shuffled labels"]["accuracy"]
                for best in draw.pick(results.summary["best"], model=model, head=head)
                if "shuffled labels" in best["margins"]
            }
            if len({row["label"] for row in own}) > 1:
                figures[_slug("granularity", model, head)] = (
                    f"Coarse against fine labels in {model}: accuracy above the base rate, that of a probe fitted on "
                    "shuffled labels, relative to the label's best cell, with 95 % intervals over the fits. Layers, "
                    "timesteps and the best cell are chosen on validation images.",
                    draw.granularity_profile(own, title=f"{model}, ", base_rates=base_rates),
                )
    return figures


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _lines(best: dict[str, Any]) -> tuple[str, list[list[str]]]:
    """A sentence on the best cell, and a row a comparison."""
    spread = "" if best["accuracy_std"] is None else f" ± {_percent(best['accuracy_std'])}"
    sentence = (
        f"{best['model']}, {best['label']} ({best['num_labels']} classes), {best['head']} probe: {best['layer']} at "
        f"t = {best['timestep']}, prompt: {best['prompt']}; {_percent(best['accuracy'])}{spread} % of "
        f"{best['images']:,} {best['measured_on']} images."
    )
    rows = []
    for name, entry in best["margins"].items():
        where = f" ({entry['layer']}, t = {entry['timestep']}, {entry['prompt']})" if entry["layer"] else ""
        interval = f"{100 * entry['difference']:+.1f} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"
        verdict = "yes" if entry["exceeds_noise"] else "no"
        rows.append([name + where, _percent(entry["accuracy"]), interval, verdict])
    return sentence, rows


HEADER = ["against", "accuracy (%)", "margin in points [95 % interval]", "exceeds the noise"]
PROTOCOL = (
    "The best cell and every setting are chosen on validation images; accuracies are of test images, mean and standard "
    "deviation over the fits, unless said otherwise. A margin's interval is a paired bootstrap over images and fits. "
    "Cells whose prompt is made of the image's class are never taken for the best."
)

NO_BEST = "No cell is the best: every prompt is made of the image's class. Add an empty prompt for a comparison."


def findings(results: SweepResults) -> str:
    """Markdown of a whole page: what is best with its margins, and the observations."""
    return f"# Sweep on {results.summary['config']['dataset']}\n\n{PROTOCOL}\n\n{findings_tables(results)}"


def findings_tables(results: SweepResults) -> str:
    """The tables of `findings` without title and protocol."""
    text = [] if results.summary["best"] else [f"{NO_BEST}\n"]
    for best in results.summary["best"]:
        sentence, rows = _lines(best)
        text += [f"**Best:** {sentence}\n"]
        if rows:
            text += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
            text += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    header, rows = observation_table(results.summary["observations"])
    if not rows:
        return "\n".join(text)
    text += [f"**Observations**, {OBSERVATIONS}:\n"]
    text += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    text += [f"| {' | '.join(row)} |" for row in rows] + [""]
    return "\n".join(text)


STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:900px;margin:2rem auto;padding:0 1rem;color:#1a1a1a;"
    "background:#fff}table{border-collapse:collapse;width:100%;font-size:14px}td,th{text-align:left;padding:4px 8px;"
    "border-bottom:1px solid #ddd}img{width:100%;height:auto}figure{margin:2rem 0}figcaption{font-size:14px}"
)


def _page(results: SweepResults, captions: dict[str, str]) -> str:
    title = html.escape(f"Sweep on {results.summary['config']['dataset']}")
    parts = [f"<h1>{title}</h1><p>{html.escape(PROTOCOL)}</p>"]
    if not results.summary["best"]:
        parts.append(f"<p>{NO_BEST}</p>")
    for best in results.summary["best"]:
        sentence, rows = _lines(best)
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        header = "".join(f"<th>{name}</th>" for name in HEADER)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        parts.append(f"<p><b>Best:</b> {html.escape(sentence)}</p><table><tr>{header}</tr>{body}</table>")
    columns, rows = observation_table(results.summary["observations"])
    header = "".join(f"<th>{name}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if rows:
        parts.append(f"<p><b>Observations</b>, {OBSERVATIONS}.</p><table><tr>{header}</tr>{body}</table>")
    for name, caption in captions.items():
        text = html.escape(caption, quote=True)
        parts.append(f'<figure><img src="{name}" alt="{text}"><figcaption>{text}</figcaption></figure>')
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
