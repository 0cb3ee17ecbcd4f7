r"""Write the embedded corpus and one project's manual as a study's text.

    pip download --no-deps --no-binary :all: django==5.2.19 && tar -xzf django-5.2.19.tar.gz
    python -m experiments.manual_text --manual django-5.2.19/docs --out manual
    python -m experiments.arms --text manual --tokens 1998848 --seeds 0 1 2 --device cuda --jobs 2 \
        --arms "smk, muon, features x 16" --set data.eval_tokens=65536 \
        --set data.settling_tokens=65536 --report-tokens 122880 --out runs/manual

The folder gets embedded.jsonl, which depends on the version of Python, and manual.jsonl. Documents
are those that `tiny-onn distill` reads from the same sources.
"""

import argparse
import sys
from pathlib import Path

from experiments.options import mistakes_told
from experiments.split_text import write_documents
from tiny_onn.cli.arguments import require_place
from tiny_onn.data.sources import read_documents
from tiny_onn.errors import UserError


def main(argv: list[str]) -> None:
    """Write both files."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--manual", type=Path, required=True, help="folder of the manual")
    options.add_argument("--out", type=Path, required=True, help="folder of the text")
    arguments = options.parse_args(argv)
    require_place(arguments.out, "--out")
    if not arguments.manual.is_dir():
        raise UserError(
            f"--manual: got {arguments.manual}, expected the folder of a manual's text; see --help"
        )
    for name, source in (("manual", str(arguments.manual)), ("embedded", "embedded")):
        texts = [document.text for document in read_documents(source, "text")]
        path = arguments.out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_documents(path, texts)
        print(f"{path}: {len(texts):,} documents")


if __name__ == "__main__":
    with mistakes_told():
        main(sys.argv[1:])
