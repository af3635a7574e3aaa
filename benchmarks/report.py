"""What a report of 10,000 images and 20,480 latents takes: to build on two cores, and in the browser.

    python benchmarks/report.py --out docs/results/report.json

The sparse codes are synthetic: 64 positions an image with 32 active latents each, most of them of its class, and as
unevenly dense as those of trained SAEs. What it takes to make such codes is `sae_encoding.py`'s matter. The page is
opened from the disk in headless Chromium, which measures it by its own clock.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae._files import read_json
from diffusion_sae.extraction.sources import ImageSource
from diffusion_sae.report.build import Report, write_report
from diffusion_sae.report.latents import Dictionary, Labels
from diffusion_sae.sae.code import SparseCode
from diffusion_sae.sae.code_files import FORMAT_VERSION, KIND, MARK, ActiveLatents, Manifest, shard_name, write_shard
from diffusion_sae.sae.sparse_codes import SparseCodes

IMAGES, LATENTS, D_IN, SIDE, CLASSES, K = 10_000, 20_480, 320, 8, 50, 32
OF_IMAGE, EVERYWHERE, FILE_IMAGES = 160, 30, 500
"""Latents that an image's positions draw from, and how many of these are not of its class."""
LARGEST_MB = 120
"""What a report of this size may take on the disk."""


def synthetic(folder: Path, images: int, latents: int) -> tuple[KSparseAutoencoder, SparseCodes, np.ndarray]:
    """Sparse codes on the disk in the library's format, and an SAE of that many directions."""
    torch.manual_seed(0)
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=latents, k=K)).eval()
    draw, labels = torch.Generator().manual_seed(0), torch.arange(images) % CLASSES
    positions, share = SIDE**2, latents // CLASSES
    manifest = Manifest(
        KIND, FORMAT_VERSION, "parquet", latents, K, images * positions, FILE_IMAGES * positions, positions, [],
        {"name": None, "config": sae.config.to_dict(), "weights": "synthetic"}, {"fingerprint": "", "provenance": None},
    )  # fmt: skip
    for shard in range(manifest.num_shards):
        rows = manifest.rows_of(shard)
        own = labels[rows.start // positions : rows.stop // positions, None]
        skewed = torch.rand(len(own), OF_IMAGE - EVERYWHERE, generator=draw) ** 3
        everywhere = torch.randint(latents, (len(own), EVERYWHERE), generator=draw)
        pool = torch.cat([own * share + (skewed * share).long(), everywhere], 1)  # latents of an image
        chosen = torch.rand(len(own), positions, OF_IMAGE, generator=draw).topk(K, dim=2).indices
        found = pool[:, None].expand(-1, positions, -1).gather(2, chosen).flatten(0, 1).sort(1).values
        acts = torch.rand(found.shape, generator=draw) ** 2 * 5 + 0.1
        acts[:, 1:][found[:, 1:] == found[:, :-1]] = 0  # a latent that was drawn twice is active once
        write_shard(folder, manifest, shard, [ActiveLatents.of(SparseCode(acts, found))])
    marks = [read_json(folder / f"{shard_name(shard)}{MARK}") for shard in range(manifest.num_shards)]
    replace(manifest, complete=True, shards=marks).write(folder)
    return sae, SparseCodes(folder), labels.numpy()


def picture(i: int) -> Image.Image:
    """256 pixels wide, as photographs are made small for a page."""
    coarse = np.random.default_rng(i).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC)


