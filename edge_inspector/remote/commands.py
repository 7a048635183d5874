"""Commands over MQTT: whose are carried out, and each signed one once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone

from edge_inspector.errors import InspectorError, SchemaError
from edge_inspector.messages import Command, Reply, ReplyError
from edge_inspector.remote.authority import Authority

REMEMBERED = 1024
"""Signed commands that were carried out; the oldest are forgotten once their time is over."""
_BEGINNING = datetime.min.replace(tzinfo=timezone.utc)


@dataclass(frozen=True)
class _Done:
    command: Command
    expires_at: datetime
    reply: Reply


class Commands:
    """For one session of the device. Used from one thread.

    A signed command that comes again, from a broker or from whoever recorded it, gets the answer that it got before. One
    from before the oldest that is remembered is void, wherever the clock was set meanwhile.
    """

    def __init__(self, authority: Authority, session: str) -> None:
        self._authority, self._session = authority, session
        self._done: OrderedDict[str, _Done] = OrderedDict()
        self._forgotten = _BEGINNING

    def answered(self, name: str, payload: bytes, topic: str, act: Callable[[Command], None]) -> tuple[Command, Reply]:
        """Carry a command out by `act`, unless it was; returns it with its answer. Raises SchemaError, or another
        InspectorError for a command that nobody can be answered.
        """
        command, once = self._authority.command(name, payload, topic, self._session)
        if not once:
            return command, _reply(command, act)
        known = self._done.get(command.request_id)
        if known is not None:
            return command, known.reply if _same(known.command, command) else _used(command)
        self._make_room(command)
        done = _Done(command, command.expires_at or _BEGINNING, _reply(command, act))
        self._done[command.request_id] = done
        return command, done.reply

    def _make_room(self, command: Command) -> None:
        """Forget the commands whose time is over soonest; what may be one of them is void. Raises InspectorError."""
        if command.expires_at is None or command.expires_at <= self._forgotten:
            raise InspectorError("it may have been carried out before", hint="order again, with a later expires_at")
        while len(self._done) >= REMEMBERED:
            oldest = min(self._done, key=lambda request_id: self._done[request_id].expires_at)
            self._forgotten = max(self._forgotten, self._done.pop(oldest).expires_at)


def _same(old: Command, new: Command) -> bool:
    """Whether the same is wanted, though it may have been signed again."""
    return (old.command, old.station, old.product, old.client) == (new.command, new.station, new.product, new.client)


def _used(command: Command) -> Reply:
    told = f"request_id {command.request_id} was used for another command in this session"
    return Reply(request_id=command.request_id, ok=False, error=ReplyError(code="refused", message=told, hint="take another"))


def _reply(command: Command, act: Callable[[Command], None]) -> Reply:
    try:
        act(command)
    except SchemaError:
        raise
    except InspectorError as error:
        told = ReplyError(code="refused", message=error.message, hint=error.hint)
        return Reply(request_id=command.request_id, ok=False, error=told)
    return Reply(request_id=command.request_id, ok=True)
