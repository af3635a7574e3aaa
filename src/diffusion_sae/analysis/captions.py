"""Names of SAE latents from the captions or prompts of their images."""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from .._config import check_integer

_WORD = re.compile(r"\w+(?:['’-]\w+)*")


def phrases_of(caption: str, longest: int) -> set[str]:
    """All sequences of 1 to `longest` words of a caption, in lower case."""
    words = _WORD.findall(caption.casefold())
    return {" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)}


class CaptionScores:
    """Names from captions: words and phrases that are in a set's captions more often than in the others.

    score(w) is the z-score of the log-odds ratio with an informative prior (Monroe, Colaresi & Quinn 2008, §3.3), of
    captions that have w (y of the set's n, Y of all N) rather than of words, so that a repeated word counts once:

        z = δ / σ,   δ = log (y + a)/(n − y + b) − log (Y − y + a)/(N − n − Y + y + b),
        σ² = 1/(y + a) + 1/(n − y + b) + 1/(Y − y + a) + 1/(N − n − Y + y + b),   a = α Y/N,   b = α − a.

    The prior is worth α captions at the base rate. A phrase is a name only if each of its words has at least half of
    its score, so that no list of stop words is needed, and goes before a word of it with the same score. `NameScores`
    of `naming.name_latents`.
    """

    unit = "z"
    nested = True

    def __init__(
        self, captions: Sequence[str], *, longest: int = 2, least_captions: int = 3, prior: float = 2.0
    ) -> None:
        """
        Args:
            captions: one an image, in the order of the features; empty where there is none.
            longest: words of a phrase.
            least_captions: names that fewer have are left out, and so are those that all have.
            prior: α.

        Raises:
            ValueError: if no word is left.
        """
        check_integer("longest", longest, 1)
        check_integer("least_captions", least_captions, 1)
        each = [phrases_of(caption, longest) for caption in captions]
        having = Counter(phrase for phrases in each for phrase in phrases)
        frequent = {name for name, count in having.items() if least_captions <= count < len(captions)}
        self.names = sorted(name for name in frequent if frequent.issuperset(name.split()))
        if not self.names:
            raise ValueError(
                f"No word is in at least {least_captions} of the {len(captions)} captions without being in all. Name "
                "by a vocabulary or by classes."
            )
        index = {name: place for place, name in enumerate(self.names)}
        places = [np.array(sorted(index[p] for p in phrases if p in index), np.int64) for phrases in each]
        starts = np.cumsum([0, *map(len, places)])
        # Any: scipy has no types; float32: sums of as many ones as a set has images
        self._has: Any = csr_array(
            (np.ones(starts[-1], np.float32), np.concatenate(places), starts), shape=(len(each), len(self.names))
        )
        self._total = torch.tensor([having[name] for name in self.names], dtype=torch.float64)
        words = [[index[word] for word in name.split()] for name in self.names]
        self._lengths = torch.tensor([len(own) for own in words], dtype=torch.float64)
        self._words = torch.tensor([own + own[:1] * (longest - len(own)) for own in words])  # (names, longest)
        self._captions, self._prior = len(captions), prior

    def __call__(self, images: Int[Tensor, "m n"], weights: Float[Tensor, "m n"]) -> Float[Tensor, "m names"]:
        """−∞ for names that no caption of a set has."""
        present = weights > 0
        row, column = torch.nonzero(present, as_tuple=True)
        ones = np.ones(len(row), np.float32)
        sets = csr_array((ones, (row.numpy(), images[row, column].numpy())), shape=(len(images), self._captions))
        y = torch.from_numpy((sets @ self._has).toarray()).double()
        n = present.sum(1, keepdim=True).double()
        a = self._prior * self._total / self._captions
        b = self._prior - a
        counts = (y + a, n - y + b, self._total - y + a, self._captions - n - self._total + y + b)
        delta = counts[0].log() - counts[1].log() - counts[2].log() + counts[3].log()
        z = delta / torch.stack([1 / count for count in counts]).sum(0).sqrt()
        whole = torch.stack([z[:, self._words[:, place]] for place in range(self._words.shape[1])]).amin(0) >= z / 2
        return torch.where((y > 0) & (whole | (self._lengths == 1)), z + 1e-9 * self._lengths, -torch.inf)
