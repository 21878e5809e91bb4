"""The class event: what changed since a client last asked.

event.from sleeps on the trio loop until a change concerns its subscription, so that a hundred clients that
wait cost no thread. Many changes of one object between two calls are one event with the record as it is now.
A token names the run of the gateway and the last change that was told; as text, later tokens are greater. A
token of an earlier run, or one so old that changes after it were forgotten, gets all objects as "add", and
`valid_ref_counts` lets the client find out what it knows too many: xapi does the same after a restart.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from gateway.core.errors import XenAPIError
from gateway.xenapi.datamodel import ApiClass, Call, Parameter, message
from gateway.xenapi.implicit import Turn
from gateway.xenapi.types import FLOAT, INT, STRING, STRINGS, Int32, Record, SetOf

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from gateway.core.events import Event, Events
    from gateway.core.roles import Role
    from gateway.xenapi.estate import Estate
    from gateway.xenapi.fields import ListedObjects

_TOKEN: Final = re.compile(r"([0-9]{1,20}),([0-9]{1,20})", re.ASCII)

MOST_WORDS: Final = 1000
"""Classes and single objects that a client may listen to: a session's are kept as long as it lives, and each
change is held against them."""

_LONGEST_WORD: Final = 200

LONGEST_WAIT: Final = 3600.0
"""Seconds after which event.from answers whatever it was asked for: by then a proxy has closed the
connection anyway."""


@dataclass(frozen=True, slots=True)
class Subscription:
    """Which objects a client wants to hear of. `models` are the classes concerned, `whole` those of which it
    wants every object."""

    models: Mapping[str, ApiClass]
    whole: frozenset[str]
    objects: frozenset[tuple[str, str]]

    def wants(self, event: Event) -> bool:
        return event.class_name in self.whole or (event.class_name, event.ref) in self.objects

    def present(self, estate: Estate) -> Iterable[tuple[str, Any]]:
        """Every object that is there now, with the name of its class."""
        for name, model in self.models.items():
            listed = _objects(model, estate)
            if name in self.whole:
                yield from ((name, item) for item in listed.all())
                continue
            for class_name, ref in self.objects:
                if class_name == name:
                    try:
                        yield name, listed.get(ref)
                    except XenAPIError:
                        continue

    def counts(self, estate: Estate) -> dict[str, Int32]:
        """valid_ref_counts."""
        return {name.lower(): Int32(len(_objects(model, estate))) for name, model in self.models.items()}


def _objects(model: ApiClass, estate: Estate) -> ListedObjects:
    if model.objects is None:
        raise AssertionError(f"{model.name} has no objects")
    objects: Any = model.objects(estate)
    return objects  # type: ignore[no-any-return]  # has_events says that they can be listed


def parse_subscription(words: Collection[str], told: Mapping[str, ApiClass], role: Role) -> Subscription:
    """`*`, a class in any case, or class/reference. Classes that do not exist, or whose objects the caller
    may not see, have no events. EVENT_SUBSCRIPTION_PARSE_FAILURE for anything else, VALUE_NOT_SUPPORTED for
    too many."""
    if len(words) > MOST_WORDS:
        reason = f"{MOST_WORDS} are the most that a client may listen to; listen to whole classes"
        raise XenAPIError("VALUE_NOT_SUPPORTED", "classes", str(len(words)), reason)
    visible = {name: model for name, model in told.items() if role >= model.reader}
    by_lower = {name.lower(): name for name in visible}
    whole: set[str] = set()
    objects: set[tuple[str, str]] = set()
    for word in words:
        if word == "*":
            whole.update(visible)
            continue
        class_name, slash, ref = word.partition("/")
        if not class_name or (slash and not ref) or len(word) > _LONGEST_WORD:
            raise XenAPIError("EVENT_SUBSCRIPTION_PARSE_FAILURE", word[:100])
        name = by_lower.get(class_name.lower())
        if name is None:
            continue
        if slash:
            objects.add((name, ref))
        else:
            whole.add(name)
    concerned = whole | {name for name, _ in objects}
    return Subscription(
        {name: model for name, model in visible.items() if name in concerned},
        frozenset(whole),
        frozenset(objects),
    )


def token_of(events: Events, counter: int) -> str:
    """The token of a client that knows everything up to `counter`."""
    return f"{events.epoch:020d},{counter:020d}"


def parse_token(events: Events, token: str) -> int | None:
    """The counter that `token` names; None if what came after it is not known any more.

    EVENT_FROM_TOKEN_PARSE_FAILURE if it is no token.
    """
    if not token:
        return None
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise XenAPIError("EVENT_FROM_TOKEN_PARSE_FAILURE", token[:100])
    epoch, counter = map(int, match.groups())
    if epoch != events.epoch or counter > events.counter or events.since(counter) is None:
        return None
    return counter


async def _wait(call: Call, subscription: Callable[[], Subscription], counter: int, seconds: float) -> int:
    """Wait for a change past `counter` that is wanted; the counter before it, or the newest if none came.

    Ends early when nobody waits for the answer any more.
    """
    events, ending, session = call.estate.events, call.caller.ending, call.identity.session
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            if ending is not None:
                nursery.start_soon(_cancel_after, ending, nursery.cancel_scope)
            with call.estate.sessions.in_use(session if session is not None else ""):
                while True:
                    changes = events.since(counter)
                    if changes is None or any(map(subscription().wants, changes)):
                        break
                    counter = events.counter
                    await events.wait_past(counter)
            nursery.cancel_scope.cancel()
    # Whoever was logged out meanwhile is told nothing more.
    if session is not None:
        call.estate.sessions.get(call.session_ref)
    return counter


async def _cancel_after(ending: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
    await ending()
    scope.cancel()


async def _told(call: Call, changes: Iterable[Event], models: Mapping[str, ApiClass]) -> list[dict[str, Any]]:
    """Events as they are sent, each with the record as it is now."""
    told: list[dict[str, Any]] = []
    turn = Turn()
    for event in changes:
        model = models[event.class_name]
        entry = _entry(event.counter, event.moment, event.class_name, event.operation, event.ref)
        if event.operation != "del":
            try:
                item = _objects(model, call.estate).get(event.ref)
            except XenAPIError:
                entry["operation"] = "del"
            else:
                entry["snapshot"] = model.record(item, call.estate)
        told.append(entry)
        await turn.end_in_time()
    return told


async def _everything(call: Call, subscription: Subscription) -> list[dict[str, Any]]:
    """All objects as if they had just come."""
    events, turn = call.estate.events, Turn()
    told: list[dict[str, Any]] = []
    for name, item in subscription.present(call.estate):
        entry = _entry(events.counter, events.epoch / 1e6, name, "add", item.ref)
        entry["snapshot"] = subscription.models[name].record(item, call.estate)
        told.append(entry)
        await turn.end_in_time()
    return told


def _entry(counter: int, moment: float, class_name: str, operation: str, ref: str) -> dict[str, Any]:
    return {
        "id": str(counter),
        "timestamp": f"{moment:.1f}",
        "class": class_name.lower(),
        "operation": operation,
        "ref": ref,
    }


_CLASSES = Parameter(
    "classes", STRINGS, 'class names in any case, "task/" and a reference for one object, "*" for everything'
)


def event_class(models: Iterable[ApiClass]) -> ApiClass:
    """The class event over `models`."""
    by_name = {model.name: model for model in models if model.has_events}

    @message(
        "from",
        "Wait until something changes, and tell what; then call again with the token of the answer.",
        _CLASSES,
        Parameter("token", STRING, "what the last answer gave; empty to be told of all that is there"),
        Parameter("timeout", FLOAT, "seconds to wait at most for something to happen"),
        result=Record("event batch", {}),
        asynchronous=False,
        errors=("EVENT_FROM_TOKEN_PARSE_FAILURE", "EVENT_SUBSCRIPTION_PARSE_FAILURE", "VALUE_NOT_SUPPORTED"),
    )
    async def from_(call: Call, classes: tuple[str, ...], token: str, timeout: float) -> dict[str, Any]:  # noqa: ASYNC109 - XenAPI's parameter
        estate, events = call.estate, call.estate.events
        subscription = parse_subscription(classes, by_name, call.identity.role)
        seconds = min(max(timeout, 0.0), LONGEST_WAIT)
        counter = parse_token(events, token)
        told: list[dict[str, Any]] | None = None
        if counter is None:
            counter = events.counter
            told = await _everything(call, subscription)
        if told is None or not (told or token):
            counter = await _wait(call, lambda: subscription, counter, seconds)
            changes = events.since(counter)
            counter = events.counter
            if changes is None:
                told = await _everything(call, subscription)
            else:
                told = await _told(call, filter(subscription.wants, changes), subscription.models)
        return {
            "token": token_of(events, counter),
            "events": told,
            "valid_ref_counts": subscription.counts(estate),
        }

    @message(
        "inject",
        "Let an object appear changed. What event.from answers with a token that is not less has all that "
        "happened before.",
        Parameter("class", STRING, "class of the object"),
        Parameter("ref", STRING, "reference of the object"),
        result=STRING,
        asynchronous=False,
        errors=("HANDLE_INVALID",),
    )
    async def inject(call: Call, class_name: str, ref: str) -> str:
        subscription = parse_subscription((class_name,), by_name, call.identity.role)
        for name, model in subscription.models.items():
            _objects(model, call.estate).get(ref)
            events = call.estate.events
            # The token is that before the event, so event.from answers at once with it, as xapi does.
            token = token_of(events, events.counter)
            events.publish(name, "mod", ref)
            return token
        raise XenAPIError("HANDLE_INVALID", class_name[:100], ref)

    @message("get_current_id", "The number of the newest change.", result=INT, asynchronous=False)
    async def get_current_id(call: Call) -> int:
        return call.estate.events.counter

    @message(
        "register",
        "Hear of classes through event.next.",
        _CLASSES,
        asynchronous=False,
        errors=("EVENT_SUBSCRIPTION_PARSE_FAILURE", "VALUE_NOT_SUPPORTED"),
    )
    async def register(call: Call, classes: tuple[str, ...]) -> None:
        known = call.estate.registrations.find(_listener(call))
        wanted = {**(known.classes if known is not None else {}), **dict.fromkeys(classes)}
        parse_subscription(wanted, by_name, call.identity.role)
        registration = call.estate.registrations.of(_listener(call), call.estate.events.counter)
        registration.classes = wanted

    @message("unregister", "Hear of classes no more through event.next.", _CLASSES, asynchronous=False)
    async def unregister(call: Call, classes: tuple[str, ...]) -> None:
        registration = call.estate.registrations.find(_listener(call))
        for name in classes if registration is not None else ():
            assert registration is not None
            registration.classes.pop(name, None)

    @message(
        "next",
        "Wait until something changes of the registered classes, and tell what; event.from is better.",
        result=SetOf(Record("event", {})),
        asynchronous=False,
        errors=("SESSION_NOT_REGISTERED", "EVENTS_LOST"),
    )
    async def next_(call: Call) -> list[dict[str, Any]]:
        events = call.estate.events
        registration = call.estate.registrations.find(_listener(call))
        if registration is None:
            raise XenAPIError("SESSION_NOT_REGISTERED", call.identity.user)

        def subscription() -> Subscription:
            return parse_subscription(registration.classes, by_name, call.identity.role)

        counter = await _wait(call, subscription, registration.counter, LONGEST_WAIT)
        changes = events.since(counter)
        registration.counter = events.counter
        if changes is None:
            raise XenAPIError("EVENTS_LOST")
        wanted = subscription()
        return await _told(call, filter(wanted.wants, changes), wanted.models)

    return ApiClass(
        name="event",
        doc="What changed.",
        messages=(from_, inject, get_current_id, register, unregister, next_),
        enumerable=False,
        named=False,
    )


def _listener(call: Call) -> str:
    session = call.identity.session
    return session.uuid if session is not None else call.identity.user
