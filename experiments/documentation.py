r"""Build a text of many projects from Debian's documentation packages: one file for each package.

Figures that shall mean something beyond one project's manual are measured on this text. The
packages are those of Debian 12; a version that the mirrors no longer carry is at
https://snapshot.debian.org. Their own licences apply (GFDL, GPL, PSF, MIT and others).

    python -m experiments.documentation --debs debs --out documentation

downloads the packages that `debs` lacks by `apt-get download`, unpacks them by `dpkg-deb`, and
writes `documentation/PACKAGE.jsonl`: documents of at most 40,000 characters, in which a paragraph
that occurs twice, in any package, is kept once. The same packages give the same text.

    python -m experiments.documentation --packages experiments/more_packages.json \
        --without documentation --debs debs --out more

does so with the packages of a JSON object of names and versions, and leaves out every paragraph of
another text (`--without`), so that nothing of it is learned from what is written.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path

from experiments.options import mistakes_told
from experiments.split_text import documents_of, write_documents
from tiny_onn.errors import UserError, reason_of

PACKAGES = {
    "apache2-doc": "2.4.68-1~deb12u1",
    "cmake-doc": "3.25.1-1",
    "debian-handbook": "11.20220922",
    "debian-reference-en": "2.100",
    "developers-reference": "12.18",
    "fortunes": "1:1.99.1-7.3",
    "gimp-help-en": "2.10.34-2",
    "git-doc": "1:2.39.5-0+deb12u3",
    "gnuplot-doc": "5.4.4+dfsg1-2",
    "libreoffice-help-en-us": "4:7.4.7-1+deb12u14",
    "llvm-19-doc": "1:19.1.7-3~deb12u1",
    "maxima-doc": "5.46.0-11",
    "octave-doc": "7.3.0-2",
    "postgresql-doc-15": "15.18-0+deb12u1",
    "python-django-doc": "3:3.2.25-0+deb12u3",
    "python-sympy-doc": "1.11.1-1",
    "python3.11-doc": "3.11.2-6+deb12u8",
    "rust-doc": "1.63.0+dfsg1-2",
    "vim-doc": "2:9.0.1378-2+deb12u2",
}
DOCUMENT_CHARS, LEAST_CHARS, LEAST_PARAGRAPH = 40_000, 400, 40
# Some manuals are larger than all others together.
PACKAGE_CHARS = 7_500_000
BREAKS = frozenset(
    ["p", "div", "li", "br", "h1", "h2", "h3", "h4", "tr", "pre", "dt", "dd", "section"]
)
HIDDEN = frozenset(["script", "style", "nav", "head", "svg", "footer"])
NO_TEXT = re.compile(r"copyright|changelog|genindex|search|/_static", re.IGNORECASE)
# Translations beside the English text, in names of files and of folders.
LANGUAGES = "de|fr|es|it|ja|ko|pt|pt[-_]br|zh[-_](?:cn|tw)|ru|tr|sp_sp|it_it|ja_jp|ko_kr"
TRANSLATED = re.compile(rf"\.(?:{LANGUAGES})(?:\.|$)|/(?:{LANGUAGES})/", re.IGNORECASE)


class PageText(HTMLParser):
    """The text of an HTML page, without navigation and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a hidden element or a line."""
        del attrs
        self._hidden += tag in HIDDEN
        if tag in BREAKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End a hidden element."""
        self._hidden = max(0, self._hidden - (tag in HIDDEN))

    def handle_data(self, data: str) -> None:
        """Keep what is shown."""
        if not self._hidden:
            self.parts.append(data)


def page_text(html: str) -> str:
    """The text of an HTML page, with a blank line between paragraphs."""
    page = PageText()
    page.feed(html)
    text = re.sub(r"[ \t]+", " ", "".join(page.parts))
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def file_text(path: Path) -> str:
    """The text of a documentation file; nothing of a file of another kind."""
    raw, name = path.read_bytes(), path.name.lower()
    if name.endswith(".gz"):
        raw, name = gzip.decompress(raw), name.removesuffix(".gz")
    text = raw.decode("utf-8", "ignore")
    if re.search(r"\.x?html?(\.en)?$", name):
        return page_text(text)
    plain = name.endswith((".txt", ".rst", ".md"))
    fortune = "/fortunes/" in str(path) and not name.endswith((".dat", ".u8"))
    return text if plain or fortune else ""


