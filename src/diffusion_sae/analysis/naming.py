"""Names of SAE latents, with a score, the runner-up, and what images drawn at random would score.

Three sources of names, each a `NameScores` over the images of a latent:

| class | names | score of a name | needs |
|---|---|---|---|
| `VocabularyScores` | any words | how much more the images resemble it than all images do (cosine) | a CLIP |
| `captions.CaptionScores` | words of captions or prompts | log-odds of being in their captions (z) | captions |
| `ClassScores` | class names | its part in the divergence from the base rate (bits) | labels |

`name_latents` takes one of them. A latent's top images say what it fires on most, not all that it fires on.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .._config import check_integer
from ..extraction.images import to_pictures
from ..extraction.sources import ImageSource
from ..extraction.text_image import TextImageModel
from .latents import LatentStatistics

TEMPLATES = ("{}", "a photo of a {}", "an image of {}")
"""Prompts whose embeddings are averaged for a word: one alone prefers words that fit its grammar."""
_SCORES_AT_ONCE = 4_000_000
_CANDIDATES = 16  # among which a runner-up is looked for that says something else


class NameScores(Protocol):
    """How well each name fits each set of images; higher is better."""

    unit: str
    """What a score is, in a word or two."""
    nested: bool
    """Whether names are parts of others, such as words of phrases; a runner-up is then none of these."""

    @property
    def names(self) -> Sequence[str]: ...

    def __call__(self, images: Int[Tensor, "m n"], weights: Float[Tensor, "m n"]) -> Float[Tensor, "m names"]:
        """Scores of m sets of n images, −∞ for names out of the question. An image of weight 0 is not in its set."""
        ...


@dataclass(frozen=True)
class LatentName:
    """The name of a latent."""

    latent_index: int
    name: str
    score: float
    unit: str
    """What the score is: `cosine above mean`, `z` or `bits`."""
    runner_up: str | None
    """The next best name that is no part of the first, nor the other way round; None where there is none."""
    runner_up_score: float | None
    random_score: float
    """Mean score of the best names of random images, as many as the latent has, with such activations."""
    chance: float
    """Share of random sets whose best name scores at least as much, (1 + count) / (1 + draws): a p-value of this one
    latent. Of 1,000 latents 50 have less than 0.05 by chance."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class VocabularyScores:
    """Names from a vocabulary, by a model of texts and images.

    score(w) = Σᵢ aᵢ (cos(eᵢ, w) − c̄_w) / Σᵢ aᵢ over the images i of a set with activations aᵢ, where c̄_w is the mean
    cosine of w with all images: a word that resembles every image of the data names none.
    """

    unit = "cosine above mean"
    nested = False

    def __init__(self, names: Sequence[str], words: Float[Tensor, "names d"], images: Float[Tensor, "N d"]) -> None:
        """
        Args:
            names: the vocabulary.
            words: an embedding a name.
            images: an embedding an image of the data, in the order of the features.
        """
        if len(names) != len(words) or words.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"{len(names)} names need embeddings of as many words and of the images' width, got the shapes "
                f"{tuple(words.shape)} and {tuple(images.shape)}."
            )
        self.names = list(names)
        self.words = torch.nn.functional.normalize(words.double(), dim=1)
        unit = torch.nn.functional.normalize(images.double(), dim=1)
        self.images = unit - unit.mean(0)
        """Less their mean, so that products with words are cosines above the mean."""

    @classmethod
    def of_model(
        cls,
        model: TextImageModel,
        names: Sequence[str],
        source: ImageSource,
        *,
        templates: Sequence[str] = TEMPLATES,
        progress: bool = True,
    ) -> "VocabularyScores":
        """Embed the vocabulary and every image.

        Args:
            model: `TextImageModel.from_pretrained` of any CLIP.
            names: the vocabulary, as `read_vocabulary` gives it.
            source: the images that the features were extracted from.
            templates: prompts with `{}` for the name; their embeddings are averaged.
            progress: show a progress bar.
        """
        from tqdm.auto import tqdm

        bar = tqdm(range(len(source)), unit="image", desc="embed", disable=not progress)
        images = model.embed_images(_picture(source, i) for i in bar)
        return cls(names, embed_words(model, names, templates), images)

    def directions(self, images: Int[Tensor, "m n"], weights: Float[Tensor, "m n"]) -> Float[Tensor, "m d"]:
        """Activation-weighted mean embedding of each set, less that of all images."""
        share = weights.double() / weights.double().sum(1, keepdim=True)
        return torch.einsum("mn,mnd->md", share, self.images[images])

    def __call__(self, images: Int[Tensor, "m n"], weights: Float[Tensor, "m n"]) -> Float[Tensor, "m names"]:
        return self.directions(images, weights) @ self.words.T


def _picture(source: ImageSource, image: int) -> Any:
    read = source.read(image)
    return to_pictures(read[None])[0] if isinstance(read, Tensor) else read


