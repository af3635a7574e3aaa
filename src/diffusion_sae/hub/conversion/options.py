"""ForeignOptions. No torch here: the command line reads its fields."""

from dataclasses import dataclass

from ..._config import JsonConfig, check, check_choice, check_integer, check_number

NORMALIZATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")


@dataclass(frozen=True, kw_only=True)
class ForeignOptions(JsonConfig):
    """Where an SAE of another library lies, and what its files do not say."""

    format: str | None = None
    """Library that wrote it: sae_lens, sparsify, saeuron, dictionary_learning, sdxl_unbox, overcomplete or revelio;
    None: recognised by its files."""
    subfolder: str = ""
    """Folder within the source, such as a hookpoint of sparsify."""
    filename: str | None = None
    """Name of the weights file where the library gives it none, as overcomplete and Revelio."""
    k: int | None = None
    """Latents that are active at a time, where the files do not hold it (overcomplete, Revelio)."""
    activation: str | None = None
    """Another activation than the files name, or the one that they do not name; as in KSparseAutoencoderConfig."""
    threshold: float | int | None = None
    """Threshold of a BatchTopK whose files lack it (overcomplete, SAeUron)."""
    scaling_factor: float | int | None = None
    """What SAELens multiplied the activations by (expected_average_only_in), if no activation_scaler.json says it."""
    normalization: str = "l2"
    """Of overcomplete's dictionary, which a state dict does not hold: l2, max_l2, l1, max_l1 or identity."""
    revision: str | None = None
    """Branch, tag or commit of the source on the Hub."""

    def __post_init__(self) -> None:
        for name in ("format", "filename", "activation", "revision"):
            value = getattr(self, name)
            check(value is None or (isinstance(value, str) and bool(value)), f"{name} must be a name, got {value!r}.")
        check(isinstance(self.subfolder, str), f"subfolder must be a string, got {self.subfolder!r}.")
        if self.k is not None:
            check_integer("k", self.k, 1)
        for name in ("threshold", "scaling_factor"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), 0, open_low=name == "scaling_factor")
        check_choice("normalization", self.normalization, NORMALIZATIONS)
