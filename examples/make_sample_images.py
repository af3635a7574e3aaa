"""Make the packaged sample images, class-balanced, in Parquet with the schema that `datasets` reads.

4,000 train and 1,000 validation images from Fashion-MNIST's official training split, 1,000 test images from its
official test split.

    python examples/make_sample_images.py
"""

import argparse
import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from train_tiny_diffusion import CLASSES, read_fashion_mnist

OUT = Path(__file__).parents[1] / "src/diffusion_sae/zoo/images"
SPLITS = {"train": ("train", 0, 400), "validation": ("train", 400, 100), "test": ("test", 0, 100)}


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def rows_of_split(labels: np.ndarray, first: int, count: int, seed: int) -> np.ndarray:
    """`count` rows of each class, from the `first`-th on in an order that depends on the seed; classes interleaved."""
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = [order[labels[order] == c][first : first + count] for c in range(len(CLASSES))]
    return np.stack(by_class, 1).reshape(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    features = Features({"image": Image(), "label": ClassLabel(names=CLASSES), "source_row": Value("int32")})
    for split, (official, first, count) in SPLITS.items():
        pixels, labels = read_fashion_mnist(official)
        rows = rows_of_split(labels, first, count, args.seed)
        content = {
            "image": [{"bytes": png(pixels[row]), "path": f"{official}-{row:05d}.png"} for row in rows],
            "label": labels[rows].tolist(),
            "source_row": rows.tolist(),
        }
        Dataset.from_dict(content, features=features).to_parquet(args.out / f"{split}.parquet")
        print(f"{split}: {len(rows)} images of the official {official} split")


if __name__ == "__main__":
    main()
