"""The sampler's distributions against `transformers` and against counts; noise that belongs to a story."""

import math

import pytest
import torch
from transformers.generation import logits_process as hf

from model.engine.request import uniform_noise
from model.sampling import draw, next_token_probabilities, penalise_repetition, sample, settle

V = 50


def probabilities(logits_bv, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Our distribution, put back in vocabulary order."""
    columns = [[x] * len(logits_bv) for x in (temperature, top_k, top_p, min_p)]
    sorted_bv, ids_bv = next_token_probabilities(logits_bv, *columns)
    return torch.zeros_like(sorted_bv).scatter(1, ids_bv, sorted_bv)


@pytest.fixture
def logits_bv():
    return torch.randn(20, V, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"temperature": 0.7}, [hf.TemperatureLogitsWarper(0.7)]),
        ({"top_k": 5}, [hf.TopKLogitsWarper(5)]),
        ({"top_k": 1000}, []),
        ({"top_p": 0.8}, [hf.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.1}, [hf.MinPLogitsWarper(0.1)]),
        (
            {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
            [
                hf.TemperatureLogitsWarper(1.3),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ],
)
def test_distribution_equals_that_of_transformers(logits_bv, settings, warpers):
    expected = logits_bv.double()
    for warper in warpers:
        expected = warper(None, expected)
    torch.testing.assert_close(probabilities(logits_bv, **settings), expected.softmax(-1), atol=1e-6, rtol=0)


def test_repetition_penalty_equals_that_of_transformers(logits_bv):
    tokens_bt = torch.randint(0, V, (20, 9), generator=torch.Generator().manual_seed(2))
    seen_bv = torch.zeros(20, V, dtype=torch.bool).scatter(1, tokens_bt, True)
    expected = hf.RepetitionPenaltyLogitsProcessor(1.3)(tokens_bt, logits_bv.clone())
    torch.testing.assert_close(penalise_repetition(logits_bv, seen_bv, torch.full((20,), 1.3)), expected)


def test_temperature_zero_is_greedy(logits_bv):
    assert torch.equal(probabilities(logits_bv, temperature=0).argmax(-1), logits_bv.argmax(-1))
    assert (probabilities(logits_bv, temperature=0) > 0).sum(-1).eq(1).all()


def test_samples_follow_the_distribution(logits_bv):
    """Chi-square over 20,000 draws with the noise stories use; 0.999 quantile for the degrees of freedom."""
    logits_1v = logits_bv[:1, :8]
    n = 20_000
    noise_b = torch.tensor([uniform_noise(seed, 17) for seed in range(n)], dtype=torch.float64)
    drawn_b = draw(logits_1v.expand(n, -1), settle([1.5] * n, [0] * n, [0.95] * n, [0] * n, 8), noise_b)
    counts_v = torch.bincount(drawn_b, minlength=8).double()
    expected_v = probabilities(logits_1v, temperature=1.5, top_p=0.95)[0] * n
    kept = expected_v > 0
    assert counts_v[~kept].sum() == 0
    chi_square = ((counts_v - expected_v)[kept] ** 2 / expected_v[kept]).sum().item()
    assert kept.sum() >= 4 and chi_square < {4: 16.3, 5: 18.5, 6: 20.5, 7: 22.5, 8: 24.3}[int(kept.sum())]


def test_every_row_has_its_own_settings(logits_bv):
    """A greedy row, a top-k 1 row and a free row in one batch equal the same rows sampled alone."""
    settings = [
        {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "noise": 0.9},
        {"temperature": 2.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "noise": 0.9},
        {"temperature": 1.5, "top_k": 0, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.2, "noise": 0.9},
    ]
    seen_bv = torch.rand(3, V, generator=torch.Generator().manual_seed(3)) < 0.2
    together = sample(logits_bv[:3], seen_bv, **{key: [s[key] for s in settings] for key in settings[0]})
    alone = [
        sample(logits_bv[i : i + 1], seen_bv[i : i + 1], **{k: [v] for k, v in s.items()})
        for i, s in enumerate(settings)
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[:2].tolist() == logits_bv[:2].argmax(-1).tolist()
    assert together[2] != logits_bv[2].argmax()


def test_noise_at_the_very_end_still_picks_a_kept_token(logits_bv):
    settings = settle([1.0] * 20, [3] * 20, [1.0] * 20, [0.0] * 20, V)
    drawn_b = draw(logits_bv, settings, torch.full((20,), 1 - 2.0**-53, dtype=torch.float64))
    assert torch.equal(drawn_b, logits_bv.sort(descending=True).indices[:, 2])


def test_a_token_without_probability_is_never_drawn():
    """A tail that underflows to 0 is not what noise just under 1 may end up at."""
    logits_bv = torch.tensor([[0.0, -2000.0, 1.0, -3000.0]])
    drawn_b = draw(logits_bv, settle([1], [0], [1], [0], 4), torch.tensor([1 - 2.0**-53], dtype=torch.float64))
    assert drawn_b.tolist() == [0]


def test_equal_logits_rank_by_id():
    logits_bv = torch.zeros(1, 8).expand(8, -1)
    noise_b = torch.arange(8, dtype=torch.float64) / 8  # each token's share of [0, 1) begins with its first number
    for min_p in (0, 1):
        assert draw(logits_bv, settle(*[[x] * 8 for x in (1, 0, 1, min_p)], 8), noise_b).tolist() == list(range(8))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_give_a_token_all_the_same(broken):
    """A damaged model must not read past the end of a buffer."""
    settings = settle([1, 0], [0, 5], [1, 0.9], [0, 0.5], V)
    drawn_b = draw(torch.full((2, V), broken), settings, torch.full((2,), 0.99, dtype=torch.float64))
    assert ((drawn_b >= 0) & (drawn_b < V)).all()


def test_drawing_looks_at_no_value(logits_bv):
    """A look would be a wait for the device; there are no values to look at on the meta device."""
    settings = settle([0.7, 0], [0, 5], [0.9, 1], [0.05, 0], V)
    on_meta = type(settings)(*(column_b.to("meta") for column_b in settings))
    assert draw(logits_bv[:2].to("meta"), on_meta, torch.empty(2, dtype=torch.float64, device="meta")).shape == (2,)


def test_noise_is_uniform_and_depends_on_seed_and_position_only():
    values = torch.tensor(
        [uniform_noise(seed, position) for seed in range(100) for position in range(100)], dtype=torch.float64
    )
    assert uniform_noise(7, 3) == uniform_noise(7, 3)
    assert values.unique().numel() == values.numel()
    assert values.min() >= 0 and values.max() < 1
    # Kolmogorov-Smirnov, 0.999 quantile
    empirical = values.sort().values - torch.arange(len(values)) / len(values)
    assert empirical.abs().max() < 1.95 / math.sqrt(len(values))
    grid = values.view(100, 100) - 0.5
    for lagged in (grid[:, 1:] * grid[:, :-1], grid[1:] * grid[:-1]):  # neighbours are not correlated
        assert abs(lagged.mean().item()) < 4 * (1 / 12) / math.sqrt(lagged.numel())