def paragraphs(text: str) -> Iterator[tuple[str, bytes]]:
    """Yield the paragraphs of a text, each with its hash."""
    for paragraph in map(str.strip, re.split(r"\n\s*\n", text)):
        yield paragraph, hashlib.sha256(paragraph.encode()).digest()


def documents(folder: Path, seen: set[bytes]) -> Iterator[str]:
    """Yield the documents below a folder, without paragraphs that were seen before.

    Args:
        folder: an unpacked package.
        seen: hashes of the paragraphs so far, to which the new ones are added.
    """
    size = 0
    for path in sorted(folder.rglob("*")):
        place = f"/{path.relative_to(folder)}"
        if path.is_symlink() or not path.is_file():
            continue
        if NO_TEXT.search(place) or TRANSLATED.search(place):
            continue
        kept: list[str] = []
        for paragraph, digest in paragraphs(file_text(path)):
            if len(paragraph) >= LEAST_PARAGRAPH and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
            elif kept and 0 < len(paragraph) < LEAST_PARAGRAPH:
                # A heading belongs to what follows text of its own.
                kept.append(paragraph)
        text = "\n\n".join(kept)
        words = sum(char.isalpha() or char == " " for char in text)
        if words < 0.7 * len(text):
            continue
        for start in range(0, len(text), DOCUMENT_CHARS):
            if size < PACKAGE_CHARS and len(text) - start >= LEAST_CHARS:
                size += len(part := text[start : start + DOCUMENT_CHARS])
                yield part


def download(debs: Path, packages: Mapping[str, str]) -> None:
    """Download the packages that are not there, and refuse to go on without one."""
    debs.mkdir(parents=True, exist_ok=True)
    for name, version in packages.items():
        if any(debs.glob(f"{name}_*.deb")):
            continue
        done = subprocess.run(["apt-get", "download", f"{name}={version}"], cwd=debs, check=False)
        if done.returncode:
            sys.exit(f"{name}={version}: apt-get cannot download it; see snapshot.debian.org")


def listed_packages(path: Path | None) -> dict[str, str]:
    """The names and versions in a JSON file, or those of the study's text without one.

    Raises:
        UserError: The file cannot be read, or is no object of strings.
    """
    if path is None:
        return PACKAGES
    expected = "expected a JSON object of package names and versions; correct it"
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--packages: {path}: got {reason_of(error)}; {expected}") from error
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UserError(f"--packages: {path}: got other JSON, {expected}")
    return found


def hashes_of(path: Path) -> set[bytes]:
    """The hashes of the paragraphs of a text, as `documents_of` reads it."""
    texts = (document["text"] for document in documents_of(path))
    return {digest for text in texts for _, digest in paragraphs(text)}


def main() -> None:
    """Download, unpack and write."""
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--debs", type=Path, required=True, help="folder of the packages")
    options.add_argument("--out", type=Path, required=True, help="folder of the text")
    options.add_argument("--packages", type=Path, help="JSON object of names and versions")
    options.add_argument("--without", type=Path, help="text whose paragraphs are left out")
    arguments = options.parse_args()
    packages = listed_packages(arguments.packages)
    seen = hashes_of(arguments.without) if arguments.without else set[bytes]()
    download(arguments.debs, packages)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in packages:
        package = next(iter(sorted(arguments.debs.glob(f"{name}_*.deb"))))
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["dpkg-deb", "--extract", package, temporary], check=True)
            texts = list(documents(Path(temporary), seen))
        write_documents(arguments.out / f"{name}.jsonl", texts)
        print(f"{name}: {len(texts):,} documents, {sum(map(len, texts)):,} characters", flush=True)


if __name__ == "__main__":
    with mistakes_told():
        main()
