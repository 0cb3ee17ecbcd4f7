"""Which selections, objectives, weightings and their options go together, and why others do not."""

from dataclasses import dataclass

from tiny_onn.config import RouterConfig, RunConfig
from tiny_onn.errors import UserError

CONTROLS = ("static", "random", "oracle")


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """A setting that does not fit the others."""

    setting: str
    got: object
    expected: str
    reason: str
    remedy: str

    def error(self) -> UserError:
        """The refusal in one line."""
        got = f'"{self.got}"' if isinstance(self.got, str) else str(self.got)
        got = got.lower() if isinstance(self.got, bool) else got
        return UserError(
            f"{self.setting}: got {got}, expected {self.expected}: {self.reason}; {self.remedy}"
        )


def has_budget(router: RouterConfig) -> bool:
    """Whether the number of a token's experts is free and a threshold holds its mean."""
    return router.selection == "budget" or (router.selection == "oracle" and router.oracle_budget)


def check_routing(config: RunConfig) -> None:
    """Return if the router's settings go together.

    Raises:
        UserError: the first that does not fit, with the reason and the remedy.
    """
    for refusal in (
        *_objective_refusals(config),
        *_number_refusals(config),
        *_top_any_refusals(config),
        *_idle_refusals(config),
        *_annealing_refusals(config),
        *_helpful_refusals(config),
        *_shared_refusals(config),
    ):
        raise refusal.error()


def _objective_refusals(config: RunConfig) -> list[Refusal]:
    """The selection cannot learn from the objective."""
    router, found = config.router, []
    if router.selection in CONTROLS and router.objective != "none":
        found.append(
            Refusal(
                setting="router.objective",
                got=router.objective,
                expected=f'"none" with router.selection = "{router.selection}"',
                reason="there is no gate to train",
                remedy='set router.objective = "none"',
            )
        )
    if router.selection == "top_any" and router.objective in ("smk", "regression"):
        reasons = {
            "smk": "a cross-entropy over experts says which one, not how many, and nothing would"
            " hold the number of experts that pass their thresholds",
            "regression": "cosines are bounded and thresholds learned, so logits that equal log"
            " norms would not count experts",
        }
        found.append(
            Refusal(
                setting="router.objective",
                got=router.objective,
                expected='"task" or "none" with router.selection = "top_any"',
                reason=reasons[router.objective],
                remedy='set router.objective = "task", or router.selection = "budget"',
            )
        )
    return found


def _number_refusals(config: RunConfig) -> list[Refusal]:
    """The number of experts does not fit."""
    router, num_experts, found = config.router, config.experts.num_experts, []
    if router.target_k > num_experts:
        found.append(
            Refusal(
                setting="router.target_k",
                got=router.target_k,
                expected=f"at most experts.num_experts = {num_experts}",
                reason="there are no more",
                remedy="lower it or raise experts.num_experts",
            )
        )
    exact = not has_budget(router) and router.selection != "top_any"
    if exact and not float(router.target_k).is_integer():
        found.append(
            Refusal(
                setting="router.target_k",
                got=router.target_k,
                expected=f'a whole number with router.selection = "{router.selection}"',
                reason="every token has exactly as many",
                remedy='round it or use router.selection = "budget"',
            )
        )
    if router.budget_scope == "global" and not has_budget(router):
        found.append(
            Refusal(
                setting="router.budget_scope",
                got="global",
                expected=f'"layer" with router.selection = "{router.selection}"',
                reason="it has no budget to share among layers",
                remedy='set router.selection = "budget"',
            )
        )
    if router.oracle_budget and router.selection != "oracle":
        found.append(
            Refusal(
                setting="router.oracle_budget",
                got=True,
                expected=f'false with router.selection = "{router.selection}"',
                reason="there is no oracle",
                remedy='set router.selection = "oracle" or leave it out',
            )
        )
    return found


def _top_any_refusals(config: RunConfig) -> list[Refusal]:
    """What `top_any` cannot do, and what only it can."""
    router, experts, found = config.router, config.experts, []
    if router.selection == "top_any":
        if experts.weighting not in ("mean", "unit"):
            found.append(
                Refusal(
                    setting="experts.weighting",
                    got=experts.weighting,
                    expected='"mean" or "unit" with router.selection = "top_any"',
                    reason="its gate says yes or no, with the gradient straight through",
                    remedy='set experts.weighting = "mean" for DynMoE',
                )
            )
        if experts.gate_init != "random":
            found.append(
                Refusal(
                    setting="experts.gate_init",
                    got=experts.gate_init,
                    expected='"random" with router.selection = "top_any"',
                    reason="its gate holds directions and thresholds, not a linear map",
                    remedy='set experts.gate_init = "random"',
                )
            )
        if router.reseed_every_steps and router.objective != "task":
            found.append(
                Refusal(
                    setting="router.reseed_every_steps",
                    got=router.reseed_every_steps,
                    expected=f'0 with router.objective = "{router.objective}"',
                    reason="the gate is frozen",
                    remedy='set router.objective = "task" or leave it at 0',
                )
            )
        return found
    for setting, got, default in (
        ("router.at_least_one", router.at_least_one, "evaluation"),
        ("router.reseed_every_steps", router.reseed_every_steps, 0),
    ):
        if got != default:
            expected = f'"{default}"' if isinstance(default, str) else str(default)
            found.append(
                Refusal(
                    setting=setting,
                    got=got,
                    expected=f'{expected} with router.selection = "{router.selection}"',
                    reason="it belongs to top_any alone",
                    remedy='set router.selection = "top_any" or leave it out',
                )
            )
    return found


