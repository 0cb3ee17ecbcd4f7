"""Checks of a model folder before transformers reads it, because it may come from anyone.

The numbers in config.json are bounded, so that none makes transformers build a model for ever.
Weights must be safetensors under plain names in the same folder and hold about as many numbers as
the configuration describes. Only regular files are opened and nothing is unpickled. Unknown
families and damaged tensors are left for transformers to refuse with its own errors.
"""

import codecs
import json
import math
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file, extract_commit_hash

from tiny_onn.config.checks import shown
from tiny_onn.console import DownloadBar, say, track
from tiny_onn.errors import LoadErrors, UserError, printable

# The largest configurations that are published have some 20 KB and 130 layers.
_CONFIG_BYTES = 2**22
_MAX_LAYERS = 1024
_MAX_NUMBER = 2**31
_TRIED_TOKENS = 8
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_INDEX = f"{_WEIGHTS}.index.json"
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# These keys count layers and other modules that transformers builds, such as n_layer,
# encoder_layers, num_layers_per_stack, depth or num_experts. The size of a layer or a number per
# layer (vocab_size_per_layer_input) is not such a count.
_COUNTS = re.compile(
    r"(?!.*(size|topk))(.*_)?(?<!per_)(layers?|depth|blocks)"
    r"|(?!.*(size|heads))(.*_)?(n|num)_(\w+_)?(?<!per_)(layers|blocks|stages|experts|codebooks|quantizers)"
    r"(?!_per_tok).*"
)
_FLOATS = ("F64", "F32", "F16", "BF16")


def check_model_config(source: str, revision: str | None) -> str | None:
    """Check config.json and return the commit of a hub id's configuration, None for a folder.

    Args:
        source: a folder or a hub id.
        revision: the revision of a hub id; None for a folder.

    Raises:
        UserError: config.json is missing, no configuration, or cannot be that of a dense model.
        OSError: the hub has no such file, or there is no network.
    """
    if revision is None:
        check_regular_files(Path(source))
    file = cached_file(source, _CONFIG, revision=revision)
    if file is None:
        raise UserError(f"there is no {_CONFIG} in it, expected a model's folder; check the path")
    check_config_table(read_object(Path(file)), _CONFIG)
    return extract_commit_hash(file, None)


def check_regular_files(folder: Path) -> None:
    """Refuse a folder that holds a file which transformers must not or cannot read.

    Such a file is a pipe or a device, which could block for ever, an adapter's configuration, or a
    JSON file that begins with a byte order mark, which transformers does not read.

    Raises:
        UserError: the folder holds such a file.
    """
    for entry in sorted(folder.iterdir()):
        # A link may point nowhere; transformers reports that if it needs the file.
        mode = entry.stat().st_mode if entry.exists() else stat.S_IFREG
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(f"{entry.name} is a pipe or a device, expected a regular file")
        if entry.name == "adapter_config.json":
            raise UserError(f"{entry.name} makes it an adapter; merge it into its base model")
        if entry.suffix == ".json" and entry.is_file() and _has_mark(entry):
            raise UserError(
                f"{entry.name} begins with a byte order mark, expected plain UTF-8; save it without"
                " the mark"
            )


def _has_mark(file: Path) -> bool:
    with file.open("rb") as content:
        return content.read(3).startswith(_MARKS)


