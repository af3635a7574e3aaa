"""An SAE saved with its code, in a process that has no diffusion_sae: the same codes and reconstructions."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.sae import remote_code
from diffusion_sae.sae.configuration import ACTIVATIONS

CONFIGS = {activation: {"activation": activation} for activation in remote_code.ACTIVATIONS}
CONFIGS |= {
    "layer norm": {"input_norm": "layer_norm"},
    "timesteps": {"timesteps": [25, 500]},
    "all": {"activation": "batchtopk", "input_norm": "layer_norm", "timesteps": [25, 500]},
}
WITHOUT = """
    import sys

    class Hidden:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "diffusion_sae":
                raise ModuleNotFoundError("No module named 'diffusion_sae'", name="diffusion_sae")

    sys.meta_path.insert(0, Hidden())
    import torch
    from pathlib import Path
    from safetensors.torch import load_file, save_file
    from transformers import AutoModel

    work, out = Path(sys.argv[1]), {}
    for folder in sorted(path for path in work.iterdir() if path.is_dir()):
        sae = AutoModel.from_pretrained(folder, trust_remote_code=True)
        timesteps = None if sae.config.timesteps is None else torch.tensor([25, 500] * 3)
        given = load_file(work / "features.safetensors")["features"]
        top_acts, top_indices = sae.encode(given, timesteps)
        output = sae(given, timesteps)
        out |= {f"{folder.name}.{name}": value for name, value in output.items()}
        out |= {f"{folder.name}.encoded": top_acts, f"{folder.name}.indices": top_indices}
    save_file({name: value.contiguous() for name, value in out.items()}, work / "out.safetensors")
    broken = work / next(path.name for path in work.iterdir() if path.is_dir())
    (broken / "model.safetensors").write_bytes((work / "broken.safetensors").read_bytes())
    try:
        AutoModel.from_pretrained(broken, trust_remote_code=True)
    except ValueError as error:
        print(error)
    assert "diffusion_sae" not in sys.modules