def _idle_refusals(config: RunConfig) -> list[Refusal]:
    """Settings that would do nothing."""
    router, smk, found = config.router, config.smk, []
    if router.selection in CONTROLS:
        found += [
            Refusal(
                setting=setting,
                got=got,
                expected=f'0 with router.selection = "{router.selection}"',
                reason="a control stays as it is",
                remedy="leave it at 0",
            )
            for setting, got in (
                ("router.balance_rate", router.balance_rate),
                ("router.revive_after_steps", router.revive_after_steps),
            )
            if got
        ]
    if smk.explore_fraction:
        reason = None
        if router.objective != "smk":
            reason = f'router.objective = "{router.objective}" has no candidates to explore'
        elif smk.candidates == "all":
            reason = 'smk.candidates = "all" sees every expert already'
        elif router.target_k == config.experts.num_experts:
            reason = "all experts are active"
        if reason is not None:
            found.append(
                Refusal(
                    setting="smk.explore_fraction",
                    got=smk.explore_fraction,
                    expected="0",
                    reason=reason,
                    remedy='leave it at 0, or set router.objective = "smk" and'
                    ' smk.candidates = "active"',
                )
            )
    return found


def _annealing_refusals(config: RunConfig) -> list[Refusal]:
    """Annealing that would do nothing."""
    router = config.router
    reason = None
    if router.selection == "top_any":
        reason = 'router.selection = "top_any" finds its own number of experts'
    elif router.target_k == config.experts.num_experts:
        reason = "router.target_k is experts.num_experts, and nothing can fall"
    no_stage = "train.blockwise_tokens is 0, and there is no blockwise stage"
    stages = {
        "anneal_fraction": reason,
        "blockwise_anneal_fraction": reason if config.train.blockwise_tokens else no_stage,
    }
    return [
        Refusal(
            setting=f"router.{name}",
            got=getattr(router, name),
            expected="0",
            reason=why,
            remedy="leave it at 0",
        )
        for name, why in stages.items()
        if why is not None and getattr(router, name)
    ]


def _helpful_refusals(config: RunConfig) -> list[Refusal]:
    """Only a gain says by its sign whether an expert helps."""
    smk = config.smk
    if smk.targets != "helpful" or (smk.surprise, smk.direction) == ("gain", "max"):
        return []
    return [
        Refusal(
            setting="smk.targets",
            got="helpful",
            expected=f'another one with smk.surprise = "{smk.surprise}" and smk.direction ='
            f' "{smk.direction}"',
            reason="only the sign of a gain says whether an expert helps",
            remedy='set smk.surprise = "gain" and smk.direction = "max", or smk.targets = "member"',
        )
    ]


def _shared_refusals(config: RunConfig) -> list[Refusal]:
    """Shared experts that leave the gate nothing to choose, or that nobody can share."""
    experts, router, found = config.experts, config.router, []
    S = experts.num_shared
    if S and router.selection == "top_any":
        found.append(
            Refusal(
                setting="experts.num_shared",
                got=S,
                expected='0 with router.selection = "top_any"',
                reason="its gate decides by itself how many experts are active, each by a threshold"
                " of its own",
                remedy='set router.selection = "budget" or leave it at 0',
            )
        )
    if experts.num_experts <= S:
        found.append(
            Refusal(
                setting="experts.num_shared",
                got=S,
                expected=f"fewer than experts.num_experts = {experts.num_experts}",
                reason="the gate would have nothing to choose from",
                remedy="lower it",
            )
        )
    elif S and router.target_k < S + 1:
        found.append(
            Refusal(
                setting="router.target_k",
                got=router.target_k,
                expected=f"at least {S + 1} with experts.num_shared = {S}",
                reason="it counts the shared experts, and every token has one of the others",
                remedy="raise it or lower experts.num_shared",
            )
        )
    if experts.keep_massive and (not S or experts.init == "random"):
        random = experts.init == "random"
        found.append(
            Refusal(
                setting="experts.keep_massive",
                got=True,
                expected='false with experts.init = "random"'
                if random
                else "false with experts.num_shared = 0",
                reason="there are no neurons of the teacher to keep"
                if random
                else "no expert is always on",
                remedy="start from dense neurons or leave it out"
                if random
                else "set experts.num_shared to 1 or more",
            )
        )
    return found


def check_path(config: RunConfig) -> None:
    """Return if the path that the settings ask for can run them.

    Raises:
        UserError: `train.expert_path = "grouped"` with settings that only the dense path runs.
    """
    need = dense_need(config)
    if config.train.expert_path == "grouped" and need is not None:
        raise UserError(
            f'train.expert_path: got "grouped", expected "auto" or "dense": {need}; set'
            ' train.expert_path = "auto"'
        )


def dense_need(config: RunConfig) -> str | None:
    """Why a run can only take the dense path; None if it can take either."""
    if config.router.objective == "smk" and config.smk.candidates == "all":
        return 'smk.candidates = "all" needs the surprise of inactive experts'
    if config.router.objective == "regression":
        return 'router.objective = "regression" needs the norms of inactive experts\' outputs'
    weighting = config.experts.weighting
    straight = weighting in ("unit", "mean") and config.router.selection != "top_any"
    if config.router.objective == "task" and straight:
        return (
            f'router.objective = "task" with experts.weighting = "{weighting}" needs the gradient'
            " of inactive experts' weights"
        )
    if config.train.ffn_chunk_tokens:
        return f"train.ffn_chunk_tokens = {config.train.ffn_chunk_tokens} chunks the dense path"
    return None
