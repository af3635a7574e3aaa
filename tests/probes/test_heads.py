"""Each head against an oracle: scikit-learn, torch's own modules, or the equation written as loops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from torch import Tensor, nn

from diffusion_sae import (
    DiffusionProbe,
    DiffusionProbeConfig,
    KSparseAutoencoder,
    KSparseAutoencoderConfig,
    ProbeTrainer,
    ProbeTrainingArguments,
)
from diffusion_sae.features import AlignedFeatures, FeatureSet
from diffusion_sae.sae.configuration import ACTIVATIONS, INPUT_NORMS

Labelled = Callable[..., FeatureSet]


def make_probe(head: str, **config: Any) -> DiffusionProbe:
    settings = {"d_in": 6, "head": head, "width": 8, "num_attention_heads": 2, "num_labels": 3}
    return DiffusionProbe(DiffusionProbeConfig(**(settings | config)))


def fit(probe: DiffusionProbe, features: Any, folder: Path, validation: Any, **args: Any) -> Any:
    settings = {"output_dir": str(folder), "learning_rate": 1e-2, "num_train_epochs": 3, "batch_size": 8}
    settings |= {"l1_path": (0.3, 0.1), **args}
    trainer = ProbeTrainer(probe, features, ProbeTrainingArguments(**settings), validation_features=validation)
    return trainer.fit(progress=False)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Values in everything, also in what starts at 0 or 1."""
    generator = torch.Generator().manual_seed(9)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(0.3 * torch.rand(tensor.shape, generator=generator) + 0.4)


class TestMLP:
    @pytest.mark.parametrize("depth", [1, 3])
    def test_equals_the_same_steps_by_hand(self, depth: int) -> None:
        probe = make_probe("mlp", depth=depth).eval()
        probe.head.feature_mean.copy_(drawn(6))
        probe.head.feature_std.copy_(drawn(6, seed=1).abs() + 0.5)
        features = drawn(5, 6, seed=2)
        hidden = (features - probe.head.feature_mean) / probe.head.feature_std
        linear = [layer for layer in probe.head.features if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linear] == [(6, 8)] + (depth - 1) * [(8, 8)]
        for layer in linear:
            hidden = (hidden @ layer.weight.T + layer.bias).clamp_min(0)
        expected = hidden @ probe.head.classifier.weight.T + probe.head.classifier.bias
        torch.testing.assert_close(probe(features=features).logits, expected)
        dropouts = [layer.p for layer in probe.head.features if isinstance(layer, nn.Dropout)]
        assert dropouts == depth * [0.3]

    def test_learns_what_is_not_linear(self, tmp_path: Path) -> None:
        """XOR of two signs, by which a linear probe is at chance."""
        features = drawn(400, 6)
        labels = ((features[:, 0] > 0) ^ (features[:, 1] > 0)).long()
        both = FeatureSet.from_tensor(features, labels)
        probe = make_probe("mlp", num_labels=2, width=32, dropout=0)
        result = fit(probe, both, tmp_path / "mlp", both, num_train_epochs=20)
        assert result.validation.accuracy > 0.9
        assert fit(make_probe("linear", num_labels=2), both, tmp_path / "linear", both).validation.accuracy < 0.65


