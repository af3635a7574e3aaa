"""Several artifacts in one repository, branches, pull requests, shards, listing: as a user does it, over real HTTP."""

import json
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hub_server import HubServer

pytestmark = pytest.mark.slow  # two processes that each train or load much
RunClient = Callable[..., subprocess.CompletedProcess[str]]
REPO, SHARDED, SINGLE = "revelio/tiny-saes", "revelio/sharded-saes", "revelio/tiny-mid-t25-pets"
PUSH = f"""
    import json, sys
    import torch
    from huggingface_hub import ModelCard
    from diffusion_sae import *
    from diffusion_sae.analysis.latent_table import latent_table

    base, images, work = sys.argv[1:]
    seen = {{}}
    extractor = DiffusionFeatureExtractor.from_pretrained(base, layers=["bottleneck", "up_ft1"], timesteps=[25, 500])
    store = extractor.extract(images, work + "/features", progress=False)
    names = dict(enumerate(store.class_names))

    def trained(layer, timestep):
        features = store.select(layer, timestep)
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=48, k=4))
        args = SAETrainingArguments(output_dir=work + f"/{{layer}}-{{timestep}}", max_steps=3, batch_size=4)
        SAETrainer(sae, features, args).train(progress=False)
        sae.latents = latent_table(sae, features, n=2, dataset="pets", split="train")
        sae.latent_sheet = b"\\x89PNG of " + layer.encode()
        sae.metrics["data"] = {{"dataset": "owner/pets", "train": "train"}}
        return sae

    first, second = trained("up_ft1", 25), trained("bottleneck", 500)
    seen["urls"] = [
        first.push_to_hub({REPO!r}, subfolder="up_ft1/t25", commit_message="First"),
        second.push_to_hub({REPO!r}, subfolder="mid/t500"),
        second.push_to_hub({REPO!r}, subfolder="mid/t500"),
    ]
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=store.select("up_ft1", 25).d_in, id2label=names))
    ProbeTrainer(probe, store.select("up_ft1", 25), ProbeTrainingArguments(output_dir=work + "/probe")).train()
    probe.push_to_hub({REPO!r}, subfolder="probes/up_ft1")
    ModelCard.load({REPO!r}).validate()

    first.push_to_hub({SINGLE!r})
    first.metrics["note"] = "Another note."
    first.push_to_hub({SINGLE!r})
    seen["pull_request"] = first.push_to_hub({SINGLE!r}, create_pr=True, commit_message="No change")
    with torch.no_grad():
        first.b_dec += 1
    seen["pull_request"] = first.push_to_hub({SINGLE!r}, create_pr=True, commit_message="Shifted")
    first.latents = first.latent_sheet = None
    first.push_to_hub({SINGLE!r}, revision=seen["pull_request"].replace("/discussions/", "/refs/pr/").split("/", 5)[-1])
    second.push_to_hub({SHARDED!r}, max_shard_size=4000)
    second.save_pretrained(
        work + "/saved", push_to_hub=True, repo_id={SHARDED!r}, subfolder="inside", revision="more", max_shard_size=4000
    )
    for name, call in (
        ("outside", lambda: first.push_to_hub({REPO!r}, subfolder="../x")),
        ("two branches", lambda: first.push_to_hub({REPO!r}, create_pr=True, revision="more")),
    ):
        try:
            call()
        except ValueError as error:
            seen[name] = str(error)
    print(json.dumps(seen))
"""
LOAD = f"""
    import json, sys
    from pathlib import Path
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
    from diffusion_sae import *
    from diffusion_sae.hub.listing import list_artifacts

    work, cache, image = sys.argv[1:]
    seen = {{}}

    def same(name, model):
        saved = KSparseAutoencoder.from_pretrained(work + "/" + name)
        return all(torch.equal(saved.state_dict()[key], value) for key, value in model.state_dict().items())

    where = {{"subfolder": "up_ft1/t25", "cache_dir": cache}}
    sae = KSparseAutoencoder.from_pretrained({REPO!r}, **where)
    seen["sae"] = same("up_ft1-25", sae) and sae.latents.source.dataset == "pets" and sae.latent_sheet[-6:] == b"up_ft1"
    seen["in the cache"] = sorted(path.name for path in Path(cache).iterdir() if path.name.startswith("models"))
    seen["extraction"] = [sae.provenance.layers, sae.provenance.timesteps]
    other = AutoModel.from_pretrained({REPO!r}, subfolder="mid/t500", cache_dir=cache)
    seen["auto model"] = same("bottleneck-500", other)
    seen["auto config"] = AutoConfig.from_pretrained({REPO!r}, **where).num_latents
    seen["dtype"] = str(KSparseAutoencoder.from_pretrained({REPO!r}, dtype="bfloat16", **where).dtype)
    seen["device map"] = str(KSparseAutoencoder.from_pretrained({REPO!r}, device_map="cpu", **where).device)
    seen["forced"] = same("up_ft1-25", KSparseAutoencoder.from_pretrained({REPO!r}, force_download=True, **where))
    offline = KSparseAutoencoder.from_pretrained({REPO!r}, local_files_only=True, **where)
    seen["offline"] = offline.latents == sae.latents and offline.provenance == sae.provenance
    try:
        KSparseAutoencoder.from_pretrained({SHARDED!r}, local_files_only=True, cache_dir=cache)
    except OSError as error:
        seen["offline miss"] = str(error)
    for subfolder in ("up_ft1/t25", "mid/t500", "probes/up_ft1"):
        extractor = DiffusionFeatureExtractor.from_pretrained({REPO!r}, subfolder=subfolder)
        (key, features), = extractor(image).items()
        seen["extractor of " + subfolder] = [*key, features.shape[-1]]

    probe = AutoModelForImageClassification.from_pretrained({REPO!r}, subfolder="probes/up_ft1")
    processor = AutoImageProcessor.from_pretrained({REPO!r}, subfolder="probes/up_ft1")
    answer = pipeline("diffusion-probe", model=probe, image_processor=processor)(image)
    seen["probe"] = sorted(entry["label"] for entry in answer)

    shifted = KSparseAutoencoder.from_pretrained({SINGLE!r}, revision="refs/pr/1")
    seen["pull request"] = (shifted.b_dec - KSparseAutoencoder.from_pretrained({SINGLE!r}).b_dec).mean().item()
    seen["shards"] = same("bottleneck-500", KSparseAutoencoder.from_pretrained({SHARDED!r}))
    inside = KSparseAutoencoder.from_pretrained({SHARDED!r}, subfolder="inside", revision="more")
    seen["shards in a branch"] = same("bottleneck-500", inside)

    def listed(**wanted):
        return [artifact.repo_id for artifact in list_artifacts(author="revelio", dataset="owner/pets", **wanted)]

    seen["listed"] = {{
        "all": listed(),
        "up1": listed(layer="up1"),
        "up_ft1 at 500": listed(layer="up_ft1", timestep=500),
        "at 500": listed(timestep=500),
        "tiny": listed(model="tiny"),
        "other": listed(model="sd15"),
        "probes": listed(kind="probe"),
        "first": listed(limit=1),
        "nobody": list_artifacts(author="nobody"),
    }}
    several, single, _ = list_artifacts(author="revelio", dataset="owner/pets")
    seen["fields"] = [several.subfolders, several.name, several.layers, several.timesteps]
    seen["named"] = [single.kind, vars(single.name), single.layers, single.timesteps, single.private]
    for wrong in (dict(kind="model"), dict(layer="upp1")):
        try:
            list_artifacts(**wrong)
        except ValueError as error:
            seen["wrong " + next(iter(wrong))] = str(error)
    print(json.dumps(seen, default=str))
"""


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def uploads(hub: HubServer) -> Counter[str]:
    """How often each file of weights or tables was sent; filled by `pushed`."""
    return Counter()


