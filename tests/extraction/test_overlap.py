"""Decoding ahead of the model and writing behind it: order, bounds, and errors in their turn."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from diffusion_sae._overlap import Behind, computed_ahead
from diffusion_sae.extraction.images import ImageError
from diffusion_sae.features import FeatureStore, StoreWriter


@pytest.mark.parametrize(("threads", "ahead"), [(1, 0), (1, 3), (4, 5), (4, 100)])
def test_results_come_in_order(threads, ahead):
    def slow_for_some(i):
        time.sleep(0.002 * (i % 3))
        return i * i

    assert list(computed_ahead(range(20), slow_for_some, threads=threads, ahead=ahead)) == [i * i for i in range(20)]
    assert list(computed_ahead([], slow_for_some, threads=threads, ahead=ahead)) == []


def test_the_look_ahead_is_bounded_and_ends_with_the_reader():
    started, lock = [], threading.Lock()

    def note(i):
        with lock:
            started.append(i)
        return i

    with closing(computed_ahead(range(1000), note, threads=2, ahead=5)) as results:
        for expected in range(3):
            assert next(results) == expected
            assert len(started) <= expected + 1 + 5
    assert len(started) <= 3 + 5


def test_an_error_comes_in_its_turn():
    def fail_at_three(i):
        if i == 3:
            raise ImageError("three")
        return i

    results = computed_ahead(range(10), fail_at_three, threads=4, ahead=8)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ImageError, match="three"):
        next(results)


def test_calls_run_one_behind():
    running, most, done = [0], [0], []

    def call(i):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.005)
        done.append(i)
        running[0] -= 1

    with Behind() as behind:
        for i in range(5):
            behind.run(call, i)
            assert len(done) >= i  # all but the last
    assert (done, most) == ([0, 1, 2, 3, 4], [1])


def test_an_error_behind_is_raised_by_the_next_call_or_at_the_end():
    def fail():
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"), Behind() as behind:
        behind.run(fail)
    ran = []

    def two_calls():
        with Behind() as behind:
            behind.run(fail)
            behind.run(ran.append, 1)

    with pytest.raises(OSError, match="no space left"):
        two_calls()
    assert ran == []


def test_what_is_behind_is_finished_when_the_block_fails():
    done = []

    def call():
        time.sleep(0.02)
        done.append(1)

    def interrupted():
        with Behind() as behind:
            behind.run(call)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == [1]


def test_threads_do_not_change_the_features(make_sd_extractor, image_folder, images, tmp_path, monkeypatch):
    """A folder is read by several threads, a list by one; with and without the overlap the files are equal."""
    extractor = make_sd_extractor(layers=("bottleneck", "up_ft1"), timesteps=(25, 100))
    sizes = {"batch_size": 3, "shard_size": 5, "progress": False}
    extractor.extract(image_folder, tmp_path / "threads", **sizes)
    monkeypatch.setattr("diffusion_sae.extraction.reading.MAX_THREADS", 1)
    monkeypatch.setattr(Behind, "run", lambda _self, call, *args: call(*args))
    extractor.extract(image_folder, tmp_path / "alone", **sizes)
    for path in (tmp_path / "threads").iterdir():
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes(), path.name


def test_a_full_disk_stops_the_run_and_it_goes_on(make_sd_extractor, image_folder, tmp_path, monkeypatch):
    extractor = make_sd_extractor(layers="up_ft1")
    write = StoreWriter.write

    def full(self, number, shard):
        if number == 1:
            raise OSError(28, "No space left on device")
        write(self, number, shard)

    sizes = {"batch_size": 2, "shard_size": 3, "progress": False}
    monkeypatch.setattr(StoreWriter, "write", full)
    with pytest.raises(OSError, match="No space left on device"):
        extractor.extract(image_folder, tmp_path, **sizes)
    assert not FeatureStore(tmp_path).complete
    monkeypatch.setattr(StoreWriter, "write", write)
    assert len(extractor.extract(image_folder, tmp_path, **sizes)) == 12
    FeatureStore(tmp_path, verify=True)


# Prompts of single images


def test_class_names_as_prompts(make_sd_extractor, image_folder, images, tmp_path):
    extractor = make_sd_extractor(layers="up_ft1", prompt="a photo of a {}", prompt_from="class")
    store = extractor.extract(image_folder, tmp_path / "store", batch_size=5, progress=False)
    classes = [store.class_names[label] for label in store.labels.tolist()]
    expected = extractor([image_folder / source for source in store.sources], prompts=classes)
    torch.testing.assert_close(store.select("up_ft1", 25)[:], expected["up_ft1", 25], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"prompt_from='class' needs images with class names, which these data lack"):
        extractor.extract(images, tmp_path / "list", progress=False)
    assert not (tmp_path / "list").exists()


def test_texts_as_prompts(make_sd_extractor, images, tmp_path):
    """A skipped image does not shift the prompts of those behind it; other prompts are other data."""
    extractor = make_sd_extractor(layers="up_ft1", prompt_from="image")
    texts = ["a bag", "a dress", "a shoe", "a dress"]

    def table(texts):
        content = [{"bytes": b"broken", "path": None}, *images[:3]]
        features = Features({"image": Image(), "text": Value("string")})
        return Dataset.from_dict({"image": content, "text": texts}, features=features)

    options = {"skip_broken": True, "batch_size": 2, "progress": False}
    store = extractor.extract(table(texts), tmp_path / "store", **options)
    expected = extractor(images[:3], prompts=texts[1:])["up_ft1", 25]
    np.testing.assert_allclose(store.select("up_ft1", 25)[:], expected, atol=1e-5)
    with pytest.raises(ValueError, match="begun with other images"):
        extractor.extract(table(texts[::-1]), tmp_path / "store", **options)
    with pytest.raises(
        ValueError, match=r"prompt_from='image' needs a text an image: a datasets column prompt or text"
    ):
        extractor.extract(images, tmp_path / "list", progress=False)


def test_prompts_given_to_extract(make_sd_extractor, images, image_folder, tmp_path):
    """A text an image for data without a text column; the same as texts of the extractor's own call."""
    extractor = make_sd_extractor(layers="up_ft1", prompt_from="image")
    prompts = [f"a bag {i % 3}" for i in range(12)]
    store = extractor.extract(images, tmp_path / "given", prompts=prompts, progress=False)
    expected = extractor(images, prompts=prompts)["up_ft1", 25]
    torch.testing.assert_close(store.select("up_ft1", 25)[:], expected, atol=1e-5, rtol=0)
    limited = extractor.extract(image_folder, tmp_path / "folder", prompts=prompts, limit=5, progress=False)
    assert len(limited) == 5
    with pytest.raises(ValueError, match=r"begun with other images, labels, class names or shard size"):
        extractor.extract(images, tmp_path / "given", prompts=prompts[::-1], progress=False)


def test_prompts_that_do_not_fit(make_sd_extractor, images, tmp_path):
    extractor = make_sd_extractor(layers="up_ft1", prompt_from="image")
    for wrong in (["one"], "a bag"):
        with pytest.raises(ValueError, match=r"prompts must be one text an image: 12 images, prompts: "):
            extractor.extract(images, tmp_path, prompts=wrong, progress=False)
    with pytest.raises(
        ValueError, match=r"prompts were given, but prompt_from='config' does not take them. Use 'image'"
    ):
        make_sd_extractor(layers="up_ft1").extract(images, tmp_path, prompts=["a"] * 12, progress=False)
    assert not any(tmp_path.iterdir())
