"""How much of a text that is measured on stands word for word in text that is learned from?

    python -m experiments.overlap --of runs/arms/text-*/report.jsonl --within runs/arms/text-*/learn

prints the share of the runs of 20 words of one text that the other holds too. Both are read as
`experiments.arms` reads `--text`. Letters and digits count, their case and all else does not.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from experiments.options import mistakes_told
from experiments.split_text import documents_of

WORDS, STEP = 20, 10


def word_runs(text: str, step: int = 1) -> Iterator[int]:
    """Yield a hash of every `step`-th run of `WORDS` words of a text."""
    words = re.findall(r"\w+", text.lower())
    for start in range(0, len(words) - WORDS + 1, step):
        yield hash(tuple(words[start : start + WORDS]))


def overlap(of: Path, within: Path) -> tuple[int, int]:
    """The number of runs of words of a text that another one holds, and of all; every tenth counts.

    Raises:
        UserError: A text cannot be read, or a line is no document.
    """
    asked = {run for document in documents_of(of) for run in word_runs(document["text"], STEP)}
    found: set[int] = set()
    for document in documents_of(within):
        found |= asked.intersection(word_runs(document["text"]))
    return len(found), len(asked)


def main() -> None:
    """Read both texts and print the share."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--of", type=Path, required=True, help="text that is measured on")
    options.add_argument("--within", type=Path, required=True, help="text that is learned from")
    arguments = options.parse_args()
    found, number = overlap(arguments.of, arguments.within)
    print(f"{found:,} of {number:,} runs of {WORDS} words: {found / max(1, number):.2%}")


if __name__ == "__main__":
    with mistakes_told():
        main()
