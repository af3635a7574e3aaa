"""The selection and the sparse products against `torch.topk`, dense products and dense autograd."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from diffusion_sae.sae import encoder, scratch
from diffusion_sae.sae.encoder import encode_above, encode_top_k, row_block
from diffusion_sae.sae.selection import group_size, pad_rows, top_k
from diffusion_sae.sae.sparse import ByLatent, DecodeRows, Encode, NormalizedMSE, SparseGradients, decode_rows

INFINITY = math.inf


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weights(latents: int, d_in: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return draw(latents, d_in, seed=1, dtype=dtype), draw(latents, seed=2, dtype=dtype)


def by_size(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    values, order = values.sort(dim=1, descending=True)
    return values, indices.gather(1, order)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 rows, whatever the width."""
    monkeypatch.setattr(encoder, "row_block", lambda rows, *_: max(1, min(rows, 7)))


class TestTopK:
    @pytest.mark.parametrize("rows", [1, 33])
    @pytest.mark.parametrize("k", [1, 2, 5, 16])
    @pytest.mark.parametrize(("columns", "members"), [(16, 1), (16, 16), (48, 16), (64, 32), (160, 16), (1024, 64)])
    def test_equals_torch(self, rows: int, columns: int, members: int, k: int) -> None:
        scores = draw(rows, columns)
        values, indices = by_size(*top_k(scores, k, members))
        expected = scores.topk(k, dim=1)
        assert torch.equal(values, expected.values)
        assert torch.equal(indices, expected.indices)

    @pytest.mark.parametrize("levels", [1, 2, 3, 10])
    @pytest.mark.parametrize("k", [1, 4, 9])
    def test_ties(self, levels: int, k: int) -> None:
        """Which of equal columns is open, but not the values, nor that columns are different and hold them."""
        scores = torch.randint(levels, (40, 96), generator=torch.Generator().manual_seed(0)).float()
        values, indices = top_k(scores, k, 16)
        assert torch.equal(values.sort(1, descending=True).values, scores.topk(k, dim=1).values)
        assert torch.equal(scores.gather(1, indices), values)
        assert all(len(set(row)) == k for row in indices.tolist())

    @pytest.mark.parametrize("where", ["one", "several", "a whole row", "every row"])
    def test_nan_counts_as_the_largest_as_it_does_in_torch(self, where: str) -> None:
        scores = draw(9, 64)
        if where == "one":
            scores[4, 17] = math.nan
        elif where == "several":
            scores[4, [0, 1, 2, 16, 17, 40]] = math.nan
        elif where == "a whole row":
            scores[4] = math.nan
        else:
            scores[:, 5] = math.nan
        values, indices = top_k(scores, 3, 16)
        assert torch.equal(scores.gather(1, indices).nan_to_num(99), values.nan_to_num(99))
        expected = scores.topk(3, dim=1).values.nan_to_num(99)
        assert torch.equal(values.nan_to_num(99).sort(1, descending=True).values, expected)

    def test_rows_of_minus_infinity_and_no_rows(self) -> None:
        scores = draw(3, 64)
        scores[1] = -INFINITY
        scores[2, 2:] = -INFINITY
        values, indices = top_k(scores, 4, 16)
        assert torch.equal(values.sort(1, descending=True).values, scores.topk(4, dim=1).values)
        assert torch.equal(scores.gather(1, indices), values)
        assert [tuple(t.shape) for t in top_k(scores[:0], 4, 16)] == [(0, 4), (0, 4)]

    def test_all_of_a_row_in_one_group(self) -> None:
        scores = draw(5, 160) - 100
        scores[:, 32:48] += 200
        values, indices = by_size(*top_k(scores, 8, 16))
        assert torch.equal(indices, scores.topk(8, dim=1).indices)
        assert torch.equal(values, scores.topk(8, dim=1).values)


