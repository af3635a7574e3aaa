"""Reports in a real Chromium."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from synthetic_report import HOSTILE, IMAGES, Made, Visit, make_report


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_report(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Made:
    names = [f"{i} {HOSTILE[i % len(HOSTILE)]}" if HOSTILE[i % len(HOSTILE)] else "" for i in range(IMAGES)]
    return make_report(tmp_path_factory.mktemp("hostile"), HOSTILE, names)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "Chromium is missing, so the page cannot be looked at: `apt-get install chromium`."
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser, made: Made) -> Iterator[Visit]:
    one = Visit(browser, (made.folder / "index.html").as_uri())
    yield one
    one.close()
