"""The disk that a run needs at its largest, from the sizes of what is trained.

A checkpoint holds the experts, the gates and the optimizer's state; it is written whole before an
older one is removed. Metrics and JSON files, some megabytes, are left out.
"""

from dataclasses import dataclass

from rich import filesize
from torch import Tensor

from tiny_onn.config.schema import RunConfig
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.norms import norms_of
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.planning.memory import NUMBER_BYTES
from tiny_onn.planning.optimizer_state import state_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class DiskUse:
    """The bytes that a run's folder holds at its largest."""

    num_checkpoints: int
    """The largest number of checkpoints at once, with the best one and the one being written."""
    checkpoint_bytes: int
    """The bytes of one checkpoint."""
    student_bytes: int
    """The bytes of the finished student."""

    @property
    def total_bytes(self) -> int:
        """The bytes of all checkpoints and the student."""
        return self.num_checkpoints * self.checkpoint_bytes + self.student_bytes

    def __str__(self) -> str:
        """Tell what takes the disk."""
        many, size = self.num_checkpoints > 1, filesize.decimal
        number = f"{self.num_checkpoints} checkpoints" if many else "a checkpoint"
        return (
            f"{number} of {size(self.checkpoint_bytes)}{' each' * many} with optimizer state, and"
            f" the student of {size(self.student_bytes)}"
        )


def disk_use(config: RunConfig, student: TinyOnnForCausalLM) -> DiskUse:
    """Return what a run keeps on disk.

    Args:
        config: the settings.
        student: the student, which may be on the meta device.
    """
    experts, gates = split_parameters(student)
    gates = gates if config.router.objective != "none" else {}
    states = (
        _state_bytes(config, name, p, name in experts) for name, p in (experts | gates).items()
    )
    master = NUMBER_BYTES[config.optim.master_dtype]
    trained = sum(
        tensor.numel() * (master if name in experts else tensor.element_size())
        for name, tensor in student.state_dict().items()
        if in_mlp(name)
    )
    backbone = sum(p.nbytes for name, p in student.named_parameters() if not in_mlp(name))
    student_bytes = trained + backbone
    if config.optim.norm_lr:
        # A checkpoint holds float32 copies of gains in bfloat16 too.
        gains = [module.get_parameter("weight") for module in norms_of(student.backbone).values()]
        trained += sum(p.nbytes for p in gains)
        copied = 4 if config.teacher.dtype == "bfloat16" else 0
        states = (*states, *(state_bytes("adamw", p.shape) + copied * p.numel() for p in gains))
    return DiskUse(
        num_checkpoints=_checkpoints_at_once(config),
        checkpoint_bytes=trained + sum(states),
        student_bytes=student_bytes,
    )


def _state_bytes(config: RunConfig, name: str, parameter: Tensor, of_experts: bool) -> int:
    # Vectors and gates have the state of AdamW, whatever the optimizer.
    if not of_experts or parameter.ndim == 1:
        return state_bytes("adamw", parameter.shape)
    # The optimizer sees the gate and up weights of an expert, which are stored as one, as two.
    halves = parameter.unflatten(1, (2, -1)) if name.endswith("gate_up_proj") else parameter
    return state_bytes(config.optim.name, halves.shape)


def _checkpoints_at_once(config: RunConfig) -> int:
    """Return `train.keep_checkpoints`, the best one and the one being written, or all if fewer."""
    train = config.train
    before_end = train.blockwise_tokens + train.tokens - 1
    # A checkpoint is written at the end, at each interval, and after an evaluation that is best.
    intervals = (every for every in (train.save_every_tokens, train.eval_every_tokens) if every)
    written = 1 + sum(before_end // every for every in intervals) + (train.blockwise_tokens > 0)
    return min(train.keep_checkpoints + 2, written)