class TestEncodeTopK:
    @pytest.mark.parametrize("rows", [0, 1, 5, 7, 23])
    @pytest.mark.parametrize(("latents", "k"), [(1, 1), (5, 5), (20, 4), (37, 37), (101, 1), (333, 7), (1000, 3)])
    @pytest.mark.usefixtures("small_blocks")
    def test_equals_torch(self, rows: int, latents: int, k: int) -> None:
        features, (W_enc, b_enc) = draw(rows, 6), weights(latents)
        values, indices = by_size(*encode_top_k(features, W_enc, b_enc, k))
        expected = torch.addmm(b_enc, features, W_enc.T).topk(k, dim=1)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(indices, expected.indices)

    def test_several_blocks_by_the_memory_for_scores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(encoder.SCORE_BYTES, "cpu", 1000)
        assert row_block(1300, 50, torch.device("cpu"), 4) == 512  # a block is never smaller
        features, (W_enc, b_enc) = draw(1300, 6), weights(50)
        values, indices = by_size(*encode_top_k(features, W_enc, b_enc, 4))
        expected = torch.addmm(b_enc, features, W_enc.T).topk(4, dim=1)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(indices, expected.indices)

    def test_a_wide_call_after_and_before_a_narrow_one(self) -> None:
        """They share memory, and the columns that fill up a group."""
        features = draw(9, 6)
        for latents in (50, 333, 20, 333, 50):
            W_enc, b_enc = weights(latents)
            _, indices = by_size(*encode_top_k(features, W_enc, b_enc, 3))
            assert torch.equal(indices, torch.addmm(b_enc, features, W_enc.T).topk(3, dim=1).indices)

    def test_latents_at_minus_infinity_are_still_latents(self) -> None:
        """As they are in half precision, if a sum overflows: not a column that only fills up a group."""
        W_enc, b_enc = weights(20)
        b_enc[2:] = -INFINITY
        _, indices = encode_top_k(draw(4, 6), W_enc, b_enc, 5)
        assert int(indices.max()) < 20

    @pytest.mark.parametrize("latents", [1, 100, 5120, 81_920])
    @pytest.mark.parametrize("k", [1, 32])
    def test_group_size(self, latents: int, k: int) -> None:
        """Rows of scores are whole groups, and must begin at a multiple of 64 bytes."""
        assert group_size(latents, k) in (16, 32, 64, 96, 128)

    def test_the_product_is_autocasts(self) -> None:
        features, (W_enc, b_enc) = draw(9, 6), weights(40)
        with torch.autocast("cpu", torch.bfloat16):
            values, indices = encode_top_k(features, W_enc, b_enc, 3)
            above, _ = encode_above(features, W_enc, b_enc, torch.zeros(()))
        halves = torch.addmm(b_enc.bfloat16(), features.bfloat16(), W_enc.bfloat16().T)
        assert values.dtype == above.dtype == torch.float32
        assert torch.equal(values, halves.float().gather(1, indices))
        assert torch.equal(above.amax(1), halves.float().amax(1))
        exact, _ = encode_top_k(features, W_enc, b_enc, 3)
        assert not torch.equal(values.sort(1).values, exact.sort(1).values)


class TestEncodeAbove:
    @pytest.mark.parametrize("rows", [0, 1, 7, 20])
    @pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.7, 100.0, "of each latent"])
    @pytest.mark.usefixtures("small_blocks")
    def test_equals_dense(self, rows: int, threshold: float | str) -> None:
        features, (W_enc, b_enc) = draw(rows, 6), weights(40)
        floor = torch.tensor(threshold) if isinstance(threshold, float) else draw(40, seed=3)
        values, indices = encode_above(features, W_enc, b_enc, floor)
        scores = torch.addmm(b_enc, features, W_enc.T)
        expected = torch.where(scores > floor.clamp_min(0), scores, 0.0)
        assert values.shape == indices.shape == (rows, max(1, int((expected > 0).sum(1).max())) if rows else 1)
        dense = torch.zeros_like(scores).scatter_add_(1, indices, values.clamp_min(0))
        torch.testing.assert_close(dense, expected)
        assert ((values > 0) | (values == -INFINITY)).all()


def test_pad_rows_by_hand() -> None:
    row, value, index = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([9, 8, 7, 6, 5])
    values, indices = pad_rows(row, 4, value, index)
    assert values.tolist() == [[1, 2, -INFINITY], [-INFINITY] * 3, [3, 4, 5], [-INFINITY] * 3]
    assert indices.tolist() == [[9, 8, 0], [0, 0, 0], [7, 6, 5], [0, 0, 0]]
    nothing = torch.zeros(0, dtype=torch.long)
    assert pad_rows(nothing, 2, value[:0], nothing)[0].tolist() == [[-INFINITY], [-INFINITY]]
    assert [tuple(part.shape) for part in pad_rows(nothing, 0, value[:0], nothing)] == [(0, 1), (0, 1)]


