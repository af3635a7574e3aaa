"""The tables of docs/speed.md, sae-recovery.md and latent-study.md, from the results that the benchmarks have left.

    python benchmarks/tables.py            # writes them between their marks in the pages
    python benchmarks/tables.py --check    # says which are not those of the results, and fails

A mark is a line `<!-- table: NAME -->`; what follows up to `<!-- end -->` is replaced.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from study_tables import STUDY_TABLES

from diffusion_sae._files import read_json, write_atomically

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("speed.md", "sae-recovery.md", "latent-study.md")
MARK = re.compile(r"(<!-- table: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = {"tiny-sd": "tiny-sd", "sd15": "SD 1.5's shape"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def source(result: dict[str, Any], machine: dict[str, Any], file: str) -> str:
    """Where the numbers come from, in a sentence."""
    load = machine.get("load_at_start")
    busy = "" if load is None else f", load {load:.1f} when it began"
    name = machine.get("processor") or machine.get("device")
    return f"`{result['command']}`; {machine['cores']} cores, {name}{busy}. Numbers: [`{file}`](results/{file})."


def training(result: dict[str, Any]) -> str:
    """Every contender's time over ours, and ours, with all scores in fp32 as well, over the limit."""
    shapes = result["shapes"]
    ours = ("ours", "ours-fp32")
    names = [name for name in next(iter(shapes.values()))["contenders"] if name not in (*ours, "limit")]
    rows = []
    for shape, found in shapes.items():
        size, d_in, n, k = shape.split(",")
        ratios = found["ratios"]
        rows.append(
            [f"{int(size):,} × {d_in}", f"{int(n):,}", k]
            + [f"{ratios[f'{name} / limit']['ratio']:.2f}" for name in ours]
            + [f"{ratios[f'{name} / ours']['ratio']:.2f}" for name in names]
        )
    over_ours = [f"{name} / ours" for name in names]
    header = ["rows × d_in", "latents", "k", "ours / limit", "ours in fp32 / limit", *over_ours]
    machine = next(iter(shapes.values()))["machine"]
    return table(header, rows) + "\n\n" + source(machine, machine, "sae-training-speed.json")


def memory(result: dict[str, Any]) -> str:
    rows = [
        [f"{int(shape.split(',')[0]):,}", f"{one['peak_mb']:,.0f}", f"{one['at_most_mb']:,.0f}"]
        for shape, one in sorted(result["memory"].items(), key=lambda item: int(item[0].split(",")[0]))
    ]
    return table(["rows", "peak (MiB)", "weights + two moments + 1 GB (MiB)"], rows)


def profile(result: dict[str, Any]) -> str:
    """Shares of a step's time by operator; what is under 3 % everywhere is left out."""
    parts = {shape: one["parts"] for shape, one in result["shapes"].items()}
    totals = {shape: sum(of.values()) for shape, of in parts.items()}
    names = sorted(
        {name for shape, of in parts.items() for name, seconds in of.items() if seconds / totals[shape] >= 0.03},
        key=lambda name: -max(of.get(name, 0.0) / totals[shape] for shape, of in parts.items()),
    )
    rows = [
        [f"`{name}`", *(f"{of.get(name, 0.0) / totals[shape]:.0%}" for shape, of in parts.items())] for name in names
    ]
    return table(["operator", *(shape.replace(",", " · ") for shape in parts)], rows)


def encoding(result: dict[str, Any]) -> str:
    rows = []
    for one in result["shapes"].values():
        rate, way = one["rows_per_second"], "by way of bf16" if one["screened_rows"] else "in fp32"
        shape = [f"{one['rows']:,} × {one['d_in']}", f"{one['num_latents']:,}", str(one["k"]), way]
        rates = [f"{rate['encode']:,}", f"{rate['product']:,}", f"{one['throughput_over_product']:.2f}"]
        rows.append([*shape, *rates, f"`{one['command'].partition(' --out')[0]}`"])
    header = ["rows × d_in", "latents", "k", "chosen", "encoded rows a second", "the product's", "share", "command"]
    machine = next(iter(result["shapes"].values()))["machine"]
    name, load = machine["processor"], machine["load_at_start"]
    end = f"{machine['cores']} cores, {name}, load {load:.1f} when the first began. "
    return table(header, rows) + f"\n\n{end}Numbers: [`sae-encoding.json`](results/sae-encoding.json)."


