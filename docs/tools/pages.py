"""Generated text in pages that people write: the part between two markers is replaced."""

from collections.abc import Mapping


def filled(text: str, contents: Mapping[str, str], begin: str, end: str) -> str:
    """The page with each content between its markers; a content without markers is left out.

    Args:
        text: the page.
        contents: by name, whole lines.
        begin: the line before a content, `{name}` in it.
        end: what follows, likewise.
    """
    for name, content in contents.items():
        head, found, rest = text.partition(begin.format(name=name) + "\n")
        if found:
            _, closed, tail = rest.partition(end.format(name=name))
            assert closed, f"{name}: no {end.format(name=name)}"
            text = f"{head}{found}{content}{closed}{tail}"
    return text
