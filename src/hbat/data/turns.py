"""What is wrong with the turns of a conversation, given as messages or written out as "Human: ... Assistant: ..."."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hbat.config.fields import nearest

Turn = Mapping[str, Any]


#: One fault of a turn: its index, the part of the turn, the kind of fault, and the problem in words.
TurnFault = tuple[int, str, str, str]


ROLES = ("system", "developer", "user", "assistant", "tool")


_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "function": "tool"}


_ROLE_OF = {"Human": "user", "User": "user", "Assistant": "assistant"}


_MARKERS = ("Human:", "Assistant:", "User:")


# `User:` alone on a line is a key of YAML, so a turn of the user needs words behind it.
_LEADING = re.compile(r"\s*(?:Human:|Assistant:|User:(?=[ \t]*\S))")


_GLUED = re.compile(r"(?<=\S)[ \t]{2,}(?:Human|Assistant|User):")


_OWN_LINE = re.compile(r"^(?:Human:|Assistant:|User:(?=[ \t]*\S))", re.MULTILINE)


def turn_faults(
    turns: Sequence[Any],
    *,
    first: Sequence[str] = (),
    last: Sequence[str] = (),
    keys: tuple[str, str] = ("role", "content"),
) -> Iterator[TurnFault]:
    """Check a conversation turn by turn.

    Args:
        turns: The messages.
        first: The roles that may begin it; none given: any.
        last: The roles that may end it; none given: any.
        keys: What a message calls its role and its content.

    Yields:
        The faults in order.
    """
    role_key, content_key = keys
    before = None
    for index, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            yield index, "", "not a message", f"{turn!r:.60} is not a message with `{role_key}` and `{content_key}`"
            return
        role = turn.get(role_key)
        yield from _role_faults(index, turn, role_key)
        if role == before and role in ("user", "assistant"):
            yield index, role_key, "repeated role", f"two turns of the {role} stand in a row"
        if role == "tool" and turn.get(content_key) is None:
            yield index, content_key, "message without content", f"the message has no `{content_key}`; give it a text"
        elif role not in (None, "tool"):  # a tool may have nothing to say
            yield from _content_faults(index, turn, str(role), content_key)
        before = role
    yield from _end_faults(turns, first, last, role_key)


def _role_faults(index: int, turn: Turn, key: str) -> Iterator[TurnFault]:
    role = turn.get(key)
    if role is None:
        also = " (it has `from`: rename that to `role`, and `value` to `content`)" if turn.get("from") else ""
        yield index, key, "message without role", f"the message has no `{key}`{also}"
    elif role not in ROLES:
        known = _FOREIGN_ROLES.get(str(role).lower())
        hint = f" Did you mean `{known}`?" if known else nearest(str(role).lower(), ROLES)
        yield index, key, "unknown role", f"the role {role!r} is none of {', '.join(ROLES)}{hint and '.'}{hint}"


def _content_faults(index: int, turn: Turn, role: str, key: str) -> Iterator[TurnFault]:
    content = turn.get(key)
    if not content and role == "assistant" and (turn.get("tool_calls") or turn.get("function_call")):
        return
    if content is None:
        yield index, key, "message without content", f"the message has no `{key}`"
    elif isinstance(content, str):
        yield from _text_faults(index, content, role, key)
    elif not isinstance(content, list | tuple) or not all(isinstance(part, Mapping) for part in content):
        yield index, key, "not text", f"{content!r:.60} is neither text nor a list of parts"
    elif all(part.get("type") == "text" and not str(part.get("text") or "").strip() for part in content):
        yield index, key, "empty turn", "the text is empty"


def _text_faults(index: int, text: str, role: str, key: str) -> Iterator[TurnFault]:
    if not text.strip():
        yield index, key, "empty turn", "the text is empty"
    elif marker := turn_marker(text, role):
        yield index, key, "role marker", marker


def _end_faults(turns: Sequence[Turn], first: Sequence[str], last: Sequence[str], key: str) -> Iterator[TurnFault]:
    if first and turns[0].get(key) not in first:
        yield (
            0,
            key,
            "wrong first turn",
            f"the first turn is not of the {' or '.join(first)}; the prompt goes elsewhere",
        )
    if last and turns[-1].get(key) not in last:
        yield len(turns) - 1, key, "wrong last turn", f"the last turn is not of the {' or '.join(last)}"


def turn_marker(text: str, role: str) -> str | None:
    """Find the beginning of another turn inside a text, as transcripts leave it when they are cut up wrongly.

    A message of a user may well quote a conversation, so only a marker at its beginning or glued to the end of a
    sentence counts there; an answer that goes on with "Human:" on a line of its own has run on.

    Args:
        text: The text of one turn.
        role: Whose turn it is.

    Returns:
        The problem in words, or None.
    """
    if not any(marker in text for marker in _MARKERS):
        return None
    found = _LEADING.match(text)
    if found is None:
        found = _GLUED.search(text) or (_OWN_LINE.search(text) if role == "assistant" else None)
    if found is None:
        return None
    quote = " ".join(text[found.start() :].split())
    return f"the marker of a turn stands inside the text: {quote[:40]!r}"


def text_turns(text: str) -> list[dict[str, Any]]:
    """Take a written-out conversation apart: a text that begins with "Human:" and has an "Assistant:" on a line.

    Args:
        text: The text.

    Returns:
        Its turns as messages; empty where the text is not of this form.
    """
    if "\nAssistant:" not in text or not text.lstrip().startswith(("Human:", "User:")):
        return []
    # Where blank lines set the turns apart, a marker after a single line break belongs to the turn.
    separator = "\n\n" if "\n\nAssistant:" in text else "\n"
    parts = re.split(rf"{separator}(Human|Assistant|User):", separator + text.lstrip())
    return [
        {"role": _ROLE_OF[marker], "content": content.strip()}
        for marker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]


def answer_start(turns: Sequence[Turn]) -> int:
    """Say where the answer of a conversation begins: its last turn, with the tool calls that lead to it.

    Args:
        turns: The messages.

    Returns:
        Index of the first turn of the answer.
    """
    start = len(turns) - 1
    while start > 0 and (turns[start - 1].get("role") == "tool" or turns[start - 1].get("tool_calls")):
        start -= 1
    return start
