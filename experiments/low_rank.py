"""A dense rival of equal compute: every MLP matrix as a product of two thin ones, then distilled.

The rank is the one at which a token costs `target_k / num_experts` of the dense MLP's FLOPs. The
start is that of SVD-LLM (arXiv 2403.07378): the best product for the inputs that the matrix sees,
layer by layer on the student's own inputs; the down projection is fitted to the teacher's output by
ridge regression before it is cut. It is trained by the same losses, text and schedule as a student.

Legend: T tokens, D hidden, F neurons, R rank.
"""

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_onn.config.schema import RunConfig
from tiny_onn.console import track
from tiny_onn.conversion.gates import RIDGE
from tiny_onn.conversion.refit import Passing
from tiny_onn.data.packing import PackedRow
from tiny_onn.data.rows import training_rows
from tiny_onn.distill.hidden_states import unexplained_variance
from tiny_onn.distill.schedule import lr_factor
from tiny_onn.model.attention import packed_kwargs
from tiny_onn.model.backbone import decoder_layers, gated_mlps, head_of, last_hidden_states
from tiny_onn.model.hooks import layer_outputs
from tiny_onn.ops.distillation_loss import distill
from tiny_onn.ops.loss_chunks import loss_chunk_tokens

SAVE_EVERY_STEPS = 128
# Of a change of the down projection, in units of the neurons' median energy.
PENALTY = 0.1


class Thin(nn.Module):
    """A matrix (out, in) as the product of (out, R) and (R, in), in float32."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.left = nn.Parameter(left.float().contiguous())
        self.right = nn.Parameter(right.float().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """The product with x, in x's number format."""
        return F.linear(F.linear(x, self.right.to(x.dtype)), self.left.to(x.dtype))