class TestAttention:
    def test_equals_multihead_attention(self) -> None:
        """Of torch, whose query has a projection of its own: here the identity."""
        probe = make_probe("attention").eval()
        head, tokens = probe.head, drawn(4, 7, 6, seed=3)
        randomise(head)
        reference = nn.MultiheadAttention(8, 2, batch_first=True)
        with torch.no_grad():
            reference.in_proj_weight.copy_(torch.cat([torch.eye(8), head.key.weight, head.value.weight]))
            reference.in_proj_bias.copy_(torch.cat([torch.zeros(8), head.key.bias, head.value.bias]))
            reference.out_proj.weight.copy_(head.output.weight)
            reference.out_proj.bias.copy_(head.output.bias)
            projected = (
                tokens - head.feature_mean
            ) / head.feature_std @ head.projection.weight.T + head.projection.bias
            query = head.query.expand(4, 1, 8)
            pooled = reference(query, projected, projected, need_weights=False)[0][:, 0]
            expected = head.classifier(F.layer_norm(pooled, (8,), head.norm.weight, head.norm.bias))
            torch.testing.assert_close(probe(features=tokens).logits, expected)

    def test_maps_are_tokens_row_by_row_whose_order_does_not_count(self) -> None:
        probe = make_probe("attention").eval()
        feature_map = drawn(2, 6, 3, 5)
        tokens = torch.stack([feature_map[:, :, y, x] for y in range(3) for x in range(5)], 1)
        logits = probe(features=feature_map).logits
        torch.testing.assert_close(probe(features=tokens).logits, logits)
        torch.testing.assert_close(probe(features=tokens.flip(1)).logits, logits)

    def test_moments_are_over_all_positions_of_the_training_images(self, tmp_path: Path) -> None:
        rows = drawn(20 * 5, 6) * torch.tensor([1e-3, 1, 1, 10, 100, 1e4]) + 5
        features = FeatureSet([rows], rows_per_image=5, labels=torch.arange(20) % 3)
        probe = make_probe("attention")
        fit(probe, features, tmp_path, features)
        torch.testing.assert_close(probe.head.feature_mean, rows.double().mean(0).float())
        torch.testing.assert_close(probe.head.feature_std, rows.double().std(0, correction=0).float())
        for kind, mean, std in (("center", rows.mean(0), torch.ones(6)), ("none", torch.zeros(6), torch.ones(6))):
            probe = make_probe("attention", feature_norm=kind)
            fit(probe, features, tmp_path / kind, features)
            torch.testing.assert_close(probe.head.feature_mean, mean)
            torch.testing.assert_close(probe.head.feature_std, std)

    def test_learns_from_one_position_among_many(self, tmp_path: Path) -> None:
        """The class stands in one of 16 positions, whichever: an average would drown it."""
        labels, features = torch.arange(150) % 3, 0.5 * drawn(150, 16, 6, seed=4)
        place = torch.randint(0, 16, (150,), generator=torch.Generator().manual_seed(0))
        features[torch.arange(150), place, labels] += 6
        rows = FeatureSet([features.flatten(0, 1)], rows_per_image=16, labels=labels)
        result = fit(make_probe("attention", width=16), rows, tmp_path, None, num_train_epochs=15)
        assert result.validation.accuracy > 0.9


