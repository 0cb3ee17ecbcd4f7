"""The student's configuration: its experts' own settings, and the backbone's for all else."""

from dataclasses import asdict, fields
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tiny_onn.config import Compensation
from tiny_onn.errors import UserError
from tiny_onn.router import RoutingRule

# Attributes by which transformers asks how a checkpoint is stored: the dense model's says nothing
# about the student's.
OF_STORED_FILES = ("quantization_config", "compression_config", "auto_map")


class TinyOnnConfig(PretrainedConfig):
    """A dense decoder's configuration and the shape and routing of its experts.

    What it does not have itself it reads from the backbone's configuration and writes there
    (`vocab_size`, `hidden_size`, `max_position_embeddings`, ...), so each fact is stored once.

    Args:
        backbone: the dense model's configuration, or its dictionary.
        num_experts: experts per layer, E.
        expert_dim: neurons per expert, I; E * I is the dense MLP's width.
        routing: the options of `RoutingRule`, or the rule itself; stored as a table of all of
            them. Students of before this table have its options among `kwargs`.
        compensation, learn_scale: see `ExpertsConfig`.
        teacher, teacher_revision: the dense model it was cut from: a folder, hub id, or `embedded`.

    Raises:
        UserError: an option of `routing` is unknown, stands beside the table, or has a value of
            another type.
    """

    model_type = "tiny_onn"
    # The class-level protocol of transformers 5.17 and later.
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012 # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self,
        backbone: PretrainedConfig | dict[str, Any] | None = None,
        *,
        num_experts: int = 32,
        expert_dim: int = 0,
        routing: object = None,
        compensation: Compensation = "none",
        learn_scale: bool = False,
        teacher: str = "",
        teacher_revision: str = "main",
        **kwargs: Any,  # noqa: ANN401 - whatever transformers stores in a config
    ) -> None:
        if isinstance(backbone, dict):
            backbone = CONFIG_MAPPING[backbone["model_type"]](**backbone)
        self.backbone = CONFIG_MAPPING["qwen3"]() if backbone is None else backbone
        self.num_experts = num_experts
        self.expert_dim = expert_dim or self.backbone.intermediate_size // num_experts
        beside = {f.name: kwargs.pop(f.name) for f in fields(RoutingRule) if f.name in kwargs}
        if beside and routing is not None:
            raise UserError(
                f"{', '.join(beside)}: got a value beside `routing`, expected routing options in"
                " that table alone; move it there"
            )
        if not isinstance(routing, RoutingRule):
            routing = RoutingRule.from_stored(beside if routing is None else routing)
        self.routing: dict[str, Any] = asdict(routing)
        self.compensation: Compensation = compensation
        self.learn_scale = learn_scale
        self.teacher_revision = teacher_revision
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.backbone, name, None))
        kwargs.setdefault("tie_word_embeddings", self.backbone.tie_word_embeddings)
        super().__init__(**kwargs)
        # Last, see `_answers_for`: transformers' part must not find and change the backbone's.
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the backbone has
        if self._answers_for(name) and hasattr(self.backbone, name):
            return getattr(self.backbone, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object) -> None:
        own = name in self.__dict__ or hasattr(type(self), name)
        if not own and self._answers_for(name) and hasattr(self.backbone, name):
            setattr(self.backbone, name, value)
        else:
            super().__setattr__(name, value)

    def _answers_for(self, name: str) -> bool:
        """Whether a name that the configuration has not itself is looked up in the backbone's.

        Not before it is complete, and not for what tells of stored files or of Python's protocols.
        """
        complete = "teacher" in self.__dict__
        return complete and not name.startswith("_") and name not in OF_STORED_FILES

    def get_text_config(self, *_: object, **__: object) -> PretrainedConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The backbone's configuration: what caches and generation ask about layers and heads."""
        return self.backbone

    def routing_rule(self) -> RoutingRule:
        """The rule every layer's router follows."""
        return RoutingRule(**self.routing)
