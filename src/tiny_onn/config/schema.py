"""The settings of a run: frozen dataclasses, read from TOML, written back as resolved JSON.

Every field is documented once, in the docstring under it; `tiny-onn config` and the error messages
take their text from there. A field's default is stated here and nowhere else.
"""

from dataclasses import dataclass, field
from typing import Literal

Surprise = Literal["parameters", "input", "output", "gain", "magnitude", "relative"]
Weighting = Literal["unit", "softmax", "sigmoid", "mean", "ramp"]
StraightThrough = Literal["softmax", "threshold", "coupled"]
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
Shard = Literal["none", "optimizer", "full"]
OptimizerName = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "muon"]
# The number format in which `tiny-onn cache` stores a teacher's hidden states.
StatesFormat = Literal["bfloat16", "int8", "float32"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """The dense model that is converted and that teaches."""

    path: str = "embedded"
    """The teacher model: `embedded` (SmolLM2-135M-Instruct, which needs no network), a local
    folder, or a Hugging Face hub id."""
    revision: str = "main"
    """The branch, tag or commit to load when `path` is a hub id."""
    placement: Literal["shared", "separate"] = "shared"
    """The way the teacher is held in memory. `shared`: teacher and student use one frozen backbone,
    and only the teacher's MLPs are held besides; `separate`: the teacher is a whole model of its
    own."""
    dtype: TeacherDType = "auto"
    """The number format of the teacher and of the frozen backbone. `auto`: bfloat16 where the
    device has instructions for it (GPUs from compute capability 8.0, CPUs with AVX-512 BF16, AMX or
    Arm BF16), else float32. The run's config.json records the format that was chosen."""
    quantization: Literal["none", "nf4"] = "none"
    """`nf4` stores the teacher's linear layers in 4 bits (bitsandbytes): all of them if `placement`
    is `separate`, those of the MLPs if it is `shared`."""
    double_quant: bool = True
    """Quantise the scales of NF4 too, so that a weight takes 0.516 bytes instead of 0.563."""
    trust_remote_code: bool = False
    """Run the Python code that a hub repository brings for its model. Turn this on only for authors
    whom you trust."""
    cache: str = "none"
    """A folder that `tiny-onn cache` wrote, from which training steps read the teacher's last
    hidden states. `none`: the teacher computes them at each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """The experts that replace each dense MLP, and the gate that they start with."""

    num_experts: int = 32
    """The number of experts per layer. `num_experts * expert_dim` must equal the MLP's width."""
    expert_dim: int = 0
    """The number of neurons per expert. 0: the MLP's width divided by `num_experts`."""
    init: ExpertInit = "importance"
    """The weights that the experts start from. `random`: random weights (as in the model card). The
    other values share the teacher's neurons out among the experts. `slices`: neighbouring neurons
    together; `importance`: in the order of their contribution to the output on calibration text;
    `cluster`: neurons whose gate rows point in similar directions together; `coactivation`: neurons
    that are large at the same tokens together; `learned`: so that the experts which a linear gate
    chooses, `router.target_k` per token, hold most of the output's energy."""
    num_shared: int = 0
    """The number of shared experts: the first ones of each layer, which every token uses with
    weight 1. `router.target_k` counts them. A partition made from text gives them the neurons with
    the largest contribution to the output, and the other neurons to the routed experts."""
    keep_massive: bool = False
    """Put the neurons that write massive activations into the shared experts, whatever the
    partition. This needs `num_shared` >= 1."""
    gate_init: GateInit = "ridge"
    """The weights that the gates start from. `random`: normal with standard deviation 0.02 (with
    the selection `top_any`: orthogonal prototypes); `zeros`; `ridge`: a ridge regression of the log
    norms of the experts' outputs on calibration text."""
    weighting: Weighting = "unit"
    """The factor on an active expert's output. `unit`: 1; `softmax`: its softmax probability,
    renormalised over the active experts; `sigmoid`: its sigmoid probability; `mean`: 1/k with k
    active experts; `ramp`: 0 at the threshold of a budget, rising to 1 above it, so that the main
    loss has a true gradient at the gate."""
    compensation: Compensation = "none"
    """The stand-in for an inactive expert's output. `none`: nothing; `mean`: a vector that starts
    as the mean of the expert's output over calibration tokens that leave it inactive, and is
    trained with the experts."""
    learn_scale: bool = False
    """Multiply each expert's weight by a learned scale that starts at 1."""
    token_scale: bool = False
    """Multiply each expert's weight by 1 + tanh(u x / |x|), where x is the token's input and u a
    learned vector of the expert that starts at 0. The main loss has a true gradient at u."""
    refit: bool = False
    """Fit the down projections and the mean outputs to the teacher by least squares on calibration
    text, layer by layer under the routing that the student starts with. The student is closer to
    its teacher before any training, but no longer equal to it with all experts active."""
    calibration_tokens: int = 8192
    """The number of training tokens read as calibration text: for every `init` but `random`,
    `slices` and `cluster` (which reads them too if there are shared experts), for `ridge` gates,
    the `static` control, `keep_massive`, the `mean` compensation and the blockwise stage."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """The experts that a token activates, and what their gate learns from."""

    selection: Selection = "budget"
    """The rule that selects a token's experts. `top_k`: the k experts with the largest logits;
    `top_any`: every expert whose cosine with the token passes the expert's own learned threshold
    (DynMoE); `budget`: as many as the token needs, k on average. Three values are controls, to
    compare with. `static`: always the same experts; `random`: by a frozen random gate; `oracle`:
    those whose true output norms are largest, for which all experts are computed."""
    objective: Objective = "smk"
    """The quantity that the gate learns from. `smk` (Surprise Min_K): surprise, by the loss that
    `smk.targets` names, with no gradient from the main loss; `task`: the main loss; `regression`:
    the log norms of all experts' outputs, with no gradient from the main loss; `none`: nothing, the
    gate is frozen."""
    straight_through: StraightThrough = "softmax"
    """The gradient that the objective `task` gives the gate where the experts' weights do not
    depend on it (weighting `unit` or `mean`). `softmax`: as if the weights were the softmax
    probabilities times the number of experts; `threshold`: as if an expert became active by a
    sigmoid around the threshold of a budget; `coupled`: that of `softmax`, which also flows through
    the gate into the layers below, where it is no gradient of the loss. This is what runs of
    earlier versions did, and it is kept for them alone."""
    target_k: float = 16.0
    """The number of active experts per token, k: exact for `top_k` and the controls, a mean for
    `budget`. `top_any` finds its own number."""
    budget_form: Literal["cumulative", "threshold"] = "threshold"
    """The form of a budget, which turns probabilities into active experts. `cumulative`: the most
    probable experts until their probabilities sum to p; `threshold`: all experts with a probability
    above p, and always the most probable one. p is moved until the mean number is k."""
    budget_scope: BudgetScope = "layer"
    """`layer`: every layer has its own p and uses k experts on average; `global`: one p for all
    layers, so that k is the mean over the layers, and some layers use more experts than others."""
    budget_rate: float = 0.3
    """The share of the way that a budget's p moves, at each step, toward the value that would have
    met the target on that step's tokens."""
    anneal_fraction: float = 0.0
    """The share of the global stage during which the number of active experts (for a budget, its
    mean) falls linearly from all experts to `target_k`. 0: it is `target_k` from the start."""
    blockwise_anneal_fraction: float = 0.0
    """The share of the blockwise stage during which the number of active experts falls in the same
    way. 0: it is `target_k` from the start."""
    oracle_budget: bool = False
    """Let the control `oracle` spend its experts as a budget does: more on some tokens than on
    others, k on average."""
    at_least_one: AtLeastOne = "evaluation"
    """The times at which a token that passes no threshold of `top_any` still gets its nearest
    expert. `evaluation`: only in evaluation (as in DynMoE), so that in training the layer adds
    nothing to such a token; `always`: in training too."""
    diversity_coef: float = 0.01
    """The weight of the diversity and simplicity loss, for `top_any` with the objective `task`."""
    reseed_every_steps: int = 0
    """The number of steps after which a `top_any` expert that no token used gets a new prototype:
    the mean direction of the tokens that passed no threshold. 0: never."""
    load_balancing_coef: float = 0.01
    """The weight of the load-balancing loss (only `top_k` with the objective `task` uses it)."""
    z_loss_coef: float = 0.001
    """The weight of the router z-loss, the squared log-partition of the logits (only `top_k` with
    the objective `task` uses it)."""
    balance_rate: float = 0.0
    """The step, per update, by which an expert's selection bias rises if the expert is used less
    than the mean, and falls if it is used more (DeepSeek-V3). The bias is added to the logits for
    the selection only. 0: no such bias."""
    revive_after_steps: int = 0
    """The number of steps without use after which an expert's selection bias is raised so far that
    1 % of the tokens would have selected the expert. 0: never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SmkConfig:
    """Surprise Min_K (SMK): the gate's own loss, which only `router.objective = "smk"` uses."""

    surprise: Surprise = "gain"
    """The quantity, per token and expert, that chooses the gate's target. `parameters` (as in the
    model card), `input`, `output`: the norm of the loss gradient at the expert's parameters, input
    or output; `gain`: how much the expert lowers the loss, to first order; `magnitude`: the norm of
    its output; `relative`: `parameters` divided by the norm of its hidden activations."""
    direction: Literal["min", "max"] = "max"
    """The end of the surprise that is the target: the expert with the smallest value (`min`, as in
    the model card) or with the largest (`max`)."""
    candidates: Literal["active", "all"] = "all"
    """The experts that may become the target: those that the token activated, or all of them."""
    lesson_share: float = 1.0
    """Share of the tokens at which `candidates = "all"` holds. These tokens are evenly spaced and
    shift by one at each step; the candidates of the other tokens are their active experts. A lower
    share spares the `grouped` and `sparse` paths most of the inactive experts."""
    targets: SmkTargets = "single"
    """The loss that teaches the gate about a token. `single`: cross-entropy to the best expert;
    `set`: cross-entropy to the k best; `regress`: squared error to the surprise itself,
    standardised over the token's candidates; `member`: for every expert, whether it is one of the k
    best; `helpful`: for every expert, whether its `gain` is above 0."""
    net_gain: bool = False
    """Count in an expert's `gain` what the expert takes away by being active: its mean output,
    which stands in for it while it is inactive (`experts.compensation = "mean"`)."""
    explore_fraction: float = 0.0
    """The share of tokens that use a random inactive expert in place of their weakest active one,
    so that experts other than the usual ones become `active` candidates."""
    coef: float = 1.0
    """The weight of the SMK loss, whose gradient reaches the gate only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The loss between the student and its teacher."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """The divergence of the next-token distributions. `forward_kl`: KL(teacher || student);
    `reverse_kl`: KL(student || teacher); `jsd`: the generalised Jensen-Shannon divergence."""
    temperature: float = 1.0
    """The temperature that softens both distributions. The loss is multiplied by its square."""
    label_coef: float = 0.0
    """The share (0 to below 1) of the loss that is cross-entropy to the text's own next token."""
    jsd_beta: float = 0.5
    """The weight of the teacher in the mixture of `jsd`."""
    states_coef: float = 0.0
    """The weight, in the global stage, of a second loss: the share of the variance of the teacher's
    hidden states that the student's leave unexplained, averaged over layers. 0: no such loss."""
    states_scale: Literal["layer", "feature"] = "layer"
    """The variance that the share is of. `layer`: that of all features of a layer's hidden states
    together; `feature`: each feature's own, so that none counts more for being large."""
    chunk_tokens: int = 0
    """The number of tokens whose logits are held in memory at once. 0: 512 on a CPU, by the free
    memory on a GPU. Step records hold the number, with which a run can be repeated."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text that a run reads, for training and for evaluation."""

    sources: tuple[str, ...] = ("embedded",)
    """The places to read text from: `embedded` (text that comes with the package), files (.txt and
    .jsonl, also compressed as .gz or .zst; .parquet), folders of such files, or hub datasets as
    `hf:name` or `hf:name:config`, where `name@revision` pins a branch, tag or commit."""
    text_field: str = "text"
    """The field that holds the text in a row of a jsonl file, a parquet file or a hub dataset. A
    row that has no such field but a chat (`messages`, `conversations`, or a pair such as `prompt`
    and `completion`) is rendered with the tokenizer's chat template."""
    split: str = "train"
    """The split to read of a hub dataset."""
    row_tokens: int = 1024
    """The number of tokens in a packed row, into which documents are joined for training."""
    shuffle_tokens: int = 0
    """The number of tokens whose rows are shuffled together, so that the rows of a long document
    are spread over as many steps. 0: rows come in the order of the documents."""
    held_out_fraction: float = 0.05
    """The share of documents kept out of training for evaluation, chosen by a hash of their text:
    exact duplicates stay on one side."""
    settling_fraction: float = 0.05
    """The share of documents kept out of training to settle a budget's evaluation thresholds on,
    chosen by the same hash. 0, or a share that leaves none: they are settled on training text."""
    settling_tokens: int = 0
    """The number of tokens of it that an evaluation settles on. 0: `experts.calibration_tokens`."""
    eval_tokens: int = 8192
    """The number of held-out tokens read in each evaluation."""
    eval_row_tokens: int = 0
    """The number of tokens in a row that is evaluated or settled on; at least `row_tokens`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """The optimizers of the experts and of the gates, which learn at different rates."""

    name: OptimizerName = "adamw"
    """The experts' optimizer. `adamw`: 32-bit state; `adamw8bit`: 8-bit state (bitsandbytes);
    `paged_adamw8bit`: 8-bit state that moves to host memory when GPU memory is short (on a CPU it
    equals `adamw8bit`); `adafactor`: a factored second moment; `muon`: an expert's matrices move by
    their orthogonalised momentum, which takes long if they are wide, its vectors by AdamW. Gates
    always use AdamW with 32-bit state."""
    master_dtype: DType = "float32"
    """The number format of the experts' weights and gradients. `bfloat16` halves their memory;
    updated weights are then rounded stochastically."""
    expert_lr: float = 6e-4
    """The peak learning rate of the experts; Muon's steps have a root mean square of 0.4 of it."""
    gate_lr: float = 3e-3
    """The peak learning rate of the gates."""
    norm_lr: float = 0.0
    """The peak learning rate of the gains of the backbone's norms in the global stage, on the
    experts' schedule, without weight decay. 0: they stay as the teacher has them (model card)."""
    lr_scale: Literal["absolute", "rms"] = "absolute"
    """The unit of the weights, to which learning rates, weight decay, `eps` and `clip_norm` refer.
    `absolute`: 1; `rms`: each weight's root mean square at the start of the run (gates and ups
    apart), so that a rate fits teachers of any scale: 0.001 changes a weight by a thousandth.
    Vectors other than gains of norms, and weights that start at 0, have the unit 1 in both."""
    beta1: float = 0.9
    """The decay of the first moment, which is Muon's momentum. Adafactor has none."""
    beta2: float = 0.95
    """The decay of the second moment. Adafactor uses 1 - step^-0.8, and Muon has none."""
    eps: float = 1e-8
    """The number added to the second moment's root. Adafactor adds 1e-30 to squared gradients."""
    weight_decay: float = 0.0
    """The decoupled weight decay of the experts."""
    gate_weight_decay: float = 0.0
    """The decoupled weight decay of the gates."""
    clip_norm: float = 1.0
    """The global L2 norm to which gradients are clipped, apart for the experts and the gates."""
    warmup_fraction: float = 0.05
    """The first share of each stage, in which the experts' learning rate rises linearly from 0."""
    decay_fraction: float = 0.5
    """The last share of each stage, in which the experts' learning rate falls linearly to 0."""
    gate_warmup_fraction: float = 0.05
    """The first share of each stage, in which the gates' learning rate rises linearly from 0."""
    gate_decay_fraction: float = 0.5
    """The last share of each stage, in which the gates' learning rate falls linearly to 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop: its length, its device, its memory, and how often it reports and saves."""

    blockwise_tokens: int = 0
    """The number of training tokens of the blockwise stage, which comes first: the experts and the
    gate of each layer learn the teacher's MLP output from the teacher's MLP input. 0: no such
    stage."""
    tokens: int = 262_144
    """The number of training tokens of the global stage, which trains by the distillation loss. The
    run ends at the first step that reaches it. Each stage runs the learning rate schedule from
    start to end."""
    rows_per_step: int = 1
    """The number of packed rows whose gradients are summed for one update."""
    seed: int = 0
    """The seed of every random number: initialisation, the order of documents, random controls."""
    device: str = "auto"
    """The device to train on: `auto` (cuda if there is one, else cpu), `cpu`, `cuda`, `cuda:N`."""
    compile: bool = True
    """Fuse elementwise work with torch.compile: in the expert layers, and on a GPU also in the loss
    and in the frozen backbone. Training rows then attend by a compiled kernel, which
    `train.cuda_graphs` needs."""
    cuda_graphs: bool = True
    """Capture the passes of a row in a CUDA graph and replay it, which spares a GPU waiting for the
    host. Where that is impossible, rows run without one, and a printed line says why."""
    shard: Shard = "none"
    """The division of memory between the processes of a run. `none`: each holds everything;
    `optimizer`: the optimizer's state of each expert tensor lies in one process, which steps the
    tensor and hands it to the others, with the same results. `full`: each process holds a share of
    the experts, with their gradients and state, and of the MLPs of a teacher that is not quantised,
    and gathers them layer by layer (FSDP2), for models that do not fit on one GPU."""
    deterministic: bool = True
    """Use only GPU kernels whose results repeat bit for bit. On a CPU results always do."""
    expert_path: ExpertPath = "auto"
    """The computation of an expert layer. `dense`: every expert on every token, with a mask;
    `grouped`: each expert on its own tokens, which is faster at low k and computes inactive experts
    only for the tokens of a sampled lesson (`smk.lesson_share` below 1); `sparse`: as `grouped`, by
    Triton kernels on a GPU, which also compute the inactive experts that teach the gate; `auto`:
    the path that measured fastest on this kind of device, among those that the other settings
    allow."""
    checkpointing: Checkpointing = "layer"
    """The activations that the backward pass recomputes instead of keeping them in memory. `none`:
    none of them; `layer`: all those of a layer, from its input, which is kept; `selective`: as
    `layer`, but the outputs of attention are kept too, by a kernel that on a GPU rules out
    `train.cuda_graphs`; `offload`: as `layer`, with the inputs kept in host memory (on a CPU it
    equals `layer`)."""
    ffn_chunk_tokens: int = 0
    """The number of tokens that an expert layer processes at once, so that its working memory does
    not grow with the row. The backward pass then recomputes its hidden activations. 0: the whole
    row at once."""
    eval_every_tokens: int = 65_536
    """The number of training tokens between evaluations on held-out text. 0: only at the start and
    at the end."""
    save_every_tokens: int = 65_536
    """The number of training tokens between checkpoints, which are written while training goes on,
    from a copy in host memory. 0: only at the end and where the held-out KL is best."""
    keep_checkpoints: int = 2
    """The number of newest checkpoints to keep, besides the one with the best held-out KL."""
    max_skipped_steps: int = 5
    """End the run after so many updates in a row whose loss or gradients are not finite."""
    stop_if_worse: bool = True
    """Stop a run, with a checkpoint, whose KL on a held-out row is half as much again as before
    training after 4, 16, 64 or 256 steps of the global stage."""
    log_every_steps: int = 1
    """The number of steps between metric records."""
    stats_every_steps: int = 100
    """The number of steps between metric records that also hold the routing of each layer and
    expert. Evaluations always hold it. 0: only evaluations do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The settings of a run, in sections."""

    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    smk: SmkConfig = field(default_factory=SmkConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


# A source that starts with this is a hub dataset.
HUB_PREFIX = "hf:"
