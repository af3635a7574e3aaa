"""The mathematics of KSparseAutoencoder, against a worked example, naive versions and dense autograd."""

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import r2_score
from torch import Tensor

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.sae.code import SparseCode
from diffusion_sae.sae.losses import fraction_of_variance_unexplained, normalized_mse

D_IN, NUM_LATENTS, K = 7, 20, 4
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec")


@pytest.fixture
def worked() -> KSparseAutoencoder:
    """Two dimensions, three latents, two active: small enough for the numbers below to be worked out by hand."""
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=2, num_latents=3, k=2))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_enc.copy_(torch.tensor([0.0, 0.0, -1.0]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


@pytest.fixture
def worked_features() -> Tensor:
    return torch.tensor([[4.0, 2.0], [0.0, -1.0]])


@pytest.fixture
def sae() -> KSparseAutoencoder:
    """Random in all four parameters, untied, decoder rows of unit norm."""
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K, encoder_init="kaiming"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.copy_(torch.randn(NUM_LATENTS, generator=generator) * 0.1)
        sae.b_dec.copy_(torch.randn(D_IN, generator=generator))
    return sae


@pytest.fixture
def features() -> Tensor:
    return torch.randn(33, D_IN, generator=torch.Generator().manual_seed(2)) * 2 + 0.5


def test_worked_example_encodes_the_largest_positive_pre_activations(
    worked: KSparseAutoencoder, worked_features: Tensor
) -> None:
    # x − b_dec = (3, 2): pre-activations 3, 2, 0.6·3 + 0.8·2 − 1 = 2.4;  (−1, −1): −1, −1, −2.4
    torch.testing.assert_close(worked.pre_acts(worked_features), torch.tensor([[3.0, 2.0, 2.4], [-1.0, -1.0, -2.4]]))
    code = worked.encode(worked_features)
    torch.testing.assert_close(code.top_acts, torch.tensor([[3.0, 2.4], [0.0, 0.0]]))
    assert code.top_indices[0].tolist() == [0, 2]
    assert 2 not in code.top_indices[1]  # −2.4 is not among the two largest
    torch.testing.assert_close(code.to_dense(3), torch.tensor([[3.0, 0.0, 2.4], [0.0, 0.0, 0.0]]))


def test_worked_example_reconstruction_loss_and_fvu(worked: KSparseAutoencoder, worked_features: Tensor) -> None:
    output = worked(worked_features)
    # 3·(1, 0) + 2.4·(0.6, 0.8) + (1, 0);  nothing is active in the second row, which gets b_dec
    torch.testing.assert_close(output.reconstruction, torch.tensor([[5.44, 1.92], [1.0, 0.0]]))
    # ‖(1.44, −0.08)‖² / 20 = 0.104 and ‖(1, 1)‖² / 1 = 2, of which the mean
    assert output.loss.item() == pytest.approx(1.052, rel=1e-6)
    # errors 2.08 + 2 over ‖±(2, 1.5)‖² twice = 12.5
    assert output.fvu.item() == pytest.approx(0.3264, rel=1e-6)
    assert output.auxk_loss.item() == 0


def test_worked_example_auxk_loss(worked: KSparseAutoencoder, worked_features: Tensor) -> None:
    dead = torch.tensor([False, True, False])
    output = worked(worked_features, dead, auxk=1, auxk_alpha=0.5)
    # ê = 2·(0, 1) for e = (−1.44, 0.08): 1.44² + 1.92² = 5.76;  ê = 0 for e = (−1, −1): 2;  over 2.08 + 2
    assert output.auxk_loss.item() == pytest.approx(7.76 / 4.08, rel=1e-6)
    assert output.loss.item() == pytest.approx(1.052 + 0.5 * 7.76 / 4.08, rel=1e-6)


def test_encode_equals_a_naive_loop(sae: KSparseAutoencoder, features: Tensor) -> None:
    W_enc, b_enc, b_dec = sae.W_enc.tolist(), sae.b_enc.tolist(), sae.b_dec.tolist()
    code = sae.encode(features)
    assert code.top_acts.shape == code.top_indices.shape == (len(features), K)
    for row, acts, indices in zip(features.tolist(), code.top_acts, code.top_indices, strict=True):
        pre = [
            sum((row[d] - b_dec[d]) * W_enc[d][i] for d in range(D_IN)) + b_enc[i]  # one latent
            for i in range(NUM_LATENTS)
        ]
        expected = sorted(range(NUM_LATENTS), key=lambda i: -pre[i])[:K]
        assert indices.tolist() == expected
        assert acts.tolist() == pytest.approx([max(pre[i], 0.0) for i in expected], abs=1e-5)


def test_decode_equals_a_naive_loop(sae: KSparseAutoencoder, features: Tensor) -> None:
    code = sae.encode(features)
    W_dec, b_dec = sae.W_dec.tolist(), sae.b_dec.tolist()
    for row, acts, indices in zip(sae.decode(code), code.top_acts.tolist(), code.top_indices.tolist(), strict=True):
        expected = [b_dec[d] + sum(a * W_dec[i][d] for a, i in zip(acts, indices, strict=True)) for d in range(D_IN)]
        assert row.tolist() == pytest.approx(expected, abs=1e-5)


def test_decode_equals_the_dense_product(sae: KSparseAutoencoder, features: Tensor) -> None:
    code = sae.encode(features)
    dense = code.to_dense(NUM_LATENTS)
    assert dense.shape == (len(features), NUM_LATENTS)
    torch.testing.assert_close(sae.decode(code), dense @ sae.W_dec + sae.b_dec)


def test_decode_takes_codes_that_a_person_edited(sae: KSparseAutoencoder) -> None:
    code = SparseCode(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[5, 0], [3, 3]]))
    expected = torch.stack([2 * sae.W_dec[5], 4 * sae.W_dec[3]]) + sae.b_dec
    torch.testing.assert_close(sae.decode(code), expected)


