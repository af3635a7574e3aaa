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


def in_order(found: dict[str, Any], names: tuple[str, ...]) -> list[tuple[str, Any]]:
    """The files' keys are sorted; here those named come first."""
    return [(name, found[name]) for name in [*names, *(name for name in found if name not in names)]]


UNITS = (
    "SAE latents",
    "SAE latents, three other seeds",
    "untrained SAE",
    "raw neurons",
    "PCA directions",
    "random directions",
    "SAE latents, untrained model",
    "raw neurons, untrained model",
    "SAE latents, shuffled labels",
)


def of_latents(result: dict[str, Any]) -> Table:
    rows = []
    for name, one in in_order(result["interpretability"], UNITS):
        counts = [one[key]["mean"] if isinstance(one[key], dict) else one[key] for key in ("measured", "units")]
        rows.append([name, f"{counts[0]:,.0f} of {counts[1]:,.0f}", *(number(one[measure]) for measure in MEASURES)])
    return ["units", "with 16 images", *MEASURES.values()], rows


def of_reconstruction(result: dict[str, Any]) -> Table:
    measures = ("fvu", "l0", "dead_latents", "uncentred_explained_variance", "cosine")
    rows = [
        [name.replace("seeds", "three other seeds"), *(number(one[m]) if m in one else "" for m in measures)]
        for name, one in in_order(result["reconstruction"], ("embedded", "seeds", "untrained SAE", "mean row"))
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


SAES = ("embedded", "seed 1", "one SAE of all timesteps", "untrained SAE")


def of_splicing(result: dict[str, Any]) -> Table:
    found = result["splicing"]
    timesteps = sorted(found["embedded"], key=int)
    rows = []
    for name in ("original", "zero", "mean"):
        title = {"original": "the activations themselves", "zero": "zeros", "mean": "their mean"}[name]
        rows.append([f"loss with {title}", *(f"{found['embedded'][t][name]:.4f}" for t in timesteps)])
    for ablation, title in (("zero", "zeros"), ("mean", "the mean")):
        for name, by_t in in_order(found, SAES):
            cells = []
            for t in timesteps:
                low, high = by_t[t]["intervals"][ablation]
                cells.append(f"{by_t[t][f'recovered_from_{ablation}']:.3f} ({low:.3f} to {high:.3f})")
            rows.append([f"recovered from {title}, {name}", *cells])
    return ["", *(f"t = {t}" for t in timesteps)], rows


def of_timesteps(result: dict[str, Any]) -> Table:
    found = result["timesteps"]
    timesteps = sorted(next(iter(found.values())), key=int)
    rows = [[f"{name}: FVU", *(number(by_t[t]["fvu"]) for t in timesteps)] for name, by_t in found.items()]
    for name, by_t in found.items():
        drifts = [by_t[t].get("drift") for t in timesteps]
        if any(drifts):
            rows.append([f"{name}: drift", *("" if one is None else number(one["median"]) for one in drifts)])
    return ["", *(f"t = {t}" for t in timesteps)], rows


def of_matching(result: dict[str, Any]) -> Table:
    rows = []
    for by, what in (("decoders", "cosine of decoder rows"), ("activations", "correlation over images")):
        for name, one in sorted(result["matching"][by].items(), key=lambda pair: -pair[1]["mean"]):
            rows.append([what, name, *(number(one[key]) for key in ("mean", "above_0.7", "above_0.9"))])
    return ["by", "between", "mean of the pairs", "above 0.7", "above 0.9"], rows


def of_few_shot(result: dict[str, Any]) -> Table:
    columns = [f"{shots}-shot, {norm}" for shots in (1, 5) for norm in ("none", "center")]
    rows = [
        [name, *(f"{one[column]['mean']:.3f} ± {one[column]['interval']:.3f}" for column in columns)]
        for name, one in sorted(result["few_shot"].items(), key=lambda pair: -pair[1]["1-shot, center"]["mean"])
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
