"""Peak memory of a training step, by part, from the lengths that the step's tensors have.

A step is followed moment by moment: the teacher's forward, the loss, the backward pass at every
layer, the update. A moment's memory is the sum of what is alive then; the peak is the largest. With
gradient checkpointing the backward pass trades one layer's saved input for one layer's gradients at
each layer, so that long rows peak at the last layer and short ones at the first.

Every term is a tensor of the code it names. Terms below a kilobyte per layer are left out, and so
are the interpreter, the libraries and the CUDA context (`RUNTIME_BYTES`) and what an allocator
wastes. `python -m benchmarks plan_memory` measures the rest.

Legend: T tokens, D hidden, E experts, F neurons, V vocabulary, L layers; b bytes of an activation,
wide bytes of an activation's float32 copy (0 where it is float32 already).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Literal

from tiny_onn.config.schema import RunConfig
from tiny_onn.model.attention import VARLEN_OPTIONS
from tiny_onn.model.expert_path import sparse_entry
from tiny_onn.ops.distillation_loss import CPU_TILE_BYTES, GPU_TILE_BYTES
from tiny_onn.ops.loss_chunks import auto_chunk_tokens
from tiny_onn.planning.costs import Parameters, Sizes

DeviceType = Literal["cpu", "cuda"]

# The interpreter with torch and transformers loaded: 0.40 GB, 0.47 with the compiler (torch 2.13,
# CPU build). A CUDA context with its kernels is taken to be 0.6 GB.
RUNTIME_BYTES = MappingProxyType({"cpu": 470_000_000, "cuda": 600_000_000})
_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2})


@dataclass(frozen=True, slots=True)
class Moment:
    """What is alive at one moment of a step, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts."""
        return sum(self.parts.values())


def nf4_bytes(shape: tuple[int, ...], *, double_quant: bool) -> int:
    """Bytes of a weight in bitsandbytes' NF4: 4 bits and a scale for every 64.

    Scales are float32 (4.5 bits a weight) or, doubly quantised, 8 bits with a float32 scale for
    every 256 of them (4.13 bits a weight). Source: QLoRA, arXiv 2305.14314, section 3.
    """
    size = prod(shape)
    blocks = -(-size // 64)
    scales = blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks
    return -(-size // 2) + scales


def weight_bytes(config: RunConfig, sizes: Sizes, parameters: Parameters) -> Counter[str]:
    """Weights that never change: the student's backbone, and what the teacher has beside it."""
    b, teacher = _BYTES[config.teacher.dtype], config.teacher
    weights = Counter({"backbone weights": b * parameters.backbone})
    if teacher.quantization == "nf4":
        # A separate teacher's attention is quantised too; embeddings and norms stay shared.
        mlp = 3 * nf4_bytes((sizes.neurons, sizes.hidden), double_quant=teacher.double_quant)
        shapes = parameters.attention_linear_layers if teacher.placement == "separate" else ()
        attention = sum(nf4_bytes(shape, double_quant=teacher.double_quant) for shape in shapes)
        weights["teacher's weights"] = sizes.layers * (mlp + attention)
    else:
        own = parameters.backbone if teacher.placement == "separate" else 0
        weights["teacher's weights"] = b * (parameters.dense_mlps + own)
    return weights


