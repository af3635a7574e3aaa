import math

import pytest
import torch
from torch.testing import assert_close

from diffusion_sae import KSparseAutoencoder, KSparseAutoencoderConfig
from diffusion_sae.analysis.recovery import Recovery, SyntheticDictionary, power_law, recovery


class TestRecovery:
    def test_by_hand(self) -> None:
        """(1, 0) is met by (2, 0) with cosine 1, (0, 1) best by (3, 4) with 0.8: one of two is found."""
        W_dec = torch.tensor([[2.0, 0.0], [3.0, 4.0], [0.0, -5.0]])
        result = recovery(W_dec, torch.eye(2))
        assert result.mean_max_cosine == pytest.approx((1 + 0.8) / 2)
        assert result.found == 0.5

    def test_found_means_above_nine_tenths(self) -> None:
        def at(cosine: float) -> list[float]:
            return [cosine, math.sqrt(1 - cosine**2)]

        direction = torch.tensor([[1.0, 0.0]])
        assert recovery(torch.tensor([at(0.91)]), direction).found == 1
        assert recovery(torch.tensor([at(0.89)]), direction).found == 0

    def test_signs_count(self) -> None:
        assert recovery(-torch.eye(1), torch.eye(1)) == Recovery(-1.0, 0.0)

    def test_one_row_may_find_several_and_zeros_find_nothing(self) -> None:
        directions = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
        assert recovery(torch.tensor([[1.0, 0.05]]), directions).found == 1
        assert recovery(torch.zeros(3, 2), directions) == Recovery(0.0, 0.0)

    def test_the_truth_and_more_finds_all_in_any_order(self) -> None:
        directions = SyntheticDictionary(num_features=1500, d_in=16, seed=3).directions
        W_dec = torch.cat([torch.randn(7, 16, generator=torch.Generator().manual_seed(0)), directions.flip(0) * 0.1])
        result = recovery(W_dec, directions)
        assert result.found == 1
        assert result.mean_max_cosine == pytest.approx(1)

    def test_the_inputs_stay_as_they_are(self) -> None:
        W_dec = torch.nn.Parameter(torch.tensor([[2.0, 0.0]]))
        recovery(W_dec, torch.eye(2))
        assert W_dec.tolist() == [[2.0, 0.0]]
        assert W_dec.grad is None

    @pytest.mark.parametrize(
        ("shapes", "message"),
        [
            (((3, 4), (3, 5)), r"of the same d_in, got \(3, 4\) and \(3, 5\)"),
            (((4,), (3, 4)), r"must be \(rows, d_in\)"),
            (((0, 4), (3, 4)), "0 decoder rows and 3 directions"),
            (((3, 4), (0, 4)), "3 decoder rows and 0 directions"),
        ],
    )
    def test_what_cannot_be_compared(self, shapes: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            recovery(torch.ones(shapes[0]), torch.ones(shapes[1]))


class TestPowerLaw:
    def test_by_hand(self) -> None:
        assert_close(power_law(4, 1.0, 0.0), torch.full((4,), 0.25))
        assert_close(power_law(2, 0.75, 1.0), torch.tensor([0.5, 0.25]))
        assert_close(power_law(4, 0.5, 2.0), torch.tensor([1, 1 / 4, 1 / 9, 1 / 16]) * 0.5 / (205 / 144))

    def test_no_frequency_is_above_one(self) -> None:
        """1, 1/2 and 1/3 times 12/11 have the sum 2; the first is too large, the others share the other 1, 3 to 2."""
        assert_close(power_law(3, 2.0, 1.0), torch.tensor([1.0, 0.6, 0.4]))
        assert_close(power_law(3, 3.0, 1.0), torch.ones(3))

    def test_an_impossible_sum(self) -> None:
        with pytest.raises(ValueError, match="cannot have the sum 4"):
            power_law(3, 4.0, 1.0)


class TestSyntheticDictionary:
    def test_directions_have_unit_norm_and_follow_from_the_seed(self) -> None:
        one = SyntheticDictionary(num_features=20, d_in=8, active=2, seed=1)
        assert_close(one.directions.norm(dim=1), torch.ones(20))
        assert torch.equal(one.directions, SyntheticDictionary(num_features=20, d_in=8, active=2, seed=1).directions)
        assert not torch.equal(one.directions, SyntheticDictionary(num_features=20, d_in=8, active=2).directions)

    def test_an_sae_of_the_same_seed_does_not_begin_with_the_truth(self) -> None:
        truth = SyntheticDictionary(num_features=64, d_in=32, seed=5)
        config = KSparseAutoencoderConfig(d_in=32, num_latents=128, k=2, init_seed=5)
        assert recovery(KSparseAutoencoder(config).W_dec, truth.directions).found == 0

    def test_rows_follow_from_the_seeds_alone(self) -> None:
        truth = SyntheticDictionary(num_features=20, d_in=8, active=2)
        before = torch.get_rng_state()
        rows = truth.rows(5, 7)
        assert torch.equal(rows, truth.rows(5, 7))
        assert rows.shape == (5, 8)
        assert rows.dtype == torch.float32
        assert not torch.equal(rows, truth.rows(5, 8))
        assert torch.equal(before, torch.get_rng_state())

    def test_rows_are_sums_of_positive_parts_with_the_stated_frequencies(self) -> None:
        """With as many dimensions as features the code can be solved for."""
        truth = SyntheticDictionary(num_features=6, d_in=6, active=1.5, exponent=1.0)
        code = torch.linalg.solve(truth.directions.double().T, truth.rows(40_000, 0).double().T).T
        active = code.abs() > 1e-3
        assert_close(active.double().mean(0), truth.frequencies.double(), atol=0.01, rtol=0)
        assert active.sum(1).double().mean().item() == pytest.approx(1.5, abs=0.02)
        sizes = code[active]
        assert sizes.min() > 0.49
        assert sizes.max() < 1.51
        assert sizes.mean().item() == pytest.approx(1, abs=0.01)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_features": 0}, "num_features must be an integer ≥ 1"),
            ({"active": 0}, "active must be a number > 0"),
            ({"active": 513}, "active must be a number > 0 and ≤ 512"),
            ({"exponent": -1}, "exponent must be a number ≥ 0"),
            ({"seed": -1}, "seed must be an integer ≥ 0"),
        ],
    )
    def test_invalid_settings(self, changes: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SyntheticDictionary(**changes)
