"""BatchTopK against a global top-k over dense latents, JumpReLU against its formulas, the threshold's average."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.sae import activations
from diffusion_sae.sae.activations import JumpReLU, Step, batch_top_k
from diffusion_sae.sae.encoder import encode_top_k
from diffusion_sae.sae.losses import l0_penalty, l1_penalty
from diffusion_sae.sae.sparse import Encode, SparseGradients

D_IN, NUM_LATENTS, K = 6, 40, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_batch_top_k(features: Tensor, bias: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
    """Dense latents: the N · k largest of all, where positive."""
    latent_acts = ((features - bias) @ W_enc.T + b_enc).relu()
    kept = latent_acts.detach().flatten().topk(len(features) * k).indices
    return latent_acts * torch.zeros(latent_acts.numel()).index_fill_(0, kept, 1.0).view_as(latent_acts)


def encoded(*tensors: Tensor, **changes: Any) -> tuple[Tensor, Tensor]:
    """As the SAE does it: with the gradients of the dense product, free places 0."""
    *of_product, k = tensors
    values, indices = Encode.apply(*of_product, partial(batch_top_k, k=k), None, changes.get("collect"))
    return values.relu(), indices


def to_dense(code: tuple[Tensor, Tensor], latents: int = NUM_LATENTS) -> Tensor:
    return code[0].new_zeros(len(code[0]), latents).scatter_add(1, code[1], code[0])


def skewed(rows: int) -> Tensor:
    """The first row is much longer than the others, and takes most latents."""
    features = draw(rows, D_IN) * 0.1
    features[0] *= 300
    return features


CASES = {
    "even": (draw(20, D_IN), 0.0),
    "one_row": (draw(1, D_IN), 0.0),
    "one_row_takes_far_more_than_2k": (skewed(20), 0.0),
    "few_positive": (draw(20, D_IN), -4.0),
    "all_negative": (draw(20, D_IN), -100.0),
    "some_rows_negative": (skewed(20), -1.0),
}


class TestBatchTopK:
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.parametrize("k", [1, K, NUM_LATENTS])
    @pytest.mark.parametrize("bias_per_row", [False, True])
    def test_equals_a_global_top_k_with_its_gradients(self, case: str, k: int, bias_per_row: bool) -> None:
        features, shift = CASES[case]
        bias = draw(*([len(features)] if bias_per_row else []), D_IN, seed=1) * 0.1
        tensors = [features, bias, draw(NUM_LATENTS, D_IN, seed=2), draw(NUM_LATENTS, seed=3) * 0.1 + shift]
        got = [tensor.clone().requires_grad_() for tensor in tensors]
        expected = [tensor.clone().requires_grad_() for tensor in tensors]
        code, dense = encoded(*got, k), dense_batch_top_k(*expected, k)
        torch.testing.assert_close(to_dense(code), dense)
        assert (code[0] >= 0).all()
        assert code[0].shape[1] == max(1, int((dense > 0).sum(1).max())), "as wide as the widest row"
        probe = draw(*dense.shape, seed=4)
        (to_dense(code) * probe).sum().backward()
        (dense * probe).sum().backward()
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-4)

    def test_the_skewed_case_is_skewed(self) -> None:
        features, _ = CASES["one_row_takes_far_more_than_2k"]
        counts = (
            dense_batch_top_k(features, torch.zeros(D_IN), draw(NUM_LATENTS, D_IN), torch.zeros(NUM_LATENTS), K) > 0
        ).sum(1)
        assert counts[0] > 4 * K
        assert counts.min() < K

    def test_rows_offer_more_only_if_that_is_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        offered = []

        def look(*args: Tensor, k: int) -> tuple[Tensor, Tensor]:
            offered.append((len(args[0]), k))
            return encode_top_k(*args, k=k)

        monkeypatch.setattr(activations, "encode_top_k", lambda f, w, b, k: look(f, w, b, k=k))
        weights = draw(NUM_LATENTS, D_IN, seed=2), torch.zeros(NUM_LATENTS)
        alike = CASES["even"][0][:1].expand(20, -1)
        for features, expected in ((alike, [(20, 2 * K)]), (skewed(20), [(20, 2 * K), (5, 4 * K), (1, 8 * K)])):
            offered.clear()
            values, _ = batch_top_k(features, *weights, k=K)
            assert offered == expected, "(rows, latents): those alone whose last offer was wanted"
            assert (values > 0).sum() == len(features) * K

    def test_no_more_than_asked_where_many_are_equal(self) -> None:
        alike = draw(1, D_IN).expand(20, -1)
        values, _ = batch_top_k(alike, draw(NUM_LATENTS, D_IN).abs() * 0 + alike[0], torch.zeros(NUM_LATENTS), k=K)
        assert (values > 0).sum() == 20 * K

    def test_gradients_noted_instead_of_formed(self) -> None:
        W_enc = draw(NUM_LATENTS, D_IN, seed=2).requires_grad_()
        notes = SparseGradients(NUM_LATENTS)
        tensors = CASES["even"][0], torch.zeros(D_IN), W_enc, torch.zeros(NUM_LATENTS)
        encoded(*tensors, K, collect=notes)[0].sum().backward()
        assert W_enc.grad is None
        assert len(notes.W_enc) == 1


class TestJumpReLU:
    PRE_ACTS = torch.tensor([[0.2, 0.9, 1.1, 3.0], [1.0, 2.4, 2.6, 0.0]])
    THRESHOLD = torch.tensor([1.0, 1.0, 2.5, 0.5])
    WIDTH = 0.5
    # |p − θ| < ε / 2 at (0, 1), (1, 0) and (1, 2)
    PROBE = torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])

    def test_forward_by_hand(self) -> None:
        acts = JumpReLU.apply(self.PRE_ACTS, self.THRESHOLD, self.WIDTH)
        assert acts.tolist() == torch.tensor([[0.0, 0, 0, 3.0], [0, 2.4, 2.6, 0]]).tolist()
        steps = Step.apply(self.PRE_ACTS, self.THRESHOLD, self.WIDTH)
        assert steps.tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]
        assert steps.dtype == torch.float32

    def test_backward_by_hand(self) -> None:
        pre_acts, threshold = self.PRE_ACTS.clone().requires_grad_(), self.THRESHOLD.clone().requires_grad_()
        (JumpReLU.apply(pre_acts, threshold, self.WIDTH) * self.PROBE).sum().backward()
        assert pre_acts.grad.tolist() == [[0, 0, 0, 4], [0, 6, 7, 0]]
        # −(θ / ε) · the probe, where near: −2 · 5; −2 · 2; −5 · 7; nothing
        torch.testing.assert_close(threshold.grad, torch.tensor([-10.0, -4.0, -35.0, 0.0]))

    def test_backward_of_the_step_by_hand(self) -> None:
        pre_acts, threshold = self.PRE_ACTS.clone().requires_grad_(), self.THRESHOLD.clone().requires_grad_()
        (Step.apply(pre_acts, threshold, self.WIDTH) * self.PROBE).sum().backward()
        assert pre_acts.grad is None
        torch.testing.assert_close(threshold.grad, torch.tensor([-10.0, -4.0, -14.0, 0.0]))  # −(1 / ε) · the probe

    def test_the_estimate_is_the_gradient_of_the_expectation(self) -> None:
        """For many p of a known density f: ∂/∂θ of E[z] is −θ f(θ), of E[1[p > θ]] is −f(θ)."""
        pre_acts = torch.rand(200_000, 1, generator=torch.Generator().manual_seed(0)) * 2  # f = 1 / 2
        threshold = torch.tensor([0.8], requires_grad=True)
        for function, expected in ((JumpReLU, -0.4), (Step, -0.5)):
            threshold.grad = None
            function.apply(pre_acts, threshold, 0.1).mean().backward()
            assert threshold.grad.item() == pytest.approx(expected, rel=0.02)

    def test_a_threshold_below_what_is_wanted_rises(self) -> None:
        """More latents are active than k: the penalty's gradient in θ is negative, so that θ grows."""
        pre_acts, threshold = draw(500, 8).relu(), torch.full((8,), 0.3, requires_grad=True)
        l0_penalty(Step.apply(pre_acts, threshold, 0.2), 1).backward()
        assert (threshold.grad < 0).all()
        fewer = torch.full((8,), 2.0, requires_grad=True)
        l0_penalty(Step.apply(pre_acts, fewer, 0.2), 4).backward()
        assert fewer.grad.max() > 0
        assert fewer.grad.min() >= 0