def test_never_more_than_k_active_and_never_negative(sae: KSparseAutoencoder, features: Tensor) -> None:
    code = sae.encode(features)
    assert (code.top_acts >= 0).all()
    assert ((code.to_dense(NUM_LATENTS) > 0).sum(1) <= K).all()
    assert (code.top_acts.diff(dim=1) <= 0).all(), "largest first"


@pytest.mark.parametrize("positive", [0, 1, K - 1, K, K + 2])
def test_fewer_than_k_positive_pre_activations_leave_fewer_active(sae: KSparseAutoencoder, positive: int) -> None:
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.fill_(-1.0)
        sae.b_enc[:positive] = torch.arange(1.0, positive + 1)
    code = sae.encode(torch.zeros(1, D_IN))
    active = code.top_indices[code.top_acts > 0]
    assert sorted(active.tolist()) == list(range(max(0, positive - K), positive))


def dense_forward(
    x: Tensor, parameters: dict[str, Tensor], dead: Tensor | None, auxk: int, auxk_alpha: float
) -> tuple[Tensor, Tensor]:
    """The whole loss with dense masked codes and nothing sparse in it: loss, AuxK loss."""
    W_enc, b_enc, W_dec, b_dec = (parameters[name] for name in PARAMETERS)
    pre = (x - b_dec) @ W_enc + b_enc

    def keep_largest(values: Tensor, count: int) -> Tensor:
        return torch.where(values >= values.sort(dim=1, descending=True).values[:, count - 1 : count], values, 0.0)

    reconstruction = keep_largest(pre, K).clamp(min=0) @ W_dec + b_dec
    loss = (((reconstruction - x) ** 2).sum(1) / (x**2).sum(1)).mean()
    if dead is None:
        return loss, torch.zeros(())
    residual = (x - reconstruction).detach()
    columns = torch.nonzero(dead).flatten()
    estimate = keep_largest(pre[:, columns], min(auxk, len(columns))).clamp(min=0) @ W_dec[columns]
    auxk_loss = ((estimate - residual) ** 2).sum() / (residual**2).sum()
    return loss + auxk_alpha * auxk_loss, auxk_loss


