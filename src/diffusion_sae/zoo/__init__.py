"""What comes with the package: tiny trained models, images, and artifacts trained on them. Looked up before the Hub."""

import re
from pathlib import Path

_ROOT = Path(__file__).parent
IMAGES = "fashion-mnist-mini"
EMOJI = "emoji-mini"  # coarse and fine classes, a style of drawing a split
_DATASETS = {IMAGES: "images", EMOJI: "emoji"}
_ON_HUB = {IMAGES: "zalando-datasets/fashion_mnist"}  # what they were taken from
DEFAULT_PROBE = "tiny-sd-up1-t50-fashion-mnist"


def embedded_models() -> list[str]:
    return sorted(path.parent.name for path in _ROOT.glob("models/*/model_index.json"))


def embedded_artifacts() -> list[str]:
    return sorted(path.parent.name for path in _ROOT.glob("artifacts/*/config.json"))


def embedded_path(name: str) -> Path | None:
    """Folder of an embedded model or artifact; None for every other name. Embedded names have no slash."""
    if "/" in name or "\\" in name:
        return None
    for kind in ("models", "artifacts"):
        folder = _ROOT / kind / name
        if (folder / "model_index.json").is_file() or (folder / "config.json").is_file():
            return folder
    return None


def resolve_source(name: str) -> str:
    """What to load: the folder of an embedded name, else the name itself, a folder or a Hub id.

    Raises:
        FileNotFoundError: for what can be none of these.
    """
    if Path(name).is_dir():
        return name
    folder = embedded_path(name)
    if folder is not None:
        return str(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise FileNotFoundError(
            f"{name!r} is no folder, no Hub id (owner/name) and no embedded name. Embedded models: "
            f"{', '.join(embedded_models())}; embedded artifacts: {', '.join(embedded_artifacts())}."
        )
    return name


def embedded_datasets() -> list[str]:
    """Names that `open_images` and `extract` take for the images that come with the package."""
    return list(_DATASETS)


def dataset_on_hub(name: str) -> str | None:
    """The data set on the Hub that an embedded one is a part of; None if there is none."""
    return _ON_HUB.get(name)


def embedded_images(split: str, dataset: str = IMAGES) -> Path:
    """Parquet file of a split of the sample images: `train`, `validation` or `test`.

    Args:
        split: of `IMAGES` they are 4,000, 1,000 and 1,000 images, of `EMOJI` 2,614, 1,002 and 1,290.
        dataset: one of `embedded_datasets()`.
    """
    if dataset not in _DATASETS:
        raise ValueError(f"{dataset!r} is no embedded data set. Embedded data sets: {', '.join(_DATASETS)}.")
    path = _ROOT / _DATASETS[dataset] / f"{split}.parquet"
    if not path.is_file():
        raise ValueError(f"{dataset} has no split {split!r}. Splits: train, validation, test.")
    return path
