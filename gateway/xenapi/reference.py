"""The reference of all classes, fields and methods, written from the table that serves them.

    .venv/bin/python -m gateway.xenapi.reference >docs/rpc.md

What the table makes of a field (its getter, its setters) is told once, not for each. A test keeps docs/rpc.md
in step.
"""

import re
import sys
import textwrap
from collections.abc import Iterable, Iterator
from typing import Final

from gateway.core.roles import Role
from gateway.xenapi.classes import CLASSES
from gateway.xenapi.datamodel import REQUIRED, ApiClass, Field, Message, Parameter
from gateway.xenapi.types import VOID, Choice, MapOf, Record, SetOf, WireType

_WIDTH: Final = 120

_INTRODUCTION: Final = """\
# The RPC reference

Written from the table of classes by `.venv/bin/python -m gateway.xenapi.reference`; don't edit it by
hand.

XML-RPC is answered at `/`, `/RPC2` and `/xmlrpc`, JSON-RPC 2.0 and 1.0 at `/jsonrpc`, all by POST, over
HTTP, HTTPS and the Unix socket `xapi.sock` in the state directory. A method is called as `class.method` or
`class_method`, the class in any case. Its first parameter, not shown below, is the session's reference,
which `session.login_with_password` gives. What an error code means: [errors.md](errors.md).

- **Types.** An int is a string of digits in XML-RPC and a number in JSON-RPC; a ref is a string,
  `OpaqueRef:NULL` names nothing; a set is an array, a map a struct; a record is a struct of the fields
  below; a datetime is `20261231T23:59:59Z`.
  Members with a question mark and parameters with a value may be left out.
- **Roles.** {roles}: each may do what those before it may. The lowest one for a method stands behind
  its name.
- **Async.** Methods marked so are also called as `Async.class.method`: the answer is a task's
  reference, and the task's result is what the method answers.
- **Fields.** Each has a getter `get_FIELD (self)`, for every role that may see the class. One that can
  be changed has `set_FIELD (self, value)`; a map also `add_to_FIELD (self, key, value)` and
  `remove_from_FIELD (self, key)`, a set `add_FIELD (self, value)` and `remove_FIELD (self, value)`, for
  the role that stands in the column *changed by*.
- `system.listMethods ()` lists all methods, without a session. Any method may answer `SESSION_INVALID`,
  `RBAC_PERMISSION_DENIED`, `MESSAGE_PARAMETER_COUNT_MISMATCH`, `FIELD_TYPE_ERROR`,
  `VALUE_NOT_SUPPORTED`, and `HANDLE_INVALID` for a reference; they aren't repeated below.
"""


def reference(classes: Iterable[ApiClass]) -> str:
    """The whole document, in Markdown."""
    roles = ", ".join(role.wire_name for role in Role)
    lines = []
    for part in re.split(r"\n(?=\n|- )", _INTRODUCTION.format(roles=roles)):
        lines += [""] if not part or part.startswith("\n") else []
        bullet = "- " if part.strip().startswith("- ") else ""
        lines += _wrapped(" ".join(part.split()).removeprefix("- "), bullet)
    for model in sorted(classes, key=lambda each: each.name.lower()):
        lines += _class(model)
    return "\n".join(lines) + "\n"


def _class(model: ApiClass) -> Iterator[str]:
    yield from ("", f"## {model.name}", "", *_wrapped(_sentence(model.doc)))
    # Clients expect these, and there is nothing behind them.
    constant = {each.name: each for each in model.fields if each.doc.startswith("always ")}
    if model.fields:
        yield from ("", "| field | type | changed by | what it is |", "|---|---|---|---|")
        for each in model.fields:
            if each.name in constant:
                continue
            cells = (f"`{each.name}`", _type(each.type), _changed_by(each), _field_doc(each))
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    for doc in dict.fromkeys(each.doc for each in constant.values()):
        names = ", ".join(f"`{each.name}`" for each in constant.values() if each.doc == doc)
        yield from ("", *_wrapped(f"{_sentence(doc).rstrip('.')}: {names}."))
    yield ""
    for called in sorted(_own_messages(model), key=lambda each: each.name):
        yield from _wrapped(_message(called), "- ")


def _own_messages(model: ApiClass) -> Iterator[Message]:
    """All but those that follow from a single field."""
    written = {each.name for each in model.messages}
    names = [each.name for each in model.fields]
    of_fields = {f"{verb}_{name}" for verb in _VERBS for name in names}
    for called in model.all_messages.values():
        if called.name in written or called.name not in of_fields:
            yield called


_VERBS: Final = ("get", "set", "add_to", "remove_from", "add", "remove")


def _message(called: Message) -> str:
    parameters = ", ".join(_parameter(each) for each in called.parameters)
    result = "" if called.result is VOID else f": {called.result.name}"
    signature = f"**{called.name}** `({parameters}){result}`"
    notes = [called.role.wire_name if called.session else "no session"]
    if called.asynchronous:
        notes.append("Async")
    text = f"{signature} ({', '.join(notes)}). {_sentence(called.doc)}"
    meanings = [
        f"`{each.name}`: {each.doc}" for each in called.parameters if each.doc and each.name != "self"
    ]
    if meanings:
        text += f" {'; '.join(meanings)}."
    if called.errors:
        text += f" Errors: {', '.join(f'`{code}`' for code in called.errors)}."
    return text


def _parameter(each: Parameter) -> str:
    text = f"{each.name}: {each.type.name}"
    if isinstance(each.type, Record) and each.type.members:
        members = (name + ("" if item.default is None else "?") for name, item in each.type.members.items())
        text += f" of {', '.join(members)}"
    return text if each.default is REQUIRED else f"{text} = {_shown(each.default)}"


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return {"()": "[]"}.get(repr(value), repr(value).replace("'", '"'))


def _type(kind: WireType) -> str:
    if isinstance(kind, Choice):
        return " or ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, SetOf) and isinstance(kind.item, Choice):
        return f"set of {kind.item.name}"
    return kind.name


def _changed_by(each: Field) -> str:
    if each.writer is None:
        return ""
    keys = "".join(f"; key `{key}`: {role.wire_name}" for key, role in each.key_writers)
    return each.writer.wire_name + (keys if isinstance(each.type, MapOf) else "")


def _field_doc(each: Field) -> str:
    return each.doc + (" (chosen when it is created)" if each.given and each.writer is None else "")


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _wrapped(text: str, bullet: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=bullet,
        subsequent_indent=" " * len(bullet),
        break_long_words=False,
        break_on_hyphens=False,
    )


if __name__ == "__main__":
    sys.stdout.write(reference(CLASSES))
