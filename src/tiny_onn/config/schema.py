"""Settings of a run: frozen dataclasses, read from TOML, written back as resolved JSON.

Every field is documented once, in the docstring under it; `tiny-onn config` and the error messages
take their text from there. A field's default is stated here and nowhere else.
"""

from dataclasses import dataclass, field
from typing import Literal

Surprise = Literal["parameters", "input", "output", "gain", "magnitude", "relative"]
Weighting = Literal["unit", "softmax", "sigmoid", "mean"]
Selection = Literal["top_k", "top_any", "budget", "static", "random", "oracle"]
Objective = Literal["smk", "task", "regression", "none"]
AtLeastOne = Literal["evaluation", "always"]
BudgetScope = Literal["layer", "global"]
ExpertInit = Literal["random", "slices", "importance", "cluster", "coactivation", "learned"]
GateInit = Literal["random", "zeros", "ridge"]
Compensation = Literal["none", "mean"]
SmkTargets = Literal["single", "set", "regress", "member", "helpful"]
DType = Literal["float32", "bfloat16"]
TeacherDType = Literal["auto", "float32", "bfloat16"]
ExpertPath = Literal["auto", "dense", "grouped", "sparse"]
Checkpointing = Literal["none", "layer", "selective", "offload"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The dense model that is converted and that teaches."""

    path: str = "embedded"
    """`embedded` (SmolLM2-135M-Instruct, offline), a local folder, or a Hugging Face hub id."""
    revision: str = "main"
    """Branch, tag or commit of a hub id."""
    placement: Literal["shared", "separate"] = "shared"
    """`shared`: the student's frozen backbone with the teacher's MLPs; `separate`: a whole copy."""
    dtype: TeacherDType = "auto"
    """Number format of the teacher and of the frozen backbone. `auto`: bfloat16 where the device
    has instructions for it (GPUs from compute capability 8.0, CPUs with AVX-512 BF16, AMX or Arm
    BF16), else float32; the run's config.json says which it was."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4`: the teacher's linear layers in 4 bits (bitsandbytes): all of a separate teacher's, the
    MLPs of a shared one."""
    double_quant: bool = True
    """Quantise NF4's scales too: 0.516 bytes per weight instead of 0.563."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub id. Off unless you trust its author."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """How each dense MLP becomes a bank of experts."""

    num_experts: int = 32
    """Experts per layer, E. `num_experts * expert_dim` must equal the MLP's width."""
    expert_dim: int = 0
    """Neurons per expert, I. 0: the MLP's width divided by `num_experts`."""
    init: ExpertInit = "importance"
    """`random` (the model card), or dense neurons: `slices` (contiguous), `importance` (ordered by
    their calibrated contribution to the output), `cluster` (gate rows that point the same way),
    `coactivation` (large at the same tokens), `learned` (most of the output's energy in the experts
    that a linear gate chooses, `router.target_k` a token)."""
    num_shared: int = 0
    """Experts of each layer, the first ones, that every token uses at weight 1, whatever its gate
    says. `router.target_k` counts them. Partitions from text give them the neurons of largest
    contribution to the output, and cut the others into the routed experts."""
    keep_massive: bool = False
    """Put the neurons that write massive activations into the shared experts, whatever the
    partition; needs `num_shared` >= 1."""
    gate_init: GateInit = "ridge"
    """`random` (normal, std 0.02), `zeros`, or `ridge` (regression of the log norms of the experts'
    outputs on calibration text). With `top_any`, `random` means orthogonal prototypes."""
    weighting: Weighting = "unit"
    """What an active expert's output is multiplied by: 1, its renormalised softmax or its sigmoid
    probability, or 1/k."""
    compensation: Compensation = "none"
    """What stands in for an inactive expert: `none`, or the `mean` of its output over calibration
    tokens that leave it inactive, which then learns with the experts."""
    learn_scale: bool = False
    """Multiply each expert's weight by a learned scale that starts at 1."""
    calibration_tokens: int = 8192
    """Training tokens read by partitions other than `slices` and `cluster`, by `cluster` with
    shared experts, by `ridge` and by `mean`, and, before each evaluation, as many others that a
    budget settles on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """Which experts a token activates, and what the gate learns from."""

    selection: Selection = "budget"
    """`top_k`: exactly k; `top_any`: all whose similarity to the token passes their own learned
    threshold (DynMoE); `budget`: as many as the token needs, k on average; `static` (always the
    same ones), `random` (a frozen random gate) and `oracle` (largest true output norm, which costs
    computing all experts): controls."""
    objective: Objective = "smk"
    """What the gate learns from. `smk`: cross-entropy toward the expert that surprise points at,
    decoupled from the main loss; `task`: the main loss; `regression`: the log norms of all experts'
    outputs, decoupled; `none`: nothing, it is frozen."""
    target_k: float = 16.0
    """Active experts per token: exact for `top_k` and the controls, the mean for a budget.
    `top_any` finds its own number."""
    budget_form: Literal["cumulative", "threshold"] = "threshold"
    """`cumulative`: experts by falling probability until it sums to p; `threshold`: all above p."""
    budget_scope: BudgetScope = "layer"
    """`layer`: every layer meets the target; `global`: one p for all layers, which meet it
    together, so that layers differ in how much they use."""
    budget_rate: float = 0.3
    """Share by which the budget's p moves toward the last batch's exact value, per step."""
    anneal_fraction: float = 0.0
    """Share of the global stage over which the number of active experts (for a budget its mean)
    falls linearly from all of them to `target_k`. 0: it is `target_k` from the start."""
    blockwise_anneal_fraction: float = 0.0
    """The same for the blockwise stage."""
    oracle_budget: bool = False
    """Let the oracle spend its experts as a budget does: more on some tokens, k on average."""
    at_least_one: AtLeastOne = "evaluation"
    """When a token that passes no threshold of `top_any` still gets its nearest expert: at
    `evaluation` (DynMoE; in training the layer adds nothing to it), or `always`."""
    diversity_coef: float = 0.01
    """Weight of the diversity and simplicity loss (`top_any` with objective `task` only)."""
    reseed_every_steps: int = 0
    """Steps after which a `top_any` expert that nobody used gets a new prototype: the mean
    direction of the tokens that passed no threshold. 0: never."""
    load_balancing_coef: float = 0.01
    """Weight of the load-balancing loss (`top_k` with objective `task` only)."""
    z_loss_coef: float = 0.001
    """Weight of the squared log-partition of the router logits (`top_k` with objective `task`
    only)."""
    balance_rate: float = 0.0
    """Step by which a bias on the logits, used for selection only, rises for an expert used less
    than the mean and falls for one used more (DeepSeek-V3), per update. 0: no such bias."""
    revive_after_steps: int = 0
    """Steps without use after which an expert's selection bias is raised to where it would have
    been chosen by 1 % of the tokens. 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmkConfig:
    """Surprise Min_K: the gate's own loss (objective `smk` only)."""

    surprise: Surprise = "gain"
    """Which per-token, per-expert quantity points at the target: the norm of the gradient at the
    expert's `parameters` (the model card), `input` or `output`; the first-order `gain` of having
    the expert; its output's `magnitude`; or `parameters` relative to its hidden activations."""
    direction: Literal["min", "max"] = "max"
    """Whether the target is where the quantity is smallest (the model card) or largest."""
    candidates: Literal["active", "all"] = "all"
    """Experts that may become the target: those the token activated, or all of them."""
    lesson_share: float = 1.0
    """Share of the tokens, evenly spaced and shifted by one at each step, whose inactive experts
    are surprised too where `candidates` is `all`; the other tokens' candidates are their active
    experts. A lower share spares the `grouped` and `sparse` paths most inactive experts."""
    targets: SmkTargets = "single"
    """`single`: cross-entropy to one expert; `set`: to the k best; `regress`: squared error to the
    quantity itself, without its mean over the token's candidates and in units of its spread;
    `member`: for every expert, whether it is one of the k best; `helpful`: for every expert,
    whether its `gain` is above 0."""
    explore_fraction: float = 0.0
    """Share of tokens that use a random inactive expert in place of their weakest active one, so
    that `active` candidates see others too."""
    coef: float = 1.0
    """Weight of the SMK loss. It acts on the gate's gradient only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What the student is asked to match."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """KL(teacher || student), KL(student || teacher), or generalised Jensen-Shannon divergence."""
    temperature: float = 1.0
    """Both distributions are softened by it; the loss is multiplied by its square."""
    jsd_beta: float = 0.5
    """Weight of the teacher in the mixture of `jsd`, in (0, 1)."""
    states_coef: float = 0.0
    """Weight, in the global stage, of a second loss: the share of the variance of the teacher's
    hidden states that the student's leave unexplained, mean over layers. 0: no such loss."""
    chunk_tokens: int = 0
    """Tokens whose logits exist at once. 0: chosen when the run starts, 512 on a CPU, on a GPU from
    its free memory; the number is in every step's record, and setting it repeats that run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text."""

    sources: tuple[str, ...] = ("embedded",)
    """`embedded`, files (.txt, .jsonl, also .gz or .zst of either; .parquet), folders of them, or
    hub datasets as `hf:name` or `hf:name:config`, where `name@revision` pins a branch, tag or
    commit."""
    text_field: str = "text"
    """The field of a jsonl or parquet row, or of a hub dataset's row, that holds the text. A row
    without it that holds a chat (`messages`, `conversations`, or a pair such as `prompt` and
    `completion`) is rendered with the tokenizer's chat template."""
    split: str = "train"
    """Split of a hub dataset."""
    row_tokens: int = 1024
    """Tokens per packed row."""
    held_out_fraction: float = 0.05
    """Share of documents kept for evaluation, chosen by a hash of their content. Exact duplicates
    stay on one side; texts that differ by a blank may not."""
    eval_tokens: int = 8192
    """Held-out tokens per evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """How the experts (fast) and the gates (slow) are updated."""

    name: Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor"] = "adamw"
    """The experts' optimizer. `adamw`: 32-bit state; `adamw8bit`: 8-bit state (bitsandbytes);
    `paged_adamw8bit`: 8-bit state that moves to host memory when the GPU's is short (on a CPU the
    same as `adamw8bit`); `adafactor`: factored second moment. Gates: AdamW with 32-bit state."""
    master_dtype: DType = "float32"
    """Number format of the experts' weights and gradients; `bfloat16` halves their memory, with
    weights rounded stochastically."""
    expert_lr: float = 6e-4
    """Peak learning rate of the experts."""
    gate_lr: float = 3e-3
    """Peak learning rate of the gates."""
    beta1: float = 0.9
    """Decay of the first moment. Adafactor has none."""
    beta2: float = 0.95
    """Decay of the second moment. Adafactor's is 1 - step^-0.8."""
    eps: float = 1e-8
    """Added to the root of the second moment. Adafactor adds 1e-30 to squared gradients."""
    weight_decay: float = 0.0
    """Decoupled weight decay of the experts."""
    gate_weight_decay: float = 0.0
    """Decoupled weight decay of the gates."""
    clip_norm: float = 1.0
    """The gradient's global L2 norm is clipped to it, experts and gates apart."""
    warmup_fraction: float = 0.05
    """Share of the run in which the experts' learning rate rises linearly from 0."""
    decay_fraction: float = 0.5
    """Share of the run, at its end, in which it falls linearly to 0."""
    gate_warmup_fraction: float = 0.05
    """Share of the run in which the gates' learning rate rises linearly from 0."""
    gate_decay_fraction: float = 0.5
    """Share of the run, at its end, in which it falls linearly to 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The loop."""

    blockwise_tokens: int = 0
    """Training tokens of the blockwise stage, which comes first: each layer's experts and gate
    learn the teacher's MLP output from the teacher's MLP input. 0: no such stage."""
    tokens: int = 262_144
    """Training tokens of the global stage, by the distillation loss; the run ends at the first step
    that reaches it. Each stage has the whole learning rate schedule."""
    rows_per_step: int = 1
    """Packed rows whose gradients are summed before an update."""
    seed: int = 0
    """Seed of every generator: initialisation, document order, random controls."""
    device: str = "auto"
    """`auto` (cuda if there is one, else cpu), `cpu`, `cuda` or `cuda:N`."""
    compile: bool = True
    """Fuse elementwise work with torch.compile: the expert layers', and on a GPU the loss' and the
    frozen backbone's."""
    deterministic: bool = True
    """On a GPU, take only kernels whose results repeat bit for bit. A CPU's always do."""
    expert_path: ExpertPath = "auto"
    """How an expert layer computes. `dense`: every expert on every token, masked; `grouped`: each
    expert on its own tokens, faster at low k, but blind to inactive experts; `sparse`: as
    `grouped`, by Triton kernels on a GPU, which also see inactive experts that teach the gate;
    `auto`: the fastest one as measured on this kind of device that the other settings allow."""
    checkpointing: Checkpointing = "layer"
    """What the backward pass computes again instead of keeping it. `none`: nothing; `layer`: each
    layer, from its kept input; `selective`: as `layer`, but attention's outputs are kept;
    `offload`: as `layer`, with the inputs in host memory (on a CPU the same as `layer`)."""
    ffn_chunk_tokens: int = 0
    """Tokens that an expert layer processes at once, so that its working memory does not grow with
    the row; its hidden activations are then computed again in the backward pass. 0: the row."""
    eval_every_tokens: int = 65_536
    """Training tokens between evaluations on held-out text. 0: only at the start and the end."""
    save_every_tokens: int = 65_536
    """Training tokens between checkpoints. 0: only at the end and where held-out KL is best. They
    are written while training goes on, from a copy in host memory."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the one of best held-out KL."""
    max_skipped_steps: int = 5
    """Updates in a row that may be skipped because loss or gradient is not finite; then the run
    ends."""
    log_every_steps: int = 1
    """Steps between metric records."""
    stats_every_steps: int = 100
    """Steps between metric records that also hold the routing of each layer and expert, as
    evaluations do. 0: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run is made from."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    smk: SmkConfig = field(default_factory=SmkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


HUB_PREFIX = "hf:"
