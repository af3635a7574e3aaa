"""Names of latents: worked by hand, against naive versions, and with a real CLIP of random weights."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPModel

from diffusion_sae.analysis.captions import CaptionScores, phrases_of
from diffusion_sae.analysis.latents import LatentStatistics
from diffusion_sae.analysis.metrics.interpretability import base_rate_of, label_divergence
from diffusion_sae.analysis.naming import (
    ClassScores,
    VocabularyScores,
    embed_words,
    name_latents,
    read_vocabulary,
)
from diffusion_sae.extraction.sources import open_images
from diffusion_sae.extraction.text_image import TextImageModel


def statistics(top_images: list[list[int]], top_acts: list[list[float]], images: int) -> LatentStatistics:
    acts = torch.tensor(top_acts)
    return LatentStatistics(torch.tensor(top_images), acts, torch.ones(len(acts)), acts.mean(1), images)


# four images: two up, one right, one between; the mean embedding is (0.4, 0.65)
IMAGES = torch.tensor([[0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [0.6, 0.8]])
WORDS = torch.tensor([[0.0, 3.0], [1.0, 0.0]])


def test_vocabulary_by_hand() -> None:
    """Images 3 and 2 with activations 3 and 1: the mean cosine with `right` is (3 × 0.6 + 1)/4 = 0.7, with all 0.4."""
    scores = VocabularyScores(["up", "right"], WORDS, IMAGES)
    found = scores(torch.tensor([[3, 2], [0, 1]]), torch.tensor([[3.0, 1.0], [1.0, 0.0]]))
    assert_close(found, torch.tensor([[0.6 - 0.7, 0.7 - 0.4], [1 - 0.7, 0 - 0.4]]).double())


def test_a_word_that_resembles_all_images_names_none() -> None:
    """`thing` has the highest cosine with every image, and the least above its mean."""
    images = torch.nn.functional.normalize(torch.tensor([[1.0, 0, 5], [0, 1, 5], [1, 0, 5], [0, 1, 5]]), dim=1)
    scores = VocabularyScores(["one", "other", "thing"], torch.eye(3), images)
    assert (images @ torch.eye(3)).argmax(1).tolist() == [2] * 4
    (name,) = name_latents(statistics([[1, 3]], [[2.0, 1.0]], 4), scores)
    assert name.name == "other"


def test_names_have_a_score_a_runner_up_and_a_baseline() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(200, 8, generator=generator)
    words = torch.randn(30, 8, generator=generator)
    images[:5] += 3 * words[7]
    planted, chance = list(range(5)), [20, 40, 60, 80, 100]
    scores = VocabularyScores([f"word {i}" for i in range(30)], words, images)
    found = statistics([planted, chance, planted], [[5.0, 4, 3, 2, 1], [1.0] * 5, [0.0] * 5], 200)
    clear, unclear = name_latents(found, scores, draws=300)
    assert (clear.latent_index, clear.name, clear.unit) == (0, "word 7", "cosine above mean")
    expected = scores(found.top_images, found.top_acts)[0]
    assert clear.score == expected[7]
    assert clear.runner_up_score == expected[expected != expected[7]].max()
    assert clear.chance == 1 / 301
    assert unclear.latent_index == 1
    assert unclear.chance > 0.05
    assert unclear.score == pytest.approx(unclear.random_score, abs=0.3)
    assert json.loads(json.dumps(clear.to_dict()))["name"] == "word 7"


def test_the_baseline_is_uniform_for_random_images() -> None:
    """Latents whose images mean nothing have p-values that are spread over 0…1, whatever their number of images."""
    generator = torch.Generator().manual_seed(1)
    scores = VocabularyScores(list("abcdef"), torch.randn(6, 8, generator=generator), torch.randn(100, 8))
    images = torch.stack([torch.randperm(100, generator=generator)[:4] for _ in range(300)])
    acts = torch.rand(300, 4, generator=generator).sort(1, descending=True).values
    acts[:100, 1:] = 0
    found = name_latents(LatentStatistics(images, acts, torch.ones(300), acts.mean(1), 100), scores)
    for part in (found[:100], found[100:]):
        chances = torch.tensor([name.chance for name in part])
        assert 0.4 < chances.mean() < 0.6
        assert 0.01 < (chances < 0.1).float().mean() < 0.2


def test_same_names_in_blocks_and_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = VocabularyScores(["up", "right"], WORDS, IMAGES)
    found = statistics([[3, 2], [0, 1], [1, 3]], [[3.0, 1], [1, 0], [2, 2]], 4)
    whole = name_latents(found, scores, draws=20)
    assert whole == name_latents(found, scores, draws=20)
    monkeypatch.setattr("diffusion_sae.analysis.naming._SCORES_AT_ONCE", 2)
    assert whole == name_latents(found, scores, draws=20)
    assert name_latents(found, scores, draws=20, latents=[2])[0].latent_index == 2


def test_embeddings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"2 names need .* got the shapes \(2, 2\) and \(4, 3\)"):
        VocabularyScores(["up", "right"], WORDS, torch.ones(4, 3))
    with pytest.raises(ValueError, match="draws must be an integer ≥ 1, got 0"):
        name_latents(statistics([[0]], [[1.0]], 4), VocabularyScores(["up", "right"], WORDS, IMAGES), draws=0)


def test_vocabularies(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# comment\nshoe\n\n  bag # another\nshoe\n", encoding="utf-8")
    (tmp_path / "words.json").write_text('["shoe", "bag"]')
    assert read_vocabulary(tmp_path / "words.txt") == read_vocabulary(tmp_path / "words.json") == ["shoe", "bag"]
    assert read_vocabulary(["a", "b", "a"]) == ["a", "b"]
    packaged = read_vocabulary()
    assert len(packaged) > 400
    assert {"sneaker", "stripes", "eyes"} <= set(packaged)
    (tmp_path / "none.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=r"none.txt has no names. Write one a line"):
        read_vocabulary(tmp_path / "none.txt")
    (tmp_path / "wrong.json").write_text('{"shoe": 1}')
    with pytest.raises(ValueError, match="A vocabulary is a list of texts"):
        read_vocabulary(tmp_path / "wrong.json")


def test_a_real_clip(clip_folder: Path, images: list[Image.Image]) -> None:
    """The scores are those of CLIPModel's own logits, less their mean over the images, weighted by hand."""
    model, words = TextImageModel.from_pretrained(str(clip_folder)), ["shoe", "bag", "a red thing"]
    scores = VocabularyScores.of_model(model, words, open_images(images), templates=["{}"], progress=False)
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    text = AutoTokenizer.from_pretrained(clip_folder)(words, padding=True, return_tensors="pt")
    pixels = model.processor(images, return_tensors="pt").pixel_values
    with torch.no_grad():
        cosines = clip(pixel_values=pixels, **text).logits_per_image / clip.logit_scale.exp()
    expected = 0.75 * cosines[4] + 0.25 * cosines[9] - cosines.mean(0)
    found = scores(torch.tensor([[4, 9]]), torch.tensor([[3.0, 1.0]]))
    assert_close(found[0].float(), expected, atol=1e-4, rtol=1e-4)
    names = name_latents(statistics([[4, 9]], [[3.0, 1.0]], len(images)), scores, draws=10)
    assert names[0].name == words[int(expected.argmax())]


