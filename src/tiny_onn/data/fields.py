"""The text of a data set's row, which is one field or a chat in one of its common forms.

A row without the field of text may hold a chat, as a list of messages (`messages`, `conversations`)
or as a pair of question and answer (`PAIRS`). Every chat becomes a list of messages in JSON, which
the tokenizer's chat template renders to text (`tokens.py`).
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from tiny_onn.errors import UserError

CHATS = ("messages", "conversations")
"""Fields that hold a list of messages, `{"role", "content"}` or `{"from", "value"}`."""
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
)
"""Pairs of fields that hold a user's question and the assistant's answer."""
_ASKED_WITH = ("input", "context")
_SYSTEM = "system"
_ROLES = MappingProxyType(
    {name: name for name in ("system", "developer", "user", "assistant", "tool")}
    | {"human": "user", "gpt": "assistant"}
)


class Chat(str):
    """A chat as a JSON list of `{"role", "content"}` objects, both of them strings."""

    __slots__ = ()


def bad_source(where: object, problem: str) -> UserError:
    """Return the error for a source of text."""
    return UserError(f"data.sources: {where}: {problem}")


def fields_read(names: Iterable[str], text_field: str, where: object) -> list[str]:
    """Return the fields that make a row's text, which are the field of text or those of a chat.

    Args:
        names: the row's fields.
        text_field: the field that holds the text, if the row has it.
        where: the row or file, for the error.

    Raises:
        UserError: the row has neither the field nor a chat.
    """
    names = list(names)
    if text_field in names and text_field not in CHATS:
        return [text_field]
    for name in CHATS if text_field not in names else (text_field,):
        if name in names:
            return [name, *(other for other in (_SYSTEM,) if other in names)]
    for pair in PAIRS:
        if set(pair) <= set(names):
            return [*pair, *(other for other in (*_ASKED_WITH, _SYSTEM) if other in names)]
    shown = ", ".join(str(name)[:40] for name in itertools.islice(names, 20)) or "none"
    raise UserError(
        f"data.text_field: {where}: got {text_field!r}, expected one of: {shown}; correct the"
        f" setting, or the row if other rows have {text_field!r}"
    )


def row_text(row: Mapping[str, Any], text_field: str, where: object) -> str:
    """Return the row's text, or its chat as a `Chat`; null and a chat without a word are blank.

    Raises:
        UserError: the field is missing or holds no text, or the chat is ill-formed.
    """
    name, *others = fields_read(row, text_field, where)
    value = row[name]
    if name == text_field and (value is None or isinstance(value, str)):
        return value or ""
    if name == text_field and not isinstance(value, list):
        raise UserError(
            f"data.text_field: {where}: {name!r} holds {type(value).__name__}, expected text;"
            " name another field"
        )
    if name in CHATS or name == text_field:
        messages = _messages(value, where, name)
    else:
        messages = _pair(row, name, others[0], where)
    system = _part(row, _SYSTEM, where) if _SYSTEM in others else ""
    if system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    if not any(message["content"].strip() for message in messages):
        return ""
    return Chat(json.dumps(messages, ensure_ascii=False))


def _messages(value: Any, where: object, name: str) -> list[dict[str, str]]:  # noqa: ANN401
    """Return the messages of a list in either form; null has none."""
    if not isinstance(value, list | None):
        raise bad_source(
            where,
            f"{name!r} holds {type(value).__name__}, expected a list of messages with role and"
            f" content; mend it, or set data.text_field = {name!r} if it is text",
        )
    return [
        _message(item, f"{where}: message {number} of {name!r}")
        for number, item in enumerate(value or (), start=1)
    ]


def _message(item: Any, where: str) -> dict[str, str]:  # noqa: ANN401
    """Return one message as role and content; keys that hold null are left out."""
    form = "expected an object with role and content, or from and value, and no more; mend it"
    if not isinstance(item, dict):
        raise bad_source(where, f"got {type(item).__name__}, {form}")
    given = {key: value for key, value in item.items() if value is not None}
    own_names = given.keys() & {"from", "value"}
    role_key, content_key = ("from", "value") if own_names else ("role", "content")
    if missing := sorted({role_key, content_key} - given.keys()):
        raise bad_source(where, f"got no {' and no '.join(missing)}, {form}")
    if unknown := sorted(str(key)[:40] for key in given.keys() - {role_key, content_key}):
        raise bad_source(where, f"got {', '.join(unknown[:20])} too, {form}")
    role = given[role_key]
    if not isinstance(role, str) or role not in _ROLES:
        expected = ", ".join(_ROLES)
        raise bad_source(
            where, f"got {role_key} {str(role)[:40]!r}, expected one of {expected}; mend it"
        )
    return {"role": _ROLES[role], "content": _content(given[content_key], where)}


def _content(value: Any, where: str) -> str:  # noqa: ANN401
    """Return a message's text, which may be given as a list of parts."""
    texts = []
    for part in value if isinstance(value, list) else [value]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise bad_source(
                where, f"got content of type {str(kind)[:40]}, expected text; leave the row out"
            )
        texts.append(text)
    return "".join(texts)


def _pair(row: Mapping[str, Any], asked: str, answered: str, where: object) -> list[dict[str, str]]:
    """Return a question and its answer as messages; both may be lists of messages themselves."""
    both = (row[asked], row[answered])
    if all(isinstance(value, list) for value in both):
        return _messages(both[0], where, asked) + _messages(both[1], where, answered)
    if both == (None, None):
        return []
    for name in (asked, answered):
        if row[name] is None:
            raise bad_source(where, f"{name!r} holds null, expected text; leave the row out")
    question = [_part(row, name, where) for name in (asked, *_ASKED_WITH) if name in row]
    return [
        {"role": "user", "content": "\n\n".join(text for text in question if text.strip())},
        {"role": "assistant", "content": _part(row, answered, where)},
    ]


def _part(row: Mapping[str, Any], name: str, where: object) -> str:
    value = row[name]
    if not isinstance(value, str | None):
        raise bad_source(
            where,
            f"{name!r} holds {type(value).__name__}, expected text; mend it, or render the chat to"
            " text and name its field with data.text_field",
        )
    return value or ""