@pytest.mark.parametrize("auxk", [0, 3, 50], ids=["no_auxk", "auxk", "auxk_above_dead"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
def test_loss_and_all_gradients_equal_dense_autograd(
    sae: KSparseAutoencoder, features: Tensor, auxk: int, dtype: torch.dtype, tolerance: float
) -> None:
    sae, features = sae.to(dtype), features.to(dtype)
    dead = torch.zeros(NUM_LATENTS, dtype=torch.bool)
    dead[[1, 4, 6, 9, 17]] = True
    output = sae(features, dead, auxk, 0.3)
    output.loss.backward()
    copies = {name: getattr(sae, name).detach().clone().requires_grad_() for name in PARAMETERS}
    loss, auxk_loss = dense_forward(features, copies, dead if auxk else None, auxk, 0.3)
    loss.backward()
    assert output.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert output.auxk_loss.item() == pytest.approx(auxk_loss.item(), rel=tolerance)
    for name, copy in copies.items():
        gradient = getattr(sae, name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            gradient, copy.grad, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_latents_in_another_order_reconstruct_the_same(sae: KSparseAutoencoder, features: Tensor) -> None:
    before = sae(features)
    order = torch.randperm(NUM_LATENTS, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_enc[:, order])
        sae.b_enc.copy_(sae.b_enc[order])
        sae.W_dec.copy_(sae.W_dec[order])
    after = sae(features)
    torch.testing.assert_close(after.reconstruction, before.reconstruction)
    assert torch.equal(order[after.top_indices].sort(1).values, before.top_indices.sort(1).values)


def test_rows_do_not_depend_on_their_batch(sae: KSparseAutoencoder, features: Tensor) -> None:
    whole = sae(features).reconstruction
    torch.testing.assert_close(torch.cat([sae(part).reconstruction for part in features.split(5)]), whole)


def test_normalized_mse_worked_by_hand() -> None:
    target = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    reconstruction = torch.tensor([[3.0, 3.0], [1.0, 2.0]])
    # 1/25 and 1/4: rows count alike, whatever their length
    assert normalized_mse(reconstruction, target).item() == pytest.approx((0.04 + 0.25) / 2)
    assert normalized_mse(target, target).item() == 0
    assert normalized_mse(torch.zeros_like(target), target).item() == pytest.approx(1.0)


def test_fvu_worked_by_hand() -> None:
    target = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # mean (2, 2): Σ‖x − x̄‖² = 5 + 5
    reconstruction = torch.tensor([[1.0, 1.0], [3.0, 2.0]])  # Σ‖x − x̂‖² = 1 + 4
    assert fraction_of_variance_unexplained(reconstruction, target).item() == pytest.approx(0.5)
    assert fraction_of_variance_unexplained(target, target).item() == 0
    assert fraction_of_variance_unexplained(target.mean(0).expand(2, 2), target).item() == pytest.approx(1.0)


def test_fvu_is_one_minus_the_variance_weighted_r2(sae: KSparseAutoencoder, features: Tensor) -> None:
    output = sae(features)
    r2 = r2_score(features.numpy(), output.reconstruction.detach().numpy(), multioutput="variance_weighted")
    assert output.fvu.item() == pytest.approx(1 - r2, rel=1e-5)


class TestAuxK:
    """The loss that revives dead latents: Σ‖e − ê‖² / Σ‖e‖² with e = x − x̂."""

    @pytest.fixture
    def planted(self) -> tuple[KSparseAutoencoder, Tensor, Tensor]:
        """What the alive latent leaves over is exactly what the dead ones write: direction 1; b_dec is far off."""
        sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=3, num_latents=3, k=1))
        with torch.no_grad():
            sae.W_dec.copy_(torch.eye(3))
            sae.W_enc.copy_(torch.eye(3))
            sae.b_dec.copy_(torch.tensor([10.0, -20.0, 5.0]))
        features = torch.tensor([[5.0, 2.0, 0.0], [7.0, 1.0, 0.0], [4.0, 3.0, 0.0]]) + sae.b_dec.detach()
        return sae, features, torch.tensor([False, True, True])

    def test_a_residual_that_dead_latents_hold_costs_nothing(
        self, planted: tuple[KSparseAutoencoder, Tensor, Tensor]
    ) -> None:
        sae, features, dead = planted
        # e = (0, 2, 0), …: with the sign turned it would cost 4, with b_dec added to ê much more
        output = sae(features, dead, auxk=1)
        assert output.top_indices.flatten().tolist() == [0, 0, 0]
        assert output.auxk_loss.item() == pytest.approx(0, abs=1e-10)

    def test_dead_latents_that_write_nothing_cost_one(self, planted: tuple[KSparseAutoencoder, Tensor, Tensor]) -> None:
        sae, features, dead = planted
        with torch.no_grad():
            sae.b_enc[1:] = -100.0
        assert sae(features, dead, auxk=2).auxk_loss.item() == pytest.approx(1.0)

    def test_alive_latents_take_no_part(self, planted: tuple[KSparseAutoencoder, Tensor, Tensor]) -> None:
        sae, features, _ = planted
        only_idle = torch.tensor([False, False, True])  # latent 1, which could do it, is alive: nothing is explained
        assert sae(features, only_idle, auxk=3).auxk_loss.item() == pytest.approx(1.0)

    def test_gradient_reaches_dead_latents_only(self, sae: KSparseAutoencoder, features: Tensor) -> None:
        dead = torch.zeros(NUM_LATENTS, dtype=torch.bool)
        dead[[0, 3, 8, 11]] = True
        gradients = {}
        for alpha in (0.0, 1.0):
            sae.zero_grad()
            sae(features, dead, auxk=2, auxk_alpha=alpha).loss.backward()
            gradients[alpha] = {name: getattr(sae, name).grad.clone() for name in ("W_enc", "b_enc", "W_dec")}
        by_auxk = {name: gradients[1.0][name] - gradients[0.0][name] for name in gradients[0.0]}
        for name, gradient in by_auxk.items():
            by_latent = (gradient.T if name == "W_enc" else gradient).reshape(NUM_LATENTS, -1).abs().amax(1)
            assert by_latent[~dead].max() < 1e-6, name
            assert by_latent[dead].max() > 1e-3, name

    def test_gradient_does_not_pass_through_the_residual(
        self, planted: tuple[KSparseAutoencoder, Tensor, Tensor]
    ) -> None:
        """Else the alive latents would learn to leave over what the dead ones can write."""
        sae, features, dead = planted
        with torch.no_grad():
            sae.W_enc[:, 1] *= 0.5  # so that the loss is not at its minimum
        sae(features, dead, auxk=1, auxk_alpha=1.0).loss.backward()
        with_auxk = sae.W_dec.grad[0].clone()
        sae.zero_grad()
        sae(features).loss.backward()
        assert torch.equal(with_auxk, sae.W_dec.grad[0])

    @pytest.mark.parametrize("auxk", [1, 3, 100])
    def test_equals_a_naive_loop(self, sae: KSparseAutoencoder, features: Tensor, auxk: int) -> None:
        dead = [0, 3, 8, 11, 12]
        mask = torch.zeros(NUM_LATENTS, dtype=torch.bool)
        mask[dead] = True
        error = total = 0.0
        with torch.no_grad():
            output = sae(features, mask, auxk)
            pre_acts = sae.pre_acts(features)
            for row in range(len(features)):
                residual = features[row] - output.reconstruction[row]
                chosen = sorted(dead, key=lambda i: -pre_acts[row, i].item())[:auxk]
                estimate = torch.zeros(D_IN)
                for i in chosen:
                    estimate += max(pre_acts[row, i].item(), 0.0) * sae.W_dec[i]
                error += (residual - estimate).pow(2).sum().item()
                total += residual.pow(2).sum().item()
        assert output.auxk_loss.item() == pytest.approx(error / total, rel=1e-5)

    def test_no_dead_latent_no_auxk(self, sae: KSparseAutoencoder, features: Tensor) -> None:
        plain = sae(features)
        none_dead = sae(features, torch.zeros(NUM_LATENTS, dtype=torch.bool), auxk=4)
        switched_off = sae(features, torch.ones(NUM_LATENTS, dtype=torch.bool), auxk=0)
        assert none_dead.auxk_loss.item() == switched_off.auxk_loss.item() == 0
        assert none_dead.loss.item() == switched_off.loss.item() == plain.loss.item()


def test_normalize_decoder_keeps_directions(sae: KSparseAutoencoder) -> None:
    before = sae.W_dec.detach().clone()
    lengths = torch.linspace(0.1, 9, NUM_LATENTS)[:, None]
    with torch.no_grad():
        sae.W_dec *= lengths
    sae.normalize_decoder_()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(NUM_LATENTS))
    torch.testing.assert_close(sae.W_dec.detach(), before)


