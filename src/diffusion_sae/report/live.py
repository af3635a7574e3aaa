"""What `diffusion-sae browse` does with the SAEs of a report: encode an image, keep names, search by text."""

import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from .._files import read_json, write_json
from .._weights import weights_hash
from ..analysis.firing import grid_of, pooled_cells
from ..extraction.extractor import DiffusionFeatureExtractor
from ..extraction.images import load_image
from ..extraction.text_image import TextImageModel
from ..sae.latent_table import LATENTS_NAME
from ..sae.modeling import KSparseAutoencoder
from .build import WORDS

MOST = 24
"""Latents that are told of an image, or found by a text."""
LONGEST_NAME = 200
NAMES = "names.json"


class RefusedError(ValueError):
    """What was asked for cannot be done; the message is shown on the page."""


class LiveSAE:
    """One SAE of a report that is being served. Loaded when it is first needed; one call at a time."""

    def __init__(self, key: str, record: Mapping[str, Any], files: Path, report: Path) -> None:
        """
        Args:
            key: which of the report's.
            record: what `browse.json` says of it.
            files: the report's folder of files.
            report: the report's folder, in which names are kept where the SAE cannot hold them.
        """
        self.key, self.record, self.files, self.report = key, record, files, report
        self.lock = threading.Lock()

    @property
    def abilities(self) -> dict[str, bool]:
        return {"encode": self.record["path"] is not None and bool(self.record["layer"]), "text": self._words.is_file()}

    @property
    def _words(self) -> Path:
        return self.files / f"{self.key}-{WORDS}"

    @cached_property
    def sae(self) -> KSparseAutoencoder:
        path = self.record["path"]
        if path is None:
            raise RefusedError("The report does not say where its SAE is kept.")
        sae = KSparseAutoencoder.from_pretrained(path).eval()
        if weights_hash({"sae": sae}, {}) != self.record["weights"]:
            raise RefusedError(f"The SAE in {path} has other weights now than when the report was made. Make it anew.")
        return sae

    @cached_property
    def extractor(self) -> DiffusionFeatureExtractor:
        return DiffusionFeatureExtractor.from_pretrained(self.record["path"])

    def encode(self, content: bytes) -> dict[str, Any]:
        """The latents that fire most in an image, and where: `latents` of latent, activation and map, and the `grid`.

        Args:
            content: an image file.
        """
        if not self.abilities["encode"]:
            raise RefusedError("The report does not say which extraction its SAE belongs to.")
        with self.lock, torch.no_grad():
            features = self.extractor(load_image(content, "the dropped image"))
            layer = self.record["layer"]
            at_each = []
            for t in self.record["timesteps"]:
                rows = features[layer, t][0]  # (T, C), or (C,) for pooled features
                rows = (rows if rows.ndim == 2 else rows[None]).to(self.sae.device)
                code = self.sae.encode(rows, None if self.sae.config.timesteps is None else t)
                at_each.append(code.to_dense(self.sae.config.num_latents).float().cpu().numpy())
            dense = np.max(at_each, 0)  # (timesteps, T, num_latents) -> (T, num_latents)
        return self._strongest(dense)

    def _strongest(self, dense: np.ndarray) -> dict[str, Any]:
        largest = dense.max(0)
        order = [i for i in np.argsort(-largest, kind="stable")[:MOST].tolist() if largest[i] > 0]
        grid = grid_of(len(dense))
        latents = []
        for latent in order:
            told = {"latent": latent, "activation": float(largest[latent])}
            if grid is not None:
                cells = np.zeros(grid[0] * grid[1])
                np.maximum.at(cells, pooled_cells(len(dense)), dense[:, latent])
                told["map"] = np.ceil(255 * (cells / cells.max())).astype(int).tolist()
            latents.append(told)
        return {"latents": latents, "grid": grid}

    def names(self) -> dict[str, str]:
        """What people have called the latents."""
        with self.lock:
            if self._table_path is None or self.sae.latents is None:
                path = self.report / NAMES
                return read_json(path).get(self.record["weights"], {}) if path.is_file() else {}
            columns = [self.sae.latents.table[name].to_pylist() for name in ("latent_index", "name", "name_score")]
            # what has a score was named by a program
            return {str(i): name for i, name, score in zip(*columns, strict=True) if name and score is None}

    @property
    def _table_path(self) -> Path | None:
        """Of the SAE's table of latents, in which names travel with it; None where it has none on this disk."""
        path = self.record["path"]
        if path is None or not Path(path, LATENTS_NAME).is_file():
            return None
        return Path(path, LATENTS_NAME) if self.sae.latents is not None else None

    def save_names(self, names: Mapping[str, Any]) -> str:
        """Set names by latent, or with an empty text take them back; returns where they are now."""
        checked = {}
        for latent, text in names.items():
            number = int(latent) if latent.isascii() and latent.isdigit() else -1
            if not 0 <= number < self.record["latents"] or not isinstance(text, str):
                raise RefusedError(
                    f"There is no latent {latent!r:.40} to name with a text; they are 0…{self.record['latents'] - 1}."
                )
            checked[number] = text.strip()[:LONGEST_NAME]
        with self.lock:
            path = self._table_path
            if path is not None and self.sae.latents is not None:
                self.sae.latents = self.sae.latents.with_names({i: text or None for i, text in checked.items()})
                self.sae.latents.save(path)
                return "with the SAE"
            path = self.report / NAMES
            content = read_json(path) if path.is_file() else {}
            own = content.setdefault(self.record["weights"], {}) | {str(i): text for i, text in checked.items()}
            content[self.record["weights"]] = {i: text for i, text in own.items() if text}
            write_json(path, content)
            return "with the report"

    @cached_property
    def _text_model(self) -> TextImageModel:
        return TextImageModel.from_pretrained(self.record["clip"])

    def search(self, text: str) -> dict[str, Any]:
        """The latents whose images a text describes best: cosine above the mean of all images."""
        if not self.abilities["text"]:
            raise RefusedError("The report was made without a model of texts and images: see `--clip`.")
        with self.lock:
            with safe_open(self._words, "pt") as file:
                directions = file.get_tensor("directions")
            scores = directions.double() @ self._text_model.embed_texts([text])[0].double()
        known = directions.any(1)  # not of latents that fire in no image
        scores[~known] = -torch.inf
        best = scores.topk(min(MOST, int(known.sum())))
        return {
            "latents": [
                {"latent": i, "score": score}
                for i, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
        }
