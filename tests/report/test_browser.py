"""The page, used as a person uses it, in a real Chromium and from the disk."""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from synthetic_report import CLASSES, HOSTILE, IMAGES, Made, Visit, eventually, frames, until

pytestmark = pytest.mark.slow
VIEWS = (
    "#/latents?heat=1",
    "#/latents/LATENT",
    "#/images",
    "#/images/7",
    "#/classes",
    "#/classes/1",
    "#/classes/1/2",
    "#/layers",
    "#/overview",
)
CARD = ".virtual .card"


def numbers_of_cards(page: Page) -> list[int]:
    return [int(text) for text in page.locator(f"{CARD} .index").all_inner_texts()]


def some_latent(made: Made) -> int:
    """The one that fires in most images."""
    return int((made.acts.max((0, 2)) > 0).sum(0).argmax())


def test_opens_and_lists_all_living_latents(visit: Visit, made: Made) -> None:
    page = visit.open()
    living = int((made.acts.max((0, 1, 2)) > 0).sum())
    expect(page.locator(".count")).to_contain_text(f"{living} of {living} living latents")
    assert page.title() == "Latents · Shapes"
    page.wait_for_selector("canvas[data-drawn=plain]")
    assert page.locator(CARD).count() < living  # the rest comes when it is scrolled to
    seen = set(numbers_of_cards(page))
    while page.evaluate("scrollY + innerHeight + 2 < document.documentElement.scrollHeight"):
        page.evaluate("scrollBy(0, 600)")
        frames(page)
        seen |= set(numbers_of_cards(page))
    assert seen == set(np.flatnonzero(made.acts.max((0, 1, 2)) > 0))


def test_sort_and_filter(visit: Visit, made: Made) -> None:
    page = visit.open()
    acts = made.acts.max((0, 2))
    page.get_by_label("Sort by").select_option("max")
    by_max = np.argsort(-acts.max(0), kind="stable")

    def shows(numbers: list[int]) -> None:
        assert numbers_of_cards(page)[: len(numbers)] == numbers

    eventually(lambda: shows(by_max[:6].tolist()))
    shown = numbers_of_cards(page)
    assert shown == by_max[: len(shown)].tolist()
    page.get_by_role("button", name="Largest first").click()
    smallest = [i for i in by_max[::-1] if acts[:, i].max() > 0]
    eventually(lambda: shows(smallest[:6]))
    page.get_by_label("Sort by").select_option("density")
    page.get_by_text("Ranges and own names").click()
    page.get_by_role("group", name="Density, %").get_by_label("at least").fill("50")
    dense = np.flatnonzero((acts > 0).mean(0) >= 0.5)
    expect(page.locator(".count")).to_have_text(re.compile(f"^{len(dense)} of "))
    assert set(numbers_of_cards(page)) <= set(dense)
    page.get_by_role("combobox", name="Class").select_option(label="square")

    def shows_squares() -> None:
        assert set(page.locator(f"{CARD} .name").all_inner_texts()) == {"square"}

    eventually(shows_squares)
    expect(page).to_have_url(re.compile("densityFrom=50"))  # a link to what is shown
    page.get_by_label("Name, class or number").fill("no such name")
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Name, class or number").fill("7")

    def shows_it_alone() -> None:
        assert numbers_of_cards(page) == ([7] if acts[:, 7].max() > 0 else [])

    eventually(shows_it_alone)


def test_click_through_and_back(visit: Visit, made: Made) -> None:
    page = visit.open("#/latents?sort=max")
    page.evaluate("scrollTo(0, 700)")
    frames(page)
    card = page.locator(CARD).nth(12)
    latent = int(card.locator(".index").inner_text())
    card.click()
    page.wait_for_selector("section:has(#top) .act")
    expect(page.locator("h1")).to_contain_text(f"latent {latent}")
    acts = made.acts.max((0, 2))[:, latent]
    shown = [float(text) for text in page.locator("section:has(#top) .act").all_inner_texts()]
    assert shown == pytest.approx(np.sort(acts[acts > 0])[::-1][:12], abs=0.006)
    expect(page.locator("section:has(#timesteps) svg")).to_have_count(2)
    until(page, "scrollY === 0")
    page.get_by_role("link", name="next →").click()
    page.wait_for_selector(f"h1:not(:has-text('latent {latent}'))")
    page.go_back()
    page.go_back()
    page.wait_for_selector(".virtual")
    until(page, "scrollY === 700")