"""


def make(name: str) -> KSparseAutoencoder:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=6, num_latents=40, k=3, **CONFIGS[name])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.state_dict().values():
            value += torch.rand(value.shape, generator=generator) * 0.1
    return sae


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory, features: torch.Tensor) -> tuple[dict[str, torch.Tensor], str]:
    """What a process without the package makes of all of them, and its message about weights that are not whole."""
    work = tmp_path_factory.mktemp("exported")
    for name in CONFIGS:
        make(name).save_pretrained(work / name, export_code=True)
    save_file({"features": features}, work / "features.safetensors")
    save_file({"W_dec": torch.zeros(40, 6)}, work / "broken.safetensors", metadata={"format": "pt"})
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HOME": str(work / ".cache"), "HF_MODULES_CACHE": str(work / ".modules"), "HF_HUB_OFFLINE": "1"}
    for hidden in (".cache", ".modules"):
        assert not (work / hidden).exists()
    code = textwrap.dedent(WITHOUT).replace("if path.is_dir()", 'if path.is_dir() and path.name[0] != "."')
    command = [sys.executable, "-c", code, str(work)]
    done = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(work / "out.safetensors"), done.stdout


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_numbers(name: str, without: tuple[dict, str], features: torch.Tensor) -> None:
    sae, got = make(name), without[0]
    timesteps = None if sae.config.timesteps is None else torch.tensor([25, 500] * 3)
    code = sae.encode(features, timesteps)
    dense = torch.zeros(6, 40).scatter_add(1, got[f"{name}.indices"], got[f"{name}.encoded"])
    torch.testing.assert_close(dense, code.to_dense(40).detach(), rtol=1e-5, atol=1e-5)
    assert torch.equal(got[f"{name}.encoded"], got[f"{name}.encoded"].sort(dim=1, descending=True).values)
    output = sae(features, timesteps=timesteps)
    for key in ("reconstruction", "fvu"):
        torch.testing.assert_close(got[f"{name}.{key}"], output[key].detach(), rtol=1e-5, atol=1e-5)


def test_weights_that_are_not_whole_are_refused_there_too(without: tuple[dict, str]) -> None:
    assert "missing_keys: ['W_enc', 'b_dec', 'b_enc'" in without[1]


def test_the_config_that_stands_alone_has_the_fields_of_the_librarys() -> None:
    """All but the origin of a conversion; the defaults too, as a config may leave them out."""
    names = set(KSparseAutoencoderConfig.__annotations__) - {"model_type", "required_keys", "converted_from"}
    alone = set(remote_code.KSparseAutoencoderConfig.__annotations__) - {"model_type"}
    assert alone == names
    for name in names - {"d_in"}:  # which the library asks for
        assert getattr(remote_code.KSparseAutoencoderConfig, name) == getattr(KSparseAutoencoderConfig, name), name


class TestWithThePackage:
    def test_its_own_class_is_loaded_and_nothing_is_asked(self, tmp_path: Path) -> None:
        make("topk").save_pretrained(tmp_path, export_code=True)
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
            "AutoConfig": "modeling_k_sparse_autoencoder.KSparseAutoencoderConfig",
            "AutoModel": "modeling_k_sparse_autoencoder.KSparseAutoencoder",
        }
        assert type(AutoModel.from_pretrained(tmp_path)) is KSparseAutoencoder
        assert type(AutoConfig.from_pretrained(tmp_path)) is KSparseAutoencoderConfig

    def test_saved_again_without_it(self, tmp_path: Path) -> None:
        make("topk").save_pretrained(tmp_path, export_code=True)
        KSparseAutoencoder.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
        assert not list(tmp_path.glob("*.py"))

    def test_what_cannot_be_exported(self, tmp_path: Path) -> None:
        for other in set(ACTIVATIONS) - set(remote_code.ACTIVATIONS) | {"other"}:
            sae = make("topk")
            object.__setattr__(sae.config, "activation", other)
            with pytest.raises(ValueError, match="The code that export_code=True writes knows activation topk"):
                sae.save_pretrained(tmp_path / "sae", export_code=True)
        with pytest.raises(ValueError, match="DiffusionProbe has no code that could be saved beside it"):
            DiffusionProbe(DiffusionProbeConfig(d_in=4)).save_pretrained(tmp_path / "probe", export_code=True)


class TestTheFile:
    def test_it_stands_alone(self) -> None:
        source = Path(remote_code.__file__).read_text(encoding="utf-8")
        assert "from ." not in source
        assert "import diffusion_sae" not in source
        assert "from diffusion_sae" not in source

    def test_what_it_refuses(self, features: torch.Tensor) -> None:
        config = remote_code.KSparseAutoencoderConfig(d_in=6, num_latents=8, k=2)
        sae = remote_code.KSparseAutoencoder(config)
        with pytest.raises(ValueError, match=r"features must have the shape \(N, 6\), got \(6, 5\)"):
            sae.encode(features[:, :5])
        with pytest.raises(ValueError, match="this SAE has none"):
            sae.encode(features, timesteps=25)
        several = remote_code.KSparseAutoencoderConfig(d_in=6, num_latents=8, k=2, timesteps=[25, 500])
        sae = remote_code.KSparseAutoencoder(several)
        with pytest.raises(ValueError, match=r"give timesteps=, each one of \[25, 500\]"):
            sae.encode(features)
        with pytest.raises(ValueError, match=r"timesteps must be among \[25, 500\], got \[30\]"):
            sae.encode(features, timesteps=30)
        with pytest.raises(ValueError, match=r"activation must be one of .* got 'other': use diffusion_sae"):
            remote_code.KSparseAutoencoder(
                remote_code.KSparseAutoencoderConfig(d_in=6, num_latents=8, activation="other")
            )
