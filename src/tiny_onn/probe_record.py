"""From what `probe` saw token by token to its numbers.

Legend: T tokens, D hidden, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_onn.probe_stats import Estimate, estimate, fit_ridge, levels, per_token, spearman


@dataclass(kw_only=True, slots=True)
class Seen:
    """What one layer showed on a set of documents, token by token."""

    value: list[Tensor]
    active: list[Tensor]
    x: list[Tensor]
    scores: dict[str, list[Tensor]]


def layer_record(
    seen: Seen, fit: Seen | None, groups_T: Tensor, counted_T: Tensor, first_T: Tensor
) -> dict[str, Any]:
    """One layer's numbers: leaving out, adding, the first token apart, and what is predictable."""
    active_TE = torch.cat(seen.active)
    scores = {kind: torch.cat(parts) for kind, parts in seen.scores.items()}
    value_TE = torch.cat(seen.value)

    def record(candidates_TE: Tensor, tokens_T: Tensor) -> dict[str, Any] | None:
        # One candidate is no choice.
        tokens_T = tokens_T & (candidates_TE.sum(-1) > 1)
        if not tokens_T.any():
            return None
        generator = torch.Generator().manual_seed(0)
        truth, candidates, groups = value_TE[tokens_T], candidates_TE[tokens_T], groups_T[tokens_T]

        def of(values_T: Tensor) -> Estimate:
            return estimate(values_T, groups, generator)

        rules = {
            kind: per_token(score_TE[tokens_T], truth, scores["magnitude"][tokens_T], candidates)
            for kind, score_TE in scores.items()
        }
        return {
            "num_tokens": int(tokens_T.sum()),
            "mean_candidates": candidates.sum(-1).float().mean().item(),
            "levels": {name: of(values) for name, values in levels(truth, candidates).items()},
            "rules": {
                kind: {name: of(values) for name, values in found.items()}
                for kind, found in rules.items()
            },
        }

    return {
        "remove": record(active_TE, counted_T),
        "remove_first_token": record(active_TE, first_T),
        "add": record(~active_TE, counted_T),
        "predictable": None
        if fit is None
        else _predictable(seen, fit, groups_T[counted_T], counted_T),
    }


def quantities(gain_TE: Tensor, magnitude_TE: Tensor) -> dict[str, Tensor]:
    """What a gate could be asked to predict, by name."""
    half = gain_TE.shape[1] // 2
    order_TE = gain_TE.argsort(dim=-1, descending=True, stable=True)
    top_TE = torch.zeros_like(gain_TE).scatter_(-1, order_TE[:, :half], 1.0)
    return {
        "gain": gain_TE,
        "|gain|": gain_TE.abs(),
        "gain above 0": gain_TE.clamp_min(0),
        "gain in the top half": top_TE,
        "magnitude": magnitude_TE,
        "log magnitude": magnitude_TE.clamp_min(1e-6).log(),
    }


def _predictable(seen: Seen, fit: Seen, groups_T: Tensor, counted_T: Tensor) -> dict[str, Any]:
    """Per quantity, how a regression on the token and a token-blind mean rank it and the truth."""
    truth_TE = torch.cat(seen.value)[counted_T]
    x_TD = torch.cat(seen.x)[counted_T]
    # The first token would decide the fit, and the last has no loss.
    fit_x_TD = torch.cat([x[1:-1] for x in fit.x])
    targets = quantities(
        *(torch.cat([s[1:-1] for s in fit.scores[kind]]) for kind in ("gain", "magnitude"))
    )
    actual = quantities(
        *(torch.cat(seen.scores[kind])[counted_T] for kind in ("gain", "magnitude"))
    )
    everyone_TE = torch.ones_like(truth_TE, dtype=torch.bool)
    found: dict[str, Any] = {}
    for name, target_TE in targets.items():
        generator = torch.Generator().manual_seed(0)
        guesses = {
            "token": fit_ridge(fit_x_TD, target_TE)(x_TD),
            "blind": target_TE.double().mean(0).expand(len(x_TD), -1),
        }
        found[name] = {
            who: {
                "rank_of_quantity": estimate(
                    spearman(guess_TE, actual[name], everyone_TE), groups_T, generator
                ),
                "rank_of_truth": estimate(
                    spearman(guess_TE, truth_TE, everyone_TE), groups_T, generator
                ),
                "truth_at_max": estimate(
                    truth_TE.gather(-1, guess_TE.argmax(-1, keepdim=True))[:, 0],
                    groups_T,
                    generator,
                ),
            }
            for who, guess_TE in guesses.items()
        }
    return found
