"""Hooks on a model's layers: a dense model's MLP inputs, its MLPs' calls, and layers' outputs.

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

# A function of a layer's index, the layer's MLP input (T, D) and the row.
Visitor = Callable[[int, Tensor, PackedRow], None]


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
        self._inputs: list[list[Tensor]] = []

    def head(self, num_rows: int) -> "MlpInputs":
        """Return the inputs of the first rows alone."""
        if num_rows >= len(self.rows):
            return self
        first = MlpInputs(self.dense, self.rows[:num_rows])
        first._inputs = self._inputs[:num_rows]
        return first

    @torch.no_grad()
    def visit(self, visitor: Visitor, text: str) -> None:
        """Call `visitor(layer, x_TD, row)` for each layer of each row.

        Args:
            visitor: The function to call; it must leave the tensors, which come again at the next
                visit, as they are.
            text: The progress bar's text.
        """
        if self._inputs:
            for row, inputs in track(list(zip(self.rows, self._inputs, strict=True)), text):
                for layer, x_TD in enumerate(inputs):
                    visitor(layer, x_TD, row)
            return
        keep = self._num_bytes() <= KEPT_BYTES
        rows_inputs = [self._run(row, visitor, keep) for row in track(self.rows, text)]
        if keep:
            self._inputs = rows_inputs

    def _run(self, row: PackedRow, visitor: Visitor, keep: bool) -> list[Tensor]:
        """Run the model on a row; return its MLP inputs if they are to be kept, else no tensor."""
        inputs: list[Tensor] = []

        def hook(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TD = args[0].flatten(0, -2)
            if keep:
                inputs.append(x_TD)
            visitor(layer, x_TD, row)

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
def mlp_calls(
    dense: PreTrainedModel, observe: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `observe(layer, x_TD, y_TD)` with the input and output of every MLP call in the context.

    Both tensors are detached.
    """

    def hook(index: int, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        observe(index, inputs[0].detach().flatten(0, -2), output.detach().flatten(0, -2))

    with ExitStack() as hooks:
        for index, layer in enumerate(decoder_layers(dense)):
            mlp = layer.get_submodule("mlp")
            hooks.enter_context(mlp.register_forward_hook(partial(hook, index)))
        yield


@contextmanager
def layer_outputs(model: PreTrainedModel, wanted: bool = True) -> Iterator[list[Tensor]]:
    """Yield a list that receives each decoder layer's output (1, T, D) in a forward pass.

    The context must end before the backward pass, in which checkpointed layers run again and would
    add their outputs again. The list stays empty if `wanted` is false.
    """
    outputs: list[Tensor] = []

    def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    with ExitStack() as hooks:
        for layer in decoder_layers(backbone_of(model)) if wanted else ():
            hooks.enter_context(layer.register_forward_hook(hook))
        yield outputs