def test_heat_map_over_the_images(visit: Visit) -> None:
    page = visit.open()
    page.wait_for_selector("canvas[data-drawn=plain]")
    page.get_by_label("Heat map").check()
    page.wait_for_selector(f"{CARD} canvas[data-drawn=heat]")
    expect(page).to_have_url(re.compile("heat=1"))
    page.get_by_label("Heat map").uncheck()
    page.wait_for_selector(f"{CARD} canvas[data-drawn=plain]")


def test_a_name_stays_and_travels(visit: Visit, made: Made, tmp_path: Path) -> None:
    latent, name = some_latent(made), "<b>round</b> handles 👜"
    page = visit.open(f"#/latents/{latent}")
    page.get_by_role("textbox", name="Name", exact=True).fill(name)
    page.get_by_role("button", name="Save name").click()
    page.wait_for_selector("text=Saved in this browser.")
    expect(page.locator("h1 bdi")).to_have_text(name)
    page.reload()
    expect(page.locator("h1 bdi")).to_have_text(name)
    page.get_by_role("link", name="All latents").click()
    page.get_by_text("Ranges and own names").click()
    page.get_by_label("Only latents with a name of mine").check()
    expect(page.locator(f"{CARD} .index")).to_have_text([str(latent)])
    with page.expect_download() as download:
        page.get_by_role("button", name="Download names").click()
    path = tmp_path / "names.json"
    download.value.save_as(path)
    content = json.loads(path.read_text())
    assert content["names"] == {str(latent): name}
    page.get_by_label("Load names").set_input_files(path)
    page.wait_for_selector("text=Names saved in this browser.")
    path.write_text(json.dumps(content | {"weights": "other"}))
    page.get_by_label("Load names").set_input_files(path)
    page.wait_for_selector("text=of an SAE with other weights")
    page.locator(CARD).click()
    page.get_by_role("textbox", name="Name", exact=True).fill("")
    page.get_by_role("button", name="Save name").click()
    page.wait_for_selector("text=Your name is taken back.")
    expect(page.locator("h1 bdi")).to_have_text(re.compile("|".join(CLASSES)))


def test_what_is_typed_stays_while_the_page_is_drawn_again(visit: Visit, made: Made) -> None:
    page = visit.open(f"#/latents/{some_latent(made)}")
    name = page.get_by_role("textbox", name="Name", exact=True)
    name.fill("half a na")
    heat = page.get_by_label("Heat map")
    heat.uncheck()
    page.wait_for_selector(".tiles canvas[data-drawn=plain]")
    expect(name).to_have_value("half a na")
    heat.check()
    page.wait_for_selector(".tiles canvas[data-drawn=heat]")
    expect(name).to_have_value("half a na")
    page.get_by_role("link", name="next →").click()
    expect(name).to_have_value("")


def test_keyboard_alone(visit: Visit) -> None:
    page = visit.open()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "To the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('.virtual .card')"):
            break
    first = page.evaluate("document.activeElement.querySelector('.index').textContent")
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp"):
        page.keyboard.press(key)
        frames(page)
    assert page.evaluate("document.activeElement.querySelector('.index').textContent") == first
    page.keyboard.press("Enter")
    page.wait_for_selector(f"h1:has-text('latent {first}')")


def box_of(page: Page, selector: str) -> tuple[float, float, float, float]:
    box = page.locator(selector).bounding_box()
    assert box
    return box["x"], box["y"], box["width"], box["height"]