def test_templates_are_averaged(clip_folder: Path) -> None:
    model = TextImageModel.from_pretrained(str(clip_folder))
    both = embed_words(model, ["shoe", "bag"], ["{}", "a {}"])
    one, other = model.embed_texts(["shoe", "bag"]), model.embed_texts(["a shoe", "a bag"], batch_size=1)
    assert_close(both, torch.nn.functional.normalize(one + other, dim=1))
    with pytest.raises(ValueError, match=r"Each template must have a \{\} for the name, got \['a photo'\]"):
        embed_words(model, ["shoe"], ["a photo"])


def test_a_model_without_texts(clip_folder: Path) -> None:
    vision = CLIPModel.from_pretrained(clip_folder).vision_model
    with pytest.raises(ValueError, match="no model of texts and images: it lacks get_text_features"):
        TextImageModel(vision, None, None)


LABELS = torch.tensor([0, 0, 0, 0, 0, 0, 1, 2])


def test_class_names_by_hand() -> None:
    """Of four images one has the class of an eighth of all, three that of six eighths."""
    scores = ClassScores(LABELS, ["shirt", "bag", "boot"])
    found = scores(torch.tensor([[0, 1, 2, 6]]), torch.ones(1, 4))
    assert found.tolist() == [[0.75 * math.log2(0.75 / 0.75), 0.25 * math.log2(0.25 / 0.125), -math.inf]]
    (name,) = name_latents(statistics([[0, 1, 2, 6]], [[4.0, 3, 2, 1]], 8), scores)
    assert (name.name, name.score, name.runner_up, name.runner_up_score) == ("bag", 0.25, "shirt", 0.0)
    (alone,) = name_latents(statistics([[7, 0]], [[4.0, 0]], 8), scores)  # image 0 is not active
    assert (alone.name, alone.score, alone.runner_up) == ("boot", 3.0, None)


