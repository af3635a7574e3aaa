"""A model that puts texts and images into one space: any CLIP or SigLIP of transformers."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


class TextImageModel:
    """Unit-norm embeddings of texts and images, whose products are cosine similarities."""

    def __init__(self, model: Any, tokenizer: Any, processor: Any) -> None:
        """Wrap what is loaded already; `from_pretrained` loads it.

        Raises:
            ValueError: for a model without embeddings of texts and images.
        """
        lacking = [n for n in ("get_text_features", "get_image_features") if not hasattr(model, n)]
        if lacking:
            raise ValueError(
                f"{type(model).__name__} is no model of texts and images: it lacks {' and '.join(lacking)}. Give a "
                "CLIP or SigLIP of transformers, by Hub id or folder."
            )
        self.model = model.eval()
        self.tokenizer, self.processor = tokenizer, processor
        # SigLIP is trained on texts of one length
        self._padding = "max_length" if model.config.model_type.startswith("siglip") else True

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu", **hub: Any) -> Self:
        """Load a model by Hub id or folder.

        Args:
            name: of a CLIP or SigLIP.
            device: where to run.
            **hub: `revision`, `cache_dir`, `token`, `local_files_only`, as in transformers.
        """
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        # Any: a CLIPModel, SiglipModel or another of their interface, which AutoModel has no type of
        model: Any = AutoModel.from_pretrained(name, **hub).to(device)
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        return cls(model, tokenizer, AutoImageProcessor.from_pretrained(name, backend="pil", **hub))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Float[Tensor, "n d"]:
        """On the CPU; longer texts than the model takes are cut."""
        parts = []
        for batch in _batches(texts, batch_size):
            inputs = self.tokenizer(batch, padding=self._padding, truncation=True, return_tensors="pt")
            parts.append(_unit(self.model.get_text_features(**inputs.to(self.model.device))))
        return torch.cat(parts)

    @torch.no_grad()
    def embed_images(self, images: Iterable[Image.Image], batch_size: int = 64) -> Float[Tensor, "n d"]:
        """On the CPU; the images are read one batch at a time."""
        parts = []
        for batch in _batches(images, batch_size):
            inputs = self.processor(batch, return_tensors="pt").to(self.model.device)
            parts.append(_unit(self.model.get_image_features(**inputs)))
        return torch.cat(parts)


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(items)
    while batch := list(islice(rest, size)):
        yield batch


def _unit(output: Any) -> Float[Tensor, "n d"]:
    pooled = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(pooled.float(), dim=-1).cpu()
