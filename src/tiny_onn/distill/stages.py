"""The stages of a run: which one a step belongs to, how far it is, and how many experts are on.

A run reads `train.blockwise_tokens` in the blockwise stage, then `train.tokens` in the global one,
each in whole steps. A checkpoint needs the stage's name and where it began; all else follows from
the settings and the tokens read so far.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

from tiny_onn.config.schema import RunConfig
from tiny_onn.model.experts import ExpertBank
from tiny_onn.model.router import temporary_rules

StageName = Literal["blockwise", "global"]
# A threshold below every score.
ALL_ACTIVE = -1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A part of a run with a loss, a learning rate schedule and an optimizer state of its own."""

    name: StageName
    begin: int
    """Tokens of the run that come before it."""
    tokens: int
    """Its length; its last step may read more."""
    anneal_fraction: float

    def progress(self, tokens: int | float) -> float:
        """How much of the stage is done, from 0 to 1, after so many tokens of the run."""
        return min(1.0, (tokens - self.begin) / self.tokens)

    def over(self, tokens: int) -> bool:
        """Whether the stage is done after so many tokens of the run."""
        return tokens - self.begin >= self.tokens


def stage_named(name: StageName, begin: int, config: RunConfig) -> Stage:
    """The stage of this name that begins after so many tokens of the run."""
    if name == "blockwise":
        tokens, fraction = config.train.blockwise_tokens, config.router.blockwise_anneal_fraction
    else:
        tokens, fraction = config.train.tokens, config.router.anneal_fraction
    return Stage(name=name, begin=begin, tokens=tokens, anneal_fraction=fraction)


def step_tokens(config: RunConfig) -> int:
    """Tokens that every step reads, padding included."""
    return config.train.rows_per_step * config.data.row_tokens


def run_tokens(stage: Stage, config: RunConfig) -> int:
    """Tokens at which the run ends, seen from a stage of it; the last step may read more."""
    if stage.name == "global":
        return stage.begin + stage.tokens
    step = step_tokens(config)
    return stage.begin + -(-stage.tokens // step) * step + config.train.tokens


def annealed_k(progress: float, fraction: float, num_experts: int, target_k: float) -> float:
    """Active experts at `progress` in [0, 1]: all at 0, on a line to the target at `fraction`."""
    if progress >= fraction:
        return target_k
    return num_experts + (target_k - num_experts) * progress / fraction


@contextmanager
def annealed(
    banks: Sequence[ExpertBank], config: RunConfig, stage: Stage, tokens: int
) -> Iterator[None]:
    """Within the context routers are set for the step that begins after so many tokens.

    Routers that activate a fixed number of experts get the step's k, rounded. A budget's threshold
    was moved to the step's k by the step before; what this step moves it to is the next step's, and
    all the way, so that the mean keeps up with the line. Afterwards routers have their own k again,
    which evaluations use; training thresholds stay where the annealing is.
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