def embed_words(
    model: TextImageModel, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Float[Tensor, "names d"]:
    """Mean of the embeddings of a name's prompts, as CLIP's authors make classifiers of names."""
    if not templates or any("{}" not in template for template in templates):
        raise ValueError(f"Each template must have a {{}} for the name, got {list(templates)}.")
    each = [model.embed_texts([template.replace("{}", name) for name in names]) for template in templates]
    return torch.nn.functional.normalize(torch.stack(each).mean(0), dim=1)


class ClassScores:
    """Names of classes, by the labels of the images: p_c log₂(p_c / q_c), the part that class c has in the divergence
    of the images' labels p from the base rate q (`metrics.interpretability.label_divergence`); −∞ where p_c is 0.
    """

    unit = "bits"
    nested = False

    def __init__(self, labels: Int[Tensor, " images"], class_names: Sequence[str]) -> None:
        if len(labels) and int(labels.max()) >= len(class_names):
            raise ValueError(f"Labels go up to {int(labels.max())}, there are {len(class_names)} class names.")
        self.labels, self.names = labels, list(class_names)
        self._base_rate = torch.bincount(labels, minlength=len(class_names)).double() / len(labels)

    def __call__(self, images: Int[Tensor, "m n"], weights: Float[Tensor, "m n"]) -> Float[Tensor, "m names"]:
        present = (weights > 0).double()
        shares = torch.zeros(len(images), len(self.names), dtype=torch.float64)
        shares.scatter_add_(1, self.labels[images], present / present.sum(1, keepdim=True))
        bits = shares * (shares / self._base_rate.clamp_min(1e-300)).log2()
        return torch.where(shares > 0, bits, -torch.inf)


def read_vocabulary(source: str | Path | Sequence[str] | None = None) -> list[str]:
    """Names, without repetitions and empty ones.

    Args:
        source: a text file with a name a line (`#` begins a comment), a JSON file with a list, a list, or None for the
            packaged list of some hundred everyday things, parts, materials, colours and scenes.

    Raises:
        ValueError: if there are none, or a JSON file holds something else.
    """
    if source is None:
        source = Path(__file__).with_name("vocabulary.txt")
    if isinstance(source, str | Path):
        text = Path(source).read_text(encoding="utf-8")
        content = json.loads(text) if Path(source).suffix == ".json" else [x.split("#")[0] for x in text.splitlines()]
    else:
        content = list(source)
    what = str(source) if isinstance(source, str | Path) else f"{source!s:.60}"
    if not isinstance(content, list) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"A vocabulary is a list of texts; {what} holds a {type(content).__name__} of others.")
    names = list(dict.fromkeys(stripped for name in content if (stripped := name.strip())))
    if not names:
        raise ValueError(f"The vocabulary {what} has no names. Write one a line.")
    return names


@torch.no_grad()
def name_latents(
    statistics: LatentStatistics,
    scores: NameScores,
    *,
    latents: Iterable[int] | None = None,
    draws: int = 200,
    seed: int = 0,
) -> list[LatentName]:
    """Name latents by their top images.

    The baseline is drawn by the number of active images, as fewer images score higher by chance: random images, with
    the activations of a random latent that has as many.

    Args:
        statistics: top images and activations; images with activation 0 do not count.
        scores: where names come from.
        latents: which latents; default all. Left out are those that are active in no image, or whose images have no
            name.
        draws: random sets for each number of active images.
        seed: of these.
    """
    check_integer("draws", draws, 1)
    counts = (statistics.top_acts > 0).sum(1)
    wanted = torch.arange(len(counts)) if latents is None else torch.as_tensor(list(latents), dtype=torch.long)
    wanted = wanted[counts[wanted] > 0]
    null = _random_scores(statistics, scores, counts, counts[wanted].unique().tolist(), draws, seed)
    named = []
    block = max(1, _SCORES_AT_ONCE // len(scores.names))
    for part in wanted.split(block):
        values = scores(statistics.top_images[part], statistics.top_acts[part])
        best = values.topk(min(_CANDIDATES, values.shape[1]), dim=1)
        for row, latent in enumerate(part.tolist()):
            candidates = list(zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True))
            possible = [(str(scores.names[name]), value) for name, value in candidates if value > -math.inf]
            if possible:
                named.append(_name(latent, scores, possible, null[int(counts[latent])]))
    return named


def _name(
    latent: int, scores: NameScores, candidates: Sequence[tuple[str, float]], null: Float[Tensor, " draws"]
) -> LatentName:
    (first, score), *others = candidates
    words = set(first.split())
    if scores.nested:
        others = [(name, value) for name, value in others if not (words <= (own := set(name.split())) or own <= words)]
    runner_up = others[0] if others else None
    return LatentName(
        latent_index=latent,
        name=first,
        score=score,
        unit=scores.unit,
        runner_up=None if runner_up is None else runner_up[0],
        runner_up_score=None if runner_up is None else runner_up[1],
        random_score=null[null.isfinite()].mean().item(),
        chance=(1 + int((null >= score).sum())) / (1 + len(null)),
    )


def _random_scores(
    statistics: LatentStatistics,
    scores: NameScores,
    counts: Int[Tensor, " num_latents"],
    sizes: Sequence[int],
    draws: int,
    seed: int,
) -> Mapping[int, Float[Tensor, " draws"]]:
    """Best scores of random images for each number of active images."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for size in sizes:
        alike = torch.nonzero(counts == size).flatten()
        weights = statistics.top_acts[alike[torch.randint(len(alike), (draws,), generator=generator)], :size]
        images = torch.stack([torch.randperm(statistics.num_images, generator=generator)[:size] for _ in range(draws)])
        block = max(1, _SCORES_AT_ONCE // len(scores.names))
        parts = [scores(i, w).amax(1) for i, w in zip(images.split(block), weights.split(block), strict=True)]
        found[size] = torch.cat(parts)
    return found