class _Step:
    """The sizes of one step's tensors: a row of `T` tokens on a device."""

    def __init__(
        self,
        config: RunConfig,
        sizes: Sizes,
        parameters: Parameters,
        device: DeviceType,
        memory_bytes: int,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.config, self.sizes, self.parameters, self.device = config, sizes, parameters, device
        self.T = config.data.row_tokens
        self.b = _BYTES[config.teacher.dtype]
        self.m = _BYTES[config.optim.master_dtype]
        self.wide = 4 if self.b != 4 else 0
        self.D, self.F, self.E, self.L = sizes.hidden, sizes.neurons, sizes.experts, sizes.layers
        self.TD, self.TF, self.TE = self.T * self.D, self.T * self.F, self.T * self.E
        # Tokens that an expert layer processes at once.
        self.C = min(config.train.ffn_chunk_tokens or self.T, self.T)
        self.CF = self.C * self.F
        self.chunked = config.train.ffn_chunk_tokens > 0
        path = config.train.expert_path
        faster = device == "cuda" and sparse_entry(config, f"{device} {config.teacher.dtype}")
        self.sparse = path == "sparse" or (path == "auto" and bool(faster))
        self.gates_learn = config.router.objective != "none"
        self.layer_gradients = self.m * 3 * self.F * self.D

    def resident(self) -> Counter[str]:
        """Weights and optimizer state, from the first update on."""
        E, I, D, L = self.E, self.sizes.expert_dim, self.D, self.L
        name, p = self.config.optim.name, self.parameters
        paged = name == "paged_adamw8bit" and self.device == "cuda"
        state = 0 if paged else state_bytes(name, (2, E, I, D)) + state_bytes(name, (E, I, D))
        parts = weight_bytes(self.config, self.sizes, p)
        parts["expert weights to train"] = self.m * p.experts
        parts["gates"] = 4 * p.gates
        parts["optimizer state"] = L * state + (8 * p.gates if self.gates_learn else 0)
        return parts

    def attention_saved(self) -> int:
        """What one layer's norms and attention keep for their backward pass."""
        T, q, kv, b = self.T, self.sizes.query, self.sizes.key_value, self.b
        # Norms compute in float32: they keep a copy of their input, or the input itself, which for
        # the first norm is the layer's input.
        norms = self.wide * self.TD + 4 * self.TD
        if self.sizes.qk_norm:
            norms += 4 * T * (q + kv)
        grouped = self.device == "cuda" and self.b == 2 and "enable_gqa" in VARLEN_OPTIONS
        keys_values = 2 * T * (kv if grouped else q)
        return norms + b * (2 * T * q + keys_values) + 4 * T * self.sizes.heads

    def hidden_states(self) -> int:
        """The last ones, and those of all layers where they are matched."""
        kept = 2 * self.b * self.TD
        if self.config.loss.states_coef:
            # The student's are its layers' inputs, which only offloading puts elsewhere.
            offloaded = self.config.train.checkpointing == "offload" and self.device == "cuda"
            kept += (2 if offloaded else 1) * self.L * self.b * self.TD
        return kept

    def ffn_saved(self) -> int:
        """What one layer's experts and gate keep for their backward pass."""
        router = (self.wide * self.TD + 4 * self.TE) if self.gates_learn else 0
        pre = 0 if self.chunked else 2 * self.b * self.TF
        # The sparse path keeps the hidden activations too. Where a layer is computed again, the
        # dense path's backward pass, which is planned, needs more than that.
        sparse = self.sparse and self.config.train.checkpointing == "none"
        return self.b * self.TD + pre + router + (self.b * self.TF if sparse else 0)

    def routing(self) -> int:
        """Each bank's last routing: logits, scores, weights, active."""
        return self.L * 13 * self.TE

    def region(self) -> int:
        """The expert layer's elementwise backward region at its largest, pre-activations aside."""
        if self.config.train.compile:
            outputs = 3 * self.b * self.CF + 12 * self.TE
            # Inductor's CPU code (torch 2.13) writes out the activation's value and slope in
            # float32. CUDA: outputs alone.
            return outputs + (8 * self.CF if self.device == "cpu" else 0)
        # In float32: value, slope, hidden, its two gradients, and the squares and their sum; beside
        # them copies of gate, up and gradient and the outputs in bfloat16, or the outputs alone.
        return (44 + (6 if self.b == 2 else 0)) * self.CF

    def weight_gradients(self) -> int:
        """Around the weights' gradients: casts of weights, products, the gradients themselves."""
        FD, cast = self.F * self.D, self.b if self.b != self.m else 0
        if self.chunked:
            # Sums in float32, and the product of a chunk.
            return (12 + 3 * cast + 2 * self.b) * FD
        return max(2 * cast * FD, (2 * self.m + 2 * cast) * FD, (3 * self.m + cast) * FD)

    def surprise(self) -> int:
        """Transient memory of surprise, before its (T, E) result."""
        squares = (self.wide + 4) * self.C * self.D
        pre = 2 * self.wide * self.CF
        objective, kind = self.config.router.objective, self.config.smk.surprise
        if objective == "regression":
            kind = "magnitude"
        elif objective != "smk":
            return 0
        if kind == "magnitude":
            return max(squares, pre + 12 * self.CF)
        if kind == "input":
            return max(squares, pre + self.wide * self.CF + 32 * self.CF)
        return squares

    def attention_backward(self) -> int:
        """Transient gradients at one layer's queries, keys, values, attention output and norms."""
        return self.b * 4 * self.T * self.sizes.query + (4 + self.wide) * self.TD

    def saved(self, layer: int) -> int:
        """Activations that wait for the backward pass of layers up to this one, itself included."""
        inputs = (layer + 1) * self.b * self.TD
        mode = self.config.train.checkpointing
        if mode == "offload" and self.device == "cuda":
            return self.b * self.TD
        if mode == "selective":
            # Attention's output and log-sum-exp.
            kept = self.b * self.T * self.sizes.query + 4 * self.T * self.sizes.heads
            return inputs + (layer + 1) * kept
        if mode != "none":
            return inputs
        attention = layer * self.attention_saved()
        return self.b * self.TD + attention + (layer + 1) * self.ffn_saved()

    def backward(self, layer: int) -> Iterator[Moment]:
        """The moments of one layer's backward pass: experts, then attention."""
        later = self.L - 1 - layer
        if self.config.train.rows_per_step > 1:
            later = self.L
        common = self.resident()
        common["saved activations"] = self.saved(layer)
        common["hidden states of student and teacher"] = self.hidden_states()
        common["positions"] = 2 * self.b * self.T * self.sizes.head_dim
        common["gradients"] = later * self.layer_gradients
        common["routing"] = self.routing()
        recomputed = self.config.train.checkpointing != "none"
        # Nothing before layer 0's experts learns, so its attention keeps nothing.
        attention = self.attention_saved() if recomputed and layer else 0
        ffn = self.ffn_saved() if recomputed else 0
        common["one layer's attention"] = attention
        incoming = self.b * self.TD
        pre = 2 * self.b * self.CF if self.chunked else 0
        experts = ffn + incoming + pre + self.b * self.CF
        name = f"backward of layer {layer}"
        outputs = 3 * self.b * self.CF + 12 * self.TE
        yield _moment(
            f"{name}: elementwise", common, {"one layer's experts": experts + self.region()}
        )
        grad_x = self.b * self.TD if layer else 0
        working = experts + outputs + grad_x
        yield _moment(
            f"{name}: weight gradients",
            common,
            {"one layer's experts": working, "gradients": self.weight_gradients()},
        )
        yield _moment(
            f"{name}: surprise",
            common,
            {"one layer's experts": working + self.surprise(), "gradients": self.layer_gradients},
        )
        if layer:
            yield _moment(
                f"{name}: attention",
                common,
                {
                    "one layer's attention": self.attention_backward() + incoming,
                    "gradients": self.layer_gradients,
                },
            )

    def loss(self) -> Moment:
        """Logits of one chunk, tiles, and the gradient at the student's hidden states."""
        V, free_bytes = self.sizes.vocab, None
        if self.device == "cuda":
            # Asked before the first step makes the optimizer's state.
            weights = self.resident() - Counter({"optimizer state": 1 << 62})
            free_bytes = max(0, self.memory_bytes - RUNTIME_BYTES["cuda"] - weights.total())
        automatic = auto_chunk_tokens(V, self.b, free_bytes)
        chunk = min(self.config.loss.chunk_tokens or automatic, self.T)
        tile = CPU_TILE_BYTES if self.device == "cpu" else GPU_TILE_BYTES
        tile_rows = min(chunk, max(1, tile // (4 * V)))
        parts = self.resident()
        # The final norm keeps its input in float32, beside the layers' inputs.
        parts["saved activations"] = self.saved(self.L - 1) + 4 * self.TD
        parts["hidden states of student and teacher"] = self.hidden_states()
        parts["positions"] = 2 * self.b * self.T * self.sizes.head_dim
        parts["routing"] = self.routing()
        if self.device == "cuda" and self.config.train.compile:
            # The compiled region holds no tiles, but Inductor (torch 2.11) writes the gradient
            # beside the logits before it overwrites them: measured by `distill_loss.py`.
            working = 3 * self.b * chunk * V
        else:
            working = 2 * self.b * chunk * V + 4 * 4 * tile_rows * V
        parts["loss buffers"] = working + self.b * self.TD
        if self.config.train.rows_per_step > 1:
            parts["gradients"] = self.L * self.layer_gradients
        return _moment("loss", parts, {})

    def teacher(self) -> Moment:
        """One layer of the teacher: its MLP, or its attention."""
        T, q, kv = self.T, self.sizes.query, self.sizes.key_value
        parts = self.resident()
        attention = self.b * T * (3 * q + 2 * kv) + self.wide * T * q
        # An NF4 weight is unpacked for its product.
        quantised = self.config.teacher.quantization != "none"
        cast = self.b * self.F * self.D if quantised else 0
        parts["one layer of the teacher"] = 2 * self.b * self.TD + max(
            3 * self.b * self.TF + cast, attention
        )
        # The last row's recomputed graphs live until the student's forward pass.
        parts["routing"] = self.routing()
        if self.config.train.rows_per_step > 1:
            parts["gradients"] = self.L * self.layer_gradients
        return _moment("teacher's forward", parts, {})

    def update(self) -> Moment:
        """The optimizer's step, with all gradients."""
        parts = self.resident()
        parts["gradients"] = self.L * self.layer_gradients + 4 * self.parameters.gates
        parts["routing"] = self.routing()
        # Stochastic rounding: float32 copies of one tensor and of its gradient, and random bits.
        largest = 2 * self.F * self.D
        return _moment("update", parts, {"rounding": 12 * largest if self.m == 2 else 0})


def moments(
    config: RunConfig,
    sizes: Sizes,
    parameters: Parameters,
    device: DeviceType,
    memory_bytes: int,
) -> list[Moment]:
    """The moments of a step among which the peak is, in order."""
    step = _Step(config, sizes, parameters, device, memory_bytes)
    backward = [m for layer in reversed(range(sizes.layers)) for m in step.backward(layer)]
    return [step.teacher(), step.loss(), *backward, step.update()]


def _moment(name: str, common: Counter[str], parts: dict[str, int]) -> Moment:
    total = common + Counter(parts)
    return Moment(name, dict(total))


# bitsandbytes' own numbers: smaller tensors keep 32-bit state; a scale per block; a map per moment.
_MIN_8BIT_SIZE = 4096


_BLOCK_SIZE = 256


_QMAP_BYTES = 256 * 4


def state_bytes(
    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor"], shape: Sequence[int]
) -> int:
    """Bytes of optimizer state beside one expert tensor, counters left out.

    Args:
        name: the optimizer.
        shape: the tensor's as the optimizer sees it: (2, E, I, D), (E, I, D).
    """
    size = prod(shape)
    if name == "adafactor":
        return 4 * (size // shape[-1] + size // shape[-2])
    if name == "adamw" or size < _MIN_8BIT_SIZE:
        return 8 * size
    return 2 * (size + 4 * -(-size // _BLOCK_SIZE) + _QMAP_BYTES)
