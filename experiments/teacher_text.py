"""Write text that a teacher samples, beside as much of the corpus, for an arm of `arms.py`.

    python -m experiments.teacher_text --text runs/arms/text-1234abcd/learn --tokens 2000000 \
        --device cuda --out runs/sampled
    python -m experiments.arms --text docs.jsonl.xz --sampled runs/sampled \
        --arms "smk, half sampled" --device cuda --out runs/arms

`--text` is what `arms.py` made to learn from, so that nothing that it reports on is read. The
folder OUT gets sampled.jsonl, where each document is the start of one of the corpus and what the
teacher goes on with at temperature 1, and corpus.jsonl, other documents with as many tokens.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from experiments.blockwise import tiny_teacher
from experiments.options import mistakes_told, parser
from experiments.split_text import documents_of, tiny_text
from tiny_onn.config.schema import TeacherConfig
from tiny_onn.console import track
from tiny_onn.device import pick_device
from tiny_onn.teacher.load import load_dense


@torch.inference_mode()
def continued(
    model: PreTrainedModel, prompts_BT: Tensor, num_new: int, generator: torch.Generator
) -> Tensor:
    """The prompts with `num_new` tokens more that the model samples at temperature 1, (B, T')."""
    cache, tokens_BT, last_BT = DynamicCache(config=model.config), prompts_BT, prompts_BT
    for _ in range(num_new):
        output = model(last_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        p_BV = output.logits[:, -1].float().softmax(-1)
        last_BT = torch.multinomial(p_BV, 1, generator=generator)
        tokens_BT = torch.cat([tokens_BT, last_BT], 1)
    return tokens_BT


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    starts: Sequence[list[int]],
    arguments: argparse.Namespace,
) -> Iterator[list[int]]:
    """The tokens of a document for each start, up to the token that ends it."""
    generator = torch.Generator(model.device).manual_seed(arguments.seed)
    num_new = arguments.document_tokens - arguments.start_tokens
    batches = torch.tensor(starts, device=model.device).split(arguments.batch)
    for prompts_BT in track(batches, "sampling, batches"):
        tokens_BT = continued(model, prompts_BT, num_new, generator)
        for tokens in tokens_BT.tolist():
            new = tokens[arguments.start_tokens :]
            if tokenizer.eos_token_id in new:
                new = new[: new.index(tokenizer.eos_token_id)]
            yield [*tokens[: arguments.start_tokens], *new]


def main() -> int:
    """Write both files."""
    options = parser(__doc__)
    options.add_argument("--text", type=Path, help="a folder of .jsonl files to learn from")
    options.add_argument("--teacher", default="embedded", help="a folder; default: the embedded")
    options.add_argument("--tokens", type=int, default=2_000_000, help="of each file, about")
    options.add_argument("--start-tokens", type=int, default=64, help="that the corpus gives")
    options.add_argument("--document-tokens", type=int, default=1024, help="of a document, at most")
    options.add_argument("--batch", type=int, default=512, help="documents at once")
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if arguments.smoke:
            (folder := Path(temporary) / "text").mkdir()
            arguments.text, arguments.out = tiny_text(folder).parent, Path(temporary)
            arguments.teacher = str(tiny_teacher(Path(temporary) / "teacher"))
            arguments.tokens, arguments.start_tokens, arguments.document_tokens = 256, 4, 16
        if arguments.text is None or arguments.out is None:
            options.error("--text and --out are needed, except with --smoke")
        write(arguments)
    return 0


def write(arguments: argparse.Namespace) -> None:
    """Sample and write, as the options say."""
    teacher = TeacherConfig(path=arguments.teacher)
    model, tokenizer = load_dense(teacher, pick_device(arguments.device))
    model.set_attn_implementation("sdpa")  # The attention of packed rows has no cache.
    texts = [document["text"] for document in documents_of(arguments.text)]
    random.Random(arguments.seed).shuffle(texts)
    starts: list[list[int]] = []
    wanted = arguments.tokens // arguments.document_tokens
    while len(starts) < wanted and texts:
        tokens = tokenizer(texts.pop(), add_special_tokens=False)["input_ids"]
        if len(tokens) >= arguments.start_tokens:
            starts.append(tokens[: arguments.start_tokens])
    documents = [*sampled(model, tokenizer, starts, arguments)]
    total, beside = sum(map(len, documents)), 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / "sampled.jsonl").open("w", encoding="utf-8") as file:
        for tokens in documents:
            file.write(json.dumps({"text": tokenizer.decode(tokens)}) + "\n")
    with (arguments.out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        while texts and beside < total:
            text = texts.pop()
            beside += len(tokenizer(text, add_special_tokens=False)["input_ids"])
            file.write(json.dumps({"text": text}) + "\n")
    print(f"{arguments.out}: {total:,} tokens sampled, {beside:,} of the corpus")


if __name__ == "__main__":
    with mistakes_told():
        sys.exit(main())