def extraction(result: dict[str, Any]) -> str:
    rows = []
    for model, found in result["models"].items():
        folder, sweep = found["folder"], found["sweep"]
        rows.append(
            [
                MODELS[model],
                f"{found['overhead']['ratio']:.2f}",
                f"{found['early_exit']['ratio']:.2f}",
                f"{sweep['ratio']:.2f}",
                f"{sweep['times_faster']:.1f}",
                f"{folder['ratio']:.2f}",
                f"{folder['share_of_limit']:.2f}",
            ]
        )
    header = ["", "over the bare modules", "`bottleneck` over the whole U-Net", "5 × 5 cells over the minimum"]
    header += ["times faster than a pass a cell", "JPEG folder, share of compute alone", "of compute and decoding"]
    return table(header, rows) + "\n\n" + source(result, result["machine"], "extraction-speed.json")


def recovery(result: dict[str, Any]) -> str:
    def spread(values: dict[str, float]) -> str:
        return f"{values['mean']:.3f} ({values['min']:.3f} to {values['max']:.3f})"

    measures = ("found", "mean_max_cosine", "dead in 65,536", "explained")
    rows = []
    for line in sorted(result["summary"], key=lambda line: (line["setting"], -line["mean_max_cosine"]["mean"])):
        d_in, directions, latents, k = line["setting"]
        of = f"d {d_in}, {directions} directions, n {latents:,}, k {k}"
        rows.append([of, line["contender"], str(len(line["seeds"])), *(spread(line[name]) for name in measures)])
    header = ["setting", "contender", "seeds", "found", "mean maximal cosine", "dead", "explained variance"]
    return table(header, rows) + "\n\n" + source(result, result["machine"], "sae-recovery.json")


def variants(result: dict[str, Any]) -> str:
    rows = []
    for shape, found in result["shapes"].items():
        size, d_in, n, _ = shape.split(",")
        for activation, ratio in found["over_topk"].items():
            ways = found["over_as_it_is"][activation]
            numbers = [f"{one:.2f}" for one in (ratio, ways["compiled"], ways["bf16"])]
            rows.append([f"{int(size):,} × {d_in}", f"{int(n):,}", activation, *numbers])
    header = ["rows × d_in", "latents", "activation", "over topk", "compiled / as it is", "bf16 / fp32"]
    return table(header, rows) + "\n\n" + source(result, result["machine"], "sae-variants.json")


def plans(result: dict[str, Any]) -> str:
    names = list(next(iter(result["datasets"].values())))
    rows = [
        [dataset, *(f"{found[name]['taken'] / found[name]['planned']:.2f}" for name in names)]
        for dataset, found in result["datasets"].items()
    ]
    return (
        table(["taken / planned", *names], rows)
        + "\n\n"
        + source(result["machine"], result["machine"], "sweep-plan.json")
    )


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "training": ("sae-training-speed.json", training),
    "memory": ("sae-training-speed.json", memory),
    "profile": ("sae-training-profile.json", profile),
    "variants": ("sae-variants.json", variants),
    "encoding": ("sae-encoding.json", encoding),
    "extraction": ("extraction-speed.json", extraction),
    "plans": ("sweep-plan.json", plans),
    "recovery": ("sae-recovery.json", recovery),
    **{
        name: ("latent-study.json", lambda result, make=make: table(*make(result)))
        for name, make in STUDY_TABLES.items()
    },
    "latents-source": ("latent-study.json", lambda result: source(result, result["machine"], "latent-study.json")),
}


def filled(page: str, results: Path) -> str:
    """The page's text with its tables as the results have them.

    Raises:
        ValueError: for a mark that names no table.
    """

    def replace(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise ValueError(f"There is no table {match['name']!r}; known: {', '.join(TABLES)}.")
        file, render = TABLES[match["name"]]
        return f"{match[1]}{render(read_json(results / file))}\n{match[3]}"

    return MARK.sub(replace, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is not of the results")
    args = parser.parse_args()
    stale = []
    for name in PAGES:
        page = DOCS / name
        text = page.read_text(encoding="utf-8")
        new = filled(text, DOCS / "results")
        if new != text:
            stale.append(name)
            if not args.check:
                write_atomically(page, lambda path, new=new: path.write_text(new, encoding="utf-8"))
    print("\n".join(f"{name}: {'not of the results' if args.check else 'written'}" for name in stale) or "as it was")
    sys.exit(1 if args.check and stale else 0)


if __name__ == "__main__":
    main()
