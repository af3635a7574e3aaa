"""The page, read back as a browser reads it: its text, its numbers, its links, and its layout in a real Chromium."""

import base64
import hashlib
import http.server
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from diffusion_sae.report import page
from diffusion_sae.report.page import (
    Baseline,
    Example,
    Figure,
    LatentPanel,
    LayerGrid,
    PageData,
    Prediction,
    render_page,
    write_page,
)

SECTIONS = ("figures", "latents", "grid", "baselines", "predictions", "provenance")
HOSTILE = {
    "script": "<script>window.pwned = parent.pwned = 1</script>",
    "quotes": '" onmouseover="window.pwned=1" x=\' onload=\'1',
    "close": "</script></style></title><img src=http://evil.test/a.png>",
    "template": "{{ 7 * 7 }}{% raw %}{# #}",
    "emoji": "👟🧥👩‍👩‍👧‍👦 é",
    "right-to-left": "حذاء رياضي \u202e evil",
    "one long word": "W" * 10_000,
    "many words": "word " * 2_000,
    "entity": "&lt;b&gt; &amp;amp; &#0;",
    "braces": "--x:red}body{display:none",
}
VOID = {"meta", "link", "img", "path", "br"}


class Parsed(HTMLParser):
    """Elements as (tag, attributes, text inside), in the order they open; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[dict] = []
        self.open: list[dict] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {[element['tag'] for element in self.open]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"attribute given twice in {tag}: {names}"
        element = {"tag": tag, "text": "", "inside": [outer["attrs"].get("id") for outer in self.open], **dict(attrs)}
        element["attrs"] = dict(attrs)
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def all(self, tag=None, cls=None, inside=None):
        return [
            element
            for element in self.elements
            if (tag is None or element["tag"] == tag)
            and (cls is None or cls in (element["attrs"].get("class") or "").split())
            and (inside is None or inside in element["inside"])
        ]

    def texts(self, *args, **kwargs):
        return [" ".join(element["text"].split()) for element in self.all(*args, **kwargs)]


def image(size=(28, 28), colour=128, mode="L"):
    return Image.new(mode, size, colour)


def latent(index=7, name="Sandal", labels=("Sandal", "Sandal", "Sneaker", "Sandal"), **changes):
    examples = [Example(image(colour=40 * i), label, 9.25 - i, f"test/{i:05d}.png") for i, label in enumerate(labels)]
    values = {"purity": 0.75, "density": 0.0123, "max_activation": 9.25, "examples": examples, **changes}
    return LatentPanel(index, name, **values)


GRID = LayerGrid(
    layers=["down_ft0", "bottleneck", "up_ft1"],
    timesteps=[10, 100, 500],
    accuracy=[[0.712, 0.721, 0.51], [0.812, 0.83, None], [0.79, 0.801, 0.62]],
    chosen=("bottleneck", 100),
    baseline=0.741,
    caption="Validation accuracy, one linear probe a cell.",
)
DATA = PageData(
    title="What tiny-sd knows about Fashion-MNIST",
    subtitle="Features of the bottleneck at timestep 100",
    figures=[Figure("FVU", "0.083", "fraction of variance unexplained, held-out rows"), Figure("L0", "32")],
    baselines=[
        Baseline("Diff-C probe", 0.8512, 0.0042, "3 seeds", highlight=True),
        Baseline("Raw pixels, logistic regression", 0.741, None, "same images"),
        Baseline("Untrained model", 0.99, 0.05),
    ],
    grid=GRID,
    latents=[latent(), latent(1999, "Ankle boot", ("Ankle boot",) * 8, purity=1.0)],
    shuffled_purity=0.23,
    predictions=[
        Prediction(image(), "Coat", [("Coat", 0.913), ("Shirt", 0.05), ("Pullover", 0.03), ("Dress", 0.007)]),
        Prediction(image((512, 300), (200, 30, 30), "RGB"), "Shirt", [("Coat", 0.6), ("Shirt", 0.4)]),
        Prediction(image(), "", [("Bag", 1.0)]),
    ],
    provenance={"base model": "tiny-sd", "fingerprint": "3b1f09c2aa77e1d0"},
    commands=["diffusion-sae train --k 32", 'diffusion-sae report "runs/sae"'],
)
EMPTY = PageData("Empty", "", [], [], None, [], None, [], {}, [])


def hostile(text: str) -> PageData:
    examples = [Example(image((300, 200), 90), text, 0.00123, text)] * 3
    return PageData(
        title=text,
        subtitle=text,
        figures=[Figure(text, text, text)],
        baselines=[Baseline(text, 0.5, 0.3, text), Baseline(text, 0.1, 0.3, text)],
        grid=LayerGrid([text, "x"], [*range(20)], [[i / 20 for i in range(20)]] * 2, (text, 3), 0.3, text),
        latents=[LatentPanel(10**9, text, 0.5, 1e-9, 123456.7, examples)],
        shuffled_purity=0.0,
        predictions=[Prediction(image(), text, [(text, 0.9), ("other", 0.1)])],
        provenance={text: text},
        commands=[text],
    )


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_text_shows_as_text_and_adds_nothing(text):
    parsed, plain = Parsed(render_page(hostile(text))), Parsed(render_page(hostile("shoe")))

    assert [e["tag"] for e in parsed.elements] == [e["tag"] for e in plain.elements]
    assert [sorted(e["attrs"]) for e in parsed.elements] == [sorted(e["attrs"]) for e in plain.elements]
    assert not [name for element in parsed.elements for name in element["attrs"] if name.startswith("on")]
    expected = " ".join(text.split())
    for where in ("figures", "latents", "grid", "baselines", "predictions", "provenance"):
        assert expected in parsed.texts(inside=where), where
    assert parsed.texts("h1") == [expected]
    assert max(len(e["attrs"].get("alt") or "") for e in parsed.elements) <= 160
    assert parsed.all("script")[0]["text"] == plain.all("script")[0]["text"]


def test_undecodable_file_names_and_control_characters_become_visible(tmp_path):
    bad = "a\x00b\x1b[31m\udcff"
    write_page(tmp_path / "page.html", hostile(bad))
    written = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "a\ufffdb\ufffd[31m\ufffd" in Parsed(written).texts("h1")
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", written)


def test_label_without_letters_is_named():
    labels = Parsed(render_page(replace(DATA, latents=[latent(name="", labels=("", " "))]))).texts(cls="label")
    assert labels == ["(no label)", "(no label)"]


@pytest.mark.parametrize("data", [DATA, EMPTY, hostile(HOSTILE["close"])], ids=["full", "empty", "hostile"])
def test_nothing_is_fetched_and_only_the_own_script_may_run(data):
    html = render_page(data)
    parsed = Parsed(html)
    ids = [element["attrs"]["id"] for element in parsed.elements if "id" in element["attrs"]]
    for element in parsed.elements:
        assert element["tag"] not in ("iframe", "object", "embed", "base", "form", "video", "audio", "source")
        for name in ("src", "href", "srcset", "action", "poster", "data", "xlink:href"):
            link = element["attrs"].get(name)
            assert link is None or link.startswith("data:") or link[1:] in ids, link
        assert "url(" not in (element["attrs"].get("style") or "")
    assert len(ids) == len(set(ids))
    assert not re.search(r"url\(|@import|https?:", parsed.all("style")[0]["text"])

    [script] = parsed.all("script")
    digest = base64.b64encode(hashlib.sha256(script["text"].encode()).digest()).decode()
    [policy] = [e["content"] for e in parsed.all("meta") if e["attrs"].get("http-equiv") == "Content-Security-Policy"]
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def test_structure_is_semantic():
    html = render_page(DATA)
    parsed = Parsed(html)
    assert html.startswith("<!doctype html>")
    assert parsed.all("html")[0]["lang"] == "en"
    assert parsed.all("meta")[0]["attrs"] == {"charset": "utf-8"}
    assert [e["content"] for e in parsed.all("meta") if e["attrs"].get("name") == "viewport"] == [
        "width=device-width, initial-scale=1"
    ]
    assert len(parsed.all("h1")) == len(parsed.all("main")) == 1
    assert all(element["alt"] for element in parsed.all("img"))
    assert [element["attrs"]["id"] for element in parsed.all("section")] == list(SECTIONS)
    headings = {element["attrs"].get("id") for element in parsed.all("h2")}
    assert all(section["aria-labelledby"] in headings for section in parsed.all("section"))
    assert [link["href"] for link in parsed.all("a")] == [f"#{section}" for section in SECTIONS]
    lead = parsed.texts(cls="lead")[0]
    assert len(re.findall(r"[.](?: |$)", lead)) == 2, "the header says what this is in two sentences"


NOTHING = {
    "figures": {"figures": []},
    "latents": {"latents": []},
    "grid": {"grid": None},
    "baselines": {"baselines": []},
    "predictions": {"predictions": []},
    "provenance": {"provenance": {}, "commands": []},
}


@pytest.mark.parametrize("section", SECTIONS)
def test_an_empty_section_is_left_out(section):
    parsed = Parsed(render_page(replace(DATA, **NOTHING[section])))
    left = [name for name in SECTIONS if name != section]
    assert [element["attrs"]["id"] for element in parsed.all("section")] == left
    assert [link["href"] for link in parsed.all("a")] == [f"#{name}" for name in left]


@pytest.mark.parametrize(
    "grid",
    [
        LayerGrid([], [], [], ("", 0), None, ""),
        LayerGrid(["a"], [], [[]], ("a", 0), None, ""),
        LayerGrid(["a", "b"], [1], [[None], [None]], ("a", 1), 0.5, ""),
    ],
    ids=["no layers", "no timesteps", "nothing measured"],
)
def test_a_grid_without_a_number_is_left_out(grid):
    assert not Parsed(render_page(replace(DATA, grid=grid))).all("table")


def test_an_empty_page_still_stands():
    parsed = Parsed(render_page(EMPTY))
    assert parsed.texts("h1") == ["Empty"]
    assert not parsed.all("section")
    assert not parsed.all("nav")
    assert not parsed.all(cls="subtitle")


def test_parts_of_a_section_are_left_out():
    data = replace(DATA, shuffled_purity=None, commands=[], latents=[latent(examples=[])])
    parsed = Parsed(render_page(data))
    assert not parsed.all(cls="strip")
    assert not parsed.all(cls="tick", inside="latents")
    assert "shuffled" not in " ".join(parsed.texts(inside="latents"))
    assert not parsed.all("pre")
    assert not Parsed(render_page(replace(DATA, provenance={}))).all("dl", cls="provenance")


def test_latents_show_their_numbers():
    parsed = Parsed(render_page(DATA))
    assert parsed.texts("h3", inside="latents") == ["Sandal", "Ankle boot"]
    assert parsed.texts(cls="index") == ["latent #7", "latent #1999"]
    assert parsed.texts(cls="facts")[0] == "Purity (shuffled)75% (23%) Density1.23% Max activation9.25"
    assert [e["style"] for e in parsed.all(cls="fill", inside="latents")] == ["width:75.00%", "width:100.00%"]
    assert {e["style"] for e in parsed.all(cls="tick", inside="latents")} == {"left:23.00%"}
    assert parsed.texts("button")[:3] == ["Sandal activation 9.25", "Sandal activation 8.25", "Sneaker activation 7.25"]
    assert [e["attrs"].get("class") for e in parsed.all("button")[:4]] == [None, None, "off", None]
    assert parsed.all("button")[2]["data-source"] == "test/00002.png"
    assert parsed.texts(cls="detail")[0] == "Sandal activation 9.25 test/00000.png"


def test_heat_map_shows_every_cell():
    parsed = Parsed(render_page(DATA))
    assert parsed.texts("th", inside="grid") == [
        *["layer", "timestep t", "10", "100", "500"],
        *GRID.layers,
    ]
    assert parsed.texts("td") == [
        *["71.2%", "72.1%", "51.0%"],
        *["81.2%", "83.0% (chosen)", "–not measured"],
        *["79.0%", "80.1%", "62.0%"],
    ]
    styles = {" ".join(e["text"].split()): e["attrs"].get("style") for e in parsed.all("td")}
    assert styles["–not measured"] is None
    assert styles["51.0%"] == f"--lb:{page.RAMP_LIGHT[0]};--lf:#000;--db:{page.RAMP_DARK[0]};--df:#fff"
    assert styles["83.0% (chosen)"] == f"--lb:{page.RAMP_LIGHT[-1]};--lf:#fff;--db:{page.RAMP_DARK[-1]};--df:#000"
    legend = parsed.texts(cls="legend")[0]
    assert "51.0%83.0%" in legend
    assert "chosen: bottleneck at t = 100" in legend
    assert "reference: 74.1%" in legend
    [mark] = parsed.all("i")
    assert mark["style"] == f"left:{100 * (0.741 - 0.51) / (0.83 - 0.51):.2f}%"


@pytest.mark.parametrize(("baseline", "words"), [(0.1, "below the scale"), (0.95, "above the scale"), (None, None)])
def test_a_reference_off_the_scale_is_said_not_drawn(baseline, words):
    parsed = Parsed(render_page(replace(DATA, grid=replace(GRID, baseline=baseline))))
    assert not parsed.all("i")
    assert (words or "chosen") in parsed.texts(cls="legend")[0]
    assert words or "reference" not in parsed.texts(cls="legend")[0]


def test_a_grid_of_equal_numbers_has_no_scale():
    grid = LayerGrid(["a", "b"], [1], [[0.5], [0.5]], ("a", 1), 0.5, "")
    assert not Parsed(render_page(replace(DATA, grid=grid))).all(cls="scale")


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("scheme", "sign"), [("l", -1), ("d", 1)])
def test_the_colour_scale_is_monotonic_and_its_numbers_can_be_read(scheme, sign):
    values = []
    for step in range(401):
        variables = dict(pair.split(":") for pair in page._colours(step / 400).split(";"))
        background = luminance(variables[f"--{scheme}b"])
        ink = {"#000": 0.0, "#fff": 1.0}[variables[f"--{scheme}f"]]
        assert (max(ink, background) + 0.05) / (min(ink, background) + 0.05) >= 4.5
        values.append(sign * background)
    assert values == sorted(values)
    assert values[-1] - values[0] > 0.7


def test_bars_show_accuracy_and_error():
    parsed = Parsed(render_page(DATA))
    heads = parsed.texts(cls="head", inside="baselines")
    assert heads == ["Diff-C probe85.1% ± 0.4", "Raw pixels, logistic regression74.1%", "Untrained model99.0% ± 5.0"]
    widths = [e["style"] for e in parsed.all(cls="fill", inside="baselines")]
    assert widths == ["width:85.12%", "width:74.10%", "width:99.00%"]
    whiskers = [e["style"] for e in parsed.all(cls="whisker")]
    assert whiskers == ["left:84.70%;width:0.84%", "left:94.00%;width:6.00%"], "the second one stops at 100%"
    assert len(parsed.all("li", cls="mine")) == 1
    plain = replace(DATA, baselines=[Baseline("a", 0.5)])
    assert "Whiskers" not in render_page(plain)


def test_predictions_are_marked_in_words_and_top_three_shown():
    parsed = Parsed(render_page(DATA))
    assert parsed.texts(cls="verdict") == ["Correct", "Wrong"], "an image without a true label has no mark"
    assert parsed.texts(cls="row", inside="predictions") == [
        *["Coat91.3%", "Shirt5.0%", "Pullover3.0%"],
        *["Coat60.0%", "Shirt40.0%"],
        "Bag100.0%",
    ]
    assert parsed.texts(cls="true-label") == ["Coat91.3%", "Shirt40.0%"]
    assert "right on 1 of the 2 labelled images" in parsed.texts(cls="note")[-1]
    assert parsed.texts(cls="truth") == ["True label: Coat", "True label: Shirt", "No true label"]


def test_provenance_and_commands_are_in_a_collapsible():
    parsed = Parsed(render_page(DATA))
    assert "open" not in parsed.all("details")[0]["attrs"]
    assert parsed.texts("dt", inside="provenance") == ["base model", "fingerprint"]
    assert parsed.texts("dd", inside="provenance") == ["tiny-sd", "3b1f09c2aa77e1d0"]
    assert parsed.texts("pre") == DATA.commands


def embedded(source: Image.Image) -> tuple[Image.Image, dict]:
    data = replace(EMPTY, predictions=[Prediction(source, "a", [("a", 1.0)])])
    [element] = Parsed(render_page(data)).all("img")
    header, payload = element["src"].split(",")
    assert header == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(payload))), element


@pytest.mark.parametrize(
    ("size", "embedded_size", "crisp"),
    [
        ((28, 28), (28, 28), True),
        ((32, 64), (32, 64), True),
        ((512, 256), (128, 64), False),
        ((65, 20), (65, 20), False),
        ((3000, 1), (128, 1), False),
    ],
)
def test_images_are_small_and_thumbnails_crisp(size, embedded_size, crisp):
    shown, element = embedded(image(size))
    assert shown.size == embedded_size
    assert (element["attrs"].get("class") == "crisp") is crisp


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_every_image_mode_can_be_shown(mode):
    source = image(mode=mode, colour=1 if mode == "1" else 0)
    assert embedded(source)[0].size == (28, 28)
    assert source.mode == mode


def test_pixels_are_kept_and_metadata_is_not():
    source = Image.effect_noise((28, 28), 60)
    exif = Image.Exif()
    exif[0x010E] = "home address"
    buffer = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "home address")
    source.save(buffer, format="PNG", exif=exif, pnginfo=text)
    shown, element = embedded(Image.open(io.BytesIO(buffer.getvalue())))
    assert shown.tobytes() == source.tobytes()
    assert b"home address" not in base64.b64decode(element["src"].split(",")[1])
    assert not shown.info


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Baseline("raw", 83.2), r"accuracy of 'raw' is 83.2, but must lie between 0 and 1. Divide"),
        (lambda: Baseline("raw", float("nan")), r"accuracy of 'raw' is nan"),
        (lambda: Baseline("raw", 0.5, -0.1), r"std of 'raw' is -0.1"),
        (lambda: latent(purity=75), r"purity of latent 7 is 75"),
        (lambda: latent(density=-1.0), r"density of latent 7 is -1.0"),
        (lambda: replace(DATA, shuffled_purity=23), r"shuffled_purity is 23"),
        (lambda: replace(GRID, baseline=74.1), r"accuracy in the grid is 74.1"),
        (lambda: replace(GRID, accuracy=[[0.1]]), r"accuracy has rows of \[1\] cells for 3 layers and 3 timesteps"),
        (lambda: replace(GRID, chosen=("up_ft9", 10)), r"chosen is \('up_ft9', 10\); choose a measured cell"),
        (lambda: replace(GRID, chosen=("bottleneck", 500)), r"chosen is \('bottleneck', 500\)"),
        (lambda: Prediction(image(), "a", []), r"scores are \[\]: give at least one, best first"),
        (lambda: Prediction(image(), "a", [("a", 0.1), ("b", 0.9)]), r"scores are \[0.1, 0.9\]"),
        (lambda: Prediction(image(), "a", [("a", 3.5)]), r"score of 'a' is 3.5"),
    ],
)
def test_impossible_numbers_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.254, "9.25"), (0, "0.00"), (123.456, "123.46"), (54321.6, "54,322"), (-1.5, "-1.50"), (0.00123, "0.0012")],
)
def test_activations_are_short_in_every_size(value, text):
    assert page._number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0, "0%"), (1, "100%"), (0.0123, "1.23%"), (1e-9, "<0.001%")])
def test_densities_are_never_shown_as_zero_when_they_are_not(value, text):
    assert page._share(value) == text


def test_same_data_gives_the_same_page():
    assert render_page(DATA) == render_page(DATA)


def test_write_is_atomic(tmp_path):
    path = tmp_path / "new folder" / "page.html"
    write_page(path, DATA)
    assert path.read_text(encoding="utf-8") == render_page(DATA)

    unreadable = replace(DATA, predictions=[Prediction(image((0, 0)), "a", [("a", 1.0)])])
    with pytest.raises(ValueError, match=r"."):
        write_page(path, unreadable)
    assert path.read_text(encoding="utf-8") == render_page(DATA)

    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(OSError, match="taken"):
        write_page(taken, DATA)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new folder", "page.html", "taken"]


def test_import_needs_no_model_library():
    code = (
        "import sys, diffusion_sae; before = set(sys.modules); import diffusion_sae.report.page; "
        "print({m.split('.')[0] for m in set(sys.modules) - before}"
        " & {'torch', 'diffusers', 'transformers', 'datasets', 'matplotlib', 'numpy'})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


# Measures the page inside frames of given widths, served from the same origin. A frame is the only way to a phone's
# width: Chromium makes no window narrower than about 500 pixels.
HARNESS = """<!doctype html><meta charset="utf-8"><body><pre id="result"></pre><script>
const results = [];
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const luminance = (colour) => channels(colour).slice(0, 3)
  .map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function measure(frame) {
  const view = frame.contentWindow, doc = frame.contentDocument, root = doc.documentElement;
  const style = (e) => view.getComputedStyle(e);
  doc.querySelector("details")?.setAttribute("open", "");
  const name = (e) => `${e.tagName}.${e.className} ${e.textContent.trim().slice(0, 40)}`;
  const shown = [...doc.body.querySelectorAll("*")]
    .filter((e) => e.getClientRects().length && !e.closest(".hidden, script"));
  const cut = (e) => {
    while ((e = e.parentElement)) if (style(e).overflowX !== "visible") return true;
    return false;
  };
  const background = (e) => {
    for (; e; e = e.parentElement) {
      const colour = style(e).backgroundColor;
      if (channels(colour)[3] !== 0) return colour;
    }
  };
  const texts = shown.filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()));
  const contrast = (e) => {
    const [a, b] = [style(e).color, background(e)].map(luminance).sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const buttons = [...doc.querySelectorAll(".strip button")].slice(0, 2);
  if (buttons.length) buttons[0].dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
  const focused = doc.activeElement === buttons[1];
  if (buttons.length) buttons[1].click();
  results.push({
    page: frame.dataset.page, width: view.innerWidth, overflow: root.scrollWidth - root.clientWidth,
    outside: shown.filter((e) => !cut(e) && e.getBoundingClientRect().right > view.innerWidth + 0.5).map(name),
    clipped: shown.filter((e) => style(e).overflowX === "hidden" &&
      (e.scrollWidth > e.clientWidth + 1 || e.scrollHeight > e.clientHeight + 3)).map(name),
    faint: texts.filter((e) => contrast(e) < 4.5).map((e) => `${name(e)} ${contrast(e).toFixed(2)}`),
    background: style(doc.body).backgroundColor, focused, texts: texts.length, height: root.scrollHeight,
    detail: doc.querySelector(".detail")?.textContent.replace(/\\s+/g, " ").trim(),
    broken: [...doc.images].filter((i) => !i.naturalWidth).length,
    pwned: Boolean(view.pwned || window.pwned),
    fetched: view.performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
  });
  document.getElementById("result").textContent = JSON.stringify(results);
}
for (const page of PAGES) for (const width of WIDTHS) {
  const frame = document.createElement("iframe");
  Object.assign(frame, { width, height: 800, src: page + "?" + width, onload: () => measure(frame) });
  frame.style.border = 0;
  frame.dataset.page = page;
  document.body.append(frame);
}
</script>"""
WIDTHS = [360, 390, 768, 1440]


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "setting", "paper"), [("light", 1, "252, 251, 248"), ("dark", 0, "20, 22, 25")])
def test_layout_in_chromium(tmp_path, scheme, setting, paper):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    assert chromium, "Chromium is missing, so the layout cannot be checked: `apt-get install chromium`."
    pages = {"full.html": DATA, "empty.html": EMPTY}
    pages |= {f"hostile{i}.html": hostile(text) for i, text in enumerate(HOSTILE.values())}
    for name, data in pages.items():
        write_page(tmp_path / "www" / name, data)
    harness = HARNESS.replace("PAGES", json.dumps(list(pages))).replace("WIDTHS", json.dumps(WIDTHS))
    (tmp_path / "www" / "harness.html").write_text(harness, encoding="utf-8")

    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path.split("?")[0].lstrip("/"))

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "www")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", "--window-size=1600,1000"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={setting}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--timeout=60000", "--dump-dom"]
    try:
        run = subprocess.run(
            [*command, f"http://127.0.0.1:{server.server_port}/harness.html"],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
    finally:
        server.shutdown()
        server.server_close()
    found = re.search(r'<pre id="result">(.+?)</pre>', run.stdout, re.S)
    assert found, f"Chromium did not measure the page: {run.stdout[:500]} {run.stderr[-500:]}"
    results = json.loads(Parsed(f"<p>{found[1]}</p>").elements[0]["text"])

    assert sorted((r["page"], r["width"]) for r in results) == sorted((p, w) for p in pages for w in WIDTHS)
    for result in results:
        where = f"{result['page']} at {result['width']} pixels, {scheme}"
        assert result["background"] == f"rgb({paper})", where
        assert result["overflow"] <= 0, f"{where} scrolls sideways"
        assert not result["outside"], where
        assert not result["faint"], where
        assert not result["broken"], where
        assert not result["pwned"], where
        assert not result["fetched"], where
        assert result["height"] < 9000, where
        if result["page"] == "full.html":
            assert not result["clipped"], where
            assert result["texts"] > 50, where
            assert result["focused"], f"{where}: the arrow key moves to the next image"
            assert result["detail"] == "Sandal activation 8.25 test/00001.png", where
    assert set(asked) <= {*pages, "harness.html", "favicon.ico"}
    assert Path(tmp_path / "profile").exists()
