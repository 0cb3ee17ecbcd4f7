"""The verb `export`: a student written for programs other than this one, one module per target."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError

from tiny_onn.console import say, status
from tiny_onn.deploy import to_dense, to_gguf, to_transformers
from tiny_onn.deploy.exporting import ExportError, Job, refuse_what_no_export_has
from tiny_onn.errors import UserError, reason_line
from tiny_onn.publish import publish
from tiny_onn.routing.budgets import set_budget
from tiny_onn.runs.model_card import README, write_export_card, write_model_card
from tiny_onn.runs.students import load_student

# A target's writer fills a folder and returns what the export loses, in one sentence.
WRITERS: MappingProxyType[str, Callable[[Job, Path], str]] = MappingProxyType(
    {
        "transformers": to_transformers.write,
        "vllm": to_transformers.write_for_vllm,
        "gguf": to_gguf.write,
        "dense": to_dense.write,
    }
)
_IN_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)
write = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(write("A list is", max_new_tokens=20)[0]["generated_text"])
```"""
# What a target's README shows: each runs in the export's folder.
EXAMPLES: MappingProxyType[str, str] = MappingProxyType(
    {
        "transformers": _IN_TRANSFORMERS,
        "vllm": "```sh\nvllm serve . --trust-remote-code --model-impl transformers\n```",
        "gguf": '```sh\nllama-completion -m model-Q8_0.gguf -no-cnv -p "A list is" -n 20\n```',
        "dense": _IN_TRANSFORMERS.replace(", trust_remote_code=True", ""),
    }
)


def run_export(
    model: str,
    *,
    to: str,
    out: Path,
    keep: int | None = None,
    fixed_k: bool = False,
    budget: float | None = None,
    text: Path | None = None,
    checkpoint: str = "newest",
    teacher: str | None = None,
) -> str:
    """Write a student for another program into a new folder, and return what that loses.

    The folder appears whole or not at all.

    Args:
        model: a run folder or a student's folder.
        to: a name in `WRITERS`.
        out: the folder to write, which must not exist, or be empty.
        keep: for `dense`, the number of experts that each layer keeps; None: all.
        fixed_k: for `gguf`, whether every token gets the same number of experts.
        budget: the mean number of active experts per token; None: as in training.
        text: a file or folder of text, for what has to be measured; None: the run's own text.
        checkpoint: the choice among a run's students, see `load_student`.
        teacher: the place of the student's teacher, see `load_student`.

    Raises:
        UserError: there is no such student, the target cannot hold it, or the disk refuses.
    """
    check_destination(out)
    loaded = load_student(model, torch.device("cpu"), checkpoint, teacher)
    if budget is not None:
        set_budget(loaded.student, budget)
    job = Job(loaded=loaded, keep=keep, fixed_k=fixed_k, text=text)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True
        ) as temporary:
            folder = Path(temporary) / "export"
            folder.mkdir()
            refuse_what_no_export_has(job)
            readme = Path(model) / README
            if loaded.of_run:
                # A damaged record of the run shows here, before what an export has to measure.
                write_model_card(folder, loaded.config, Path(model), step=loaded.step)
                readme = folder / README
            lost = WRITERS[to](job, folder)
            write_export_card(folder, readme, to=to, example=EXAMPLES[to], lost=lost, budget=budget)
            with status(f"Writing {out}"):
                publish(folder, out)
    except ExportError as error:
        raise UserError(f"--to {to}: {error}") from error
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or f"{reason_line(error)}: is the disk full?"
        raise UserError(
            f"--out: cannot write {out} ({reason}), expected free disk and permission; free some"
            " space or name another folder"
        ) from error
    say(f"{out}: {lost}")
    return lost


def check_destination(out: Path) -> None:
    """Refuse a destination that exists, unless it is an empty folder.

    Raises:
        UserError: something is there.
    """
    try:
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    except OSError as error:
        raise UserError(
            f"--out: got {out}, which cannot be read ({error.strerror}), expected a new folder;"
            " name another one"
        ) from error
    if taken:
        raise UserError(
            f"--out: got {out}, which exists already, expected a new folder; name another one or"
            " remove it"
        )
