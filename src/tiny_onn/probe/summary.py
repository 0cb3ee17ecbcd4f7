"""From what `probe` saw token by token to its numbers.

Legend: T tokens, D hidden, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_onn.ops.surprise import log_norm
from tiny_onn.probe.statistics import Estimate, estimate, fit_ridge, levels, per_token, spearman

# Fewer groups than this give no interval worth the name; tokens take their place.
MIN_DOCUMENTS = 10


@dataclass(kw_only=True, slots=True)
class Seen:
    """What one layer showed on a set of documents, token by token."""

    value: list[Tensor]
    active: list[Tensor]
    x: list[Tensor]
    scores: dict[str, list[Tensor]]


def numbers(
    probed: Sequence[Tensor],
    losses: Sequence[Tensor],
    seen: dict[int, Seen],
    fit: dict[int, Seen],
    *,
    use_kl: bool,
) -> dict[str, Any]:
    """What was measured of the documents that have losses, the first ones, by layer.

    Args:
        probed: all documents to probe, token ids (1, T).
        losses: each document's own losses (T,).
        seen: by layer, of the same documents.
        fit: by layer, of the documents to fit regressions on; empty: none are made.
        use_kl: whether a token's own loss is the KL to the teacher, or that of the next token.
    """
    num_planned, probed = len(probed), probed[: len(losses)]
    losses_T = torch.cat(list(losses))
    # The last token of a document has no loss.
    is_first_T, is_last_T = (_edges(probed, edge) for edge in (0, -1))
    counted_T = ~is_first_T & ~is_last_T
    by_document = len(probed) >= MIN_DOCUMENTS
    groups = [torch.full((ids.shape[1],), number) for number, ids in enumerate(probed)]
    groups_T = torch.cat(groups) if by_document else torch.arange(len(losses_T))
    return {
        "loss": "forward_kl" if use_kl else "next_token",
        "complete": len(probed) == num_planned,
        "num_documents": len(probed),
        "num_tokens": int(counted_T.sum()),
        "num_first_tokens": len(probed),
        "fit_tokens": sum(len(x) - 2 for layer in list(fit)[:1] for x in fit[layer].x),
        "intervals": "documents" if by_document else "tokens",
        "mean_loss": losses_T[counted_T].mean().item(),
        "mean_loss_first_token": losses_T[is_first_T].mean().item(),
        "layers": {
            str(layer): layer_record(seen[layer], fit.get(layer), groups_T, counted_T, is_first_T)
            for layer in seen
        },
    }


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
        "log magnitude": log_norm(magnitude_TE),
    }


def _edges(documents: Sequence[Tensor], edge: int) -> Tensor:
    """Which tokens of the documents, end to end, are the first (0) or the last (-1) of theirs."""
    marks = []
    for ids in documents:
        mark_T = torch.zeros(ids.shape[1], dtype=torch.bool)
        mark_T[edge] = True
        marks.append(mark_T)
    return torch.cat(marks)


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