def test_parts_of_classes_add_up_to_the_divergence() -> None:
    images = torch.tensor([[0, 1, 6, 7], [6, 7, 0, 2]])
    parts = ClassScores(LABELS, ["a", "b", "c"])(images, torch.ones(2, 4))
    assert_close(
        parts.clamp_min(-99).where(parts > -99, 0.0).sum(1), label_divergence(LABELS[images], base_rate_of(LABELS))
    )


def test_labels_without_a_name() -> None:
    with pytest.raises(ValueError, match="Labels go up to 2, there are 2 class names"):
        ClassScores(LABELS, ["a", "b"])


CAPTIONS = [
    *("a black ankle boot", "a brown ankle boot", "an ankle boot with a heel", "a small black bag"),
    *("a shirt with stripes", "a black shirt", "a shirt", "a dress with stripes", "a dress", "a bag"),
]


def test_captions_against_the_formula() -> None:
    scores = CaptionScores(CAPTIONS, least_captions=2)
    found = scores(torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4))[0]
    total, n, prior = 10, 4, 2.0
    for phrase in ("black", "ankle boot", "bag"):
        y = sum(phrase in caption for caption in CAPTIONS[:4])
        Y = sum(phrase in caption for caption in CAPTIONS)
        a = prior * Y / total
        b = prior - a
        four = (y + a, n - y + b, Y - y + a, total - n - Y + y + b)
        z = (math.log(four[0] / four[1]) - math.log(four[2] / four[3])) / math.sqrt(sum(1 / x for x in four))
        assert found[scores.names.index(phrase)].item() == pytest.approx(z, abs=1e-7)
    assert found[scores.names.index("stripes")] == -math.inf


def test_captions_name_what_sets_images_apart() -> None:
    """A phrase stands for its words, `a` begins none, and the runner-up is no part of the name."""
    scores = CaptionScores(CAPTIONS, least_captions=2)
    found = statistics([[0, 1, 2, 3], [4, 7, 5, 6]], [[4.0, 3, 2, 1], [2.0, 1, 0, 0]], 10)
    boots, stripes = name_latents(found, scores)
    assert (boots.name, boots.runner_up, boots.unit) == ("ankle boot", "black", "z")
    assert stripes.name == "with stripes"
    assert boots.chance < 0.2
    photos = [f"a photo of a {'shoe' if i < 5 else 'bag'} on white, number {i}" for i in range(10)]
    (shoe,) = name_latents(statistics([[0, 1, 2, 3]], [[1.0] * 4], 10), CaptionScores(photos))
    assert (shoe.name, shoe.runner_up) == ("shoe", None)


def test_images_without_captions() -> None:
    captions = [*CAPTIONS, "", "…"]
    found = statistics([[10, 11], [4, 10]], [[2.0, 1.0], [1.0, 0.0]], 12)
    names = name_latents(found, CaptionScores(captions, least_captions=2))
    assert [name.latent_index for name in names] == [1]
    with pytest.raises(ValueError, match="No word is in at least 3 of the 3 captions without being in all"):
        CaptionScores(["shoe"] * 3)


def test_phrases() -> None:
    assert phrases_of("Don't PANIC, Zaphod!", 2) == {"don't", "panic", "zaphod", "don't panic", "panic zaphod"}
    assert phrases_of("деревянный стол", 1) == {"деревянный", "стол"}
