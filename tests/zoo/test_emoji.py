"""The embedded emoji: splits by style, classes in all of them, and what docs/emoji.md says."""

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from datasets import Dataset, Image

from diffusion_sae import DiffusionFeatureExtractor
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.zoo import EMOJI, embedded_datasets, embedded_images

STYLES = {"train": {"twemoji", "noto"}, "validation": {"emojione"}, "test": {"fluent"}}
DOC = Path(__file__).parents[2] / "docs" / "emoji.md"


@pytest.fixture(scope="module")
def tables():
    return {split: Dataset.from_parquet(str(embedded_images(split, EMOJI))) for split in STYLES}


def named(table, column):
    names = table.features[column].names
    return [names[number] for number in table[column]]


def test_no_style_is_in_two_splits_and_every_class_in_all(tables):
    for split, styles in STYLES.items():
        assert set(named(tables[split], "style")) == styles
        for column, count in (("group", 8), ("subgroup", 70)):
            assert tables[split].features[column] == tables["train"].features[column]
            assert set(tables[split][column]) == set(range(count))
    of = dict(chain.from_iterable(zip(t["subgroup"], t["group"], strict=True) for t in tables.values()))
    pairs = set(chain.from_iterable(zip(t["subgroup"], t["group"], strict=True) for t in tables.values()))
    assert len(of) == len(pairs)  # a subgroup has one group


def test_the_emoji_of_validation_and_test_are_known_in_other_styles(tables):
    known = set(tables["train"]["emoji"])
    for split in ("validation", "test"):
        assert set(tables[split]["emoji"]) <= known
        assert len(set(tables[split]["emoji"])) == len(tables[split])
    assert max(Counter(tables["train"]["emoji"]).values()) == 2


def test_the_document_has_the_counts(tables):
    lines = DOC.read_text(encoding="utf-8").splitlines()
    counts = Counter(
        entry
        for table in tables.values()
        for entry in zip(named(table, "subgroup"), named(table, "style"), strict=True)
    )
    styles = tables["train"].features["style"].names
    for subgroup in tables["train"].features["subgroup"].names:
        assert f"| | {subgroup} | " + " | ".join(str(counts[subgroup, style]) for style in styles) + " |" in lines
        assert min(counts[subgroup, style] for style in styles) >= 6
    for split, table in tables.items():
        assert any(line.startswith(f"| {split} |") and line.endswith(f"| {len(table):,} |") for line in lines)


def test_images_are_small_coloured_and_different(tables):
    stored = [row["image"]["bytes"] for t in tables.values() for row in t.cast_column("image", Image(decode=False))]
    assert len(set(stored)) == len(stored) == 4906
    for table in tables.values():
        image = table[0]["image"].convert("RGB")
        assert image.size == (64, 64)
        assert image.getpixel((0, 0)) == (255, 255, 255)
    assert sum(embedded_images(split, EMOJI).stat().st_size for split in STYLES) < 4_000_000


def test_it_is_extracted_by_name_with_all_labels(tmp_path):
    assert EMOJI in embedded_datasets()
    source = open_images(EMOJI, "test")
    assert (source.label_name, list(source.more_labels)) == ("group", ["subgroup", "style"])
    extractor = DiffusionFeatureExtractor.from_pretrained("tiny-sd", layers="bottleneck", timesteps=25, pooling="mean")
    store = extractor.extract(EMOJI, tmp_path / "store", split="test", limit=24, progress=False)
    assert store.label_names == ("group", "style", "subgroup")
    for name in store.label_names:
        features, expected = store.select("bottleneck", 25, labels=name), source.labelled_by(name)
        assert features.image_labels.tolist() == list(expected.labels)[:24]
        assert features.class_names == expected.class_names
    assert len(set(store.labels.tolist())) >= 6  # the classes are mixed, so that a limit takes of all


def test_a_split_that_there_is_not():
    with pytest.raises(ValueError, match=rf"{EMOJI} has no split 'dev'\. Splits: train, validation, test\."):
        open_images(EMOJI, "dev")