class TestKNN:
    @pytest.mark.parametrize("k", [1, 5, 40])
    def test_equals_scikit_learn(self, k: int, labelled: Labelled, tmp_path: Path) -> None:
        rows, new = labelled(100), labelled(60, seed=1)
        probe = make_probe("knn", num_neighbors=k, temperature=0.2)
        fit(probe, rows, tmp_path, new)
        mean, std = rows.to_tensor().mean(0), rows.to_tensor().std(0, correction=0)
        reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
        reference.fit(((rows.to_tensor() - mean) / std).numpy(), rows.labels.numpy())
        expected = reference.predict_proba(((new.to_tensor() - mean) / std).numpy())
        torch.testing.assert_close(probe.predict(new).softmax(1), torch.tensor(expected).float(), atol=2e-5, rtol=1e-3)

    def test_numbers_by_hand(self, tmp_path: Path) -> None:
        """Cosines 1, 0 and −1 with a vote of three neighbours at temperature 1."""
        rows = FeatureSet.from_tensor(torch.tensor([[2.0, 0], [0, 3], [-5, 0]]), torch.tensor([0, 1, 1]))
        probe = make_probe("knn", d_in=2, num_labels=2, num_neighbors=3, temperature=1.0, feature_norm="none")
        fit(probe, rows, tmp_path, rows)
        votes = torch.tensor([1.0, 0.0, -1.0]).exp()
        expected = torch.stack([votes[0], votes[1] + votes[2]]) / votes.sum()
        torch.testing.assert_close(probe.predict(torch.tensor([[7.0, 0]])).exp()[0], expected, atol=2e-6, rtol=1e-5)

    def test_the_number_of_neighbours_is_chosen_on_validation(self, labelled: Labelled, tmp_path: Path) -> None:
        rows, validation = labelled(80, noise=3.0), labelled(300, seed=1, noise=3.0)
        alone = {}
        for k in (1, 7, 30, 80):
            alone[k] = fit(
                make_probe("knn", num_neighbors=k, temperature=10), rows, tmp_path / str(k), validation
            ).validation
        best = max(alone, key=lambda k: (alone[k].accuracy, -alone[k].loss))
        assert best not in (1, 80)
        probe = make_probe("knn", temperature=10)
        result = fit(probe, rows, tmp_path / "path", validation, neighbors_path=(1, 7, 30, 500))
        assert result.chosen == {"num_neighbors": best}
        assert (probe.config.num_neighbors, probe.config.num_rows) == (best, 80)
        assert result.validation == alone[best]

    @pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
    def test_other_problem_types_are_weighted_means(self, problem_type: str, tmp_path: Path) -> None:
        features, new = drawn(50, 6), drawn(9, 6, seed=1)
        labels = (drawn(50, 3, seed=2) > 0).float() if problem_type[0] == "m" else drawn(50, 3, seed=2)
        rows = FeatureSet.from_tensor(features, labels)
        probe = make_probe("knn", num_neighbors=7, feature_norm="none", problem_type=problem_type)
        fit(probe, rows, tmp_path, rows)
        reference = KNeighborsRegressor(7, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = torch.tensor(reference.fit(features.numpy(), labels.numpy()).predict(new.numpy())).float()
        got = probe.predict(new)
        torch.testing.assert_close(got.sigmoid() if problem_type[0] == "m" else got, expected, atol=2e-5, rtol=1e-3)

    def test_without_rows_it_says_so(self) -> None:
        with pytest.raises(ValueError, match="holds no training rows yet: train it with ProbeTrainer"):
            make_probe("knn")(features=drawn(2, 6))


class TestPrototype:
    def test_numbers_by_hand(self, tmp_path: Path) -> None:
        """Two rows of class 0 at right angles: their mean direction is the diagonal, whatever their lengths."""
        rows = FeatureSet.from_tensor(torch.tensor([[9.0, 0], [0, 0.1], [-4, 0]]), torch.tensor([0, 0, 1]))
        probe = make_probe("prototype", d_in=2, num_labels=2, temperature=0.5, feature_norm="none")
        fit(probe, rows, tmp_path, rows)
        torch.testing.assert_close(probe.head.prototypes, torch.tensor([[0.5, 0.5], [-1, 0]]))
        half = 2**-0.5
        torch.testing.assert_close(
            probe.predict(torch.tensor([[3.0, 0], [1, 1]])),
            torch.tensor([[half, -1], [1, -half]]) / 0.5,
        )

    def test_equals_the_nearest_mean_of_unit_vectors(self, labelled: Labelled, tmp_path: Path) -> None:
        rows, new = labelled(90), labelled(50, seed=1)
        probe = make_probe("prototype", feature_norm="center")
        result = fit(probe, rows, tmp_path, new)
        mean = rows.to_tensor().mean(0)
        unit = F.normalize(rows.to_tensor() - mean, dim=1)
        means = torch.stack([unit[rows.labels == c].mean(0) for c in range(3)])
        expected = F.cosine_similarity((new.to_tensor() - mean)[:, None], means[None], dim=2) / 0.07
        torch.testing.assert_close(probe.predict(new), expected, atol=1e-3, rtol=1e-4)
        assert result.chosen == {}

    def test_a_class_without_rows_is_named(self, labelled: Labelled, tmp_path: Path) -> None:
        names = {0: "bag", 1: "dress", 2: "shoe", 3: "hat"}
        with pytest.raises(ValueError, match="A prototype is the mean of its class, and hat has no training rows"):
            fit(make_probe("prototype", num_labels=4, id2label=names), labelled(30), tmp_path, labelled(30, seed=1))


def make_aligned(images: int = 30, seed: int = 0) -> AlignedFeatures:
    """Two layers of other widths and sizes at two timesteps; one of the four tells the classes."""
    labels = torch.arange(images) % 3
    sets = {}
    for place, (layer, shape) in enumerate((("mid", (5, 3, 3)), ("up", (4, 6, 6)))):
        for t in (25, 100):
            values = drawn(images, *shape, seed=100 * seed + 10 * place + t)
            if (layer, t) == ("up", 100):
                values[torch.arange(images), labels] += 1.5
            sets[layer, t] = FeatureSet.from_tensor(values, labels)
    return AlignedFeatures(sets)


class TestFusion:
    def make(self, fusion: str, **config: Any) -> DiffusionProbe:
        inputs = make_aligned().inputs
        return make_probe("fusion", d_in=18, inputs=inputs, fusion=fusion, **config)

    def test_mixing_equals_the_equation(self) -> None:
        probe, features = self.make("mixing").eval(), {key: one[:5] for key, one in make_aligned().items()}
        head = probe.head
        randomise(head)
        weights = head.mixing_logits.exp() / head.mixing_logits.exp().sum()
        expected = torch.zeros(5, 8)
        for place, (layer, t) in enumerate((("mid", 100), ("mid", 25), ("up", 100), ("up", 25))):
            projection = head.projections[0 if layer == "mid" else 1]  # one a layer, whatever the timestep
            moments, values = head.moments[place], features[layer, t]
            for image in range(5):
                positions = values[image].flatten(1).T
                hidden = [
                    (projection.weight @ ((x - moments.feature_mean) / moments.feature_std) + projection.bias).relu()
                    for x in positions
                ]
                expected[image] += weights[place] * torch.stack(hidden).mean(0)
        expected = expected @ head.classifier.weight.T + head.classifier.bias
        torch.testing.assert_close(probe(features=features).logits, expected)
        assert len(head.projections) == 2
        assert head.mixing_weights == pytest.approx(
            dict(zip(("mid@100", "mid@25", "up@100", "up@25"), weights.tolist(), strict=True))
        )

    def test_the_input_that_tells_the_classes_gets_the_weight(self, tmp_path: Path) -> None:
        probe = self.make("mixing", width=16)
        result = fit(probe, make_aligned(90), tmp_path, make_aligned(60, seed=1), num_train_epochs=25)
        assert result.validation.accuracy > 0.9
        weights = probe.head.mixing_weights
        assert max(weights, key=weights.__getitem__) == "up@100"

    def test_attention_equals_torchs_transformer(self) -> None:
        probe = self.make("attention", depth=2, pool_size=3).eval()
        head, features = probe.head, {key: one[:4] for key, one in make_aligned().items()}
        randomise(head)
        blocks = []
        for block in head.blocks:
            layer = nn.TransformerEncoderLayer(
                8, 2, 32, dropout=0, activation="gelu", batch_first=True, norm_first=True
            ).eval()
            layer.load_state_dict(
                {
                    "self_attn.in_proj_weight": block.query_key_value.weight,
                    "self_attn.in_proj_bias": block.query_key_value.bias,
                    "self_attn.out_proj.weight": block.output.weight,
                    "self_attn.out_proj.bias": block.output.bias,
                    "linear1.weight": block.mlp[0].weight,
                    "linear1.bias": block.mlp[0].bias,
                    "linear2.weight": block.mlp[2].weight,
                    "linear2.bias": block.mlp[2].bias,
                    "norm1.weight": block.attention_norm.weight,
                    "norm1.bias": block.attention_norm.bias,
                    "norm2.weight": block.mlp_norm.weight,
                    "norm2.bias": block.mlp_norm.bias,
                }
            )
            blocks.append(layer)
        pooled = []
        with torch.no_grad():
            for t in (25, 100):
                sequence = [head.token.expand(4, 1, 8)]
                for layer, projection in zip(("mid", "up"), head.projections, strict=True):
                    moments = head.moments[head.names.index(f"{layer}@{t}")]
                    values = features[layer, t]
                    values = values.unflatten(3, (3, -1)).unflatten(2, (3, -1)).mean((3, 5))  # blocks of 3 × 3
                    tokens = values.flatten(2).transpose(1, 2)
                    sequence.append(projection((tokens - moments.feature_mean) / moments.feature_std))
                tokens = torch.cat(sequence, 1)
                assert tokens.shape == (4, 1 + 9 + 9, 8)
                for block in blocks:
                    tokens = block(tokens)
                pooled.append(tokens[:, 0])
            expected = head.classifier(torch.cat(pooled, 1))
            torch.testing.assert_close(probe(features=features).logits, expected, atol=1e-4, rtol=1e-4)

    def test_inputs_by_name_by_key_and_in_any_order(self) -> None:
        probe = self.make("mixing").eval()
        features = {key: one[:5] for key, one in make_aligned().items()}
        logits = probe(features=features).logits
        by_name = {f"{layer}@{t}": value for (layer, t), value in reversed(features.items())}
        assert torch.equal(probe(features=by_name).logits, logits)
        with pytest.raises(ValueError, match=r"takes several inputs.*'up@25': 4"):
            probe(features={key: value for key, value in features.items() if key != ("up", 25)})

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"inputs": None}, "inputs belongs to head='fusion', which needs it; got None"),
            ({"d_in": 17}, "d_in must be the sum of the widths in inputs, 18, got 17"),
            ({"inputs": {"a@1": 9, "b@2": 9}}, "inputs must be every layer at every timestep, got a@1, b@2"),
            ({"inputs": {"a": 18}}, "inputs are named layer@timestep"),
            ({"head": "linear"}, "inputs belongs to head='fusion'"),
            ({"fusion": "attention", "width": 9}, "width must be a multiple of num_attention_heads = 2, got 9"),
            ({"fusion": "sum"}, "fusion must be one of 'mixing', 'attention', got 'sum'"),
        ],
    )
    def test_invalid_configs_are_refused(self, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            make_probe(**{"head": "fusion", "d_in": 18, "inputs": make_aligned().inputs, **changes})


def make_sae(d_in: int = 6, **config: Any) -> KSparseAutoencoder:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(**{"d_in": d_in, "num_latents": 40, "k": 5, **config}))
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * drawn(40, seed=5))
        sae.b_dec.copy_(0.1 * drawn(*sae.b_dec.shape, seed=6))
        if config.get("activation") == "jumprelu":
            sae.log_threshold.copy_(0.3 * drawn(40, seed=7) - 1)
        if config.get("activation") == "batchtopk":
            sae.threshold.fill_(0.4)
        if config.get("timesteps"):
            sae.timestep_scale.copy_(torch.tensor([2.0, 0.5]))
    return sae