class ThinMlp(nn.Module):
    """A gated MLP of thin products."""

    def __init__(self, gate: Thin, up: Thin, down: Thin, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn

    def forward(self, x: Tensor) -> Tensor:
        """The MLP's output."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def rank_of(hidden: int, neurons: int, share: float) -> int:
    """The largest rank whose three products cost at most this share of the dense MLP."""
    return max(1, math.floor(share * hidden * neurons / (hidden + neurons)))


def thin(weight: Tensor, gram: Tensor, rank: int) -> Thin:
    """The product of this rank with the least squared error on inputs of this second moment."""
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
    lower = torch.linalg.cholesky(gram + penalty.to(gram.dtype))
    left, values, right = torch.linalg.svd(weight.double() @ lower, full_matrices=False)
    root = values[:rank].sqrt()
    back = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    return Thin(left[:, :rank] * root, root[:, None] * back)


@torch.no_grad()
def low_rank_student(
    dense: PreTrainedModel, rows: Sequence[PackedRow], share: float
) -> PreTrainedModel:
    """A copy of the dense model with thin MLPs, frozen but for them."""
    student = copy.deepcopy(dense).requires_grad_(False)
    passing = [Passing.start(dense, row) for row in rows]
    mlps, layers = gated_mlps(dense), decoder_layers(dense)
    for index, layer in enumerate(track(decoder_layers(student), "thin matrices, layers")):
        mlp = mlps[index]
        rank = rank_of(*reversed(mlp.gate_proj.weight.shape), share=share)
        samples = [item.sample(layers[index], layer, index) for item in passing]
        # All tokens but padding: a cut that does not see the attention sinks would destroy them.
        seen = [sample.counted_T | sample.kept_T for sample in samples]
        inputs = [sample.x_TD[m] for sample, m in zip(samples, seen, strict=True)]
        targets = [sample.target_TD[m].double() for sample, m in zip(samples, seen, strict=True)]
        gram = sum_of(x.double().T @ x.double() for x in inputs)
        gate, up = (thin(w.weight, gram, rank) for w in (mlp.gate_proj, mlp.up_proj))
        act_fn: Any = mlp.module.act_fn
        hidden = [(act_fn(gate(x)) * up(x)).double() for x in inputs]
        gram = sum_of(h.T @ h for h in hidden)
        dense_down = mlp.down_proj.weight.double()
        missing = [y - h @ dense_down.T for h, y in zip(hidden, targets, strict=True)]
        moment = sum_of(h.T @ m for h, m in zip(hidden, missing, strict=True))
        penalty = PENALTY * gram.diagonal().median() * torch.eye(len(gram), device=gram.device)
        change = torch.linalg.solve(gram + penalty, moment)
        down = thin(dense_down + change.T, gram, rank)
        layer.mlp = ThinMlp(gate, up, down, act_fn)
        for item in passing:
            item.student = item.run(layer, index, item.student)
    return student


def sum_of(parts: Any) -> Tensor:
    """The sum of tensors."""
    first, *rest = parts
    for part in rest:
        first += part
    return first


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig,
    folder: Path,
) -> int:
    """Distill the thin matrices, from the folder's checkpoint if there is one; the tokens read."""
    parameters = {n: p for n, p in student.named_parameters() if p.requires_grad}
    optim, stream, step = config.optim, training_rows(config, tokenizer), 0
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=optim.expert_lr, betas=(optim.beta1, optim.beta2), weight_decay=0.0
    )
    state = folder / "state.json"
    if state.is_file():
        saved = json.loads(state.read_text("utf-8"))
        step = saved["step"]
        stream.load_state_dict(saved["stream"])
        restore(parameters, optimizer, load_file(folder / f"step-{step}.safetensors"))
    per_step = config.data.row_tokens * config.train.rows_per_step
    num_steps = -(-config.train.tokens // per_step)
    for number in range(step, num_steps):
        factor = lr_factor((number + 0.5) / num_steps, optim).experts
        optimizer.param_groups[0]["lr"] = optim.expert_lr * factor
        for _ in range(config.train.rows_per_step):
            row = next(stream).to(student.device)
            (loss_of(student, teacher, row, config) / config.train.rows_per_step).backward()
        nn.utils.clip_grad_norm_(parameters.values(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (number + 1) % SAVE_EVERY_STEPS == 0 and number + 1 < num_steps:
            save(parameters, optimizer, {"step": number + 1, "stream": stream.state_dict()}, folder)
    return num_steps * per_step


def loss_of(
    student: PreTrainedModel, teacher: PreTrainedModel, row: PackedRow, config: RunConfig
) -> Tensor:
    """The mean loss over a row's tokens, and that of the hidden states."""
    kwargs = packed_kwargs(row)
    with torch.no_grad(), layer_outputs(teacher) as theirs:
        expected = last_hidden_states(teacher, row.input_ids, **kwargs)[0]
    with layer_outputs(student) as ours:
        got = last_hidden_states(student, row.input_ids, **kwargs)[0]
    values = distill(
        got,
        expected,
        head_of(student),
        head_of(teacher),
        row.labels[0],
        divergence=config.loss.divergence,
        temperature=config.loss.temperature,
        jsd_beta=config.loss.jsd_beta,
        label_coef=config.loss.label_coef,
        chunk_tokens=loss_chunk_tokens(config.loss, head_of(student).weight),
        need_metrics=False,
    )
    mask_T = row.loss_mask[0]
    loss = (values.loss * mask_T).sum() / mask_T.sum().clamp_min(1)
    by_feature = config.loss.states_scale == "feature"
    states = unexplained_variance(ours, theirs, row.router_mask[0], by_feature=by_feature).mean()
    return loss + config.loss.states_coef * states


def save(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    folder: Path,
) -> None:
    """Write a checkpoint, and then the file that names it."""
    tensors = {name: p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        moments = optimizer.state[p].items()
        tensors |= {f"{name}@{key}": torch.as_tensor(value) for key, value in moments}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{state['step']}.safetensors"
    save_file(tensors, path)
    temporary = folder / "state.tmp"
    temporary.write_text(json.dumps(state), encoding="utf-8")
    temporary.rename(folder / "state.json")
    for old in folder.glob("step-*.safetensors"):
        if old != path:
            old.unlink()


@torch.no_grad()
def restore(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    tensors: dict[str, Tensor],
) -> None:
    """Put a checkpoint's tensors back."""
    for name, p in parameters.items():
        p.copy_(tensors[name])
        prefix = f"{name}@"
        moments = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        optimizer.state[p] = {
            key: value if key == "step" else value.to(p.device) for key, value in moments.items()
        }
