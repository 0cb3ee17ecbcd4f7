"""Peak memory of a training step, by part, from the sizes of the step's tensors.

A step is followed moment by moment: the teacher's forward pass, the loss, the backward pass at
every layer, the update. A moment's memory is the sum of the tensors that are alive then, and the
peak is the largest moment. With gradient checkpointing the backward pass trades one layer's saved
input for one layer's gradients at each layer, so that long rows peak at the last layer and short
ones at the first.

Every term is a tensor of the code that its part names. Terms below a kilobyte per layer are left
out, and so is the memory that an allocator wastes. The interpreter, the libraries and the CUDA
context are not part of a step; `RUNTIME_BYTES` counts them. `python -m benchmarks plan_memory`
compares the numbers with measured ones.

Legend: T tokens of a row, D hidden, E experts, I expert width, F neurons, V vocabulary, L layers;
q width of all query heads, kv width of all key heads, b bytes of an activation.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from tiny_onn.config.schema import RunConfig
from tiny_onn.model.expert_path import sparse_entry
from tiny_onn.model.fused_attention import VARLEN_OPTIONS
from tiny_onn.ops.distillation_loss import CPU_TILE_BYTES, GPU_TILE_BYTES
from tiny_onn.ops.loss_chunks import auto_chunk_tokens
from tiny_onn.ops.router_gradient import NORMED
from tiny_onn.planning.costs import Parameters, Sizes
from tiny_onn.planning.optimizer_state import DeviceType, muon_bytes, state_bytes

# The interpreter with torch and transformers takes 0.40 GB, and 0.47 GB with the compiler (torch
# 2.13, CPU build). A CUDA context with its kernels is assumed to take 0.6 GB.
RUNTIME_BYTES = MappingProxyType({"cpu": 470_000_000, "cuda": 600_000_000})
NUMBER_BYTES = MappingProxyType({"float32": 4, "bfloat16": 2})


@dataclass(frozen=True, slots=True)
class Moment:
    """The memory in use at one moment of a step, in bytes by part."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return sum(self.parts.values())


