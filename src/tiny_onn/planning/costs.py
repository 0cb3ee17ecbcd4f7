"""The parameters of a student and the FLOPs of a token, counted from the real modules.

No weight is read or allocated. The dense model and `TinyOnnForCausalLM` are built on the meta
device, parameters are counted from the modules, and matrix products from the shapes of their linear
layers.

A multiply-add counts as 2 FLOPs. Norms, rotations, softmax, activations, what optimizers do number
by number and the unpacking of 4-bit weights are left out, as is usual.

Legend: T tokens, D hidden, E experts, I expert width, F = E * I neurons, V vocabulary, L layers,
H query heads.
"""

from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from tiny_onn.config.schema import RunConfig
from tiny_onn.conversion.convert import student_config
from tiny_onn.errors import LoadErrors, UserError
from tiny_onn.model.backbone import decoder_layers
from tiny_onn.model.backbone_mode import in_mlp
from tiny_onn.model.fused_attention import head_dim_of
from tiny_onn.model.student import TinyOnnForCausalLM, split_parameters
from tiny_onn.planning.optimizer_state import muon_flops
from tiny_onn.teacher.multimodal import dense_skeleton

# The backward pass of flash attention has five matrix products, of which one computes the scores
# again, where the forward pass has two. Source: FlashAttention-2, arXiv 2307.08691, section 4.1.
ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The sizes of a student that the formulas use."""

    layers: int
    hidden: int
    vocab: int
    heads: int
    query: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together, and of all value heads."""
    head_dim: int
    attention_weights: int
    """Weights of the linear layers of all attention blocks."""
    qk_norm: bool
    """True if queries and keys are normalised before they are rotated."""
    experts: int
    expert_dim: int
    compensated: bool
    """True if the mean outputs of inactive experts are added."""
    token_scaled: bool = False
    """True if the experts' weights have a factor that depends on the token."""

    @property
    def neurons(self) -> int:
        """The number of neurons of one MLP, F = E * I."""
        return self.experts * self.expert_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Numbers of parameters; the student's parts sum to its total."""

    embeddings: int
    output_head: int
    """Parameters of the output head; 0 if it is tied to the embeddings."""
    attention: int
    """Parameters of the linear layers of all attention blocks."""
    norms: int
    experts: int
    """Parameters of all experts, mean outputs and scales included."""
    gate_weights: int
    gate_biases: int
    """Biases of all gates, which are one learned threshold per expert and layer."""
    budget_thresholds: int
    """Thresholds that are steered instead of learned, and do not count as parameters."""
    one_expert: int
    dense_mlps: int
    """Parameters of the MLPs that the experts replace."""
    attention_linear_layers: tuple[tuple[int, ...], ...]
    """Shapes of one attention block's linear weights."""

    @property
    def backbone(self) -> int:
        """The frozen parameters of the student."""
        return self.embeddings + self.output_head + self.attention + self.norms

    @property
    def gates(self) -> int:
        """The weights and biases of all gates."""
        return self.gate_weights + self.gate_biases

    @property
    def trainable(self) -> int:
        """The parameters of experts and gates."""
        return self.experts + self.gates

    @property
    def student_total(self) -> int:
        """The parameters of backbone, experts and gates."""
        return self.backbone + self.trainable

    @property
    def dense_total(self) -> int:
        """The parameters of the dense model."""
        return self.backbone + self.dense_mlps


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFlops:
    """FLOPs of one token's forward pass through all layers, by part."""

    attention_projections: int
    attention_scores_row: float
    """Scores if the whole row is one document: each token sees (T + 1) / 2 on average."""
    attention_scores_documents: float
    """Scores if documents are as long as the plan says, or as they were measured."""
    ffn_dense: int
    """The teacher's MLPs, and the experts in training, where all are computed and then masked."""
    ffn_at_k: float
    """The experts in decoding, at the mean number of active ones, with the mean outputs of inactive
    ones and without the gate."""
    router: int
    head: int

    @property
    def ffn_saved(self) -> float:
        """The share of the MLPs' FLOPs that k active experts save, after their gate's own FLOPs."""
        return 1 - (self.ffn_at_k + self.router) / self.ffn_dense

    @property
    def model_saved(self) -> float:
        """The share of all the dense model's FLOPs that is saved, attention scores left out."""
        dense = self.attention_projections + self.ffn_dense + self.head
        return (self.ffn_dense - self.ffn_at_k - self.router) / dense


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFlops:
    """FLOPs of one training step, by phase."""

    student_forward: float
    recompute: float
    """The second forward pass, layer by layer, under gradient checkpointing."""
    backward: float
    teacher_forward: float
    loss_heads: float
    """The logits of student and teacher, and the gradient at the student's hidden states."""
    update: float
    """The matrix products of the optimizer's step, in float32; only Muon has any."""

    @property
    def total(self) -> float:
        """The sum of all phases."""
        return sum(getattr(self, item.name) for item in fields(self))


