"""The content of a run's folder as the report reads it, as plain dictionaries."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

Record = Mapping[str, Any]

EVALUATIONS = ("start", "eval", "end")
STEPS = ("step", "blockwise")
CONTROLS = ("static", "random", "oracle")


@dataclass(frozen=True, kw_only=True)
class Run:
    """The content of one run's folder.

    Attributes:
        name: the name in the page, where no two runs share one.
        config: `config.json`, section by section.
        environments: `environment.json` and those of resumptions, in order.
        records: `metrics.jsonl`, in order.
        health: the verdict and its findings, as `summary.json` has them.
        conversion: `conversion.json`; None: the file is missing.
        summary: `summary.json`; None: the run has not finished.
        process: "ended", "trains", "lost" if the run's process ended without saving, or "silent" if
            it is on another machine and has written nothing for a while.
        news: the time of the last news of a run that is silent.
        frontier: `frontier.json`; None: the file is missing.
        view: measurements of the student itself, see `evaluation/run_view.py`; None: there are
            none.
        view_missing: the reason why there is no view.
    """

    name: str
    config: Mapping[str, Mapping[str, Any]]
    environments: Sequence[Mapping[str, Any]]
    records: Sequence[Record]
    health: Mapping[str, Any]
    conversion: Mapping[str, Any] | None = None
    summary: Mapping[str, Any] | None = None
    process: Literal["ended", "trains", "lost", "silent"] = "ended"
    news: str = ""
    frontier: Mapping[str, Any] | None = None
    view: Mapping[str, Any] | None = None
    view_missing: str = ""

    @cached_property
    def steps(self) -> list[Record]:
        """The records of the steps of both stages."""
        return [record for record in self.records if record["kind"] in STEPS]

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def evaluations(self) -> list[Record]:
        """The records of held-out evaluations, including the one before the first step."""
        return [record for record in self.records if record["kind"] in EVALUATIONS]

    @property
    def untrained(self) -> Record | None:
        """The evaluation before the first step."""
        first = self.evaluations[:1]
        return first[0] if first and first[0]["step"] == 0 else None

    @property
    def last(self) -> Record | None:
        """The newest evaluation, which is the untrained one if no other was made."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def was_judged(self) -> bool:
        """True if the student was evaluated after its training began."""
        return self.last is not None and self.last["step"] > 0

    @property
    def tokens(self) -> int:
        """The number of training tokens that were recorded."""
        return max((record["tokens"] for record in self.records), default=0)

    @property
    def planned_tokens(self) -> int:
        """The number of training tokens that the settings ask for."""
        train = self.config["train"]
        return train["tokens"] + train.get("blockwise_tokens", 0)

    @property
    def finished(self) -> bool:
        """True if the run came to its end."""
        ended = self.summary is not None and self.process == "ended"
        return ended and not (self.summary or {}).get("interrupted")

    @property
    def selection(self) -> str:
        """The setting `router.selection`."""
        return self.config["router"]["selection"]

    @property
    def is_control(self) -> bool:
        """True if the run is a control, which a trained gate has to beat."""
        return self.selection in CONTROLS

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer."""
        return self.config["experts"]["num_experts"]

    @property
    def num_shared(self) -> int:
        """The number of experts of a layer that every token has."""
        return self.config["experts"].get("num_shared", 0)

    @property
    def target_k(self) -> float | None:
        """The mean number of active experts that a budget holds; None without a budget."""
        router = self.config["router"]
        free = self.selection == "budget" or (
            self.selection == "oracle" and router["oracle_budget"]
        )
        return router["target_k"] if free else None

    def with_layers(self) -> Iterator[Record]:
        """Return the records that hold the routing of each layer, in order."""
        return (
            record
            for record in self.records
            if record["kind"] in (*STEPS, *EVALUATIONS) and record.get("layers")
        )


def token_blind_layers(layers: Mapping[str, Any], num_shared: int, num_experts: int) -> list[int]:
    """Return the layers in which every token has the same experts, although it has not nearly all.

    Args:
        layers: `layers` of an evaluation's record.
        num_shared: the number of experts that every token has.
        num_experts: the number of experts of a layer.
    """
    num_routed = num_experts - num_shared
    # If every token has the same k experts, the entropy of the load is log k.
    return [
        i
        for i, (entropy, k) in enumerate(zip(layers["load_entropy"], layers["mean_k"], strict=True))
        if k - num_shared < 0.95 * num_routed and not math.exp(entropy) > 1.02 * (k - num_shared)
    ]


def distinct(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with distinct names: a number follows a name that came before."""
    taken: set[str] = set()
    renamed = []
    for run in runs:
        name, number = run.name, 1
        while name in taken:
            number += 1
            name = f"{run.name} ({number})"
        taken.add(name)
        renamed.append(replace(run, name=name))
    return renamed
