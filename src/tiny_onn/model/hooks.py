"""What goes into a dense model's MLPs on a few rows of text: read once, visited often.

Legend: T tokens, D hidden, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tiny_onn.console import track
from tiny_onn.data.packing import PackedRow
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import backbone_of, decoder_layers, gated_mlps, last_hidden_states

# Inputs of at most so many bytes stay in memory between visits.
KEPT_BYTES = 2**30

Visit = Callable[[int, Tensor, PackedRow], None]


class MlpInputs:
    """The MLP inputs of a dense model on some rows, layer by layer and row by row.

    The first visit runs the model once. If the inputs take at most `KEPT_BYTES`, they stay in
    memory, in the model's number format, and later visits read the same bits from there; else every
    visit runs the model again.

    Args:
        dense: The model; its weights must not change between visits.
        rows: The text, on the model's device.
    """

    def __init__(self, dense: PreTrainedModel, rows: Sequence[PackedRow]) -> None:
        self.dense, self.rows = dense, rows
        self._kept: list[list[Tensor]] = []

    def head(self, num_rows: int) -> "MlpInputs":
        """The inputs of the first rows alone."""
        if num_rows >= len(self.rows):
            return self
        first = MlpInputs(self.dense, self.rows[:num_rows])
        first._kept = self._kept[:num_rows]
        return first

    @torch.no_grad()
    def visit(self, see: Visit, text: str) -> None:
        """Call `see(layer, x_TD, row)` for each layer of each row.

        Args:
            see: What to do with an input; the same tensors come again at the next visit.
            text: What the progress bar calls this visit.
        """
        if self._kept:
            for row, inputs in track(list(zip(self.rows, self._kept, strict=True)), text):
                for layer, x_TD in enumerate(inputs):
                    see(layer, x_TD, row)
            return
        keep = self._num_bytes() <= KEPT_BYTES
        kept = [self._run(row, see, keep) for row in track(self.rows, text)]
        if keep:
            self._kept = kept

    def _run(self, row: PackedRow, see: Visit, keep: bool) -> list[Tensor]:
        """Run the model on a row; its MLP inputs if they are to be kept."""
        inputs: list[Tensor] = []

        def hook(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TD = args[0].flatten(0, -2)
            if keep:
                inputs.append(x_TD)
            see(layer, x_TD, row)

        with ExitStack() as hooks:
            for layer, mlp in enumerate(gated_mlps(self.dense)):
                hooks.enter_context(mlp.module.register_forward_pre_hook(partial(hook, layer)))
            last_hidden_states(self.dense, row.input_ids, **packed_kwargs(row))
        return inputs

    def _num_bytes(self) -> int:
        num_tokens = sum(row.input_ids.numel() for row in self.rows)
        hidden_dim = gated_mlps(self.dense)[0].gate_proj.in_features
        size = self.dense.dtype.itemsize
        return len(decoder_layers(self.dense)) * num_tokens * hidden_dim * size


@contextmanager
def mlp_calls(dense: PreTrainedModel, see: Callable[[int, Tensor, Tensor], None]) -> Iterator[None]:
    """Within the context, `see(layer, x_TD, y_TD)` gets each MLP's input and output in its pass."""

    def hook(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(index, inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2))

    with ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(dense)):
            mlp = layer.get_submodule("mlp")
            hooks.enter_context(mlp.register_forward_hook(partial(hook, index)))
        yield


@contextmanager
def layer_outputs(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Within the context the list gets each decoder layer's output (1, T, D) in a forward pass.

    Close it before the backward pass: what a checkpointed layer recomputes would be added.
    """
    kept: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        kept.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for layer in decoder_layers(backbone_of(model)) if wanted else ():
            hooks.enter_context(layer.register_forward_hook(hook))
        yield kept