def nf4_bytes(shape: tuple[int, ...], *, double_quant: bool) -> int:
    """Return the bytes of a weight in bitsandbytes' NF4, 4 bits and a scale for every 64 numbers.

    Scales are float32 (4.5 bits a weight) or, doubly quantised, 8 bits with a float32 scale for
    every 256 of them (4.13 bits a weight). Source: QLoRA, arXiv 2305.14314, section 3.
    """
    size = prod(shape)
    blocks = -(-size // 64)
    scales = blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks
    return -(-size // 2) + scales


def weight_bytes(config: RunConfig, sizes: Sizes, parameters: Parameters) -> Counter[str]:
    """Return the bytes of frozen weights: the student's backbone, and the teacher's own weights."""
    number_bytes, teacher = NUMBER_BYTES[config.teacher.dtype], config.teacher
    weights = Counter({"backbone weights": number_bytes * parameters.backbone})
    if teacher.quantization == "nf4":
        # A separate teacher's attention is quantised too; embeddings and norms stay shared.
        mlp = 3 * nf4_bytes((sizes.neurons, sizes.hidden), double_quant=teacher.double_quant)
        shapes = parameters.attention_linear_layers if teacher.placement == "separate" else ()
        attention = sum(nf4_bytes(shape, double_quant=teacher.double_quant) for shape in shapes)
        weights["teacher's weights"] = sizes.layers * (mlp + attention)
    else:
        own = parameters.backbone if teacher.placement == "separate" else 0
        weights["teacher's weights"] = number_bytes * (parameters.dense_mlps + own)
    return weights


class _Step:
    """The sizes of one step's tensors on a device; methods return bytes or moments.

    Attributes:
        activation_bytes: bytes of an activation.
        master_bytes: bytes of a trained weight and of its gradient.
        widened_bytes: bytes of an activation's float32 copy; 0 if activations are float32.
        chunk_tokens: tokens that an expert layer processes at once.
        hidden_elements: elements of a (T, D) tensor.
        expert_elements: elements of a (T, E) tensor.
        chunk_neuron_elements: elements of a tensor of `chunk_tokens` rows and F columns.
        projection_elements: elements of a (F, D) weight.
        hidden_bytes: bytes of a (T, D) tensor of activations; the other `_bytes` likewise.
        layer_gradients: bytes of the gradients of one layer's experts.
    """

    def __init__(
        self,
        config: RunConfig,
        sizes: Sizes,
        parameters: Parameters,
        device: DeviceType,
        memory_bytes: int,
    ) -> None:
        self.memory_bytes = memory_bytes
        self.config, self.sizes, self.parameters = config, sizes, parameters
        self.device: DeviceType = device
        self.row_tokens = config.data.row_tokens
        self.activation_bytes = NUMBER_BYTES[config.teacher.dtype]
        self.master_bytes = NUMBER_BYTES[config.optim.master_dtype]
        self.widened_bytes = 4 if self.activation_bytes != 4 else 0
        self.hidden, self.neurons = sizes.hidden, sizes.neurons
        self.experts, self.layers = sizes.experts, sizes.layers
        self.chunk_tokens = min(config.train.ffn_chunk_tokens or self.row_tokens, self.row_tokens)
        self.hidden_elements = self.row_tokens * self.hidden
        self.expert_elements = self.row_tokens * self.experts
        self.chunk_neuron_elements = self.chunk_tokens * self.neurons
        self.projection_elements = self.neurons * self.hidden
        self.hidden_bytes = self.activation_bytes * self.hidden_elements
        self.neuron_bytes = self.activation_bytes * self.row_tokens * self.neurons
        self.chunk_neuron_bytes = self.activation_bytes * self.chunk_neuron_elements
        self.chunked = config.train.ffn_chunk_tokens > 0
        path = config.train.expert_path
        faster = device == "cuda" and sparse_entry(config, f"{device} {config.teacher.dtype}")
        self.sparse = path == "sparse" or (path == "auto" and bool(faster))
        self.gates_learn = config.router.objective != "none"
        self.norms_learn = config.optim.norm_lr > 0
        self.layer_gradients = self.master_bytes * 3 * self.projection_elements

    def resident(self) -> Counter[str]:
        """Return weights and optimizer state, as they are from the first update on."""
        E, I, D, L = self.experts, self.sizes.expert_dim, self.hidden, self.layers
        name, p = self.config.optim.name, self.parameters
        paged = name == "paged_adamw8bit" and self.device == "cuda"
        state = 0 if paged else state_bytes(name, (2, E, I, D)) + state_bytes(name, (E, I, D))
        parts = weight_bytes(self.config, self.sizes, p)
        parts["expert weights to train"] = self.master_bytes * p.experts
        parts["gates"] = 4 * p.gates
        parts["optimizer state"] = L * state + (8 * p.gates if self.gates_learn else 0)
        if self.norms_learn:  # Gradients, two moments, and float32 copies of gains in bfloat16.
            parts["norms"] = (2 * self.activation_bytes + 8 + self.widened_bytes) * p.norms
        return parts

    def attention_saved(self) -> int:
        """Return the tensors that one layer's norms and attention keep for their backward pass."""
        T, q, kv, b = self.row_tokens, self.sizes.query, self.sizes.key_value, self.activation_bytes
        # Norms compute in float32 and keep a copy of their input, or the input itself, which is the
        # layer's input for the first norm; and for a gain that learns what it multiplies.
        norms = self.widened_bytes * self.hidden_elements + 4 * self.hidden_elements
        norms += 2 * self.hidden_bytes * self.norms_learn
        if self.sizes.qk_norm:
            norms += (4 + b * self.norms_learn) * T * (q + kv)
        train = self.config.train
        by_blocks = train.compile and train.checkpointing != "selective"
        by_flash = b == 2 and "enable_gqa" in VARLEN_OPTIONS
        grouped = self.device == "cuda" and (by_blocks or by_flash)
        keys_values = 2 * T * (kv if grouped else q)
        return norms + b * (2 * T * q + keys_values) + 4 * T * self.sizes.heads

    def hidden_states(self, num_layers: int) -> int:
        """Return the last hidden states, and if the loss compares them those of some layers.

        Before the backward pass these are the teacher's of all layers. It first replaces each by
        the gradient of the student's state, which lives until that layer's backward pass.
        """
        kept = 2 * self.hidden_bytes
        if self.config.loss.states_coef:
            # The student's hidden states are its layers' inputs, which are counted among the saved
            # activations unless these are offloaded.
            offloaded = self.config.train.checkpointing == "offload" and self.device == "cuda"
            kept += (2 if offloaded else 1) * num_layers * self.hidden_bytes
        return kept

    def ffn_saved(self) -> int:
        """Return the tensors that one layer's experts and gate keep for their backward pass."""
        router = 0
        if self.gates_learn:
            router = self.widened_bytes * self.hidden_elements + 4 * self.expert_elements
        pre = 0 if self.chunked else 2 * self.neuron_bytes
        # The sparse path keeps the hidden activations too. Where a layer is computed again, the
        # dense path's backward pass, which is planned, needs more than that.
        keeps_hidden = self.sparse and self.config.train.checkpointing == "none"
        return self.hidden_bytes + pre + router + (self.neuron_bytes if keeps_hidden else 0)

    def routing(self) -> int:
        """Return each bank's last routing, which is logits, scores, weights and active."""
        return self.layers * 13 * self.expert_elements

    def region(self) -> int:
        """Return the largest memory of the expert layer's elementwise backward region.

        Pre-activations are left out.
        """
        if self.config.train.compile:
            outputs = 3 * self.chunk_neuron_bytes + 12 * self.expert_elements
            # Inductor's CPU code (torch 2.13) writes the activation's value and slope in float32,
            # its CUDA code writes the outputs alone.
            return outputs + (8 * self.chunk_neuron_elements if self.device == "cpu" else 0)
        # Value, slope, hidden, its two gradients, the squares and their sum are in float32. Beside
        # them are the outputs, and in bfloat16 copies of gate, up and gradient too.
        return (44 + (6 if self.activation_bytes == 2 else 0)) * self.chunk_neuron_elements

    def weight_gradients(self) -> int:
        """Return casts of weights, products and gradients while weight gradients are computed."""
        size, cast = self.projection_elements, 0
        if self.activation_bytes != self.master_bytes:
            cast = self.activation_bytes
        if self.chunked:
            # The sums over chunks are float32, beside the product of one chunk.
            return (12 + 3 * cast + 2 * self.activation_bytes) * size
        master = self.master_bytes
        return max(2 * cast, 2 * master + 2 * cast, 3 * master + cast) * size

    def surprise(self) -> int:
        """Return the transient memory of surprise, without its (T, E) result."""
        pre = 2 * self.widened_bytes * self.chunk_neuron_elements
        objective, kind = self.config.router.objective, self.config.smk.surprise
        if objective == "regression":
            kind = "magnitude"
        elif objective != "smk":
            return 0
        if kind == "magnitude":
            return pre + 12 * self.chunk_neuron_elements
        if kind == "input":
            return pre + (self.widened_bytes + 32) * self.chunk_neuron_elements
        # Other kinds read no norm of the layer's input or of the gradient at its output.
        squares = (self.widened_bytes + 4) * self.chunk_tokens * self.hidden
        return squares if kind in NORMED else 0

    def attention_backward(self) -> int:
        """Return gradients at one layer's queries, keys, values, attention output and norms."""
        T, q = self.row_tokens, self.sizes.query
        return self.activation_bytes * 4 * T * q + (4 + self.widened_bytes) * self.hidden_elements

    def saved(self, layer: int) -> int:
        """Return the activations saved for the backward pass of the layers up to this one."""
        inputs = (layer + 1) * self.hidden_bytes
        mode = self.config.train.checkpointing
        if mode == "offload" and self.device == "cuda":
            return self.hidden_bytes
        if mode == "selective":
            # Attention's output and log-sum-exp are kept.
            T, b = self.row_tokens, self.activation_bytes
            kept = b * T * self.sizes.query + 4 * T * self.sizes.heads
            return inputs + (layer + 1) * kept
        if mode != "none":
            return inputs
        attention = (layer + self.norms_learn) * self.attention_saved()
        return self.hidden_bytes + attention + (layer + 1) * self.ffn_saved()

    def backward(self, layer: int) -> Iterator[Moment]:
        """Yield the moments of one layer's backward pass, of experts first and then attention."""
        later = self.layers - 1 - layer
        if self.config.train.rows_per_step > 1:
            later = self.layers
        common = self.resident()
        common["saved activations"] = self.saved(layer)
        common["hidden states of student and teacher"] = self.hidden_states(layer)
        common["positions"] = 2 * self.activation_bytes * self.row_tokens * self.sizes.head_dim
        common["gradients"] = later * self.layer_gradients
        common["routing"] = self.routing()
        recomputed = self.config.train.checkpointing != "none"
        # If only experts learn, nothing is trained before layer 0's, whose attention keeps nothing.
        reached = layer > 0 or self.norms_learn
        attention = self.attention_saved() if recomputed and reached else 0
        ffn = self.ffn_saved() if recomputed else 0
        common["one layer's attention"] = attention
        incoming = self.hidden_bytes
        pre = 2 * self.chunk_neuron_bytes if self.chunked else 0
        experts = ffn + incoming + pre + self.chunk_neuron_bytes
        name = f"backward of layer {layer}"
        outputs = 3 * self.chunk_neuron_bytes + 12 * self.expert_elements
        yield _moment(
            f"{name}: elementwise", common, {"one layer's experts": experts + self.region()}
        )
        grad_x = self.hidden_bytes if reached else 0
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
        if reached:
            yield _moment(
                f"{name}: attention",
                common,
                {
                    "one layer's attention": self.attention_backward() + incoming,
                    "gradients": self.layer_gradients,
                },
            )

    def loss(self) -> Moment:
        """Return the loss, with one chunk's logits, tiles, and the gradient at hidden states."""
        V, free_bytes = self.sizes.vocab, None
        if self.device == "cuda":
            # Free memory is read before the first step makes the optimizer's state.
            weights = self.resident() - Counter({"optimizer state": 1 << 62})
            free_bytes = max(0, self.memory_bytes - RUNTIME_BYTES["cuda"] - weights.total())
        automatic = auto_chunk_tokens(V, self.activation_bytes, free_bytes)
        chunk = min(self.config.loss.chunk_tokens or automatic, self.row_tokens)
        tile = CPU_TILE_BYTES if self.device == "cpu" else GPU_TILE_BYTES
        tile_rows = min(chunk, max(1, tile // (4 * V)))
        parts = self.resident()
        # The final norm keeps a float32 copy of its input beside the layers' inputs.
        parts["saved activations"] = self.saved(self.layers - 1) + 4 * self.hidden_elements
        parts["hidden states of student and teacher"] = self.hidden_states(self.layers)
        parts["positions"] = 2 * self.activation_bytes * self.row_tokens * self.sizes.head_dim
        parts["routing"] = self.routing()
        if self.device == "cuda" and self.config.train.compile:
            # The compiled region holds no tiles, but Inductor (torch 2.11) writes the gradient
            # beside the logits before it overwrites them, as `distill_loss.py` measured.
            working = 3 * self.activation_bytes * chunk * V
        else:
            working = 2 * self.activation_bytes * chunk * V + 4 * 4 * tile_rows * V
        parts["loss buffers"] = working + self.hidden_bytes
        if self.config.train.rows_per_step > 1:
            parts["gradients"] = self.layers * self.layer_gradients
        return _moment("loss", parts, {})

    def teacher(self) -> Moment:
        """Return the teacher's forward pass, at the larger of one layer's MLP and attention."""
        T, q, kv = self.row_tokens, self.sizes.query, self.sizes.key_value
        parts = self.resident()
        attention = self.activation_bytes * T * (3 * q + 2 * kv) + self.widened_bytes * T * q
        # An NF4 weight is unpacked for its product.
        quantised = self.config.teacher.quantization != "none"
        cast = self.activation_bytes * self.projection_elements if quantised else 0
        parts["one layer of the teacher"] = 2 * self.hidden_bytes + max(
            3 * self.neuron_bytes + cast, attention
        )
        # The routings of the last row's recomputed graphs live until the student's forward pass.
        parts["routing"] = self.routing()
        if self.config.train.rows_per_step > 1:
            parts["gradients"] = self.layers * self.layer_gradients
        return _moment("teacher's forward", parts, {})

    def update(self) -> Moment:
        """Return the optimizer's step, with all gradients."""
        parts = self.resident()
        parts["gradients"] = self.layers * self.layer_gradients + 4 * self.parameters.gates
        parts["routing"] = self.routing()
        # Stochastic rounding makes float32 copies of one tensor and its gradient, and random bits.
        temporary = {}
        if self.master_bytes == 2:
            temporary["rounding"] = 12 * 2 * self.projection_elements
        if self.config.optim.name == "muon":
            shape = (self.layers, self.experts, self.sizes.expert_dim, self.hidden)
            master_dtype = self.config.optim.master_dtype
            temporary["directions"] = muon_bytes(*shape, master_dtype, device=self.device)
        return _moment("update", parts, temporary)


def moments(
    config: RunConfig,
    sizes: Sizes,
    parameters: Parameters,
    device: DeviceType,
    memory_bytes: int,
) -> list[Moment]:
    """Return the moments of a step in order; one of them is the peak.

    Args:
        config: the settings, whose `teacher.dtype` is not `auto`.
        sizes: the student's sizes.
        parameters: the numbers of parameters.
        device: the kind of device.
        memory_bytes: the device's memory.
    """
    step = _Step(config, sizes, parameters, device, memory_bytes)
    backward = [m for layer in reversed(range(sizes.layers)) for m in step.backward(layer)]
    return [step.teacher(), step.loss(), *backward, step.update()]


def _moment(name: str, common: Counter[str], parts: dict[str, int]) -> Moment:
    total = common + Counter(parts)
    return Moment(name, dict(total))