class TestSAE:
    @pytest.mark.parametrize("input_norm", INPUT_NORMS)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    @pytest.mark.parametrize("timestep", [None, 25, 100])
    def test_latents_are_those_of_the_sae(self, activation: str, input_norm: str, timestep: int | None) -> None:
        timesteps = None if timestep is None else [25, 100]
        sae = make_sae(activation=activation, input_norm=input_norm, timesteps=timesteps)
        probe = DiffusionProbe.from_sae(sae, timestep=timestep, num_labels=3)
        features = drawn(20, 6, seed=8)
        expected = sae.encode(features, timesteps=timestep).to_dense(40)
        assert 0 < (expected != 0).float().mean() < 0.8
        torch.testing.assert_close(probe(features=features).latent_acts, expected)

    def test_latents_of_an_image_are_pooled_over_its_positions(self) -> None:
        sae, tokens = make_sae(), drawn(4, 9, 6)
        dense = sae.encode(tokens.flatten(0, 1)).to_dense(40).unflatten(0, (4, 9))
        for pooling, expected in (("max", dense.amax(1)), ("mean", dense.mean(1))):
            probe = DiffusionProbe.from_sae(sae, num_labels=3, latent_pooling=pooling)
            torch.testing.assert_close(probe(features=tokens).latent_acts, expected)

    def test_contributions_sum_to_the_logits_without_the_bias(self, labelled: Labelled, tmp_path: Path) -> None:
        rows = FeatureSet.from_tensor(F.normalize(labelled(120).to_tensor(), dim=1), labelled(120).labels)
        probe = DiffusionProbe.from_sae(make_sae(), num_labels=3)
        fit(probe, rows, tmp_path, rows)
        output, contributions = probe(features=rows[:20]), probe.contributions(rows[:20])
        assert contributions.shape == (20, 3, 40)
        torch.testing.assert_close(contributions.sum(2), output.logits - probe.head.classifier.bias)
        weight = probe.head.classifier.weight
        for image, label, latent in ((0, 0, 3), (7, 2, 11), (19, 1, 39)):
            expected = weight[label, latent] * output.latent_acts[image, latent]
            assert contributions[image, label, latent] == expected
        with pytest.raises(ValueError, match=r"Contributions of latents are those of an sae probe.*head is mlp"):
            make_probe("mlp").contributions(rows[:2])

    def test_the_sae_is_not_trained(self, labelled: Labelled, tmp_path: Path) -> None:
        sae = make_sae()
        probe = DiffusionProbe.from_sae(sae, num_labels=3)
        fit(probe, labelled(60), tmp_path, labelled(60, seed=1))
        assert {name for name, _ in probe.named_parameters()} == {"head.classifier.weight", "head.classifier.bias"}
        assert torch.equal(probe.head.W_enc, sae.W_enc)

    @pytest.mark.parametrize(("timesteps", "timestep"), [([25, 100], None), ([25, 100], 50), (None, 25)])
    def test_timesteps_that_do_not_fit(self, timesteps: list[int] | None, timestep: int | None) -> None:
        with pytest.raises(ValueError, match=r"timestep must be that of the probe's features, for this SAE"):
            DiffusionProbe.from_sae(make_sae(timesteps=timesteps), timestep=timestep, num_labels=3)

    def test_an_incomplete_encoder_is_refused(self) -> None:
        with pytest.raises(ValueError, match="sae must hold num_latents, k, activation, input_norm, got"):
            make_probe("sae", sae={"num_latents": 4})
