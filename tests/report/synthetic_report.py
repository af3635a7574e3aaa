"""A synthetic report in a real Chromium: images, an SAE with random weights, sparse codes at two timesteps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from playwright.sync_api import Browser, Page

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig, encode_features
from diffusion_sae.extraction.sources import ImageSource
from diffusion_sae.features import FeatureSet
from diffusion_sae.report.build import Bar, Report, write_report
from diffusion_sae.report.grids import Grid
from diffusion_sae.report.latents import Dictionary, Labels

IMAGES, CLASSES, SIDE, TIMESTEPS = 90, ("circle", "square", "stripe"), 4, (50, 500)
HOSTILE = (
    "<script>window.pwned = 1</script>",
    '" onmouseover="window.pwned=1" x=\' onload=\'1',
    "</script></style></title><img src=http://evil.test/a.png onerror=window.pwned=1>",
    "👟🧥👩‍👩‍👧‍👦 é",
    "حذاء رياضي \u202e evil",
    "W" * 10_000,
    "word " * 2_000,
    "\x00\x1b\ud800 broken",
    "&lt;b&gt; &amp;amp; {{ 7 * 7 }} ${7 * 7}",
    "",
)


@dataclass(frozen=True)
class Made:
    """A report and what it was made of."""

    folder: Path
    acts: np.ndarray
    """(timesteps, images, positions, num_latents)."""
    labels: np.ndarray
    sae: KSparseAutoencoder
    sae_path: Path
    class_names: tuple[str, ...] = CLASSES
    result: dict[str, Any] = field(default_factory=dict)


def pictures(count: int, side: int) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 255, (count, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(pattern).resize((side, side), Image.Resampling.BICUBIC) for pattern in coarse]


def make_report(folder: Path, names: tuple[str, ...] = CLASSES, image_names: list[str] | None = None) -> Made:
    """Features of which each class has directions of its own, so that latents tell the classes apart."""
    draw = torch.Generator().manual_seed(5)
    labels = np.arange(IMAGES) % len(names)
    directions = torch.randn(len(names), 16, generator=draw)
    values = torch.randn(len(TIMESTEPS), IMAGES, SIDE**2, 16, generator=draw) + 2 * directions[labels][None, :, None]
    features = FeatureSet([values.reshape(-1, 16)], rows_per_image=len(TIMESTEPS) * SIDE**2, timesteps=TIMESTEPS)
    torch.manual_seed(0)
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=16, num_latents=160, k=5)).eval()
    sae.save_pretrained(folder / "sae")
    acts = sae.encode(features[:]).to_dense(160).detach().numpy().reshape(len(TIMESTEPS), IMAGES, SIDE**2, 160)
    images = pictures(IMAGES, 80)
    sources = image_names or [f"{names[label]}/{i:03d}.png" for i, label in enumerate(labels)]
    source = ImageSource(sources, images.__getitem__, labels.tolist(), list(names))
    report = Report(
        names[0] if image_names else "Shapes",
        source,
        labels=Labels(labels, names),
        maps={"PCA of features": values[0].mean(1)[:, :2].numpy()},
        grids=[Grid(names[0], ["bottleneck", names[-1]], [50, 500], [[0.5, 0.6], [None, 0.9]], ("bottleneck", 50))],
        colours={
            (layer, t): np.random.default_rng(t).integers(0, 255, (20, 4, 4, 3), dtype=np.uint8)
            for layer in ("bottleneck", names[-1])
            for t in (50, 500)
        },
        bars=[Bar(names[0], 0.83, names[1], highlight=True), Bar("raw pixels", 0.8)],
        predictions=torch.randn(IMAGES, len(names), generator=draw).softmax(1).numpy(),
        commands=[f"diffusion-sae {names[0]}"],
    )
    encoded = encode_features(sae, features, folder / "encoded", progress=False)
    one = Dictionary(names[0] if image_names else "shapes-sae", sae, encoded, fvu=0.25, path=str(folder / "sae"))
    result = write_report(folder / "report", report, [one])
    return Made(folder / "report", acts, labels, sae, folder / "sae", names, result)


def eventually(check: Callable[[], None], seconds: float = 20.0) -> None:
    """Repeat a check until it passes: a page shows what was asked of it some time later."""
    end = time.monotonic() + seconds
    while True:
        try:
            return check()
        except (AssertionError, IndexError, ValueError):
            if time.monotonic() > end:
                raise
        time.sleep(0.05)


def until(page: Page, expression: str) -> None:
    """Wait until it is true. Playwright's own wait evaluates a text in the page, whose security policy forbids it."""

    def check() -> None:
        assert page.evaluate(expression), expression

    eventually(check)


def frames(page: Page, count: int = 5) -> None:
    """Let the page be drawn so many times."""
    page.evaluate("async (n) => { while (n--) await new Promise(requestAnimationFrame); }", count)


class Visit:
    """A page of a report that notes what goes wrong on it and what it asks for."""

    def __init__(self, browser: Browser, address: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}, **context})
        self.page: Page = self.context.new_page()
        self.address = address
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self._console(message.type, message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    def open(self, hash: str = "") -> Page:
        self.page.goto(self.address + hash)
        self.page.wait_for_selector("main h1")
        return self.page

    def close(self) -> None:
        """Ends the visit: nothing went wrong, and nothing was asked of any other place."""
        foreign = [url for url in self.asked if not url.startswith((self.address.rsplit("/", 1)[0], "data:", "blob:"))]
        self.context.close()
        assert not self.problems, self.problems
        assert not foreign, foreign
