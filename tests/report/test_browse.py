"""`diffusion-sae browse`: what it serves, what it refuses, and the page with live actions on the embedded model."""

import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import Browser
from synthetic_report import Made, Visit
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

from diffusion_sae import DiffusionFeatureExtractor, KSparseAutoencoder
from diffusion_sae.analysis.latent_table import latent_table
from diffusion_sae.analysis.latents import latent_statistics
from diffusion_sae.extraction.sources import ImageSource, open_images
from diffusion_sae.report.browse import ReportServer
from diffusion_sae.report.build import files_of
from diffusion_sae.report.latents import PURITY_OF
from diffusion_sae.report.sae import Trained, Vocabulary, report_saes

NAME = "tiny-sd-up1-t50"
IMAGES = 40


@pytest.fixture(scope="module")
def source() -> ImageSource:
    return open_images("fashion-mnist-mini", "test").first(IMAGES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The embedded SAE, kept in a folder with its table of latents."""
    folder = tmp_path_factory.mktemp("browse")
    extractor = DiffusionFeatureExtractor.from_pretrained(NAME)
    store = extractor.extract("fashion-mnist-mini", folder / "store", split="test", limit=IMAGES)
    sae = KSparseAutoencoder.from_pretrained(NAME)
    features = store.select("up_ft1", 50)
    sae.latents = latent_table(sae, features)
    sae.save_pretrained(folder / "sae")
    return Trained("embedded", sae, features, folder / "encoded", str(folder / "sae"))


@contextmanager
def serving(folder: Path) -> Iterator[ReportServer]:
    with ReportServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def served(trained: Trained, source: ImageSource, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReportServer]:
    report = tmp_path_factory.mktemp("report")
    report_saes(report, "Embedded", [trained], source)
    with serving(report) as server:
        yield server


def ask(
    server: ReportServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    if body is not None and "Content-Length" not in headers:
        headers["Content-Length"] = str(len(body))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    answer = connection.getresponse()
    result = answer.status, answer.read(), dict(answer.getheaders())
    connection.close()
    return result


def act(server: ReportServer, method: str, path: str, content: Any = None) -> tuple[int, Any]:
    body = content if isinstance(content, bytes | None) else json.dumps(content).encode()
    status, answer, _ = ask(server, method, path, body, X_Diffusion_Sae=server.token)
    return status, json.loads(answer)


def test_only_the_reports_own_files_are_served(served: ReportServer) -> None:
    status, page, headers = ask(served, "GET", "/")
    assert status == 200
    assert served.token in page.decode()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    files = next(iter(served.files)).split("/")[1]
    assert ask(served, "GET", f"/{files}/browser.js")[2]["Content-Type"] in (
        "text/javascript",
        "application/javascript",
    )
    for path in (
        f"/{files}/browse.json",
        f"/{files}/../../sae/config.json",
        f"/{files}/%2e%2e/%2e%2e/sae/config.json",
        "/../sae/config.json",
        "//etc/passwd",
        "/etc/passwd",
        f"/{files}/data/",
        "/\x00".replace("\x00", "%00"),
    ):
        assert ask(served, "GET", path)[0] == 404, path


def test_other_sites_and_pages_are_refused(served: ReportServer) -> None:
    for method, path in (("GET", "/"), ("POST", "/api/names/sae0")):
        assert ask(served, method, path, b"{}", Host="evil.test", X_Diffusion_Sae=served.token)[0] == 403
        foreign = ask(served, method, path, b"{}", Origin="http://evil.test", X_Diffusion_Sae=served.token)
        assert foreign[0] == 403
    status, answer, _ = ask(served, "POST", "/api/names/sae0", b"{}")
    assert (status, json.loads(answer)["error"]) == (403, "Only the report's own page may ask for this. Load it again.")
    assert ask(served, "GET", "/api/names/sae0", X_Diffusion_Sae="wrong")[0] == 403


def test_bad_requests_say_why(served: ReportServer) -> None:
    for path, content, message in (
        ("names/sae0", {"99999999": "x"}, "no latent '99999999'"),
        ("names/sae0", {"1": 5}, "no latent '1' to name with a text"),
        ("names/sae0", [1], "must be a JSON object"),
        ("names/sae0", b"{", "is no JSON"),
        ("encode/sae0", b"not an image", "Cannot read the image 'the dropped image'"),
        ("search/sae0", {"text": "x"}, "without a model of texts and images"),
    ):
        status, answer = act(served, "POST", f"/api/{path}", content)
        assert status == 400
        assert message in answer["error"]
    assert act(served, "POST", "/api/names/sae7", {})[0] == 404
    assert act(served, "POST", "/api/nothing/sae0", {})[0] == 404
    headers = {"X_Diffusion_Sae": served.token, "Content-Length": str(2**40)}
    status, answer, _ = ask(served, "POST", "/api/names/sae0", b"{}", **headers)
    assert status == 400
    assert "may have 1,048,576 bytes" in json.loads(answer)["error"]


def test_an_image_is_encoded_as_by_hand(served: ReportServer, tmp_path: Path) -> None:
    image = open_images("fashion-mnist-mini", "test").read(3)
    image.save(tmp_path / "shoe.png")
    status, answer = act(served, "POST", "/api/encode/sae0", (tmp_path / "shoe.png").read_bytes())
    assert status == 200
    extractor, sae = DiffusionFeatureExtractor.from_pretrained(NAME), KSparseAutoencoder.from_pretrained(NAME)
    with torch.no_grad():
        acts = (
            sae.encode(extractor(image)["up_ft1", 50][0]).to_dense(sae.config.num_latents).numpy()
        )  # (T, num_latents)
    assert answer["grid"] == [4, 4]
    expected = np.sort(acts.max(0))[::-1]
    assert [one["activation"] for one in answer["latents"]] == pytest.approx(
        expected[: len(answer["latents"])].tolist()
    )
    for one in answer["latents"]:
        own = acts[:, one["latent"]]
        assert one["map"] == np.ceil(255 * (own / own.max())).astype(int).tolist()


def test_names_travel_with_the_sae(served: ReportServer) -> None:
    path = served.saes["sae0"].record["path"]
    assert act(served, "POST", "/api/names/sae0", {"5": " round handles ", "6": "x"}) == (
        200,
        {"saved": "with the SAE"},
    )
    assert act(served, "POST", "/api/names/sae0", {"6": ""})[0] == 200
    assert act(served, "GET", "/api/names/sae0")[1] == {"5": "round handles"}
    latents = KSparseAutoencoder.from_pretrained(path).latents
    assert latents is not None
    assert latents[5].name == "round handles"
    assert latents[6].name is None


def test_without_a_table_names_are_kept_with_the_report(made: Made, tmp_path: Path) -> None:
    report = shutil.copytree(made.folder, tmp_path / "report")
    with ReportServer(report) as server:
        live = server.saes["sae0"]
        assert live.names() == {}
        assert live.save_names({"3": "a", "4": "b"}) == "with the report"
        assert live.save_names({"4": ""}) == "with the report"
        assert live.names() == {"3": "a"}
        assert json.loads((report / "names.json").read_text()) == {live.record["weights"]: {"3": "a"}}
        assert live.abilities == {"encode": False, "text": False}
        with pytest.raises(ValueError, match="does not say which extraction"):
            live.encode(b"")


def test_another_sae_in_its_place_is_refused(made: Made, tmp_path: Path) -> None:
    report = shutil.copytree(made.folder, tmp_path / "report")
    record = files_of(report) / "browse.json"
    content = json.loads(record.read_text())
    content["saes"]["sae0"]["weights"] = "other"
    record.write_text(json.dumps(content))
    with ReportServer(report) as server, pytest.raises(ValueError, match="has other weights now"):
        _ = server.saes["sae0"].sae
    content["saes"]["sae0"]["path"] = None
    record.write_text(json.dumps(content))
    with ReportServer(report) as server, pytest.raises(ValueError, match="does not say where its SAE is kept"):
        _ = server.saes["sae0"].sae


@pytest.mark.slow
def test_the_page_with_live_actions(served: ReportServer, browser: Browser, tmp_path: Path) -> None:
    visit = Visit(browser, served.url)
    page = visit.open("#/try")
    Image.new("RGB", (60, 40), "white").save(tmp_path / "own.png")
    page.get_by_label("Drop an image here").set_input_files(tmp_path / "own.png")
    page.wait_for_selector(".tiles canvas[data-drawn=heat]", timeout=60_000)
    assert page.locator(".tiles > li").count() > 3
    latent = int(page.locator(".tiles .act").first.inner_text().split()[0])
    page.evaluate(DROP)  # as a person drops a file
    page.wait_for_selector("text=This file is no image")
    page = visit.open(f"#/latents/{latent}")
    page.get_by_role("textbox", name="Name", exact=True).fill("kept by the server")
    page.get_by_role("button", name="Save name").click()
    page.wait_for_selector("text=Saved with the SAE.")
    page.evaluate("localStorage.clear()")
    page.reload()
    page.wait_for_selector("h1:has-text('kept by the server')")
    visit.close()


TEXT = "red bag"


def test_latents_are_found_by_a_text(
    trained: Trained, source: ImageSource, clip_folder: Path, browser: Browser, tmp_path: Path
) -> None:
    """The order is that of CLIPModel's own cosines, averaged over a latent's top images by their activations."""
    words = ("shoe", "bag", "a red thing")
    (tmp_path / "words.txt").write_text("\n".join(words))
    vocabulary = Vocabulary.embed(str(clip_folder), tmp_path / "words.txt", source)
    report_saes(tmp_path / "report", "Embedded", [trained], source, vocabulary)
    sae, features = trained.sae, trained.features
    statistics = latent_statistics(sae, features, PURITY_OF)
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    processor = AutoImageProcessor.from_pretrained(clip_folder, backend="pil")
    pixels = processor([source.read(i) for i in range(IMAGES)], return_tensors="pt")["pixel_values"]
    text = AutoTokenizer.from_pretrained(clip_folder)([TEXT], return_tensors="pt")
    with torch.no_grad():
        cosines = (clip(pixel_values=pixels, **text).logits_per_image / clip.logit_scale.exp())[:, 0].double()
    weights = statistics.top_acts.double()
    expected = ((cosines - cosines.mean())[statistics.top_images] * weights).sum(1) / weights.sum(1)
    best = expected.nan_to_num(-1).topk(5)  # of latents that fire in the same image alone, the scores are equal
    with serving(tmp_path / "report") as server:
        assert act(server, "GET", "/api/abilities/sae0") == (200, {"encode": True, "text": True})
        status, answer = act(server, "POST", "/api/search/sae0", {"text": TEXT})
        assert status == 200
        found = answer["latents"]
        assert [one["score"] for one in found[:5]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [one["score"] for one in found] == pytest.approx(
            [expected[one["latent"]].item() for one in found], abs=1e-5
        )
        visit = Visit(browser, server.url)
        page = visit.open()
        page.get_by_role("searchbox", name="Latents by a description").fill(TEXT)
        page.get_by_role("button", name="Search").click()
        page.wait_for_selector(".found li")
        first, latent = page.locator(".found li").first, found[0]["latent"]
        assert first.inner_text().split()[0] == str(latent)
        assert any(word in first.inner_text() for word in words)
        first.get_by_role("link").click()
        page.wait_for_selector(f"h1:has-text('latent {latent}')")
        visit.close()


DROP = """() => {
  const files = new DataTransfer();
  files.items.add(new File(["no image"], "a.png", { type: "image/png" }));
  document.querySelector(".drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
}"""


def test_the_command_serves_until_it_is_stopped(made: Made) -> None:
    command = [sys.executable, "-m", "diffusion_sae", "browse", str(made.folder), "--json"]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    assert process.stderr
    url = process.stderr.readline().split()[0]
    connection = http.client.HTTPConnection(url.removeprefix("http://").rstrip("/"), timeout=30)
    connection.request("GET", "/")
    assert b"diffusion-sae-browse" in connection.getresponse().read()
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert json.loads(out) == {"url": url}


def test_no_report_no_server(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no report"):
        ReportServer(tmp_path)
