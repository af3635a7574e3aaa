"""Sharing over a real Hub protocol: pushed by one process, loaded by another that has only the name.

Each process takes seconds to start, so each does much: one pushes, one loads without an account, one is offline.
"""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from hub_server import Handler, HubError, HubServer

RunClient = Callable[..., subprocess.CompletedProcess[str]]
SAE, PROBE, EXTRACTOR = "revelio/sd15-up1-t25", "revelio/sd15-up1-t25-classes", "revelio/sd15-extractor"
BASE, PRIVATE_BASE = "revelio/tiny-sd-test", "revelio/private-tiny-sd-test"
PRIVATE_SAE, PRIVATE_PROBE = "revelio/private-sae", "revelio/private-probe"
FAILING = "revelio/failing-sae"  # of its extractor_config.json a proxy says 403 (503 the client tries again for long)
ARTIFACT = {"config.json", "model.safetensors", "README.md", "metrics.json", "extractor_config.json"}

NAMES = f"""
    import dataclasses, json, sys
    import torch
    from safetensors.torch import load_file, save_file
    SAE, PROBE, EXTRACTOR = {SAE!r}, {PROBE!r}, {EXTRACTOR!r}
    BASE, PRIVATE_BASE = {BASE!r}, {PRIVATE_BASE!r}
    PRIVATE_SAE, PRIVATE_PROBE = {PRIVATE_SAE!r}, {PRIVATE_PROBE!r}
    FAILING = {FAILING!r}
    seen = {{}}

    def report():
        print(json.dumps(seen))

    def attempt(name, call, *args, **kwargs):
        try:
            seen[name] = str(call(*args, **kwargs))
        except Exception as error:
            seen[name] = [[base.__name__ for base in type(error).__mro__], str(error)]
"""
PUSH = (
    NAMES
    + """
    from huggingface_hub import HfApi, ModelCard
    from diffusion_sae import *

    base_folder, image_folder, work = sys.argv[1:]
    api = HfApi()
    for name, private in ((BASE, False), (PRIVATE_BASE, True)):
        api.create_repo(name, private=private)
        api.upload_folder(repo_id=name, folder_path=base_folder)
    extractor = DiffusionFeatureExtractor.from_pretrained(BASE, layers=["up_ft1"], timesteps=[25], seed=5)
    features = extractor.extract(image_folder, work + "/features", progress=False).select("up_ft1", 25)
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=features.d_in, num_latents=48, k=4))
    args = SAETrainingArguments(output_dir=work + "/sae", max_steps=5, batch_size=4)
    SAETrainer(sae, features, args).train(progress=False)
    names = dict(enumerate(features.class_names))
    probe = DiffusionProbe(DiffusionProbeConfig(d_in=features.d_in, id2label=names))
    ProbeTrainer(probe, features, ProbeTrainingArguments(output_dir=work + "/probe")).train(progress=False)

    seen["url"] = sae.push_to_hub(SAE)
    seen["probe_url"] = probe.push_to_hub(PROBE, commit_message="My probe")
    extractor.push_to_hub(EXTRACTOR)
    seen["sae_again"] = sae.push_to_hub(SAE)
    seen["probe_again"] = probe.push_to_hub(PROBE)

    reference = {f"sae.{name}": value for name, value in sae.state_dict().items()}
    reference |= {f"probe.{name}": value for name, value in probe.state_dict().items()}
    output = sae(features.to_tensor())
    reference |= {f"output.{name}": value.detach() for name, value in output.items()}
    reference |= {"features": features.to_tensor(), "logits": probe.predict(features)}
    save_file({name: value.contiguous() for name, value in reference.items()}, work + "/reference.safetensors")
    seen["metrics"] = {"sae": sae.metrics, "probe": probe.metrics}
    seen["fingerprint"] = sae.provenance.fingerprint

    for name in (SAE, PROBE, EXTRACTOR):
        ModelCard.load(name).validate()
    sae.push_to_hub(PRIVATE_SAE, private=True)
    sae.push_to_hub(FAILING)
    probe.provenance = dataclasses.replace(probe.provenance, model=PRIVATE_BASE)
    probe.push_to_hub(PRIVATE_PROBE, private=True)
    with torch.no_grad():
        sae.b_dec += 1
    sae.push_to_hub(SAE, revision="shifted")
    sae.save_pretrained(work + "/saved", push_to_hub=True, repo_id="revelio/saved-and-pushed", commit_message="Saved")
    sae.metrics = {}
    sae.push_to_hub("revelio/saved-and-pushed")
    attempt("foreign_owner", sae.push_to_hub, "someone-else/sae")
    report()
"""
)
LOAD = (
    NAMES
    + """
    from pathlib import Path
    from huggingface_hub import ModelCard
    from transformers import AutoModel, pipeline
    from diffusion_sae import *

    work, image_folder, token = sys.argv[1:]
    reference = load_file(work + "/reference.safetensors")
    images = sorted(map(str, Path(image_folder).rglob("*.*")))

    def same_weights(model, prefix):
        state = model.state_dict()
        return all(torch.equal(reference[f"{prefix}.{name}"], value) for name, value in state.items())

    sae = KSparseAutoencoder.from_pretrained(SAE)
    output = sae(reference["features"])
    seen["sae_weights"] = same_weights(sae, "sae")
    seen["sae_outputs"] = all(torch.equal(reference[f"output.{name}"], value) for name, value in output.items())
    seen["fingerprint"] = sae.provenance.fingerprint
    seen["metrics"] = sae.metrics
    seen["auto_model"] = type(AutoModel.from_pretrained(SAE)).__name__
    probe = DiffusionProbe.from_pretrained(PROBE)
    seen["probe_weights"] = same_weights(probe, "probe")
    seen["probe_logits"] = torch.equal(probe.predict(reference["features"]), reference["logits"])

    for name in (EXTRACTOR, SAE, PROBE):  # an artifact stands for the extraction it was made for
        extractor = DiffusionFeatureExtractor.from_pretrained(name)
        error = (extractor(images)["up_ft1", 25] - reference["features"]).abs().max().item()
        seen[f"extractor of {name}"] = [error, extractor.provenance.fingerprint]

    probabilities = reference["logits"].softmax(1)
    def off(classify):
        answers = [{entry["label"]: entry["score"] for entry in answer} for answer in classify(images)]
        labels = probe.config.id2label
        return max(abs(a[labels[c]] - p[c].item()) for a, p in zip(answers, probabilities) for c in labels)

    seen["pipeline"] = off(pipeline("diffusion-probe", model=PROBE))
    seen["image-classification"] = off(pipeline("image-classification", model=PROBE))

    shifted = KSparseAutoencoder.from_pretrained(SAE, revision="shifted")
    seen["revision"] = torch.equal(shifted.b_dec, reference["sae.b_dec"] + 1)
    attempt("private_without_token", KSparseAutoencoder.from_pretrained, PRIVATE_SAE)
    attempt("private_extractor_without_token", DiffusionFeatureExtractor.from_pretrained, PRIVATE_SAE)
    attempt("private_with_bad_token", KSparseAutoencoder.from_pretrained, PRIVATE_SAE, token="hf_wrong")
    seen["private_with_token"] = same_weights(KSparseAutoencoder.from_pretrained(PRIVATE_SAE, token=token), "sae")
    seen["private_pipeline_with_token"] = off(pipeline("diffusion-probe", model=PRIVATE_PROBE, token=token))
    attempt("failing", KSparseAutoencoder.from_pretrained, FAILING)
    attempt("missing_repo", KSparseAutoencoder.from_pretrained, "revelio/no-such-sae")
    attempt("missing_revision", KSparseAutoencoder.from_pretrained, SAE, revision="no-such-branch")
    attempt("a_pipeline_is_no_sae", KSparseAutoencoder.from_pretrained, BASE)
    attempt("a_probe_is_no_sae", KSparseAutoencoder.from_pretrained, PROBE)
    for name in (SAE, PROBE, EXTRACTOR):
        seen[f"card of {name}"] = ModelCard.load(name).data.to_dict()
    report()
"""
)
OFFLINE = (
    NAMES
    + """
    from transformers import pipeline
    from diffusion_sae import *

    work, image = sys.argv[1:]
    reference = load_file(work + "/reference.safetensors")
    sae = KSparseAutoencoder.from_pretrained(SAE)
    seen["sae"] = all(torch.equal(reference[f"sae.{name}"], value) for name, value in sae.state_dict().items())
    seen["provenance"] = sae.provenance.fingerprint
    seen["metrics"] = sae.metrics
    seen["revision"] = (KSparseAutoencoder.from_pretrained(SAE, revision="shifted").b_dec - sae.b_dec).mean().item()
    seen["extractor"] = DiffusionFeatureExtractor.from_pretrained(SAE).provenance.fingerprint
    seen["answer"] = pipeline("diffusion-probe", model=PROBE)(image)
    attempt("miss", KSparseAutoencoder.from_pretrained, "revelio/saved-and-pushed")
    attempt("miss of an extractor", DiffusionFeatureExtractor.from_pretrained, "revelio/saved-and-pushed")
    report()
"""
)


