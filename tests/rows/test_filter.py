from __future__ import annotations

import pytest
import torch

from apportion.rows.filter import TokenFilter, row_norms

BOS = 1


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[4, 8] tokens of norm about 1 with a special token, two outliers and an outlier at position 0."""
    x = torch.nn.functional.normalize(torch.randn(4, 8, 6, generator=torch.Generator().manual_seed(0)), dim=-1)
    tokens = torch.full((4, 8), 7)
    tokens[:, 0] = BOS
    tokens[2, 3] = BOS
    x[1, 5] *= 50
    x[3, 7] *= 11
    x[0, 0] *= 1000
    return x, tokens, torch.arange(8).repeat(4, 1)


def fitted(settings: TokenFilter) -> TokenFilter:
    x, tokens, positions = planted()
    return settings.fit(row_norms(x).flatten(), tokens.flatten(), positions.flatten(), [BOS])


def test_each_row_counts_under_its_first_reason() -> None:
    x, tokens, positions = planted()
    reasons = fitted(TokenFilter()).reasons(row_norms(x), tokens, positions)
    assert {name: int(rows.sum()) for name, rows in reasons.items()} == {
        "first_position": 4,
        "special": 1,
        "norm_outlier": 2,
    }
    assert reasons["norm_outlier"].nonzero().tolist() == [[1, 5], [3, 7]]


def test_mask_is_the_complement_of_the_reasons() -> None:
    x, tokens, positions = planted()
    mask = fitted(TokenFilter()).mask(x, tokens, positions)
    assert mask.shape == (4, 8)
    assert int(mask.sum()) == 32 - 4 - 1 - 2
    assert not mask[:, 0].any()
    assert not mask[2, 3]


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [
        (TokenFilter(special_tokens=False), 4 + 2),
        (TokenFilter(first_position=False), 5 + 2),
        (TokenFilter(norm_outlier=None), 5),
        (TokenFilter(norm_outlier=0), 5),
        (TokenFilter(norm_outlier=20), 5 + 1),
        (TokenFilter(special_tokens=False, first_position=False), 1 + 2),
        (TokenFilter(special_tokens=False, first_position=False, norm_outlier=None), 0),
    ],
)
def test_each_setting_switches_its_reason(settings: TokenFilter, left_out: int) -> None:
    assert int((~fitted(settings).mask(*planted())).sum()) == left_out


def test_the_median_ignores_sinks_and_special_tokens() -> None:
    norms = torch.tensor([900.0, 1.0, 2.0, 3.0, 800.0, 700.0])
    tokens = torch.tensor([5, 5, 5, 5, BOS, BOS])
    positions = torch.tensor([0, 1, 2, 3, 4, 5])
    assert TokenFilter().fit(norms, tokens, positions, [BOS]).median_norm == 2.0


def test_a_fitted_filter_keeps_its_median_and_survives_json() -> None:
    first = fitted(TokenFilter(norm_outlier=5))
    again = first.fit(torch.full((9,), 1e6), torch.full((9,), 7), torch.arange(9), [BOS])
    assert again == first
    assert TokenFilter.from_dict(first.to_dict()) == first


def test_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm_outlier=0\.5"):
        TokenFilter(norm_outlier=0.5)
    with pytest.raises(ValueError, match="no median norm yet"):
        TokenFilter().mask(torch.ones(2, 3))