def test_map_hover_zoom_lasso_and_click(visit: Visit, made: Made) -> None:
    page = visit.open("#/images")
    page.get_by_role("button", name="Lasso").click()
    page.wait_for_selector(".map.lasso")
    x, y, width, height = box_of(page, ".map")
    around = [(0, 0), (1, 0), (1, 0.55), (0, 0.55)]
    page.mouse.move(x + 2, y + 2)
    page.mouse.down()
    for right, down in around:
        page.mouse.move(x + 2 + right * (width - 4), y + 2 + down * (height - 4), steps=4)
    page.mouse.up()
    held = int(page.locator("#lasso").inner_text().split()[0])
    assert 0 < held < IMAGES
    expect(page.locator(".count")).to_have_text(re.compile(f"^{held} of {IMAGES} images lie in the lasso"))
    page.wait_for_selector(".lasso .cards .card")
    page.get_by_role("combobox", name="Class").select_option(label="stripe")

    def shows_fewer() -> None:
        assert int(page.locator(".count").inner_text().split()[0]) < held

    eventually(shows_fewer)
    page.get_by_role("button", name="Let go").click()
    page.get_by_role("combobox", name="Class").select_option(label="all")
    expect(page.locator(".count")).to_have_text(re.compile(f"^{IMAGES} of {IMAGES}"))
    page.get_by_role("button", name="Lasso").click()
    page.evaluate("scrollTo(0, 0)")
    frames(page)
    point = some_point(page)
    page.mouse.move(*point)
    page.wait_for_selector(".pointed canvas[data-drawn]")
    before = page.locator(".map").screenshot()
    page.mouse.wheel(0, -600)

    def has_changed() -> None:
        assert page.locator(".map").screenshot() != before

    eventually(has_changed)
    page.get_by_role("button", name="Whole map").click()
    frames(page)
    page.mouse.move(*point)
    page.mouse.down()
    page.mouse.up()
    page.wait_for_selector(".tiles .act")
    image = int(page.url.rsplit("/", 1)[1])
    acts = np.sort(made.acts.max((0, 2))[image])[::-1][:3]
    shown = [float(text.split("·")[1]) for text in page.locator(".tiles .act").all_inner_texts()[:3]]
    assert shown == pytest.approx(acts, abs=0.006)
    page.wait_for_selector(".tiles canvas[data-drawn=heat]")


def some_point(page: Page) -> tuple[float, float]:
    """Where something is drawn on the map, in the page's coordinates."""
    x, y, _, _ = box_of(page, ".map")
    drawn = np.asarray(Image.open(io.BytesIO(page.locator(".map").screenshot())).convert("RGB"), np.int16)
    inside = drawn[10:-10, 10:-10]
    rows, columns = np.nonzero(np.abs(inside - inside[0, 0]).sum(2) > 60)
    middle = len(rows) // 2
    return x + 10 + int(columns[middle]), y + 10 + int(rows[middle])