def answer(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharing")


@pytest.fixture(scope="module")
def pushed(
    hub: HubServer, run_client: RunClient, work: Path, tiny_sd_folder: Path, image_folder: Path
) -> dict[str, Any]:
    return answer(run_client(PUSH, token=hub.token, args=(tiny_sd_folder, image_folder, work)))


@pytest.fixture(scope="module")
def loaded(
    hub: HubServer, run_client: RunClient, work: Path, image_folder: Path, pushed: dict[str, Any]
) -> dict[str, Any]:
    resolve = Handler.resolve

    def fail(handler: Handler, repo: Any, revision: str, path: str) -> None:
        if (repo.id, path) == (FAILING, "extractor_config.json"):
            raise HubError(403, {"X-Error-Message": "Not through this proxy"})
        resolve(handler, repo, revision, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "resolve", fail)
        return answer(run_client(LOAD, cache=work / "cache", args=(work, image_folder, hub.token)))


@pytest.fixture(scope="module")
def offline(
    run_client: RunClient, hub: HubServer, work: Path, image_folder: Path, loaded: dict[str, Any]
) -> dict[str, Any]:
    asked = len(hub.requests)
    image = sorted(image_folder.rglob("*.*"))[0]
    seen = answer(run_client(OFFLINE, cache=work / "cache", offline=True, args=(work, image)))
    return seen | {"requests": len(hub.requests) - asked}


class TestPushing:
    @pytest.mark.parametrize(
        ("repo_id", "files", "title"),
        [
            (SAE, ARTIFACT, "Upload with diffusion_sae"),
            (PROBE, ARTIFACT | {"preprocessor_config.json"}, "My probe"),
            (EXTRACTOR, {"extractor_config.json", "README.md"}, "Upload with diffusion_sae"),
            (PRIVATE_SAE, ARTIFACT, "Upload with diffusion_sae"),
        ],
    )
    def test_a_push_is_one_commit_with_everything(
        self, repo_id: str, files: set[str], title: str, hub: HubServer, pushed: dict[str, Any]
    ) -> None:
        """The first commit is the Hub's own, of create_repo. The SAE has one more, on another branch."""
        first, commit = hub.commits(repo_id)[:2]
        assert set(first.files) == {".gitattributes"}
        assert set(commit.changed) == files
        assert commit.title == title
        assert ("model.safetensors" in files) == ("lfs" in commit.files.get("model.safetensors", {}))

    def test_it_returns_the_address_of_the_commit(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        assert pushed["url"] == f"{hub.endpoint}/{SAE}/commit/{hub.commits(SAE)[1].oid}"
        assert pushed["probe_url"] == f"{hub.endpoint}/{PROBE}/commit/{hub.commits(PROBE)[1].oid}"

    def test_pushing_again_what_is_there_changes_nothing(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        assert len(hub.commits(PROBE)) == 2
        assert len(hub.commits(SAE)) == 3
        assert hub.commits(SAE)[2].oid == hub.repos["model", SAE].refs["branch"]["shifted"]
        assert hub.commits(SAE)[1].oid == hub.repos["model", SAE].refs["branch"]["main"]
        assert pushed["sae_again"] == pushed["url"]
        assert pushed["probe_again"] == pushed["probe_url"]

    def test_what_is_private_is_private(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        # models alone: other tests push data sets to the same server
        private = {repo_id for (kind, repo_id), repo in hub.repos.items() if repo.private and kind == "model"}
        assert private == {PRIVATE_SAE, PRIVATE_PROBE, PRIVATE_BASE}

    def test_save_pretrained_can_push_and_records_that_went_are_deleted(
        self, hub: HubServer, pushed: dict[str, Any], work: Path
    ) -> None:
        _, first, second = hub.commits("revelio/saved-and-pushed")
        assert first.title == "Saved"
        assert set(first.changed) == ARTIFACT
        assert {path.name for path in (work / "saved").iterdir()} == ARTIFACT
        assert second.changed["metrics.json"] is None
        assert set(second.files) == ARTIFACT - {"metrics.json"} | {".gitattributes"}

    def test_to_an_owner_without_rights(self, pushed: dict[str, Any]) -> None:
        kinds, message = pushed["foreign_owner"]
        assert "HfHubHTTPError" in kinds
        assert "You don't have the rights to create a model under someone-else" in message


class TestLoading:
    def test_the_same_tensors_and_outputs(self, loaded: dict[str, Any]) -> None:
        for what in ("sae_weights", "sae_outputs", "probe_weights", "probe_logits"):
            assert loaded[what] is True, what

    def test_the_records_come_along(self, loaded: dict[str, Any], pushed: dict[str, Any]) -> None:
        assert loaded["fingerprint"] == pushed["fingerprint"]
        assert loaded["metrics"] == pushed["metrics"]["sae"]
        assert loaded["metrics"]["held_out"]["rows"] == 2

    def test_by_auto_model(self, loaded: dict[str, Any]) -> None:
        assert loaded["auto_model"] == "KSparseAutoencoder"

    @pytest.mark.parametrize("name", [EXTRACTOR, SAE, PROBE])
    def test_the_extractor_it_was_made_with(self, name: str, loaded: dict[str, Any]) -> None:
        error, fingerprint = loaded[f"extractor of {name}"]
        assert error < 1e-5
        assert fingerprint == loaded["fingerprint"]

    @pytest.mark.parametrize("how", ["pipeline", "image-classification"])
    def test_the_pipeline_by_name(self, how: str, loaded: dict[str, Any]) -> None:
        assert loaded[how] < 1e-4  # of features that agree to 1e-5

    def test_a_revision(self, loaded: dict[str, Any]) -> None:
        assert loaded["revision"] is True

    def test_private_ones_with_a_token(self, loaded: dict[str, Any]) -> None:
        """Of the pipeline the base model is private too: it is loaded later, with the same token."""
        assert loaded["private_with_token"] is True
        assert loaded["private_pipeline_with_token"] < 1e-4

    @pytest.mark.parametrize(
        ("what", "messages"),
        [
            ("private_without_token", [PRIVATE_SAE, "is not a valid model identifier", "private repository"]),
            ("private_extractor_without_token", [PRIVATE_SAE]),
            ("private_with_bad_token", [PRIVATE_SAE]),
            ("missing_repo", ["revelio/no-such-sae is not a local folder and is not a valid model identifier"]),
            ("missing_revision", ["no-such-branch is not a valid git identifier", SAE]),
        ],
    )
    def test_what_cannot_be_read_is_named(self, what: str, messages: list[str], loaded: dict[str, Any]) -> None:
        kinds, text = loaded[what]
        assert "OSError" in kinds
        for message in messages:
            assert message in text

    def test_a_record_that_cannot_be_read_is_not_taken_for_missing(self, loaded: dict[str, Any]) -> None:
        """Without its extraction an SAE would take any features."""
        kinds, text = loaded["failing"]
        assert "OSError" in kinds
        assert f"The Hub does not answer whether '{FAILING}' has extractor_config.json" in text
        assert "403" in text

    def test_what_is_no_sae_is_refused(self, loaded: dict[str, Any]) -> None:
        assert "ValueError" in loaded["a_pipeline_is_no_sae"][0]
        assert "There is no config.json" in loaded["a_pipeline_is_no_sae"][1]
        assert "'diffusion-probe', not 'k-sparse-autoencoder'" in loaded["a_probe_is_no_sae"][1]


class TestCards:
    def test_data(self, loaded: dict[str, Any], pushed: dict[str, Any]) -> None:
        """That the Hub accepts them was checked when they were pushed, which would have failed."""
        for name, pipeline_tag, tags in (
            (SAE, "image-feature-extraction", ["sparse-autoencoder", "interpretability"]),
            (PROBE, "image-classification", ["diffusion-probe"]),
            (EXTRACTOR, "image-feature-extraction", ["feature-extraction"]),
        ):
            data = loaded[f"card of {name}"]
            assert data["library_name"] == "diffusion_sae"
            assert data["license"] == "apache-2.0"
            assert data["base_model"] == BASE
            assert data["pipeline_tag"] == pipeline_tag
            assert data["tags"] == ["diffusion_sae", *tags, "up_ft1", "timestep-25"]

    def test_the_hub_was_asked_to_validate_them(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        assert ("POST", "/api/validate-yaml") in hub.requests

    def test_text(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        readme = hub.commits(SAE)[1].files["README.md"]
        text = (hub.folder / readme["sha256"]).read_text(encoding="utf-8")
        assert f'KSparseAutoencoder.from_pretrained("{SAE}")' in text
        assert f"| held_out.fvu | {pushed['metrics']['sae']['held_out']['fvu']:.4g} |" in text
        assert f"| fingerprint | `{pushed['fingerprint']}` |" in text


class TestOffline:
    def test_from_the_cache(self, offline: dict[str, Any], pushed: dict[str, Any]) -> None:
        assert offline["sae"] is True
        assert offline["provenance"] == offline["extractor"] == pushed["fingerprint"]
        assert offline["metrics"] == pushed["metrics"]["sae"]
        assert offline["revision"] == pytest.approx(1.0)
        assert {entry["label"] for entry in offline["answer"]} == {"bag", "dress", "shoe"}

    def test_a_miss_says_so(self, offline: dict[str, Any]) -> None:
        for what in ("miss", "miss of an extractor"):
            kinds, message = offline[what]
            assert "OSError" in kinds
            assert "revelio/saved-and-pushed" in message
        assert "couldn't find them in the cached files" in offline["miss"][1]

    def test_nothing_was_asked_of_the_hub(self, offline: dict[str, Any]) -> None:
        assert offline["requests"] == 0


PUSH_LARGE = """
    import hashlib, json, sys
    from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=1280))
    sae.push_to_hub(sys.argv[1])
    values = {n: p.detach().contiguous().numpy() for n, p in sae.named_parameters()}
    print(json.dumps({n: hashlib.sha256(value).hexdigest() for n, value in values.items()}))
"""
LOAD_LARGE = """
    import hashlib, json, sys, torch
    from diffusion_sae import KSparseAutoencoder
    sae = KSparseAutoencoder.from_pretrained(sys.argv[1])
    code = sae.encode(torch.ones(1, 1280))
    assert code.top_indices.shape == (1, 32)
    values = {n: p.detach().contiguous().numpy() for n, p in sae.named_parameters()}
    print(json.dumps({n: hashlib.sha256(value).hexdigest() for n, value in values.items()}))
"""


@pytest.mark.slow
def test_an_sae_of_the_papers_size(
    hub: HubServer, run_client: RunClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d_in 1280, 81,920 latents, 840 MB. It is on the disk up to three times: written, on the Hub, in the cache."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    name, cache = "revelio/sd15-mid-t25", tmp_path / "cache"
    stored = None
    try:
        expected = answer(run_client(PUSH_LARGE, token=hub.token, args=(name,)))
        assert set(expected) == {"W_enc", "b_enc", "W_dec", "b_dec"}
        _, commit = hub.commits(name)
        weights = commit.files["model.safetensors"]
        stored = hub.folder / weights["sha256"]
        assert weights["size"] > 4 * 2 * 1280 * 81_920
        assert not list(tmp_path.glob("tmp*")), "the pushed files were left behind"
        assert answer(run_client(LOAD_LARGE, cache=cache, args=(name,))) == expected
    finally:
        shutil.rmtree(cache, ignore_errors=True)
        if stored is not None:
            stored.unlink()


def test_images_are_distinct(images: list[Image.Image]) -> None:
    """What the comparisons above stand on."""
    assert len({image.tobytes() for image in images}) == len(images) == 12