def meta_models(
    config: RunConfig, shape: PreTrainedConfig
) -> tuple[PreTrainedModel, TinyOnnForCausalLM]:
    """Build the dense model and its student on the meta device.

    Raises:
        UserError: the architecture, the sizes or k do not fit.
    """
    dtype = getattr(torch, config.teacher.dtype)
    with torch.device("meta"), LoadErrors(_no_model):
        try:
            trusted = config.teacher.trust_remote_code
            dense = dense_skeleton(shape, dtype=dtype, trust_remote_code=trusted)
        except UserError as error:
            raise UserError(f"teacher.path: {error}") from error
        student = TinyOnnForCausalLM(student_config(dense, config.experts, config.router))
    return dense, student


def _no_model(reason: str) -> str:
    return (
        f"teacher.path: its config.json describes no model that can be built ({reason}), expected"
        " a causal language model; restore it"
    )


def sizes_of(student: TinyOnnForCausalLM) -> Sizes:
    """Return the student's sizes."""
    text = student.config.get_text_config()
    bank = student.banks()[0]
    E, D, I = bank.experts.down_proj.shape
    head_dim = head_dim_of(text)
    attention, head = _attention(student), student.get_output_embeddings()
    return Sizes(
        layers=text.num_hidden_layers,
        hidden=D,
        vocab=text.vocab_size,
        heads=text.num_attention_heads,
        query=text.num_attention_heads * head_dim,
        key_value=(getattr(text, "num_key_value_heads", None) or text.num_attention_heads)
        * head_dim,
        head_dim=head_dim,
        attention_weights=sum(
            module.weight.numel()
            for name, module in student.named_modules()
            if isinstance(module, nn.Linear) and not in_mlp(name) and module is not head
        ),
        qk_norm=hasattr(attention, "q_norm"),
        experts=E,
        expert_dim=I,
        compensated=bank.mean_outputs is not None,
        token_scaled=bank.token_scale is not None,
    )


def count_parameters(dense: PreTrainedModel, student: TinyOnnForCausalLM) -> Parameters:
    """Count every parameter of the two modules, shared ones once."""
    embeddings = student.get_input_embeddings()
    head = student.get_output_embeddings()
    banks = student.banks()
    experts, gates = split_parameters(student)
    assert isinstance(embeddings, nn.Embedding)
    assert isinstance(head, nn.Linear)
    tied = head.weight is embeddings.weight
    outer = {id(p) for p in (*embeddings.parameters(), *head.parameters())}
    inner = [
        (name, p)
        for name, p in student.named_parameters()
        if not in_mlp(name) and id(p) not in outer
    ]
    attention = sum(p.numel() for name, p in inner if p.ndim > 1 or name.endswith(".bias"))
    return Parameters(
        embeddings=embeddings.weight.numel(),
        output_head=0 if tied else sum(p.numel() for p in head.parameters()),
        attention=attention,
        norms=sum(p.numel() for _, p in inner) - attention,
        experts=sum(p.numel() for p in experts.values()),
        gate_weights=sum(p.numel() for p in gates.values() if p.ndim > 1),
        gate_biases=sum(p.numel() for p in gates.values() if p.ndim == 1),
        budget_thresholds=sum(bank.router.threshold.numel() for bank in banks),
        one_expert=3 * banks[0].experts.down_proj.shape[1:].numel(),
        dense_mlps=sum(p.numel() for name, p in dense.named_parameters() if in_mlp(name)),
        attention_linear_layers=tuple(
            tuple(linear.weight.shape)
            for linear in _attention(student).modules()
            if isinstance(linear, nn.Linear)
        ),
    )


def dense_ffn_flops(layers: int, hidden: int, neurons: int) -> int:
    """Return the forward FLOPs per token of gated MLPs, three matrices at 2 per multiply-add."""
    return 6 * layers * hidden * neurons


def gate_flops(layers: int, hidden: int, experts: int) -> int:
    """Return the forward FLOPs per token of linear gates, as mean outputs and token scales take."""
    return 2 * layers * hidden * experts


