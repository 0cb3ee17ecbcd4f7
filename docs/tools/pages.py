"""Put generated text between the markers of pages that people write."""

from collections.abc import Mapping


def filled(text: str, contents: Mapping[str, str], begin: str, end: str) -> str:
    """Return the page with each content between its markers; one without markers is left out.

    Args:
        text: The page.
        contents: The contents by name, each in whole lines.
        begin: The line before a content, with `{name}` in it.
        end: The text after a content, which may have `{name}` in it too.
    """
    for name, content in contents.items():
        head, found, rest = text.partition(begin.format(name=name) + "\n")
        if found:
            _, closed, tail = rest.partition(end.format(name=name))
            assert closed, f"{name}: no {end.format(name=name)}"
            text = f"{head}{found}{content}{closed}{tail}"
    return text


def no_record(command: str) -> str:
    """Return what a place says until a record lies beside it: the command that makes one."""
    return f"No record lies here yet; `{command}` makes it.\n"
