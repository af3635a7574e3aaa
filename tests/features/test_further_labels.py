"""Several labels an image: kept through resuming, appending and export, and chosen when features are selected."""

import json
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value

from diffusion_sae.analysis.probing import class_config
from diffusion_sae.cli.main import main
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.features import FeatureStore, LabelSet, Shard, StoreWriter
from diffusion_sae.features.layout import MANIFEST
from diffusion_sae.provenance import Provenance

KEY = ("up_ft1", 25)
GROUPS, SUBGROUPS = ["animal", "food"], ["bird", "fish", "fruit", "sweet"]
FINE = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3]
COARSE = [i // 2 for i in FINE]


@pytest.fixture(scope="module")
def extract(make_sd_extractor):
    extractor = make_sd_extractor(layers=KEY[0], timesteps=KEY[1])

    def run(data, folder, **options):
        return extractor.extract(data, folder, **{"batch_size": 2, "shard_size": 3, "progress": False, **options})

    return run


@pytest.fixture(scope="module")
def table(images):
    types = {
        "image": Image(),
        "group": ClassLabel(names=GROUPS),
        "subgroup": ClassLabel(names=SUBGROUPS),
        "colour": ClassLabel(names=["red", "blue"]),
        "name": Value("string"),
    }
    rows = {"image": images, "group": COARSE, "subgroup": FINE, "colour": [0] * 12, "name": ["x"] * 12}
    return Dataset.from_dict(rows, features=Features(types))


@pytest.fixture(scope="module")
def store(extract, table, tmp_path_factory):
    return extract(table, tmp_path_factory.mktemp("further") / "store")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_one_extraction_serves_coarse_and_fine_labels(store):
    assert store.label_names == ("group", "colour", "subgroup")
    for name, labels, class_names in (
        (None, COARSE, GROUPS),
        ("group", COARSE, GROUPS),
        ("subgroup", FINE, SUBGROUPS),
    ):
        features = FeatureStore(store.path).select(*KEY, labels=name)
        assert (features.labels.tolist(), features.class_names) == (labels, class_names)
        assert len(class_config(features)["id2label"]) == len(class_names)
    assert (store.labels.tolist(), store.class_names) == (COARSE, GROUPS)
    coarse, fine = store.select(*KEY), store.select(*KEY, labels="subgroup")
    assert torch.equal(coarse[:], fine[:])
    assert coarse.fingerprint() != fine.fingerprint()


def test_labels_that_the_images_do_not_have(store, extract, images, tmp_path):
    with pytest.raises(ValueError, match=r"have no labels 'species'\. Their labels: 'group', 'colour', 'subgroup'\."):
        store.select(*KEY, labels="species")
    plain = extract(images[:3], tmp_path / "plain")
    assert plain.label_names == ()
    with pytest.raises(ValueError, match=r"have no labels 'label'\. Their labels: none\."):
        plain.select(*KEY, labels="label")


def test_a_store_without_further_labels_is_what_it_was(extract, image_folder, tmp_path):
    store = extract(image_folder, tmp_path / "store")
    assert store.label_names == ("label",)
    assert store.select(*KEY, labels="label").class_names == ["bag", "dress", "shoe"]
    assert not {"label_name", "more_labels"} & json.loads((store.path / MANIFEST).read_text()).keys()


@pytest.mark.parametrize("kept", [1, 3, 6])
def test_they_are_kept_through_a_kill(extract, store, table, tmp_path, monkeypatch, kept):
    write, done = Shard.add, [0]

    def interrupted(self, *args):
        done[0] += 1
        if done[0] == kept:
            raise KeyboardInterrupt
        write(self, *args)

    monkeypatch.setattr(Shard, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(table, tmp_path / "store")
    monkeypatch.setattr(Shard, "add", write)
    extract(table, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(store.path)


def test_going_on_with_other_further_labels_is_refused(extract, store, table, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "store")
    features = table.features.copy()
    features["subgroup"] = ClassLabel(names=[*SUBGROUPS[:3], "cake"])
    renamed = Dataset.from_dict({name: table[name][:] for name in table.column_names}, features=features)
    for other in (renamed, table.remove_columns("subgroup"), table.rename_column("subgroup", "kind")):
        with pytest.raises(ValueError, match=r"was begun with other images, labels, class names or shard size"):
            extract(other, folder)
        with pytest.raises(ValueError, match=r"has the further labels \{'colour': .* They must be equal in name"):
            extract(other, folder, append=True)
    assert contents(folder) == contents(store.path)


def test_appended_images_bring_theirs(extract, store, table, tmp_path):
    folder = shutil.copytree(store.path, tmp_path / "store")
    both = extract(table.select(range(5)), folder, append=True)
    assert both.select(*KEY, labels="subgroup").labels.tolist() == FINE + FINE[:5]
    assert both.labels.tolist() == COARSE + COARSE[:5]


def test_export_has_a_column_of_each(store, tmp_path):
    exported = store.to_dataset(cache_dir=tmp_path)
    assert exported.column_names == ["image_id", "source", "label", "label_colour", "label_subgroup", "up_ft1@25"]
    assert exported.features["label_subgroup"] == ClassLabel(names=SUBGROUPS)
    assert (exported["label"][:], exported["label_subgroup"][:]) == (COARSE, FINE)


def test_which_labels_are_the_default(table):
    source = open_images(table)
    assert (source.label_name, source.labels, list(source.more_labels)) == ("group", COARSE, ["subgroup", "colour"])
    assert source.first(3).more_labels["subgroup"].values == FINE[:3]
    fine = source.labelled_by("subgroup")
    assert (fine.label_name, fine.labels, fine.class_names) == ("subgroup", FINE, SUBGROUPS)
    assert list(fine.more_labels) == ["group", "colour"]
    assert fine.labelled_by("group").labels == COARSE
    assert source.labelled_by("group") is source
    with pytest.raises(ValueError, match=r"have no labels 'name'\. Their labels: 'group', 'subgroup', 'colour'\."):
        source.labelled_by("name")
    cifar = table.rename_columns({"group": "coarse_label", "subgroup": "fine_label"})
    assert (open_images(cifar).label_name, list(open_images(cifar).more_labels)) == (
        "fine_label",
        ["coarse_label", "colour"],
    )


def test_the_command_line_chooses_them(store, tmp_path, capsys):
    run = ["probe", str(store.path), "--validation-store", str(store.path), "--labels", "subgroup", "--json"]
    assert main([*run, "--output-dir", str(tmp_path / "probe")]) == 0
    config = json.loads((tmp_path / "probe" / "config.json").read_text())
    assert list(config["id2label"].values()) == SUBGROUPS
    capsys.readouterr()


def test_a_shard_must_bring_the_labels_of_its_store(tmp_path):
    record = Provenance(model="m", layers=KEY[:1], timesteps=KEY[1:], pooling="mean", weights="abc")
    names, labels = ["a", "b"], [0, 1]
    data = {"source_names": names, "labels": labels, "class_names": GROUPS, "shard_size": 2}
    further = {"subgroup": LabelSet([0, None], SUBGROUPS)}
    writer = StoreWriter(tmp_path, record, **data, label_name="group", more_labels=further)
    values = {KEY: torch.zeros(2, 4)}
    for given in (None, {"kind": [0, 1]}, {"subgroup": [0, 1], "kind": [0, 1]}, {"subgroup": [0]}):
        shard = writer.new_shard()
        shard.add(values, names, names, labels, given)
        with pytest.raises(
            ValueError, match=r"begun with the further labels \['subgroup'\], one an image\. Give Shard"
        ):
            writer.write(0, shard)
    shard = writer.new_shard()
    shard.add(values, names, names, labels, {"subgroup": [0, None]})
    writer.write(0, shard)
    writer.finish()
    with pytest.raises(ValueError, match=r"Not all images in .* have one of the labels 'subgroup'\."):
        FeatureStore(tmp_path).select(*KEY, labels="subgroup")
