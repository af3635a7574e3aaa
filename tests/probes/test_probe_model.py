"""DiffusionProbe, its config and its heads."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from diffusion_sae import DiffusionProbe, DiffusionProbeConfig, ProbeTrainingArguments
from diffusion_sae.probes.heads import DiffCHead, as_feature_map

NAMES = {0: "bag", 1: "dress", 2: "shoe"}


def make_probe(head: str = "linear", d_in: int = 6, **config: Any) -> DiffusionProbe:
    return DiffusionProbe(DiffusionProbeConfig(**{"d_in": d_in, "head": head, "width": 8, "id2label": NAMES} | config))


class TestConfig:
    def test_class_names_go_both_ways(self) -> None:
        by_number = DiffusionProbeConfig(d_in=6, id2label=NAMES)
        by_name = DiffusionProbeConfig(d_in=6, label2id={name: number for number, name in NAMES.items()})
        for config in (by_number, by_name):
            assert config.id2label == NAMES
            assert config.label2id == {"bag": 0, "dress": 1, "shoe": 2}
            assert config.num_labels == 3

    def test_a_number_of_classes_is_enough(self) -> None:
        assert DiffusionProbeConfig(d_in=6, num_labels=5).id2label == {n: f"LABEL_{n}" for n in range(5)}

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"head": "svm"}, "head must be one of 'linear', 'mlp', 'diff-c', .*, got 'svm'"),
            ({"d_in": 0}, "d_in must be an integer ≥ 1, got 0"),
            ({"width": 0}, "width must be an integer ≥ 1, got 0"),
            ({"dropout": 1.5}, "dropout must be a number ≥ 0 and ≤ 1, got 1.5"),
            ({"init_seed": -3}, "init_seed must be an integer ≥ 0, got -3"),
            ({"num_labels": 1}, "A probe needs ≥ 2 classes, got 1"),
            ({"id2label": {0: "only"}}, "A probe needs ≥ 2 classes, got 1"),
            ({"id2label": {float("inf"): "a"}}, r"id2label must have class numbers 0, 1, … as keys, got \[inf\]"),
            ({"id2label": {1: "a", 2: "b"}}, r"id2label must give each class 0…1 a name of its own, got \{1: 'a'"),
            ({"id2label": {0: "a", 1: "a"}}, "a name of its own"),
            ({"id2label": NAMES, "label2id": {"hat": 0}}, "label2id must be the inverse of id2label"),
            ({"id2label": NAMES, "num_labels": 4}, "num_labels is 4, but id2label names 3 classes"),
            ({"drop_out": 0.1}, r"does not know 'drop_out' \(did you mean 'dropout'\?\)"),
        ],
    )
    def test_invalid_values_are_refused_by_name(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            DiffusionProbeConfig(**{"d_in": 6, **given})

    @pytest.mark.parametrize(
        "config",
        [
            DiffusionProbeConfig(d_in=6),
            DiffusionProbeConfig(d_in=6, head="diff-c", width=12, dropout=0, init_seed=3, id2label=NAMES),
        ],
    )
    def test_json_round_trip(self, config: DiffusionProbeConfig) -> None:
        read = DiffusionProbeConfig.from_dict(json.loads(config.to_json_string()))
        assert read.to_json_string() == config.to_json_string()
        assert read.id2label == config.id2label
        assert (read.d_in, read.head, read.width, read.dropout) == (6, config.head, config.width, config.dropout)

    def test_a_file_without_the_head_is_refused(self) -> None:
        with pytest.raises(ValueError, match="DiffusionProbeConfig needs head, which the given config lacks"):
            DiffusionProbeConfig.from_dict({"model_type": "diffusion-probe", "d_in": 6})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_dir": ""}, "output_dir must name a folder"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'auto', 'lbfgs', 'fista', 'adamw', got 'sgd'"),
        ({"l2_path": ()}, "l2_path must hold at least one strength"),
        ({"l2_path": (1e-3, -1.0)}, "l2_path must be a number ≥ 0, got -1.0"),
        ({"learning_rate": 0}, "learning_rate must be a number > 0"),
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be an integer ≥ 1"),
        ({"num_train_epochs": 91}, "cosine_epochs must be an integer ≥ 91, got 90"),
        ({"weight_decay": -1}, "weight_decay must be a number ≥ 0"),
        ({"validation_fraction": 0}, "validation_fraction must be a number > 0 and ≤ 0.9, got 0"),
        ({"seed": -1}, "seed must be an integer ≥ 0"),
    ],
)
def test_invalid_training_arguments_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeTrainingArguments(**{"output_dir": "runs/probe", **given})


def test_training_arguments_round_trip_through_json() -> None:
    args = ProbeTrainingArguments(output_dir="runs/probe", l2_path=(0.1, 1), optimizer="lbfgs")
    assert ProbeTrainingArguments.from_dict(json.loads(json.dumps(args.to_dict()))) == args


class TestLinearHead:
    def test_logits_are_those_of_standardised_features(self) -> None:
        probe = make_probe()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in probe.head.state_dict(keep_vars=True).items():
                value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if name == "feature_std" else 0.0))
        features = torch.randn(4, 6, generator=generator)
        logits = probe(features=features).logits
        weight, bias = probe.head.classifier.weight, probe.head.classifier.bias
        for n in range(4):
            for c in range(3):
                standardised = [
                    (features[n, d] - probe.head.feature_mean[d]) / probe.head.feature_std[d] for d in range(6)
                ]
                expected = bias[c] + sum(weight[c, d] * standardised[d] for d in range(6))
                assert logits[n, c].item() == pytest.approx(expected.item(), abs=1e-5)

    def test_begins_with_the_uniform_prediction(self) -> None:
        assert (make_probe()(features=torch.randn(2, 6)).logits == 0).all()


class TestDiffC:
    """The architecture of Revelio's §3.3, stated layer by layer."""

    @pytest.fixture
    def head(self) -> DiffCHead:
        config = DiffusionProbeConfig(d_in=1280, head="diff-c", width=1024, num_labels=37)
        with torch.device("meta"):
            return DiffusionProbe(config).head

    def test_layers(self, head: DiffCHead) -> None:
        block = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d]
        expected = [nn.BatchNorm2d, *block * 4]
        assert len(head.features) == len(expected)
        assert all(isinstance(layer, kind) for layer, kind in zip(head.features, expected, strict=True))
        assert (head.features[0].num_features, head.features[0].affine) == (1280, False)
        convolutions = [layer for layer in head.features if isinstance(layer, nn.Conv2d)]
        assert [(c.in_channels, c.out_channels) for c in convolutions] == [(1280, 1024)] + 3 * [(1024, 1024)]
        assert [c.stride for c in convolutions] == [(1, 1), (2, 2), (2, 2), (2, 2)]
        assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.bias is not None for c in convolutions)
        norms = [layer for layer in head.features if isinstance(layer, nn.BatchNorm2d)][1:]
        assert [(norm.num_features, norm.affine) for norm in norms] == 4 * [(1024, True)]
        assert all(layer.p == 0.3 for layer in head.features if isinstance(layer, nn.Dropout2d))
        assert isinstance(head.dropout, nn.Dropout)
        assert head.dropout.p == 0.3
        assert (head.classifier.in_features, head.classifier.out_features) == (1024, 37)

    def test_number_of_parameters(self, head: DiffCHead) -> None:
        first = 1280 * 1024 * 9 + 1024
        other = 1024 * 1024 * 9 + 1024
        assert first + 3 * other + 4 * 2 * 1024 + (1024 * 37 + 37) == 40_158_245
        assert sum(p.numel() for p in head.parameters()) == 40_158_245

    @pytest.mark.parametrize("side", [8, 7, 16, 1])
    def test_equals_the_same_steps_by_hand(self, side: int) -> None:
        probe = make_probe("diff-c").eval()
        head = probe.head
        generator = torch.Generator().manual_seed(0)
        for layer in head.modules():
            if isinstance(layer, nn.BatchNorm2d):  # statistics that are not 0 and 1
                layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator))
                layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.5)
        features = torch.randn(2, 6, side, side, generator=generator)
        x = features
        x = (x - head.features[0].running_mean[:, None, None]) / (
            head.features[0].running_var[:, None, None] + 1e-5
        ).sqrt()
        for index in range(4):
            convolution, norm = head.features[1 + 4 * index], head.features[2 + 4 * index]
            x = F.conv2d(x, convolution.weight, convolution.bias, stride=2 if index else 1, padding=1)
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias).relu()
        assert x.shape[2] == -(-side // 8)
        expected = x.mean((2, 3)) @ head.classifier.weight.T + head.classifier.bias
        torch.testing.assert_close(probe(features=features).logits, expected, atol=1e-5, rtol=1e-4)

    def test_tokens_become_a_map_row_by_row(self) -> None:
        tokens = torch.arange(2 * 9 * 4, dtype=torch.float32).reshape(2, 9, 4)
        feature_map = as_feature_map(tokens)
        assert feature_map.shape == (2, 4, 3, 3)
        for image in range(2):
            for channel in range(4):
                for y in range(3):
                    for x in range(3):
                        assert feature_map[image, channel, y, x] == tokens[image, 3 * y + x, channel]

    def test_tokens_and_maps_give_the_same_logits(self) -> None:
        probe = make_probe("diff-c").eval()
        feature_map = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
        tokens = torch.stack([feature_map[:, :, y, x] for y in range(4) for x in range(4)], dim=1)
        assert tokens.shape == (2, 16, 6)
        torch.testing.assert_close(probe(features=tokens).logits, probe(features=feature_map).logits)

    def test_tokens_of_no_square_are_refused(self) -> None:
        with pytest.raises(ValueError, match=r"10 tokens form no square grid; this head needs whole activations"):
            make_probe("diff-c")(features=torch.zeros(2, 10, 6))


@pytest.mark.parametrize("head", ["linear", "diff-c"])
class TestEveryHead:
    @pytest.fixture
    def features(self, head: str) -> Tensor:
        return torch.randn(5, *((6,) if head == "linear" else (6, 4, 4)), generator=torch.Generator().manual_seed(0))

    def test_loss_is_the_cross_entropy(self, head: str, features: Tensor) -> None:
        probe, labels = make_probe(head).eval(), torch.tensor([0, 2, 1, 1, 0])
        with torch.no_grad():
            probe.head.classifier.bias.copy_(torch.tensor([0.5, -1.0, 0.2]))
        output = probe(features=features, labels=labels)
        rows = output.logits.log_softmax(1)
        assert output.loss.item() == pytest.approx(-sum(rows[n, labels[n]].item() for n in range(5)) / 5, rel=1e-5)
        loss, logits = probe(features=features, labels=labels, return_dict=False)
        assert torch.equal(loss, output.loss)
        assert torch.equal(logits, output.logits)
        assert probe(features=features).loss is None
        assert len(probe(features=features, return_dict=False)) == 1

    def test_predict_goes_in_batches_without_dropout_and_restores_the_mode(self, head: str, features: Tensor) -> None:
        probe = make_probe(head).train()
        logits = probe.predict(features, batch_size=2)
        assert probe.training
        torch.testing.assert_close(logits, probe.eval()(features=features).logits)
        assert not logits.requires_grad

    def test_initialisation_depends_on_init_seed_alone(self, head: str, features: Tensor) -> None:
        states = []
        with torch.random.fork_rng(devices=[]):
            for seed in (1, 2):
                torch.manual_seed(seed)
                before = torch.random.get_rng_state()
                states.append(make_probe(head).state_dict())
                assert torch.equal(torch.random.get_rng_state(), before), "the global random state was used"
        assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
        if head == "diff-c":
            other = make_probe(head, init_seed=1).state_dict()
            assert not torch.equal(states[0]["head.features.1.weight"], other["head.features.1.weight"])

    def test_features_of_another_shape_are_refused(self, head: str, features: Tensor) -> None:
        probe = make_probe(head)
        expected = r"\(N, 6\)" if head == "linear" else r"\(N, 6, h, w\)"
        pooling = "mean" if head == "linear" else "none"
        wrong = [torch.zeros(2, 7), torch.zeros(2, 7, 4, 4), torch.zeros(6)]
        wrong += [torch.zeros(2, 6, 4, 4)] if head == "linear" else [torch.zeros(2, 6), torch.zeros(2, 16, 7)]
        for features in wrong:
            with pytest.raises(ValueError, match=f"of the shape {expected}, got .*pooling='{pooling}'"):
                probe(features=features)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_features_that_are_no_numbers_are_refused(self, head: str, value: float, features: Tensor) -> None:
        features[2, 1] = value
        with pytest.raises(ValueError, match="NaN or infinite"):
            make_probe(head)(features=features)

    def test_takes_pixels_or_features_not_both(self, head: str, features: Tensor) -> None:
        probe = make_probe(head)
        with pytest.raises(ValueError, match="either pixel_values or features"):
            probe()
        with pytest.raises(ValueError, match="either pixel_values or features"):
            probe(pixel_values=torch.zeros(1, 3, 32, 32), features=features)

    def test_without_an_extraction_it_cannot_take_images(self, head: str, features: Tensor) -> None:
        with pytest.raises(ValueError, match="does not say which extraction it was trained on"):
            make_probe(head)(pixel_values=torch.zeros(1, 3, 32, 32))


def test_he_initialisation_of_the_convolutions() -> None:
    probe = make_probe("diff-c", d_in=16, width=64)
    for convolution, fan_in in ((probe.head.features[1], 16 * 9), (probe.head.features[5], 64 * 9)):
        bound = (6 / fan_in) ** 0.5
        assert convolution.weight.abs().max() <= bound
        assert convolution.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
        assert (convolution.bias == 0).all()


def test_the_diffusion_model_is_no_part_of_the_weights() -> None:
    probe = make_probe()
    assert set(probe.state_dict()) == {
        "head.feature_mean",
        "head.feature_std",
        "head.classifier.weight",
        "head.classifier.bias",
    }
