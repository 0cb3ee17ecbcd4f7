"""The stages of a run: the step's stage, the stage's progress, and the annealing of k.

A run reads `train.blockwise_tokens` in the blockwise stage, then `train.tokens` in the global one,
each in whole steps. A checkpoint stores the stage's name and the token at which it began; the rest
follows from the settings and the number of tokens read.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from tiny_onn.config.schema import RunConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import temporary_rules

StageName = Literal["blockwise", "global"]
# This threshold is below every score, so that all experts are active.
ALL_ACTIVE = -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a run with a loss, a learning rate schedule and an optimizer state of its own."""

    name: StageName
    begin: int
    """Number of the run's tokens before the stage."""
    tokens: int
    """Number of tokens in the stage; the last step may read more."""
    anneal_fraction: float
    """Share of the stage in which k goes from all experts to the target."""

    def progress(self, tokens: int | float) -> float:
        """Return the share of the stage, from 0 to 1, that is done after so many tokens."""
        return min(1.0, (tokens - self.begin) / self.tokens)

    def over(self, tokens: int) -> bool:
        """Return True if the stage is done after so many tokens of the run."""
        return tokens - self.begin >= self.tokens


def stage_named(name: StageName, begin: int, config: RunConfig) -> Stage:
    """Return the stage of this name that begins after `begin` tokens of the run."""
    if name == "blockwise":
        tokens, fraction = config.train.blockwise_tokens, config.router.blockwise_anneal_fraction
    else:
        tokens, fraction = config.train.tokens, config.router.anneal_fraction
    return Stage(name=name, begin=begin, tokens=tokens, anneal_fraction=fraction)


def step_tokens(config: RunConfig) -> int:
    """Return the number of tokens that every step reads, padding included."""
    return config.train.rows_per_step * config.data.row_tokens


def run_tokens(stage: Stage, config: RunConfig) -> int:
    """Return the number of tokens at which the run ends, if it is in this stage now.

    The last step may read more.
    """
    if stage.name == "global":
        return stage.begin + stage.tokens
    step = step_tokens(config)
    return stage.begin + -(-stage.tokens // step) * step + config.train.tokens


def next_due(tokens: int, every: int) -> int | float:
    """Return the next multiple of `every` after so many tokens; infinity if `every` is 0."""
    return (tokens // every + 1) * every if every else math.inf


def annealed_k(progress: float, fraction: float, num_experts: int, target_k: float) -> float:
    """Return the number of active experts at `progress` in [0, 1].

    All experts are active at 0, and the number falls linearly to the target at `fraction`.
    """
    if progress >= fraction:
        return target_k
    return num_experts + (target_k - num_experts) * progress / fraction


@contextmanager
def annealed(
    banks: Sequence[ExpertBank], config: RunConfig, stage: Stage, tokens: int
) -> Iterator[None]:
    """Let the routers use, within the context, the k of the step that begins after so many tokens.

    Routers that activate a fixed number of experts get the step's k, rounded. A budget works one
    step ahead: the step runs with the threshold that the previous step set, and sets the one for
    the next step's k, without averaging, so that the mean follows the line. After the context the
    routers have their final k again, which evaluations use; training thresholds stay annealed.
    """
    fraction, num_experts = stage.anneal_fraction, config.experts.num_experts
    progress, routers = stage.progress(tokens), [bank.router for bank in banks]
    if progress >= fraction:
        yield
        return
    budget = routers[0].rule.has_budget
    if budget:
        progress = stage.progress(tokens + step_tokens(config))
    target = annealed_k(progress, fraction, num_experts, config.router.target_k)
    target_k = target if budget else float(round(target))
    rules = [replace(router.rule, target_k=target_k) for router in routers]
    with temporary_rules(routers, rules, annealing=True):
        if budget and tokens == stage.begin:
            for router in routers:
                router.threshold.fill_(ALL_ACTIVE)
        yield