def read_object(file: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        UserError: the file is too long, not UTF-8, not JSON, or holds no object.
    """
    if file.stat().st_size > _CONFIG_BYTES:
        raise UserError(f"{file.name} is longer than {_CONFIG_BYTES // 2**20} MiB")
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = printable(" ".join(str(error).split()))[:120]
        raise UserError(f"{file.name} is not JSON ({reason})") from error
    if not isinstance(table, dict):
        raise UserError(f"{file.name} holds a {type(table).__name__}, expected an object")
    return table


def check_config_table(table: dict[str, Any], where: str) -> None:
    """Refuse a configuration that names other files, is quantised, or holds absurd numbers.

    Args:
        table: the configuration.
        where: the name of its file, for messages.

    Raises:
        UserError: the configuration has such an entry; the first is named.
    """
    if "transformers_weights" in table:
        raise UserError(f"{where} names its own weights file; rename that to {_WEIGHTS}")
    if table.get("quantization_config"):
        raise UserError(
            f"{where} says that its weights are quantised; name the original model, and quantise "
            "with teacher.quantization"
        )
    waiting: list[tuple[str, object]] = [("", table)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(key), item) for key, item in value.items()]
        elif isinstance(value, list):
            waiting += [(name, item) for item in value]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            many = isinstance(value, int) and _COUNTS.fullmatch(name)
            limit = _MAX_LAYERS if many else _MAX_NUMBER
            # Factors may be larger than any count, but no setting is infinite.
            if not math.isfinite(value) if isinstance(value, float) else abs(value) > limit:
                raise UserError(
                    f"{where} has {printable(name)[:60]} = {shown(value)}, expected at most {limit}"
                )


def check_weights(source: str, revision: str | None, skeleton: PreTrainedModel) -> None:
    """Refuse weights that are not safetensors of about the size of the model to fill.

    Args:
        source: a folder or a hub id, whose weights are downloaded by this call.
        revision: the revision of a hub id; None for a folder.
        skeleton: the model on the meta device.

    Raises:
        UserError: names, number formats or sizes are wrong.
        OSError: there are no safetensors.
    """
    stored = 0
    for file in _weight_files(source, revision):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dictionary
                part = tensors.get_slice(name)
                if name.endswith("weight") and part.get_dtype() not in _FLOATS:
                    raise UserError(
                        f"{file.name} holds {printable(name)[:80]} as {part.get_dtype()}, expected"
                        f" one of {', '.join(_FLOATS)}; name the model before quantisation"
                    )
                stored += math.prod(part.get_shape())
    needed = sum(parameter.numel() for parameter in skeleton.parameters())
    if needed > 2 * stored:
        raise UserError(
            f"{_CONFIG} describes a model of {needed:,} parameters, but the weights have {stored:,}"
        )


def _weight_files(source: str, revision: str | None) -> Iterator[Path]:
    optional: dict[str, Any] = {
        "revision": revision,
        "_raise_exceptions_for_missing_entries": False,
        "tqdm_class": DownloadBar,
    }
    whole = cached_file(source, _WEIGHTS, **optional)
    if whole is not None:
        if (Path(source) / _INDEX).exists():
            say(f"{source} holds {_WEIGHTS} and {_INDEX}; {_WEIGHTS} is read, the shards are not")
        yield Path(whole)
        return
    index = cached_file(source, _INDEX, **optional)
    if index is None:
        raise OSError(f"no {_WEIGHTS}; other formats are not read, they can run code")
    names = read_object(Path(index)).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UserError(f"{_INDEX} has no weight_map, expected tensor names with their files")
    for name in names.values():
        # Any other name could make the folder have files outside it read.
        if not isinstance(name, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UserError(
                f"{_INDEX} names the file {printable(repr(name))[:80]}, expected the plain name of"
                " a .safetensors file beside it"
            )
    for name in sorted(set(names.values())):
        file = cached_file(source, name, revision=revision, tqdm_class=DownloadBar)
        assert file is not None
        yield Path(file)


@torch.no_grad()
def check_loaded(model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model some of whose tensors were missing, left over, or are not finite.

    Args:
        model: the loaded model.
        loading: the loading info of transformers' `from_pretrained`.

    Raises:
        UserError: the model has such a tensor; the first is named.
    """
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"its weights lack {len(missing)} of the model's tensors ({missing[0]} first), "
            "expected all; download it again"
        )
    # Tensors outside the decoder belong to other models, such as a vision tower, and are not read.
    prefix = f"{model.base_model_prefix}."
    if extra := sorted(name for name in loading["unexpected_keys"] if name.startswith(prefix)):
        raise UserError(
            f"its weights hold {len(extra)} tensors that its config.json has no place for "
            f"({printable(extra[0])[:80]} first); restore the config.json that belongs to them"
        )
    for name, tensor in track(model.state_dict().items(), "Checking weights"):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(
                f"its tensor {name} holds NaN or infinite numbers in {tensor.dtype}, expected "
                'finite ones; download it again, or use teacher.dtype = "float32"'
            )


@torch.no_grad()
def check_runs(model: PreTrainedModel) -> None:
    """Refuse a model that does not run on a few tokens, or whose logits are not finite.

    Raises:
        UserError: weights and configuration do not belong together, or are damaged.
    """
    vocab_size = model.config.get_text_config().vocab_size
    input_ids = torch.arange(min(_TRIED_TOKENS, vocab_size), device=model.device)[None]
    remedy = "restore its config.json and weights"
    with LoadErrors(
        lambda reason: f"it does not run on {_TRIED_TOKENS} tokens ({reason}); {remedy}"
    ):
        logits = model(input_ids=input_ids, use_cache=False).logits
        finite = bool(torch.isfinite(logits).all())
    if not finite:
        raise UserError(
            "its logits hold NaN or infinite numbers, expected finite ones; "
            f'{remedy}, or use teacher.dtype = "float32"'
        )