def score_flops(layers: int, query: int, context: float) -> float:
    """Return the forward FLOPs per token of attention scores and their product with the values.

    Args:
        layers: decoder layers.
        query: width of all query heads together.
        context: mean number of positions that a token attends to.
    """
    return 4 * layers * query * context


def document_context(tokens: int) -> float:
    """Return the mean number of positions that a token attends to in a document of this length."""
    return (tokens + 1) / 2


def token_flops(
    sizes: Sizes, *, target_k: float, row_context: float, document_context: float
) -> TokenFlops:
    """Return the FLOPs of one token's forward pass.

    Args:
        sizes: the student's sizes.
        target_k: mean number of active experts per token.
        row_context: mean number of positions that a token attends to if the row is one document.
        document_context: mean number of positions that a token attends to in its document; the mean
            is over tokens, so that a long document counts with each of its tokens.
    """
    dense = dense_ffn_flops(sizes.layers, sizes.hidden, sizes.neurons)
    gate = gate_flops(sizes.layers, sizes.hidden, sizes.experts)
    return TokenFlops(
        attention_projections=2 * sizes.attention_weights,
        attention_scores_row=score_flops(sizes.layers, sizes.query, row_context),
        attention_scores_documents=score_flops(sizes.layers, sizes.query, document_context),
        ffn_dense=dense,
        ffn_at_k=dense * target_k / sizes.experts + (sizes.compensated + sizes.token_scaled) * gate,
        router=gate,
        head=2 * sizes.hidden * sizes.vocab,
    )


def step_flops(
    config: RunConfig, sizes: Sizes, token: TokenFlops, *, packed: bool, num_shares: int = 1
) -> StepFlops:
    """Return the FLOPs of one step over `train.rows_per_step` rows.

    Unless norms learn, nothing before layer 0's experts is trained, so its attention has no
    backward pass and its experts pass no gradient to their input.

    Args:
        config: the settings.
        sizes: the student's sizes.
        token: the FLOPs of one token's forward pass.
        packed: True if rows hold documents of the planned length, False if a row is one document.
        num_shares: the processes that step the experts, each its own share.
    """
    tokens = config.train.rows_per_step * config.data.row_tokens
    scores = token.attention_scores_documents if packed else token.attention_scores_row
    attention = token.attention_projections + scores
    student = attention + token.ffn_dense + token.router
    # Every objective needs the gradient of the gate's weights; the task's also that of its input.
    router = {"none": 0, "smk": 1, "regression": 1, "task": 2}[
        config.router.objective
    ] * token.router
    first = 0 if config.optim.norm_lr else 1
    if config.router.objective == "task":
        router -= first * token.router // sizes.layers
    later_layers = (sizes.layers - first) / sizes.layers
    backward = (
        later_layers * (token.attention_projections + ATTENTION_BACKWARD * scores)
        + 2 * token.ffn_dense
        - first * 4 * sizes.hidden * sizes.neurons
        + router
    )
    kept = scores if config.train.checkpointing == "selective" else 0
    recompute = 0 if config.train.checkpointing == "none" else tokens * (student - kept)
    if config.train.ffn_chunk_tokens:
        # Chunks compute the pre-activations again, which are two of the three projections.
        recompute += tokens * token.ffn_dense * 2 // 3
    shape = (sizes.experts, sizes.expert_dim, sizes.hidden)
    update = sizes.layers * muon_flops(*shape) if config.optim.name == "muon" else 0
    return StepFlops(
        student_forward=float(tokens * student),
        recompute=float(recompute),
        backward=float(tokens * backward),
        teacher_forward=float(tokens * (attention + token.ffn_dense)),
        loss_heads=float(tokens * 3 * token.head),
        update=update / num_shares,
    )


def _attention(student: TinyOnnForCausalLM) -> nn.Module:
    attention = decoder_layers(student.backbone)[0].self_attn
    assert isinstance(attention, nn.Module)
    return attention


def forward_flops(
    student: TinyOnnForCausalLM, mean_k: float, mean_context: float
) -> dict[str, float]:
    """Return forward FLOPs per token at a mean number of active experts and attended positions."""
    token = token_flops(
        sizes_of(student),
        target_k=mean_k,
        row_context=mean_context,
        document_context=mean_context,
    )
    rest = token.attention_projections + token.attention_scores_documents + token.head
    ffn = token.ffn_at_k + token.router
    return {
        "ffn_flops": ffn,
        "dense_ffn_flops": float(token.ffn_dense),
        "total_flops": ffn + rest,
        "dense_total_flops": token.ffn_dense + rest,
    }