FRAMES = """async ([times, step]) => {
  const frames = [];
  let last = performance.now();
  for (let i = 0; i < times; i++) {
    scrollBy(0, step);
    await new Promise(requestAnimationFrame);
    const now = performance.now();
    frames.push(now - last);
    last = now;
  }
  frames.sort((a, b) => a - b);
  return { median: frames[Math.floor(times / 2)], p95: frames[Math.floor(0.95 * times)], worst: frames[times - 1] };
}"""
LONG_TASKS = """() => { window.tasks = []; new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) window.tasks.push(entry.duration);
}).observe({ entryTypes: ["longtask"] }); }"""
FILTER = """async (text) => {
  const box = document.querySelector("input[type=search]");
  const start = performance.now();
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
  await new Promise(requestAnimationFrame);
  await new Promise((done) => setTimeout(done));
  return performance.now() - start;
}"""
SORT = """async (value) => {
  const box = [...document.querySelectorAll("select")].find((e) => [...e.options].some((o) => o.value === value));
  const start = performance.now();
  box.value = value;
  box.dispatchEvent(new Event("change", { bubbles: true }));
  await new Promise(requestAnimationFrame);
  await new Promise((done) => setTimeout(done));
  return performance.now() - start;
}"""


def open_page(page: Page, url: str) -> float:
    """Seconds from the navigation to the first pictures on the screen."""
    page.goto("about:blank")
    page.goto(url)
    page.wait_for_selector("canvas[data-drawn]")
    return page.evaluate("performance.now()") / 1000


def in_browser(index: Path) -> dict[str, Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        opened = [open_page(page, index.as_uri()) for _ in range(3)]
        page.evaluate(LONG_TASKS)
        plain = page.evaluate(FRAMES, [240, 120])
        page.evaluate("scrollTo(0, 0)")
        filters = [page.evaluate(FILTER, text) for text in ("c", "cl", "class 1", "class 12", "")]
        sorts = [page.evaluate(SORT, key) for key in ("max", "density", "name", "index", "purity")]
        page.get_by_label("Heat map").check()
        page.wait_for_selector("canvas[data-drawn=heat]")
        heat = page.evaluate(FRAMES, [240, 120])
        tasks = page.evaluate("window.tasks")
        page.goto(f"{index.as_uri()}#/images")
        page.wait_for_selector(".virtual canvas[data-drawn]")
        images = page.evaluate(FRAMES, [120, 120])
        memory = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
        version = browser.version
        browser.close()
    return {
        "chromium": version,
        "open_seconds": sorted(opened)[1],
        "scroll_frame_ms": plain,
        "scroll_frame_ms_with_heat_maps": heat,
        "scroll_frame_ms_images": images,
        "filter_ms": max(filters),
        "sort_ms": max(sorts),
        "longest_task_ms": max(tasks, default=0),
        "heap_mb": memory,
    }


def rounded(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    return round(content, 3) if isinstance(content, float) else content


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--latents", type=int, default=LATENTS)
    parser.add_argument("--folder", type=Path, help="kept afterwards; default: a temporary one")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        (folder / "encoded").mkdir(parents=True, exist_ok=True)
        sae, encoded, labels = synthetic(folder / "encoded", args.images, args.latents)
        names = [f"class {i}" for i in range(CLASSES)]
        files_names = [f"{i:05d}.png" for i in range(args.images)]
        source = ImageSource(files_names, picture, labels.tolist(), names, concurrent=True)
        places = np.random.default_rng(0).normal(size=(args.images, 2)) + labels[:, None] % 7
        report = Report("Synthetic", source, Labels(labels, names), maps={"two dimensions": places})
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        started = time.perf_counter()
        result = write_report(folder / "report", report, [Dictionary("synthetic", sae, encoded)])
        building = time.perf_counter() - started
        files = [path for path in (folder / "report").rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        measured = rounded(
            {
                "images": args.images,
                "latents": args.latents,
                "living": result["saes"][0]["living"],
                "positions": SIDE**2,
                "classes": CLASSES,
                "rows": len(encoded),
                "build_seconds": building,
                "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "peak_memory_mb_before_the_build": before / 1024,
                "size_mb": size,
                "size_limit_mb": LARGEST_MB,
                "files": len(files),
                "browser": in_browser(folder / "report/index.html"),
                "machine": machine(),
            }
        )
    text = json.dumps(measured, indent=2) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