def test_penalties_by_hand() -> None:
    acts, norms = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([1.0, 0.5])
    target = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert l1_penalty(acts, norms, target).item() == pytest.approx((2 / 5 + 1.5 / 1) / 2)
    assert l0_penalty((acts > 0).float(), 3).item() == pytest.approx((1.5 / 3 - 1) ** 2)
    assert l0_penalty((acts > 0).float(), 1).item() == pytest.approx(0.25)


class TestThresholdOfBatchTopK:
    @pytest.fixture
    def sae(self) -> KSparseAutoencoder:
        return KSparseAutoencoder(
            KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, activation="batchtopk")
        )

    def test_moving_average_of_the_smallest_latent_that_was_kept(self, sae: KSparseAutoencoder) -> None:
        assert sae.threshold.item() == 0
        sae.update_threshold_(torch.tensor([[3.0, 0.0], [2.0, 5.0]]))
        assert sae.threshold.item() == 2.0, "the first as it is"
        sae.update_threshold_(torch.tensor([[4.0, 0.0], [6.0, 5.0]]), rate=0.25)
        assert sae.threshold.item() == pytest.approx(2.5)
        sae.update_threshold_(torch.zeros(2, 2))
        assert sae.threshold.item() == pytest.approx(2.5), "nothing was active, nothing is learned"

    def test_with_the_batchs_own_threshold_encode_gives_what_training_gave(self, sae: KSparseAutoencoder) -> None:
        features = draw(30, D_IN)
        output = sae.train()(features)
        smallest = output.top_acts[output.top_acts > 0].min()
        sae.threshold.copy_(smallest * 0.9999)
        assert (output.top_acts > 0).sum() <= 30 * K
        torch.testing.assert_close(
            sae.encode(features).to_dense(NUM_LATENTS), to_dense((output.top_acts, output.top_indices))
        )

    def test_training_lets_rows_compete_and_eval_does_not(self, sae: KSparseAutoencoder) -> None:
        features = draw(8, D_IN)
        longer = torch.cat([features, 100 * features])
        sae.threshold.fill_(0.5)
        in_training = [sae.train()(rows).top_acts[:8] for rows in (features, longer)]
        assert (in_training[0] > 0).sum() > (in_training[1] > 0).sum()
        in_eval = [sae.eval()(rows).reconstruction[:8] for rows in (features, longer)]
        torch.testing.assert_close(*in_eval)


@pytest.mark.parametrize(("activation", "k"), [("topk", K), ("relu_topk", K), ("signed_topk", K)])
def test_top_k_activations_of_dense_pre_activations(activation: str, k: int) -> None:
    """The signs stay in `signed_topk` alone."""
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=k, activation=activation))
    with torch.no_grad():
        sae.b_enc.fill_(-2.5)
    features = draw(30, D_IN)
    best = sae.pre_acts(features).topk(k, dim=1)
    assert (best.values < 0).any()
    expected = best.values if activation == "signed_topk" else best.values.relu()
    code = sae.encode(features)
    torch.testing.assert_close(code.top_acts, expected)
    active = code.top_acts != 0
    assert torch.equal(code.top_indices[active], best.indices[active])