class TestByLatent:
    LATENTS = 30

    @pytest.fixture
    def code(self) -> tuple[Tensor, Tensor, Tensor]:
        """(indices, weights, dense) in which half of the latents have no pair and some rows name a latent twice."""
        indices = torch.randint(self.LATENTS // 2, (25, 4), generator=torch.Generator().manual_seed(0)) * 2
        return indices, draw(25, 4, seed=1), draw(25, 6, seed=2)

    def product(self, indices: Tensor, weights: Tensor, dense: Tensor) -> Tensor:
        matrix = torch.zeros(len(indices), self.LATENTS).scatter_add_(1, indices, weights)
        return matrix.T @ dense

    @pytest.mark.parametrize(("low", "high"), [(0, None), (0, 30), (0, 7), (3, 4), (11, 24), (29, 30), (8, 8)])
    def test_sums_equal_the_dense_product(
        self, code: tuple[Tensor, Tensor, Tensor], low: int, high: int | None
    ) -> None:
        indices, weights, dense = code
        sums = ByLatent.of(indices, self.LATENTS).sums(weights, dense, low, high)
        torch.testing.assert_close(sums, self.product(*code)[low:high])
        assert (sums[1 - low % 2 :: 2] == 0).all(), "odd latents have no pairs"

    def test_no_pairs_at_all(self) -> None:
        by_latent = ByLatent.of(torch.zeros(0, 4, dtype=torch.long), 5)
        assert torch.equal(by_latent.sums(torch.zeros(0, 4), draw(3, 6)), torch.zeros(5, 6))


def gradients_of(loss: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    return list(torch.autograd.grad(loss(*leaves), leaves))


def encoded(choose: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor, subset: Tensor | None = None) -> Tensor:
    """Dense latents by `Encode`."""
    features, bias, W_enc, b_enc = tensors
    values, indices = Encode.apply(features, bias, W_enc, b_enc, choose, subset)
    return values.new_zeros(len(features), len(W_enc)).scatter_add(1, indices, values.relu())


def encoded_densely(keep: Callable[[Tensor], Tensor], *tensors: Tensor, subset: Tensor | None = None) -> Tensor:
    features, bias, W_enc, b_enc = tensors
    scores = (features - bias) @ W_enc.T + b_enc
    if subset is not None:
        outside = torch.ones(len(W_enc), dtype=torch.bool)
        outside[subset] = False
        scores = scores.masked_fill(outside, -1e30)
    return torch.where(keep(scores.detach()), scores, 0.0).relu()


def largest(scores: Tensor, k: int) -> Tensor:
    return scores >= scores.topk(k, dim=1).values[:, -1:]


CHOICES = {
    "top_k": (partial(encode_top_k, k=3), partial(largest, k=3)),
    "above": (partial(encode_above, threshold=torch.tensor(0.8)), lambda scores: scores > 0.8),
}


class TestEncode:
    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("rows", [3, 40], ids=["fewer_pairs_than_latents", "more"])
    @pytest.mark.parametrize("bias_per_row", [False, True])
    @pytest.mark.parametrize("part", [False, True], ids=["all", "subset"])
    def test_gradients_equal_dense_autograd(self, choice: str, rows: int, bias_per_row: bool, part: bool) -> None:
        choose, keep = CHOICES[choice]
        subset = torch.tensor([1, 4, 5, 11, 12, 17]) if part else None
        tensors = [draw(rows, 6), draw(*([rows] if bias_per_row else []), 6, seed=4), *weights(20)]
        probe = draw(rows, 20, seed=5)
        got = gradients_of(lambda *leaves: (encoded(choose, *leaves, subset=subset) * probe).sum(), tensors)
        expected = gradients_of(lambda *leaves: (encoded_densely(keep, *leaves, subset=subset) * probe).sum(), tensors)
        for name, a, b in zip(("features", "bias", "W_enc", "b_enc"), got, expected, strict=True):
            assert b.abs().max() > 0, name
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")

    @pytest.mark.parametrize("choice", CHOICES)
    @pytest.mark.parametrize("rows", [2, 9])
    @pytest.mark.parametrize("bias_per_row", [False, True])
    def test_gradcheck(self, choice: str, rows: int, bias_per_row: bool) -> None:
        """At a point at which no latent is near to another's rank or to the threshold."""
        f64 = torch.float64
        W_enc, b_enc = weights(11, dtype=f64)
        bias = draw(*([rows] if bias_per_row else []), 6, seed=4, dtype=f64)
        tensors = [tensor.requires_grad_() for tensor in (draw(rows, 6, seed=6, dtype=f64), bias, W_enc, b_enc)]
        scores = ((tensors[0] - bias) @ W_enc.T + b_enc).detach()
        ranked = scores.sort(1, descending=True).values
        assert (ranked[:, 2] - ranked[:, 3]).min() > 1e-4
        assert (scores - 0.8).abs().min() > 1e-4
        choose, _ = CHOICES[choice]
        assert torch.autograd.gradcheck(lambda *leaves: Encode.apply(*leaves, choose)[0].clamp_min(-1e3), tensors)

    def test_only_the_gradients_that_are_wanted(self) -> None:
        tensors = [draw(9, 6), draw(6, seed=4), *weights(20)]
        everything = gradients_of(lambda *leaves: encoded(CHOICES["top_k"][0], *leaves).square().sum(), tensors)
        for place, expected in enumerate(everything):
            leaves = [tensor.clone().requires_grad_(place == index) for index, tensor in enumerate(tensors)]
            encoded(CHOICES["top_k"][0], *leaves).square().sum().backward()
            torch.testing.assert_close(leaves[place].grad, expected)
            assert all(leaf.grad is None for leaf in leaves if not leaf.requires_grad)

    def test_collect_notes_what_the_gradient_is_a_sum_of(self) -> None:
        tensors = [tensor.requires_grad_() for tensor in (draw(9, 6), draw(6, seed=4), *weights(20))]
        expected = gradients_of(
            lambda *leaves: Encode.apply(*leaves, CHOICES["top_k"][0])[0].square().sum(), [t.detach() for t in tensors]
        )
        notes = SparseGradients(20)
        Encode.apply(*tensors, CHOICES["top_k"][0], None, notes)[0].square().sum().backward()
        assert tensors[2].grad is None
        ((indices, gradient, centered),) = notes.W_enc
        torch.testing.assert_close(ByLatent.of(indices, 20).sums(gradient, centered), expected[2])
        torch.testing.assert_close(tensors[3].grad, expected[3])


class TestDecodeRows:
    INDICES = torch.tensor([[0, 3, 7], [3, 3, 1], [9, 0, 0], [2, 7, 9]])  # a latent twice in a row; 4, 5, 6, 8 unused

    def densely(self, acts: Tensor, W_dec: Tensor) -> Tensor:
        matrix = acts.new_zeros(len(acts), len(W_dec)).scatter_add(1, self.INDICES, acts)
        return matrix @ W_dec

    def test_gradients_equal_dense_autograd(self) -> None:
        tensors, probe = [draw(4, 3), draw(10, 6, seed=1)], draw(4, 6, seed=2)
        torch.testing.assert_close(
            DecodeRows.apply(tensors[0], self.INDICES, tensors[1], None, None), self.densely(*tensors)
        )
        got = gradients_of(lambda a, w: (DecodeRows.apply(a, self.INDICES, w, None, None) * probe).sum(), tensors)
        expected = gradients_of(lambda a, w: (self.densely(a, w) * probe).sum(), tensors)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("bias_rows", [(), (4,)], ids=["one bias", "a bias each"])
    def test_gradcheck(self, bias_rows: tuple[int, ...]) -> None:
        shapes = [(4, 3), (10, 6), (*bias_rows, 6)]
        acts, W_dec, bias = (draw(*shape, seed=i, dtype=torch.float64) for i, shape in enumerate(shapes))
        leaves = [tensor.requires_grad_() for tensor in (acts, W_dec, bias)]
        assert torch.autograd.gradcheck(lambda a, w, b: DecodeRows.apply(a, self.INDICES, w, b, None), leaves)
        decoded = DecodeRows.apply(acts, self.INDICES, W_dec, bias, None)
        torch.testing.assert_close(decoded, self.densely(acts, W_dec) + bias)

    def test_collect_and_twice_backward(self) -> None:
        acts, W_dec = draw(4, 3).requires_grad_(), draw(10, 6, seed=1).requires_grad_()
        notes = SparseGradients(10)
        loss = DecodeRows.apply(acts, self.INDICES, W_dec, None, notes).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        expected = gradients_of(lambda a, w: self.densely(a, w).square().sum(), [acts.detach(), W_dec.detach()])
        torch.testing.assert_close(acts.grad, 2 * expected[0])
        assert W_dec.grad is None
        (indices, weights, gradient), _ = notes.W_dec
        torch.testing.assert_close(ByLatent.of(indices, 10).sums(weights, gradient), expected[1])

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype: torch.dtype) -> None:
        acts, W_dec = draw(4, 3), draw(10, 6, seed=1)
        decoded = decode_rows(acts.to(dtype), self.INDICES, W_dec.to(dtype))
        assert decoded.dtype == dtype
        torch.testing.assert_close(decoded.float(), self.densely(acts, W_dec), atol=0.05, rtol=0.05)


class TestNormalizedMSE:
    @staticmethod
    def densely(reconstruction: Tensor, target: Tensor) -> Tensor:
        return ((reconstruction - target).square().sum(1) / target.square().sum(1)).mean()

    def test_gradients_equal_dense_autograd(self) -> None:
        """In the target too: a feature's gradient passes through both."""
        tensors = [draw(8, 6), draw(8, 6, seed=1)]
        loss, total = NormalizedMSE.apply(*tensors)
        torch.testing.assert_close(loss, self.densely(*tensors))
        torch.testing.assert_close(total, (tensors[0] - tensors[1]).square().sum())
        got = gradients_of(lambda *leaves: 3 * NormalizedMSE.apply(*leaves)[0], tensors)
        expected = gradients_of(lambda *leaves: 3 * self.densely(*leaves), tensors)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)

    def test_gradcheck(self) -> None:
        leaves = [draw(5, 4, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1)]
        assert torch.autograd.gradcheck(lambda *tensors: NormalizedMSE.apply(*tensors)[0], leaves)

    def test_a_row_of_zeros_counts_as_nothing(self) -> None:
        reconstruction, target = draw(8, 6), draw(8, 6, seed=1)
        target[3] = 0
        kept = [i for i in range(8) if i != 3]
        loss, _ = NormalizedMSE.apply(reconstruction, target)
        torch.testing.assert_close(loss, self.densely(reconstruction[kept], target[kept]) * 7 / 8)
        got = gradients_of(lambda *leaves: NormalizedMSE.apply(*leaves)[0], [reconstruction, target])
        for gradient in got:
            assert torch.isfinite(gradient).all()
            assert (gradient[3] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_halves_are_summed_in_fp32(self, dtype: torch.dtype) -> None:
        """80 entries of 100 have squares whose sum is too large for fp16."""
        target = (100 * draw(7, 80)).to(dtype)
        reconstruction = (target + 50).requires_grad_()
        loss, total = NormalizedMSE.apply(reconstruction, target)  # type: ignore[misc]
        loss.backward()
        exact = reconstruction.detach().float().requires_grad_()
        expected = self.densely(exact, target.float())
        expected.backward()
        torch.testing.assert_close(loss.float(), expected, rtol=1e-2, atol=0)
        torch.testing.assert_close(reconstruction.grad.float(), exact.grad, rtol=2e-2, atol=1e-6)
        assert total > torch.finfo(torch.float16).max

    def test_a_second_derivative_is_an_error(self) -> None:
        leaf = draw(5, 4).requires_grad_()
        (gradient,) = torch.autograd.grad(NormalizedMSE.apply(leaf, draw(5, 4, seed=1))[0], leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="does not require grad"):
            gradient.sum().backward()


def test_training_after_inference_mode() -> None:
    """The kept memory for scores is made in one of them and written to in the other."""
    features, (W_enc, b_enc) = draw(9, 6), weights(40)
    choose = partial(encode_top_k, k=3)
    scratch._kept.__dict__.clear()
    with torch.inference_mode():
        without_gradient = encoded(choose, features, torch.zeros(6), W_enc, b_enc)
        decode_rows(*encode_top_k(features, W_enc, b_enc, 3), W_enc)
    leaf = W_enc.clone().requires_grad_()
    latent_acts = encoded(choose, features, torch.zeros(6), leaf, b_enc)
    latent_acts.sum().backward()
    assert torch.equal(latent_acts, without_gradient)
    assert leaf.grad is not None
    with torch.inference_mode():
        assert torch.equal(encoded(choose, features, torch.zeros(6), W_enc, b_enc), without_gradient)


@pytest.mark.usefixtures("small_blocks")
def test_threads_at_once() -> None:
    """Each has its own memory for scores."""
    jobs = [(draw(60, 6, seed=seed), *weights(40 + 7 * seed)) for seed in range(4)]
    expected = [by_size(*encode_top_k(*job, 3)) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = pool.map(lambda job: by_size(*encode_top_k(*job, 3)), jobs)
            for (values, indices), (a, b) in zip(results, expected, strict=True):
                torch.testing.assert_close(values, a)  # the product's last bit depends on the thread that computes it
                assert torch.equal(indices, b)
