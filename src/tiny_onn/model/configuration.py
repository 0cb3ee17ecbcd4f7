"""The student's configuration: its experts' own settings, and the backbone's for all else."""

import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from tiny_onn.config.checks import shown
from tiny_onn.config.schema import Compensation
from tiny_onn.errors import UserError
from tiny_onn.model.router import RoutingRule

# transformers asks for these attributes to learn how a checkpoint is stored. The dense model's
# values say nothing about the student's files.
OF_STORED_FILES = ("quantization_config", "compression_config", "auto_map")


# A program that never imported this package finds it by this file beside a saved student.
CODE_FILE = "modeling_tiny_onn.py"
CODE = '''"""The classes of this folder's model, which the installed package tiny-onn defines."""

from tiny_onn import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel

__all__ = ["TinyOnnConfig", "TinyOnnForCausalLM", "TinyOnnModel"]
'''
AUTO_MAP = MappingProxyType(
    {
        auto: f"{CODE_FILE.removesuffix('.py')}.{name}"
        for auto, name in (
            ("AutoConfig", "TinyOnnConfig"),
            ("AutoModel", "TinyOnnModel"),
            ("AutoModelForCausalLM", "TinyOnnForCausalLM"),
        )
    }
)


class TinyOnnConfig(PretrainedConfig):
    """A dense decoder's configuration and the shape and routing of its experts.

    An attribute that the student's configuration does not have itself is read from the backbone's
    and written there (`vocab_size`, `hidden_size`, `max_position_embeddings`, ...), so each fact is
    stored once.

    Args:
        backbone: the dense model's configuration, or its dictionary.
        num_experts: number of experts per layer, E.
        moe_intermediate_size: number of neurons per expert, I, which earlier versions stored as
            `expert_dim`. E * I is the dense MLP's width; 0 stands for that width divided by E.
        routing: the options of `RoutingRule`, or the rule itself. It is stored as a table of all
            options; students from before this table have its options among `kwargs`.
        compensation, learn_scale, token_scale: see `ExpertsConfig`.
        sequence_scale: the factor of the target where a budget follows each sequence; students from
            before it have none, which is 1.
        teacher, teacher_revision: the dense model that the student was cut from: a folder, a hub id
            or `embedded`.

    Raises:
        UserError: an option of `routing` is unknown, stands beside the table, or has a value of
            another type, or the scale is no finite number above 0.
    """

    model_type = "tiny_onn"
    attribute_map = {"expert_dim": "moe_intermediate_size"}  # noqa: RUF012 # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]
    # transformers 5.17 and later read this attribute from the class.
    sub_configs = {"backbone": AutoConfig}  # noqa: RUF012 # pyright: ignore[reportIncompatibleMethodOverride, reportAssignmentType]

    def __init__(
        self,
        backbone: PretrainedConfig | dict[str, Any] | None = None,
        *,
        num_experts: int = 32,
        moe_intermediate_size: int = 0,
        routing: object = None,
        compensation: Compensation = "none",
        learn_scale: bool = False,
        token_scale: bool = False,
        sequence_scale: object = 1.0,
        teacher: str = "",
        teacher_revision: str = "main",
        **kwargs: Any,  # noqa: ANN401 - whatever transformers stores in a config
    ) -> None:
        if isinstance(backbone, dict):
            backbone = CONFIG_MAPPING[backbone["model_type"]](**backbone)
        self.backbone = CONFIG_MAPPING["qwen3"]() if backbone is None else backbone
        self.num_experts = num_experts
        width = kwargs.pop("expert_dim", 0) or moe_intermediate_size
        self.moe_intermediate_size = width or self.backbone.intermediate_size // num_experts
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
        self.token_scale = token_scale
        if (
            not isinstance(sequence_scale, int | float)
            or isinstance(sequence_scale, bool)
            or not 0 < sequence_scale < math.inf
        ):
            raise UserError(
                f"sequence_scale: got {shown(sequence_scale)}, expected a finite number above 0;"
                " restore the student's config.json, or set 1 there"
            )
        self.sequence_scale = float(sequence_scale)
        self.teacher_revision = teacher_revision
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.backbone, name, None))
        kwargs.setdefault("tie_word_embeddings", self.backbone.tie_word_embeddings)
        super().__init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        # This attribute is set last, since `_answers_for` waits for it: until then transformers'
        # part must not find and change the backbone's attributes.
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
        """Return whether a name that the configuration lacks is looked up in the backbone's.

        It is not before the configuration is complete, nor for names that describe stored files or
        belong to Python's protocols.
        """
        complete = "teacher" in self.__dict__
        return complete and not name.startswith("_") and name not in OF_STORED_FILES

    def get_text_config(self, *_: object, **__: object) -> PretrainedConfig:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the backbone's configuration, which caches and generation ask about layers."""
        return self.backbone

    @property
    def num_experts_per_tok(self) -> int:
        """Largest number of experts that a token can activate, shared ones included."""
        return self.routing_rule().num_active or self.num_experts

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # noqa: ANN401 # pyright: ignore[reportIncompatibleMethodOverride]
        """Write config.json, and the file that names the package to programs without it."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / CODE_FILE).write_text(CODE, encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Leave the class as it is: transformers would copy its source beside what is saved."""

    def routing_rule(self) -> RoutingRule:
        """Return the rule that every layer's router follows."""
        return RoutingRule(**self.routing)
