"""The tables of docs/latent-study.md."""

from typing import Any

Row = list[str]
Table = tuple[Row, list[Row]]
MEASURES = {
    "label_purity": "purity ↑",
    "label_entropy": "entropy ↓",
    "label_divergence": "divergence ↑",
    "label_std": "label std ↓",
    "hierarchical_agreement": "hierarchy ↑",
    "monosemanticity, pixels": "monosemanticity, pixels ↑",
    "monosemanticity, tiny-dit": "by tiny-dit ↑",
}


def number(value: Any, digits: int = 3) -> str:
    """Of several seeds the mean and the standard deviation."""
    if isinstance(value, dict):
        return f"{value['mean']:.{digits}f} ± {value['std']:.{digits}f}"
    return f"{value:.{digits}f}"


def interval(one: dict[str, float]) -> str:
    return f"{one['value']:.3f} ({one['low']:.3f} to {one['high']:.3f})"


def of_latents(result: dict[str, Any]) -> Table:
    rows = []
    for name, one in result["interpretability"].items():
        counts = [one[key]["mean"] if isinstance(one[key], dict) else one[key] for key in ("measured", "units")]
        rows.append([name, f"{counts[0]:,.0f} of {counts[1]:,.0f}", *(number(one[measure]) for measure in MEASURES)])
    return ["units", "with 16 images", *MEASURES.values()], rows


def of_reconstruction(result: dict[str, Any]) -> Table:
    measures = ("fvu", "l0", "dead_latents", "uncentred_explained_variance", "cosine")
    rows = [
        [name.replace("seeds", "three other seeds"), *(number(one[m]) if m in one else "" for m in measures)]
        for name, one in result["reconstruction"].items()
    ]
    return ["", "FVU", "L0", "dead", "uncentred explained variance", "cosine"], rows


def of_downstream(result: dict[str, Any]) -> Table:
    found = result["downstream"]
    rows = [["the features themselves", interval(found["probe"]["accuracy"]), "", ""]]
    for name in ("embedded", "untrained SAE"):
        one = found[name]
        numbers = [interval(one["reconstructed"]), interval(one["difference"]), f"{one['agreement']:.3f}"]
        rows.append([f"reconstructions, {name}", *numbers])
    rows.append(["reconstructions, three other seeds", "", number(found["seeds, difference"]), ""])
    return ["linear probe on", "accuracy", "difference", "says the same"], rows


def of_splicing(result: dict[str, Any]) -> Table:
    rows = []
    for name, by_timestep in result["splicing"].items():
        for t, one in by_timestep.items():
            cells = []
            for ablation in ("zero", "mean"):
                low, high = one["intervals"][ablation]
                cells.append(f"{one[f'recovered_from_{ablation}']:.3f} ({low:.3f} to {high:.3f})")
            rows.append([name, t, f"{one['original']:.4f}", f"{one['spliced']:.4f}", *cells])
    return ["SAE", "t", "loss", "spliced", "recovered from zeros", "recovered from the mean"], rows


def of_timesteps(result: dict[str, Any]) -> Table:
    found = result["timesteps"]
    timesteps = list(next(iter(found.values())))
    rows = [[f"{name}: FVU", *(number(by_t[t]["fvu"]) for t in timesteps)] for name, by_t in found.items()]
    for name, by_t in found.items():
        drifts = [by_t[t].get("drift") for t in timesteps]
        if any(drifts):
            rows.append([f"{name}: drift", *("" if one is None else number(one["median"]) for one in drifts)])
    return ["", *(f"t = {t}" for t in timesteps)], rows


def of_matching(result: dict[str, Any]) -> Table:
    rows = []
    for by, what in (("decoders", "cosine of decoder rows"), ("activations", "correlation over images")):
        for name, one in result["matching"][by].items():
            rows.append([what, name, *(number(one[key]) for key in ("mean", "above_0.7", "above_0.9"))])
    return ["by", "between", "mean of the pairs", "above 0.7", "above 0.9"], rows


def of_few_shot(result: dict[str, Any]) -> Table:
    columns = [f"{shots}-shot, {norm}" for shots in (1, 5) for norm in ("none", "center")]
    rows = [
        [name, *(f"{one[column]['mean']:.3f} ± {one[column]['interval']:.3f}" for column in columns)]
        for name, one in result["few_shot"].items()
    ]
    return ["", *(column.replace(", none", "").replace("center", "centred") for column in columns)], rows


STUDY_TABLES = {
    "latents-units": of_latents,
    "latents-reconstruction": of_reconstruction,
    "latents-downstream": of_downstream,
    "latents-splicing": of_splicing,
    "latents-timesteps": of_timesteps,
    "latents-matching": of_matching,
    "latents-few-shot": of_few_shot,
}