def test_the_gradient_parallel_to_a_decoder_row_is_removed(sae: KSparseAutoencoder, features: Tensor) -> None:
    sae(features).loss.backward()
    gradient = sae.W_dec.grad.clone()
    rows = sae.W_dec.detach()
    parallel = (gradient * rows).sum(1)
    assert parallel.abs().max() > 1e-3
    others = {name: getattr(sae, name).grad.clone() for name in ("W_enc", "b_enc", "b_dec")}
    sae.remove_parallel_gradient_()
    assert (sae.W_dec.grad * rows).sum(1).abs().max() < 1e-7
    torch.testing.assert_close(sae.W_dec.grad + parallel[:, None] * rows, gradient)
    for name, value in others.items():
        assert torch.equal(getattr(sae, name).grad, value)


def test_tied_initialisation_is_the_transpose_with_unit_norm() -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(NUM_LATENTS))
    assert (sae.b_enc == 0).all()
    assert (sae.b_dec == 0).all()
    assert sae.W_enc.untyped_storage().data_ptr() != sae.W_dec.untyped_storage().data_ptr(), "equal, not shared"


def test_kaiming_initialisation_is_torchs_and_independent() -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=64, num_latents=512, k=K, encoder_init="kaiming"))
    bound = torch.nn.init.kaiming_uniform_(torch.empty(64, 512)).abs().max().item()
    assert bound == pytest.approx((6 / 512) ** 0.5, rel=1e-3)
    assert sae.W_enc.abs().max().item() == pytest.approx(bound, rel=1e-3)
    assert sae.W_enc.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)  # of a uniform distribution
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(512))
    cosine = torch.nn.functional.cosine_similarity(sae.W_enc.T, sae.W_dec, dim=1)
    assert cosine.mean().abs() < 0.02


