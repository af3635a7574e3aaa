"""Saving an SAE with code for those who do not have this library: opt-in, as code in a repository asks for trust."""

from pathlib import Path
from typing import Any

from .._files import read_json, write_atomically, write_json
from . import remote_code

MODULE = "modeling_k_sparse_autoencoder"  # as the file is called beside the weights


class ExportsCode:
    """The part of an artifact that can bring its code along."""

    config: Any

    def _export_code(self, folder: Path) -> None:
        """Put the stand-alone code into a saved artifact, and its name into config.json.

        Raises:
            ValueError: for settings that the stand-alone code does not know.
        """
        for name, known in (("activation", remote_code.ACTIVATIONS), ("input_norm", remote_code.INPUT_NORMS)):
            if getattr(self.config, name) not in known:
                raise ValueError(
                    f"The code that export_code=True writes knows {name} {', '.join(known)}, not "
                    f"{getattr(self.config, name)!r}. Save without it: it is loaded with diffusion_sae."
                )
        source = Path(remote_code.__file__).read_text(encoding="utf-8")
        write_atomically(folder / f"{MODULE}.py", lambda path: path.write_text(source, encoding="utf-8"))
        classes = {"AutoConfig": remote_code.KSparseAutoencoderConfig, "AutoModel": remote_code.KSparseAutoencoder}
        auto_map = {auto: f"{MODULE}.{cls.__name__}" for auto, cls in classes.items()}
        write_json(folder / "config.json", read_json(folder / "config.json") | {"auto_map": auto_map})
