"""DiffusionProbeConfig."""

from typing import Any

from huggingface_hub.dataclasses import strict

from .._config import check, check_choice, check_integer, check_number
from ..hub.artifact import ArtifactConfig, refuse_unknown_config_keys

HEADS = ("linear", "mlp", "diff-c", "attention", "fusion", "knn", "prototype", "sae")
FEATURE_NORMS = ("standardize", "center", "none")
FUSIONS = ("mixing", "attention")
LATENT_POOLINGS = ("max", "mean")
SAE_KEYS = ("num_latents", "k", "activation", "input_norm")


@strict
class DiffusionProbeConfig(ArtifactConfig):
    """Shape of a probe. What it predicts are `id2label` / `label2id` and `problem_type`, as in transformers:
    single_label_classification (None is the same), multi_label_classification or regression.

    Args:
        d_in: width of the features (channels); of fusion the widths of its inputs together.
        head: linear, mlp, diff-c (Revelio's), attention, fusion, knn, prototype or sae; the equations are in
            `diffusion_sae.probes.heads`.
        width: hidden width of mlp, diff-c, attention and fusion; 1024 in Revelio and in DifFormer.
        depth: hidden layers of mlp; transformer blocks of fusion="attention", of which DifFormer has 2.
        dropout: dropout rate of mlp and diff-c.
        num_attention_heads: of attention and fusion="attention"; must divide width.
        feature_norm: standardize (mean 0, deviation 1 on the training features), center (mean 0) or none; of all heads
            but linear, which always standardises, diff-c and sae.
        num_neighbors: k of knn; None: chosen on validation.
        temperature: of the weights exp(cos / temperature) of knn and the logits cos / temperature of prototype.
        fusion: mixing (Diffusion Hyperfeatures) or attention (DifFormer).
        pool_size: side to which fusion="attention" averages larger maps.
        inputs: of fusion, the width of each input by its name `layer@timestep`; `AlignedFeatures.inputs`.
        sae: of sae, the encoder's num_latents, k, activation and input_norm; `DiffusionProbe.from_sae` fills it in.
        latent_pooling: of sae, max or mean of a latent over the positions of an image.
        latent_names: of sae, names of latents by their number, for the contributions.
        num_rows: of knn, how many training rows it holds; the training sets it.
        init_seed: seed of the initial weights; the global random state is not used.
    """

    model_type = "diffusion-probe"
    required_keys = ("d_in", "head")

    d_in: int
    head: str = "linear"
    width: int = 1024
    depth: int = 1
    dropout: float | int = 0.3
    num_attention_heads: int = 8
    feature_norm: str = "standardize"
    num_neighbors: int | None = None
    temperature: float | int = 0.07
    fusion: str = "mixing"
    pool_size: int = 16
    inputs: dict[str, int] | None = None
    sae: dict[str, Any] | None = None
    latent_pooling: str = "max"
    latent_names: dict[str, str] | None = None
    num_rows: int = 0
    init_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        refuse_unknown_config_keys(self, kwargs)
        check_integer("d_in", self.d_in, 1)
        for name, allowed in (
            ("head", HEADS),
            ("feature_norm", FEATURE_NORMS),
            ("fusion", FUSIONS),
            ("latent_pooling", LATENT_POOLINGS),
        ):
            check_choice(name, getattr(self, name), allowed)
        for name in ("width", "depth", "num_attention_heads", "pool_size"):
            check_integer(name, getattr(self, name), 1, 1000 if name == "depth" else None)
        check_number("dropout", self.dropout, 0, 1)
        check_number("temperature", self.temperature, 0, open_low=True)
        check_integer("init_seed", self.init_seed, 0)
        check_integer("num_rows", self.num_rows, 0)
        if self.num_neighbors is not None:
            check_integer("num_neighbors", self.num_neighbors, 1)
        self._check_parts()
        self._settle_class_names(kwargs.get("num_labels"))
        super().__post_init__(**kwargs)
        least = 2 if self.problem_type in (None, "single_label_classification") else 1
        check(
            self.num_labels is not None and self.num_labels >= least,
            f"A probe needs ≥ {least} {'classes' if least == 2 else 'labels'}, got {self.num_labels}.",
        )

    def _check_parts(self) -> None:
        """What single heads need."""
        if self.head == "attention" or (self.head == "fusion" and self.fusion == "attention"):
            check(
                self.width % self.num_attention_heads == 0,
                f"width must be a multiple of num_attention_heads = {self.num_attention_heads}, got {self.width}.",
            )
        for name, head in (("inputs", "fusion"), ("sae", "sae")):
            given = getattr(self, name)
            check(bool(given) == (self.head == head), f"{name} belongs to head={head!r}, which needs it; got {given}.")
        if self.inputs is not None:
            total = sum(self.inputs.values())
            check(self.d_in == total, f"d_in must be the sum of the widths in inputs, {total}, got {self.d_in}.")
            for name in self.inputs:
                check("@" in name, f"inputs are named layer@timestep, such as 'up_ft1@25', got {name!r}.")
            grid = {tuple(name.rsplit("@", 1)) for name in self.inputs}
            full = len({layer for layer, _ in grid}) * len({timestep for _, timestep in grid})
            check(len(grid) == full, f"inputs must be every layer at every timestep, got {', '.join(self.inputs)}.")
        if self.sae is not None:
            check(sorted(self.sae) == sorted(SAE_KEYS), f"sae must hold {', '.join(SAE_KEYS)}, got {self.sae}.")

    def _settle_class_names(self, num_labels: int | None) -> None:
        """Complete id2label and label2id from each other; transformers drops or replaces what does not agree."""
        if self.id2label is None and self.label2id is None:
            return
        if self.id2label is None:
            self.id2label = {number: name for name, number in self.label2id.items()}  # type: ignore[union-attr]
        try:
            self.id2label = {int(number): name for number, name in (self.id2label or {}).items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"id2label must have class numbers 0, 1, … as keys, got {list(self.id2label or {})}."
            ) from error
        count, inverse = len(self.id2label), {name: number for number, name in (self.id2label or {}).items()}
        check(
            sorted(self.id2label) == list(range(count)) and len(inverse) == count,
            f"id2label must give each class 0…{count - 1} a name of its own, got {self.id2label}.",
        )
        check(
            self.label2id in (None, inverse),
            f"label2id must be the inverse of id2label, {inverse}, got {self.label2id}. Give one of the two.",
        )
        check(num_labels in (None, count), f"num_labels is {num_labels}, but id2label names {count} classes.")
        self.label2id = inverse
