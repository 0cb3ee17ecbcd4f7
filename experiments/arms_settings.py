"""The arms of `arms.py`: the settings of each over the preset `demo`."""

TOKENS = 1_998_848
BASE = (
    "data.row_tokens=4096",
    "data.shuffle_tokens=1048576",
    "data.eval_tokens=131072",
    "data.settling_tokens=524288",
    "experts.init=learned",
    "experts.compensation=mean",
    "experts.refit=true",
    "experts.calibration_tokens=131072",
    "loss.states_coef=4",
    "loss.states_scale=layer",
    "loss.chunk_tokens=1024",
    "optim.name=adamw",
    "optim.lr_scale=rms",
    "optim.expert_lr=2.1e-3",
    "optim.gate_lr=7.7e-3",
    "optim.decay_fraction=0.95",
    "optim.gate_decay_fraction=0.95",
    "train.eval_every_tokens=0",
    "train.save_every_tokens=4194304",
    "train.keep_checkpoints=1",
    "train.stop_if_worse=false",
    "train.stats_every_steps=0",
    "train.log_every_steps=20",
    "train.checkpointing=none",
)
SMOKE = (
    "teacher.dtype=float32",
    "train.compile=false",
    "data.row_tokens=64",
    "data.eval_row_tokens=128",
    "data.shuffle_tokens=256",
    "data.eval_tokens=128",
    "data.settling_tokens=256",
    "experts.num_experts=8",
    "experts.calibration_tokens=256",
    "router.target_k=4",
    "train.log_every_steps=1",
)
NONE = ("router.objective=none",)
STATIC = ("router.selection=static", *NONE)
HALF = ("experts.init=importance", *STATIC)
# A gate that learns from the main loss takes a lower rate than one with a loss of its own.
TASK = ("router.objective=task", "optim.gate_lr=2.3e-3")
IN_ORDER = ("data.shuffle_tokens=0",)
LONGER_MOMENT = ("optim.beta2=0.99",)
BY_FEATURE = ("loss.states_scale=feature",)
STATES_16 = ("loss.states_coef=64",)
TOGETHER = (*STATES_16, "optim.clip_norm=0.2")
MUON = ("optim.name=muon",)
MUON_FEATURES = (*MUON, *BY_FEATURE, *STATES_16)
RIVALS = {"frozen ridge gate": NONE, "half-width": HALF, "static choice": STATIC}
# A step is a row, and all are measured on rows of the same length.
STEPS = {
    ", steps of 2,048": ("data.row_tokens=2048", "data.eval_row_tokens=4096"),
    ", steps of 1,024": ("data.row_tokens=1024", "data.eval_row_tokens=4096"),
}
ARMS: dict[str, tuple[str, ...]] = {
    "smk": (),
    "smk, not refitted": ("experts.refit=false",),
    "smk, smallest gain": ("smk.direction=min",),
    "smk, lesson of 1/8": ("smk.lesson_share=0.125",),
    "smk, net gain": ("smk.net_gain=true",),
    "smk, a tenth cross-entropy": ("loss.label_coef=0.1",),
    "smk, token scale": ("experts.token_scale=true",),
    "smk, short decay": ("optim.decay_fraction=0.5", "optim.gate_decay_fraction=0.5"),
    "smk, norms learn": ("optim.norm_lr=1e-3",),
    "smk, 4 shared": ("experts.num_shared=4",),
    "smk, averaged weights": (),
    "smk, longer second moment": LONGER_MOMENT,
    "smk, half sampled": (),
    "smk, rows in order": IN_ORDER,
    "half-width, rows in order": (*HALF, *IN_ORDER),
    "smk, tighter clipping": ("optim.clip_norm=0.2",),
    "smk, shorter second moment": ("optim.beta2=0.9",),
    "smk, states x 1/4": ("loss.states_coef=1",),
    "smk, states x 4": ("loss.states_coef=16",),
    "smk, states x 16": STATES_16,
    "smk, together": TOGETHER,
    "smk, features": BY_FEATURE,
    "smk, features x 16": (*BY_FEATURE, *STATES_16),
    "smk, features, together": (*BY_FEATURE, *TOGETHER),
    "smk, features, together, loss metric": (*BY_FEATURE, *TOGETHER),
    "smk, muon": MUON,
    "smk, muon, states x 16": (*MUON, *STATES_16),
    "smk, muon, features x 16, loss metric": MUON_FEATURES,
    "half-width, muon": (*HALF, *MUON),
    **{
        f"{name}, muon, features x 16{end}": (*own, *MUON_FEATURES, *step)
        for end, step in {"": (), **STEPS}.items()
        for name, own in {"smk": (), **RIVALS}.items()
    },
    "smk, more text": (),
    "smk, loss metric": (),
    "frozen ridge gate, loss metric": NONE,
    "smk, together, more text": TOGETHER,
    "smk, one budget": ("router.budget_scope=global",),
    "smk, annealed": ("router.anneal_fraction=0.3",),
    "smk, learned scale": ("experts.learn_scale=true",),
    "half-width, longer second moment": (*HALF, *LONGER_MOMENT),
    "frozen ridge gate": NONE,
    "frozen ridge gate, token scale": (*NONE, "experts.token_scale=true"),
    "regression of norms": ("router.objective=regression",),
    "task, straight through": TASK,
    "task, threshold sigmoid": (*TASK, "router.straight_through=threshold"),
    "task, ramp": (*TASK, "experts.weighting=ramp"),
    "task, softmax weights": (*TASK, "experts.weighting=softmax"),
    "half-width": HALF,
    "half-width, not refitted": (*HALF, "experts.refit=false"),
    "half-width, together": (*HALF, *TOGETHER),
    "half-width, more text": HALF,
    "half-width, norms learn": (*HALF, "optim.norm_lr=1e-3"),
    "low-rank": STATIC,
    "oracle of norms": ("router.selection=oracle", "router.oracle_budget=true", *NONE),
    "static choice": STATIC,
    "model card's rule": (
        "smk.surprise=parameters",
        "smk.direction=min",
        "smk.candidates=active",
    ),
    "smk, k = 8": ("router.target_k=8",),
    "smk, k = 24": ("router.target_k=24",),
}
# Arms that read text of the teacher (`teacher_text.py`) in place of the study's own.
SAMPLED = ("smk, half sampled",)
# Arms that read the text of other projects besides.
MORE_TEXT = ("smk, more text", "smk, together, more text", "half-width, more text")
