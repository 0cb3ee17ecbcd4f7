"""The embedded text, a corpus that needs no network because every Python carries it.

The text is the language reference (`pydoc_data.topics`) and the standard library. Each library file
is one document, either its docstrings (prose) or its source (code), cut at `_FILE_CHARS`. That
makes some 500 documents, about 2 MB, half of it prose. Documents share no text, so that a split by
document leaks nothing. The text depends on the Python version only.
"""

import ast
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path

from tiny_onn.data.documents import Document, split_text
from tiny_onn.errors import UserError

_FILE_CHARS = 8_000
_PARSED_CHARS = 60_000
_MIN_CHARS = 200
_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "idlelib", "lib2to3"}
    | {"turtledemo", "encodings", "pydoc_data", "__pycache__", "__phello__"}
)


def embedded_documents() -> Iterator[Document]:
    """Yield the reference topics, then docstrings and sources of the standard library.

    Raises:
        UserError: this Python came without its library's sources.
    """
    for index, (name, text) in enumerate(_topics()):
        yield Document(text, f"embedded:topic:{name}", index)
    library = Path(sysconfig.get_path("stdlib"))
    num_files = 0
    for path in sorted(_library_files(library)):
        name = path.relative_to(library).as_posix()
        text = path.read_text(encoding="utf-8", errors="replace")
        # Parsing takes most of the time, 1 s per 4 MB, and the largest files 40 % of that; they
        # serve as code, which needs no parsing.
        is_code = len(text) > _PARSED_CHARS or hashlib.sha256(name.encode()).digest()[0] % 4 == 0
        text = next(split_text(text if is_code else _docstrings(text), _FILE_CHARS), "")
        if len(text) >= _MIN_CHARS:
            yield Document(text, f"embedded:{'code' if is_code else 'prose'}:{name}", 0)
            num_files += 1
    if num_files == 0:
        raise UserError(
            f"data.sources: embedded: no Python sources in {library}, expected the standard"
            " library; name files instead"
        )


def _topics() -> Iterator[tuple[str, str]]:
    """Yield reference topics; a paragraph that several of them quote stays in the shortest one."""
    from pydoc_data.topics import topics  # noqa: PLC0415 (0.5 MB, needed here only)

    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        new = [paragraph for paragraph in topics[name].split("\n\n") if paragraph not in seen]
        seen.update(new)
        text = "\n\n".join(new)
        if len(text) >= _MIN_CHARS:
            yield name, text


def _library_files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            if path.name not in _SKIPPED_FOLDERS and not path.is_symlink():
                yield from _library_files(path)
        # _sysconfigdata names folders of the machine on which Python was built.
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _docstrings(source: str) -> str:
    """Return all docstrings of a source in order, dedented, with a blank line between them."""
    with warnings.catch_warnings():
        # Invalid escapes in old library files are not the user's concern.
        warnings.simplefilter("ignore")
        tree = ast.parse(source)
    found: list[str] = []

    def visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        docstring = ast.get_docstring(node)
        if docstring:
            found.append(textwrap.dedent(docstring))
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child)

    visit(tree)
    return "\n\n".join(found)