@pytest.mark.parametrize("encoder_init", ["tied", "kaiming"])
def test_initialisation_depends_on_init_seed_alone(encoder_init: str) -> None:
    def weights(init_seed: int) -> dict[str, Tensor]:
        shape = {"d_in": D_IN, "num_latents": NUM_LATENTS, "k": K, "encoder_init": encoder_init}
        return KSparseAutoencoder(KSparseAutoencoderConfig(**shape, init_seed=init_seed)).state_dict()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.random.get_rng_state()
        first = weights(0)
        assert torch.equal(torch.random.get_rng_state(), before), "the global random state was used"
        torch.manual_seed(2)
        second, other = weights(0), weights(1)
    assert all(torch.equal(first[name], second[name]) for name in PARAMETERS)
    assert not torch.equal(first["W_dec"], other["W_dec"])
    assert not torch.equal(first["W_enc"], other["W_enc"])


def test_parameter_names_and_layout() -> None:
    sae = KSparseAutoencoder(KSparseAutoencoderConfig(d_in=D_IN, num_latents=NUM_LATENTS, k=K))
    shapes = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    assert shapes == {
        "W_enc": (D_IN, NUM_LATENTS),
        "b_enc": (NUM_LATENTS,),
        "W_dec": (NUM_LATENTS, D_IN),
        "b_dec": (D_IN,),
    }


@pytest.mark.parametrize("call", [lambda sae, x: sae(x), lambda sae, x: sae.encode(x)], ids=["forward", "encode"])
@pytest.mark.parametrize("shape", [(D_IN,), (5, D_IN + 1), (2, 3, D_IN)])
def test_features_of_another_shape_are_refused(
    sae: KSparseAutoencoder, call: Callable[[KSparseAutoencoder, Tensor], object], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=rf"shape \(N, d_in\) = \(N, {D_IN}\), got \({', '.join(map(str, shape))}"):
        call(sae, torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_no_numbers_are_refused(sae: KSparseAutoencoder, features: Tensor, value: float) -> None:
    features[3, 2] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        sae.encode(features)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sae(features)
