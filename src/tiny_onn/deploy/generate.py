"""Text from a student or a dense model, streamed to standard output."""

from dataclasses import replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from tiny_onn.config.checks import check_prompt
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.data.tokens import DocumentTokens
from tiny_onn.device import pick_device
from tiny_onn.errors import UserError
from tiny_onn.model.backbone import generation_attention
from tiny_onn.routing.budgets import set_budget
from tiny_onn.runs.recorded_teacher import refuse_for_dense
from tiny_onn.runs.students import is_student, load_student
from tiny_onn.teacher.load import load_dense
from tiny_onn.teacher.model_paths import find_model


def run_generate(
    model: str,
    *,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str = "auto",
    budget: float | None = None,
    checkpoint: str = "newest",
    teacher: str | None = None,
) -> str:
    """Print a prompt and its continuation token by token, and return the whole text.

    Args:
        model: a run folder, a student's folder, `embedded`, a dense model's folder or hub id.
        prompt: the text to continue.
        max_new_tokens: the maximum number of tokens to write.
        temperature: the temperature of the sampling; 0 always takes the most probable token.
        seed: the seed of the sampling.
        device: the device to run on.
        budget: the mean number of active experts per token of a student; None: as in training.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.

    Raises:
        UserError: there is no such model or checkpoint, or the prompt is empty.
    """
    check_prompt(prompt)
    network, tokenizer = _load(model, pick_device(device), budget, checkpoint, teacher)
    # The sampling of transformers takes no generator, so the global seed is set.
    torch.manual_seed(seed)
    sampling = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    input_ids = torch.tensor([DocumentTokens(tokenizer).prompt(prompt)], device=network.device)
    stop = getattr(network.generation_config, "eos_token_id", None)
    output = network.generate(  # pyright: ignore[reportCallIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=False, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id if stop is None else stop,
        **sampling,
    )
    text = tokenizer.decode(output[0], skip_special_tokens=True)
    assert isinstance(text, str)
    return text


def _load(
    model: str, device: torch.device, budget: float | None, checkpoint: str, teacher: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_student(model):
        loaded = load_student(model, device, checkpoint, teacher)
        if budget is not None:
            set_budget(loaded.student, budget)
        loaded.student.round_experts()
        return loaded.student, loaded.tokenizer
    refuse_for_dense(model, teacher)
    for name, given in (("--budget", budget is not None), ("--checkpoint", checkpoint != "newest")):
        if given:
            raise UserError(
                f"{name}: got {model}, a dense model, expected a student; leave {name} out"
            )
    if model != "embedded":
        find_model(model, "MODEL")
    dense, tokenizer = load_dense(replace(TeacherConfig(), path=model), device)
    # Generation keeps a cache, which the attention for packed rows of training does not handle.
    dense.set_attn_implementation(generation_attention(dense))
    return dense, tokenizer