@pytest.fixture(scope="module")
def pushed(
    hub: HubServer,
    run_client: RunClient,
    work: Path,
    tiny_sd_folder: Path,
    image_folder: Path,
    uploads: Counter[str],
) -> dict[str, Any]:
    before = len(hub.requests)
    seen = answer(run_client(PUSH, token=hub.token, args=(tiny_sd_folder, image_folder, work)))
    uploads.update(path for method, path in hub.requests[before:] if method == "PUT")
    return seen


@pytest.fixture(scope="module")
def loaded(run_client: RunClient, work: Path, image_folder: Path, pushed: dict[str, Any]) -> dict[str, Any]:
    image = sorted(image_folder.rglob("*.*"))[0]
    return answer(run_client(LOAD, args=(work, work / "cache", image)))


def readme(hub: HubServer, files: dict[str, Any], name: str = "README.md") -> str:
    return (hub.folder / files[name]["sha256"]).read_text(encoding="utf-8")


class TestPushing:
    def test_each_subfolder_is_one_commit(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        _, first, second, third = hub.commits(REPO)
        own = {"config.json", "model.safetensors", "README.md", "metrics.json", "extractor_config.json"}
        table = {"latents.parquet", "latents.png"}
        assert set(first.changed) == {f"up_ft1/t25/{name}" for name in own | table} | {"README.md"}
        assert set(second.changed) == {f"mid/t500/{name}" for name in own | table} | {"README.md"}
        assert set(third.changed) == {
            "README.md",
            "probes/up_ft1/preprocessor_config.json",
            *(f"probes/up_ft1/{n}" for n in own),
        }
        assert first.title == "First"
        assert pushed["urls"][1] == pushed["urls"][2]

    def test_the_card_of_all_lists_and_tags_them(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        card = readme(hub, hub.commits(REPO)[-1].files)
        for folder in ("up_ft1/t25", "mid/t500", "probes/up_ft1"):
            assert f"| `{folder}` | [{folder}](./{folder}/README.md) |" in card
        head = card.split("\n---")[0]
        for tag in ("up_ft1", "bottleneck", "timestep-25", "timestep-500", "sparse-autoencoder", "diffusion-probe"):
            assert f"\n- {tag}\n" in head + "\n"
        assert "model-index" not in head
        assert f'from_pretrained("{REPO}", subfolder="up_ft1/t25")' in readme(
            hub, hub.commits(REPO)[-1].files, "up_ft1/t25/README.md"
        )

    def test_what_is_there_is_not_sent_again(
        self, hub: HubServer, pushed: dict[str, Any], uploads: Counter[str]
    ) -> None:
        """Of a changed note the card and the metrics; the weights of one SAE in five places are sent once a content."""
        first, second = [commit for commit in hub.commits(SINGLE) if commit.title == "Upload with diffusion_sae"][:2]
        assert "model.safetensors" in first.changed
        assert set(second.changed) == {"README.md", "metrics.json"}
        assert uploads
        assert set(uploads.values()) == {1}

    def test_a_pull_request(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        """Nothing is opened for no change; a further commit may be added to one."""
        assert pushed["pull_request"] == f"{hub.endpoint}/{SINGLE}/discussions/1"
        repo = hub.repos["model", SINGLE]
        assert set(repo.refs["pr"]) == {"refs/pr/1"}
        main, request = repo.at("main"), repo.at("refs/pr/1")
        assert main.files["model.safetensors"] != request.files["model.safetensors"]
        assert "latents.parquet" in main.files
        assert "latents.parquet" not in request.files

    def test_shards(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        repo = hub.repos["model", SHARDED]
        names = set(repo.at("main").files)
        assert "model.safetensors.index.json" in names
        assert sum(name.startswith("model-0000") for name in names) > 1
        assert {name for name in repo.at("more").files if name.startswith("inside/model-")} == {
            f"inside/{name}" for name in names if name.startswith("model-")
        }

    def test_what_is_refused(self, pushed: dict[str, Any]) -> None:
        assert pushed["outside"].startswith("subfolder must be a path within the repository, such as up_ft1/t25, got")
        assert pushed["two branches"].startswith("A pull request is made to main, got revision='more'")


class TestLoading:
    def test_from_subfolders(self, loaded: dict[str, Any]) -> None:
        assert loaded["sae"] is True
        assert loaded["auto model"] is True
        assert loaded["auto config"] == 48
        assert loaded["extraction"] == [["up_ft1"], [25]]
        assert loaded["in the cache"] == ["models--revelio--tiny-saes"]

    def test_options_of_transformers(self, loaded: dict[str, Any]) -> None:
        assert loaded["dtype"] == "torch.bfloat16"
        assert loaded["device map"] == "cpu"
        assert loaded["forced"] is True
        assert loaded["offline"] is True
        assert SHARDED in loaded["offline miss"]

    def test_the_extractor_of_each(self, loaded: dict[str, Any]) -> None:
        assert loaded["extractor of up_ft1/t25"][:2] == ["up_ft1", 25]
        assert loaded["extractor of mid/t500"][:2] == ["bottleneck", 500]
        assert loaded["extractor of probes/up_ft1"][:2] == ["up_ft1", 25]

    def test_a_probe_of_many_and_its_processor(self, loaded: dict[str, Any]) -> None:
        assert loaded["probe"] == ["bag", "dress", "shoe"]

    def test_shards_branches_and_pull_requests(self, loaded: dict[str, Any]) -> None:
        assert loaded["shards"] is True
        assert loaded["shards in a branch"] is True
        assert loaded["pull request"] == pytest.approx(1.0)


class TestListing:
    def test_by_what_they_are(self, loaded: dict[str, Any]) -> None:
        listed = loaded["listed"]
        assert listed["all"] == [REPO, SINGLE, SHARDED]
        assert listed["up1"] == [REPO, SINGLE]
        assert listed["up_ft1 at 500"] == [REPO]  # it has both, of different artifacts
        assert listed["at 500"] == [REPO, SHARDED]
        assert listed["tiny"] == [SINGLE]
        assert listed["probes"] == [REPO]
        assert listed["first"] == [REPO]
        assert listed["other"] == listed["nobody"] == []

    def test_fields(self, loaded: dict[str, Any]) -> None:
        folders, name, layers, timesteps = loaded["fields"]
        assert folders == ["mid/t500", "probes/up_ft1", "up_ft1/t25"]
        assert name is None
        assert (sorted(layers), sorted(timesteps)) == (["bottleneck", "up_ft1"], [25, 500])
        parsed = {"model": "tiny", "layer": "bottleneck", "timestep": 25, "dataset": "pets"}
        assert loaded["named"] == ["sae", parsed, ["up_ft1"], [25], False]  # the tags say what it is, not the name

    def test_what_there_is_not(self, loaded: dict[str, Any]) -> None:
        assert loaded["wrong kind"].startswith("kind must be one of None, 'sae', 'probe', 'extractor', got 'model'")
        assert loaded["wrong layer"].startswith("'upp1' has no short form")
