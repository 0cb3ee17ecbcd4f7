"""Tiny models, rows and settings that the tests share: everything seeded, nothing downloaded."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tiny_onn.config.schema import ExpertsConfig, RouterConfig, RunConfig
from tiny_onn.conversion.convert import convert
from tiny_onn.data.packing import PackedRow, pack
from tiny_onn.model.attention import DOCUMENT_ATTENTION
from tiny_onn.model.expert_path import set_objective
from tiny_onn.model.student import TinyOnnForCausalLM
from tiny_onn.runs.checkpoint import take_snapshot, write_checkpoint

# Fields of a metric record that a clock decides.
TIMES = ("tokens_per_s", "seconds")
VOCAB = 64
WIDTH = 48
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Far from a trained model's 0.02, so that logits differ and routing has something to say.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8, "tie_word_embeddings": False},
    "llama": {"tie_word_embeddings": True},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    },
}
OTHERS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "olmo2": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "residual_multiplier": 0.5},
}


def make_dense(family="llama", *, dtype="float32", seed=0, **changes: Any) -> PreTrainedModel:
    """A dense model of a family with random weights, frozen, reading packed rows."""
    options = {**SIZES, **(FAMILIES | OTHERS).get(family, {}), **changes}
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        # Norms and biases start equal; as trained ones they must not be.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.requires_grad_(False)
    model.set_attn_implementation(DOCUMENT_ATTENTION)
    return model.train(False)


def make_student(
    dense: PreTrainedModel, *, seed=0, neuron_order=None, **changes: Any
) -> TinyOnnForCausalLM:
    """A student of it: 8 experts of neurons in order, 4 active; changed by field name."""
    pinned = {"num_experts": 8, "target_k": 4.0, "init": "slices", "gate_init": "random"}
    options = {**pinned, **changes}

    def of(section: type) -> Any:
        names = {field.name for field in fields(section)}
        return section(**{name: value for name, value in options.items() if name in names})

    return convert(
        dense,
        of(ExpertsConfig),
        of(RouterConfig),
        generator=torch.Generator().manual_seed(seed),
        neuron_order=neuron_order,
    )


def make_ids(num_rows=2, num_tokens=16, seed=0):
    """Random token ids, special ones left out."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (num_rows, num_tokens), generator=generator)


def normal(*shape, seed=0, scale=1.0, dtype=torch.float32) -> torch.Tensor:
    """Normally distributed numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * scale


def make_documents(lengths, seed=0):
    """Random documents of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def make_rows(lengths, row_tokens, seed=0) -> list[PackedRow]:
    """Random documents of these lengths, packed."""
    return list(pack(make_documents(lengths, seed), row_tokens=row_tokens, pad_token_id=0))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of fewer than 320 tokens, trained on one sentence."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_teacher(folder: Path, family="llama", **changes: Any) -> Path:
    """A dense model and its tokenizer in a folder, as a user has them."""
    make_dense(family, vocab_size=320, **changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_corpus(folder: Path, num_files=40, seed=0) -> Path:
    """A folder of small text files whose sentences can be learned."""
    generator = torch.Generator().manual_seed(seed)
    words = [["the", "a"], ["quick", "lazy", "brown"], ["fox", "dog"], ["jumps", "sleeps"]]
    folder.mkdir()
    for number in range(num_files):
        picks = torch.randint(6, (12, 4), generator=generator).tolist()
        sentences = [
            " ".join(w[i % len(w)] for w, i in zip(words, row, strict=True)) for row in picks
        ]
        (folder / f"{number:02d}.txt").write_text(f"{number}. " + ". ".join(sentences) + ".\n")
    return folder


def change(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """The settings with fields of some sections changed."""
    changed = {name: replace(getattr(config, name), **values) for name, values in sections.items()}
    return replace(config, **changed)


# The model card's recipe at a tiny size, whatever the defaults are.
CONFIG = change(
    RunConfig(),
    teacher={"dtype": "float32"},
    experts={
        "num_experts": 8,
        "init": "slices",
        "gate_init": "random",
        "weighting": "unit",
        "calibration_tokens": 128,
    },
    router={
        "selection": "budget",
        "objective": "smk",
        "target_k": 4.0,
        "budget_form": "cumulative",
        "budget_rate": 0.3,
    },
    smk={
        "surprise": "parameters",
        "direction": "min",
        "candidates": "active",
        "targets": "single",
        "coef": 1.0,
    },
    data={"row_tokens": 32, "settling_fraction": 0.0},
    optim={"expert_lr": 3e-3, "gate_lr": 3e-3},
    train={"device": "cpu", "compile": False, "checkpointing": "none"},
)


def start_damaged(
    **loss: Any,
) -> tuple[TinyOnnForCausalLM, PreTrainedModel, list[PackedRow], RunConfig]:
    """A student whose first layer is damaged, its teacher, two rows, and settings of the loss."""
    dense, rows = make_dense(), make_rows([15, 17, 32], 32)
    student = make_student(dense)
    with torch.no_grad():
        student.banks()[0].experts.down_proj.mul_(0.5)
    config = change(CONFIG, loss=loss)
    set_objective(student.banks(), config)
    return student, dense, rows, config


def write_run(folder: Path, *, num_files=40, **sections: dict[str, Any]) -> RunConfig:
    """Settings of a run on a teacher and a corpus that are written to `folder`; some changed."""
    config = change(
        CONFIG,
        teacher={"path": str(save_teacher(folder / "teacher"))},
        data={
            "sources": (str(write_corpus(folder / "corpus", num_files)),),
            "row_tokens": 64,
            "eval_tokens": 128,
            "held_out_fraction": 0.2,
        },
    )
    return change(config, **sections)


def save_checkpoint(folder: Path, step, student, optimizer, state: dict[str, Any]) -> Path:
    """Take a snapshot and write it, at once."""
    return write_checkpoint(folder, take_snapshot(step, student, optimizer, state), keep=2)


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, packed weights and their scales included.

    Tensors that share storage count once.
    """
    storages = {}
    for tensor in _tensors(model):
        storage = tensor.untyped_storage()
        # Tensors without data (meta) all sit at address 0.
        storages[(tensor.device, storage.data_ptr() or id(tensor))] = storage.nbytes()
    return sum(storages.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)
            if state.nested:
                yield from (state.offset, state.state2.absmax, state.state2.code)
