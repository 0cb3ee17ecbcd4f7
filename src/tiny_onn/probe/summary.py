"""Summaries of what `probe` measured token by token.

Legend: T tokens, D hidden, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tiny_onn.ops.surprise import log_norm
from tiny_onn.probe.statistics import Estimate, estimate, fit_ridge, levels, per_token, spearman

# With fewer documents than this, intervals are made by resampling tokens instead of documents.
MIN_DOCUMENTS = 10


@dataclass(kw_only=True, slots=True)
class Observations:
    """The measurements of one layer on a set of documents, with one tensor per document."""

    value: list[Tensor]
    """The leave-one-out truth of every expert (T, E)."""
    active: list[Tensor]
    """True for the active experts (T, E)."""
    x: list[Tensor]
    """The input of the MLP (T, D)."""
    scores: dict[str, list[Tensor]]
    """Every kind of surprise (T, E), by its name."""


def summarise(
    probed: Sequence[Tensor],
    losses: Sequence[Tensor],
    observations: dict[int, Observations],
    fit: dict[int, Observations],
    *,
    use_kl: bool,
) -> dict[str, Any]:
    """Summarise the measurements of the documents that have losses, which are the first ones.

    Args:
        probed: all documents to probe, as token ids (1, T).
        losses: the losses of the tokens of each document (T,).
        observations: the measurements of the same documents, by layer.
        fit: the measurements of the documents to fit regressions on, by layer; empty: none are
            fitted.
        use_kl: true if the loss of a token is its KL to the teacher, false if it is its next-token
            loss.
    """
    num_planned, probed = len(probed), probed[: len(losses)]
    losses_T = torch.cat(list(losses))
    # The last token of a document has no loss, since no token follows it.
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
            str(layer): layer_record(
                observations[layer], fit.get(layer), groups_T, counted_T, is_first_T
            )
            for layer in observations
        },
    }


def layer_record(
    observations: Observations,
    fit: Observations | None,
    groups_T: Tensor,
    counted_T: Tensor,
    first_T: Tensor,
) -> dict[str, Any]:
    """Summarise one layer: experts left out, experts added, the first tokens, and predictions."""
    active_TE = torch.cat(observations.active)
    scores = {kind: torch.cat(parts) for kind, parts in observations.scores.items()}
    value_TE = torch.cat(observations.value)

    def record(candidates_TE: Tensor, tokens_T: Tensor) -> dict[str, Any] | None:
        # A token with one candidate leaves nothing to rank.
        tokens_T = tokens_T & (candidates_TE.sum(-1) > 1)
        if not tokens_T.any():
            return None
        generator = torch.Generator().manual_seed(0)
        truth, candidates, groups = value_TE[tokens_T], candidates_TE[tokens_T], groups_T[tokens_T]

        def estimated(values_T: Tensor) -> Estimate:
            return estimate(values_T, groups, generator)

        rules = {
            kind: per_token(score_TE[tokens_T], truth, scores["magnitude"][tokens_T], candidates)
            for kind, score_TE in scores.items()
        }
        return {
            "num_tokens": int(tokens_T.sum()),
            "mean_candidates": candidates.sum(-1).float().mean().item(),
            "levels": {
                name: estimated(values) for name, values in levels(truth, candidates).items()
            },
            "rules": {
                kind: {name: estimated(values) for name, values in statistics.items()}
                for kind, statistics in rules.items()
            },
        }

    return {
        "remove": record(active_TE, counted_T),
        "remove_first_token": record(active_TE, first_T),
        "add": record(~active_TE, counted_T),
        "predictable": None
        if fit is None
        else _predictable(observations, fit, groups_T[counted_T], counted_T),
    }


def quantities(gain_TE: Tensor, magnitude_TE: Tensor) -> dict[str, Tensor]:
    """Return the quantities that a gate could be trained to predict (T, E), by name."""
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
    """Mark the first token (edge 0) or the last (edge -1) of each of the concatenated documents."""
    marks = []
    for ids in documents:
        mark_T = torch.zeros(ids.shape[1], dtype=torch.bool)
        mark_T[edge] = True
        marks.append(mark_T)
    return torch.cat(marks)


def _predictable(
    observations: Observations, fit: Observations, groups_T: Tensor, counted_T: Tensor
) -> dict[str, Any]:
    """Compare a regression on the token with a mean over all tokens, quantity by quantity.

    Both predict the quantity; the results tell how well the predictions rank the quantity itself
    and the leave-one-out truth.
    """
    truth_TE = torch.cat(observations.value)[counted_T]
    x_TD = torch.cat(observations.x)[counted_T]
    # First tokens would dominate the fit, and last tokens have no loss.
    fit_x_TD = torch.cat([x[1:-1] for x in fit.x])
    targets = quantities(
        *(torch.cat([s[1:-1] for s in fit.scores[kind]]) for kind in ("gain", "magnitude"))
    )
    actual = quantities(
        *(torch.cat(observations.scores[kind])[counted_T] for kind in ("gain", "magnitude"))
    )
    all_TE = torch.ones_like(truth_TE, dtype=torch.bool)
    by_quantity: dict[str, Any] = {}
    for name, target_TE in targets.items():
        generator = torch.Generator().manual_seed(0)
        predictions = {
            "token": fit_ridge(fit_x_TD, target_TE)(x_TD),
            "blind": target_TE.double().mean(0).expand(len(x_TD), -1),
        }
        by_quantity[name] = {
            predictor: {
                "rank_of_quantity": estimate(
                    spearman(predicted_TE, actual[name], all_TE), groups_T, generator
                ),
                "rank_of_truth": estimate(
                    spearman(predicted_TE, truth_TE, all_TE), groups_T, generator
                ),
                "truth_at_max": estimate(
                    truth_TE.gather(-1, predicted_TE.argmax(-1, keepdim=True))[:, 0],
                    groups_T,
                    generator,
                ),
            }
            for predictor, predicted_TE in predictions.items()
        }
    return by_quantity
