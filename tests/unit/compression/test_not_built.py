"""Why CFSP's score, PAT, PST and FTP are not built: each reason of docs/COMPRESSION.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparsecod_megatron.compression.patterns import parse_pattern


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cfsp_score(down: Tensor, up: Tensor, gate: Tensor, norms: Tensor) -> Tensor:
    """A neuron's score [neurons] by CFSP's default, `three_w_one_wa` of its published code (commit 00fd1c4).

    Three matrices [hidden, neurons], `up` and `gate` transposed, each over the sums of its columns; times the norms of
    the neurons' activations [neurons], then the mean over the hidden axis.
    """
    parts = [weight.abs() / weight.abs().sum(0) for weight in (down * norms, up, gate)]
    return (sum(parts) * norms).mean(0)


def test_cfsps_default_score_does_not_depend_on_the_weights() -> None:
    norms = random(48, seed=9).abs() + 0.1
    scores = []
    for seed in range(3):
        down, up, gate = (random(32, 48, seed=10 * seed + part) * 10.0**seed for part in range(3))
        scores.append(cfsp_score(down, up, gate, norms))
    assert torch.allclose(scores[0], scores[1]) and torch.allclose(scores[0], scores[2])
    assert torch.allclose(scores[0], 3 / 32 * norms), "columns over their sums have the mean 1/d, whatever is in them"


def test_cfsps_shares_of_blocks_depend_on_the_number_of_calibration_tokens() -> None:
    """Importance is a sum over tokens, over 10⁴, in a sigmoid: more of the same text makes the shares less equal."""

    def shares(tokens: int) -> Tensor:
        sums = torch.tensor([0.05, 0.1, 0.3]) * tokens  # angles over π, the same for every token
        kept = ((sums - sums.mean()) / 1e4).sigmoid()
        return kept / kept.mean() / 2

    few, many = shares(8 * 2048), shares(128 * 2048)
    assert few.max() - few.min() < 0.15 and many.max() - many.min() > 0.9


def test_pats_extra_layers_fold_into_matrices_of_a_smaller_width() -> None:
    """It trains (I + BA) and a mask of channels behind `o` and `down`; what is left is one matrix with fewer rows."""
    weight, first, second, x = random(32, 48), random(4, 32, seed=1), random(32, 4, seed=2), random(7, 48, seed=3)
    kept = random(32, seed=4) > 0
    trained = (x @ weight.T + x @ weight.T @ first.T @ second.T)[:, kept]
    folded = ((torch.eye(32) + second @ first) @ weight)[kept]
    assert torch.allclose(trained, x @ folded.T, atol=1e-4) and folded.shape == (int(kept.sum()), 48)


def test_pats_rank_is_no_bottleneck_at_small_widths_and_its_mask_ends_soft() -> None:
    """Rank 200 is written into the code (commit 25cce19), and so is that masks stop at 80 % of the run."""
    assert all(2 * 200 * width >= width * width for width in (64, 256, 400))
    steps = 1000
    temperature = 1 / (1 - math.log(0.8 * steps) / math.log(steps))
    scale = 1 / (1 + math.exp(-temperature * 0.02))  # a channel whose mask moved by 0.02
    assert 0.6 < scale < 0.7, "trained on with this scale, and rounded to 1 only for inference"


def pst_scores(weight: Tensor, left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """PST (arXiv 2205.11005, commit c13f686): |W| + AB + (R ⊕ C)."""
    return weight.abs() + left @ right + rows[:, None] + columns


def test_psts_scores_are_magnitude_and_a_part_of_rank_ten() -> None:
    weight = random(48, 32)
    left, zeros = random(48, 8, seed=1), torch.zeros(8, 32)
    before = pst_scores(weight, left, zeros, torch.zeros(48), torch.zeros(32))
    pattern = parse_pattern("0.5", "matrix")
    assert torch.equal(pattern.keep(before), pattern.keep(weight.abs())), "it begins with magnitude's mask"
    moved = pst_scores(weight, left, random(8, 32, seed=2), random(48, seed=3), random(32, seed=4))
    learned = (moved - weight.abs()).double()
    assert int(torch.linalg.matrix_rank(learned, rtol=1e-5)) == 10, "single weights cannot be told apart"


def test_ftps_rank_of_a_token_changes_with_later_tokens() -> None:
    """One of its router's four inputs is a token's place by its attention score (arXiv 2412.11494; no public code).

    Here that is the sum over queries of the attention that the token is given.
    """
    query, key = random(32, 8), random(32, 8, seed=1)

    def ranks(length: int) -> Tensor:
        scores = query[:length] @ key[:length].T / math.sqrt(8)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1).sum(0)[:16].argsort().argsort()

    assert int((ranks(16) != ranks(32)).sum()) >= 6  # of 16 tokens that a later one must not touch