def test_latents_that_tell_classes_apart(visit: Visit, made: Made) -> None:
    acts = made.acts.max((0, 2))

    def rank(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        pooled = np.sqrt((one.var(0) + other.var(0)) / 2 + 1e-6 * acts.max(0) ** 2)
        return np.where(acts.max(0) > 0, (one.mean(0) - other.mean(0)) / np.where(pooled > 0, pooled, 1), 0)

    for view, one, other in (
        ("#/classes/1", made.labels == 1, made.labels != 1),
        ("#/classes/1/2", made.labels == 1, made.labels == 2),
    ):
        page = visit.open(view)
        page.wait_for_selector("section:has(#more) .card")
        shown = [int(text) for text in page.locator("section:has(#more) .index").all_inner_texts()]
        expected = rank(acts[one], acts[other])
        assert expected[shown] == pytest.approx(np.sort(expected)[::-1][: len(shown)], abs=2e-3), view
        told = float(page.locator("section:has(#more) .facts").first.inner_text().split()[1])
        assert told == pytest.approx(expected.max(), abs=0.006)
    page.get_by_label("Compared with").select_option(label="all others")
    page.wait_for_selector("#pairs")
    page.get_by_role("link", name="stripe").click()
    page.wait_for_selector("#less")


def test_a_view_left_while_its_pictures_are_drawn(visit: Visit) -> None:
    """The sheets of the view come in between its end and the end of its effects, which a browser puts off."""
    visit.page.add_init_script(
        """const held = [], make = window.createImageBitmap;
        window.createImageBitmap = (...args) =>
          make(...args).then((made) => new Promise((give) => held.push(() => give(made))));
        const strips = () => [...document.querySelectorAll("canvas.strip")];
        window.leave = (hash) => new Promise((left) => {
          const drawn = strips();
          new MutationObserver(() => {
            if (!drawn.some((strip) => strip.isConnected)) left(held.splice(0).map((give) => give()).length);
          }).observe(document.body, { childList: true, subtree: true });
          location.hash = hash;
          setTimeout(() => left(0), 10000);
        });
        window.waiting = () => held.length && strips().length;"""
    )
    page = visit.open("#/latents")
    until(page, "waiting()")
    assert page.evaluate("leave('#/layers')") > 0
    page.wait_for_selector(".heat")


def test_layers_and_timesteps(visit: Visit) -> None:
    page = visit.open("#/layers")
    expect(page.locator(".heat td")).to_have_text(["50.0%", "60.0%", "–", "90.0%"])
    expect(page.locator(".heat td.chosen")).to_have_text("50.0%")
    expect(page.locator("canvas.colours")).to_have_count(4)
    assert page.locator(".heat td a").count() == 0  # these sparse codes do not say which layer they are of
    page.get_by_role("link", name="Image 3, circle").click()
    page.wait_for_selector("text=image 3, circle")
    page.get_by_role("link", name="image 3", exact=True).click()
    page.wait_for_selector("#pca")


@pytest.fixture
def at_width(browser: Browser, made: Made, request: pytest.FixtureRequest) -> Iterator[Visit]:
    width, scheme = request.param
    context: dict[str, Any] = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    visit = Visit(browser, (made.folder / "index.html").as_uri(), **context)
    yield visit
    visit.close()


MEASURE = """() => {
  const all = [...document.body.querySelectorAll("*")];
  const shown = all.filter((e) => e.getClientRects().length && !e.closest(".skip"));
  const name = (e) => `${e.tagName}.${e.className?.baseVal ?? e.className} ${e.textContent.trim().slice(0, 40)}`;
  const style = (e) => getComputedStyle(e);
  const scrolls = ({ parentElement: e }) => e && (style(e).overflowX !== "visible" || scrolls(e));
  const cut = (e) => ["hidden", "clip"].includes(style(e).overflowY) && e.scrollHeight > e.clientHeight + 3;
  const mayBeCut = "bdi, .label, .name, .card, option, .shares *";
  return {
    sideways: document.documentElement.scrollWidth - innerWidth,
    outside: shown.filter((e) => !scrolls(e) && e.getBoundingClientRect().right > innerWidth + 0.5).map(name),
    clipped: shown.filter((e) => cut(e) && !e.matches(mayBeCut)).map(name),
    empty: all.filter((e) => e.matches("canvas.strip") && !e.dataset.drawn).length,
    background: getComputedStyle(document.body).backgroundColor,
  };
}"""


@pytest.mark.parametrize(
    "at_width", [(360, "light"), (390, "dark"), (768, "light"), (1440, "dark")], indirect=True, ids=str
)
def test_layout_and_accessibility_of_all_views(at_width: Visit, made: Made) -> None:
    dark = at_width.context.pages[0].evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    for view in VIEWS:
        page = at_width.open(view.replace("LATENT", str(some_latent(made))))
        page.wait_for_timeout(400)
        until(page, "[...document.querySelectorAll('canvas.strip')].every((one) => one.dataset.drawn)")
        found = page.evaluate(MEASURE)
        assert found["background"] == ("rgb(20, 22, 25)" if dark else "rgb(252, 251, 248)")
        assert found["sideways"] <= 0, view
        assert not found["outside"], view
        assert not found["clipped"], view
        assert not found["empty"], view
        violations = Axe().run(page, options={"preload": False}).response["violations"]
        told = [
            (one["id"], one["nodes"][0]["html"][:200]) for one in violations if one["impact"] in ("serious", "critical")
        ]
        assert not told, view


def test_hostile_texts_are_shown_as_text(browser: Browser, hostile: Made) -> None:
    visit = Visit(browser, (hostile.folder / "index.html").as_uri(), viewport={"width": 390, "height": 800})
    for view in VIEWS:
        page = visit.open(view.replace("LATENT", str(some_latent(hostile))))
        page.wait_for_timeout(200)
        assert page.evaluate("window.pwned") is None
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, view
        assert page.locator("main script, main img[src*=evil]").count() == 0
    page = visit.open("#/latents")
    options = page.get_by_role("combobox", name="Class").locator("option").all_inner_texts()
    assert options[1:3] == [text.strip() for text in HOSTILE[:2]]
    assert len(options[6]) == 300
    visit.close()


def test_a_lost_file_is_named(browser: Browser, made: Made, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(made.folder, tmp_path / "copy")
    next(copy.glob("files-*/data/sae0/latents.js")).unlink()
    visit = Visit(browser, (copy / "index.html").as_uri())
    page = visit.open()
    assert "lacks its file sae0/latents.js" in page.get_by_role("alert").inner_text()
    assert len(visit.problems) == 2  # the file that was not found, and the error
    visit.problems.clear()
    visit.close()


def test_only_blocks_that_are_looked_at_are_loaded(visit: Visit) -> None:
    visit.open()
    loaded = [url.rsplit("/", 1)[1] for url in visit.asked if "/data/" in url]
    assert not any(name.startswith(("latents-0", "images-0", "classes-")) for name in loaded)
    assert IMAGES > 64
