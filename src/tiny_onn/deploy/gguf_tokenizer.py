"""A fast byte-level BPE tokenizer as the fields of a GGUF file."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase

from tiny_onn.deploy.exporting import ExportError

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp splits text before BPE by a rule of its own for each of these names (llama-vocab.cpp);
# the keys are the same rules as tokenizer.json writes them.
PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = MappingProxyType(
    {
        ("ByteLevel",): "gpt-2",
        ("Digits", "ByteLevel"): "smollm",
        (_WORDS.format(digits=""), "bytes"): "qwen2",
        (_WORDS.format(digits="{1,3}"), "bytes"): "llama-bpe",
    }
)


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    """Write a tokenizer's fields.

    Args:
        writer: the file's writer.
        tokenizer: the tokenizer.
        size: number of rows of the embeddings; ids without a token become unused ones.

    Raises:
        ExportError: it is no byte-level BPE, or llama.cpp has no rule that splits text like it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    table = {} if backend is None else json.loads(backend.to_str())
    model: Mapping[str, Any] = table.get("model") or {}
    name = PRE_TOKENIZERS.get(_rule(table.get("pre_tokenizer")))
    if model.get("type") != "BPE" or model.get("byte_fallback") or name is None:
        raise ExportError(
            f"got a tokenizer of the kind {model.get('type', type(tokenizer).__name__)} whose"
            " splitting of text llama.cpp has no name for, expected a byte-level BPE that splits"
            f" as {', '.join(PRE_TOKENIZERS.values())}; export it with --to transformers"
        )
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [TokenType.UNUSED] * size
    for token, index in model["vocab"].items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for added in table.get("added_tokens") or ():
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_token_merges(merges)
    for kind in ("bos", "eos", "unk", "pad"):
        token_id = getattr(tokenizer, f"{kind}_token_id")
        if isinstance(token_id, int):
            getattr(writer, f"add_{kind}_token_id")(token_id)
    first = tokenizer("a")["input_ids"][:1]
    writer.add_add_bos_token(first == [tokenizer.bos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _rule(pre_tokenizer: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Return the steps of a pre-tokenizer in the form of the keys of `PRE_TOKENIZERS`."""
    if pre_tokenizer is None:
        return ()
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    rule = []
    for step in steps:
        kind = step["type"]
        if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            rule.append(str(step["pattern"].get("Regex")))
        elif kind == "ByteLevel" and not step["add_prefix_space"]:
            rule.append("ByteLevel" if step["use_regex"] else "bytes")
        elif kind == "Digits" and step["individual_digits"]:
            rule.append(kind)
        else:
            rule.append(f"another {kind}")
    return tuple(rule)
