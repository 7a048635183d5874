"""Whose orders and commands are carried out: purposes of keys, what a signature covers, what comes again."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from edge_inspector import messages, signatures
from edge_inspector.config import Device, DeviceConfig, parse_line
from edge_inspector.errors import InspectorError, SchemaError, SignatureError
from edge_inspector.frames import utc_now
from edge_inspector.messages import BundleDesired, Command, ConfigDesired, Confirm
from edge_inspector.remote.authority import Authority, Trust, trust_of
from edge_inspector.remote.commands import REMEMBERED, Commands
from edge_inspector.remote.configuration import Configuration
from edge_inspector.results import rfc3339
from edge_inspector.schema import validate
from edge_inspector.signatures import ORDERS, PURPOSES, Purpose

DEVICE, SESSION = "plant/line/edge", "s-1"


class Keys:
    """A trust folder with a key for each purpose, and one for all orders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trust = folder, folder / "trust"
        for purpose in PURPOSES:
            signatures.create_key(folder / f"{purpose}.key", self.trust, [purpose])
        signatures.create_key(folder / "orders.key", self.trust, ORDERS)
        signatures.create_key(folder / "stranger.key", folder / "elsewhere", PURPOSES)

    def signed(self, values: dict[str, Any], key: str) -> dict[str, Any]:
        private = signatures.read_private_key(self.folder / f"{key}.key")
        return {**values, "signature": signatures.sign(messages.signed_bytes(values), private).model_dump()}

    @property
    def authority(self) -> Authority:
        return Authority(DEVICE, Trust(self.trust, ()))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


def public(folder: Path, head: bytes = b"", tail: bytes = b"", name: str = "a") -> Path:
    """A trust folder with one key between a head and a tail."""
    signatures.create_key(folder / f"{name}.key", folder / "made")
    (made,) = (folder / "made").glob(f"{name}-*.pub")
    (folder / "trust").mkdir(exist_ok=True)
    (folder / "trust" / f"{name}.pub").write_bytes(head + made.read_bytes().split(b"\n", 1)[1] + tail)
    return folder / "trust"


@pytest.mark.parametrize(
    ("head", "purposes"),
    [
        (b"", {"bundle"}),
        (b"the key of anna, for any purpose\n", {"bundle"}),
        (b"purposes: confirm\n", {"confirm"}),
        (b"\xef\xbb\xbfpurposes: confirm,command\r\n", {"confirm", "command"}),
        (b"caf\xe9\npurposes: bundle, label\n", {"bundle", "label"}),
    ],
)
def test_a_key_is_trusted_for_what_its_file_says(tmp_path: Path, head: bytes, purposes: set[str]) -> None:
    (key,) = signatures.trusted_keys(public(tmp_path, head)).values()
    assert key.purposes == purposes


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        (b"purposes: \n", b""), (b"purposes: confrm\n", b""), (b"# purposes: confirm\n", b""), (b"Purposes: confirm\n", b""),
        (b"purposes = confirm\n", b""), (b"purposes: confirm\npurposes: bundle\n", b""), (b"", b"purposes: confirm\n"),
        (b"purposes: all\n", b""), (b"purposes: confirm; bundle\n", b""),
    ],
)  # fmt: skip
def test_purposes_that_cannot_be_told_trust_nobody(tmp_path: Path, head: bytes, tail: bytes) -> None:
    with pytest.raises(SignatureError, match="its purposes cannot be told") as caught:
        signatures.trusted_keys(public(tmp_path, head, tail))
    assert "purposes: one or more of bundle, configuration, confirm, command, label" in caught.value.hint


def test_a_key_in_two_files_is_trusted_for_what_both_say(tmp_path: Path) -> None:
    trust = public(tmp_path, b"purposes: confirm\n")
    text = (trust / "a.pub").read_bytes()
    (trust / "b.pub").write_bytes(text.replace(b"confirm", b"label"))
    (key,) = signatures.trusted_keys(trust).values()
    assert key.purposes == {"confirm", "label"}


def device(folder: Path, remote: dict[str, Any]) -> Device:
    identity = {"site": "plant", "line": "line", "device": "edge"}
    return Device(validate(DeviceConfig, {"schema": "ei.device.v1", "identity": identity, "remote": remote}, "x"), folder)


@pytest.mark.parametrize(
    ("remote", "purposes"),
    [
        ({}, {"bundle"}),  # the folder of bundles' keys
        ({"ca_file": "x"}, {"bundle"}),
        ({"require_signature": True}, {"bundle", "configuration", "confirm"}),  # as before there were purposes
        ({"require_signature": True, "trust": "./trust"}, {"bundle", "configuration", "confirm"}),
        ({"trust": "fleet"}, set(ORDERS)),
        ({"require_signature": True, "trust": "fleet"}, set(ORDERS)),
    ],
)
def test_a_key_without_purposes_keeps_what_it_had_and_gets_nothing_new(
    tmp_path: Path, remote: dict[str, Any], purposes: set[str]
) -> None:
    public(tmp_path)
    (tmp_path / "fleet").symlink_to(tmp_path / "made")
    trust = trust_of(device(tmp_path, remote))
    assert trust is not None
    assert set(trust.unmarked) == purposes


def test_signatures_are_required_unless_device_yaml_says_no(tmp_path: Path) -> None:
    assert Authority.of(device(tmp_path, {})).trust is not None
    assert Authority.of(device(tmp_path, {"require_signature": False})).trust is None


ORDER = {"by": "anna", "device": DEVICE}
WANTED: list[tuple[type[Any], dict[str, Any], Purpose]] = [
    (ConfigDesired, {**ORDER, "line": {"version": 4}}, "configuration"),
    (BundleDesired, {**ORDER, "bundle": "b", "release": 2, "source": "/x"}, "configuration"),
    (Confirm, {**ORDER, "version": 4, "action": "confirm", "subject": "configuration"}, "confirm"),
    (Confirm, {**ORDER, "version": 4, "action": "cancel", "subject": "configuration"}, "confirm"),
    (Confirm, {**ORDER, "version": 4, "action": "reset", "subject": "configuration"}, "configuration"),
]


def test_each_order_needs_its_purpose_and_no_other_one_does(keys: Keys) -> None:
    for model, values, wanted in WANTED:
        subject = "configuration" if model is Confirm else ""
        for purpose in PURPOSES:
            order = keys.signed(values, purpose)
            if purpose == wanted:
                keys.authority.checked(model, order, subject)
            else:
                with pytest.raises(SignatureError, match=f"not trusted for {wanted}: only for {purpose}"):
                    keys.authority.checked(model, order, subject)
        keys.authority.checked(model, keys.signed(values, "orders"), subject)
        for wrong, why in (
            (values, "not signed"),
            (keys.signed(values, "stranger"), "not trusted"),
            (keys.signed({**values, "device": ""}, wanted), "without device"),
            (keys.signed({**values, "device": "plant/line/other"}, wanted), "for plant/line/other"),
            ({**keys.signed(values, wanted), "by": "ben"}, "does not fit"),
            ({**keys.signed(values, wanted), "more": 1}, "does not fit"),
        ):
            with pytest.raises(InspectorError, match=why):
                keys.authority.checked(model, wrong, subject)
    confirm = keys.signed(WANTED[2][1], "confirm")
    with pytest.raises(InspectorError, match="for configuration, this is bundle/b"):
        keys.authority.checked(Confirm, confirm, "bundle/b")


TRICKS = (
    b'{"by":"a","by":"b"}', b'{"by":"a","signature":1,"signature":2}', b'{"by":"a","line":{"x":1,"x":2}}', b'{"by":"a","x":1e999}',
    b'{"by":"a","x":-1e999}', b'{"by":"a","x":NaN}', b'{"by":"\\ud800"}', b'{"by":"a"}{"by":"b"}', b'["by"]',
)  # fmt: skip


def test_what_may_be_read_in_two_ways_is_no_order(keys: Keys) -> None:
    for payload in TRICKS:
        with pytest.raises(SchemaError):
            keys.authority.read(payload, "config/desired")


def test_a_signature_covers_each_code_point_and_digit(keys: Keys) -> None:
    values = {**ORDER, "line": {"version": 4, "name": "\u00e9 \u212b", "x": 1.0, "n": 2**60, "tiny": 1e-7}}
    payload = json.dumps(keys.signed(values, "configuration"))
    for text in (payload, json.dumps(json.loads(payload), indent=3), payload.replace("\\u00e9", "é").replace("1.0", "1.00")):
        keys.authority.checked(ConfigDesired, keys.authority.read(text.encode(), "x")[0])
    for old, new in (
        ("\\u00e9", "e\\u0301"),
        ("\\u212b", "\\u00c5"),
        ("1.0,", "1,"),
        (str(2**60), f"{2**60 + 1}"),
        ("1e-07", "0.0"),
    ):
        assert old in payload
        with pytest.raises(SignatureError, match="does not fit"):
            keys.authority.checked(ConfigDesired, keys.authority.read(payload.replace(old, new).encode(), "x")[0])


class Station:
    """Counts what it was told."""

    def __init__(self, keys: Keys, opened: tuple[str, ...] = ()) -> None:
        self.keys, self.done = keys, list[tuple[str, str | None]]()
        self.commands = Commands(Authority(DEVICE, Trust(keys.trust, ()), opened), SESSION)
        self.numbers = 0

    def act(self, command: Command) -> None:
        self.done.append((command.request_id, command.product))
        if command.product == "glass":
            raise InspectorError("no such product", hint="paper")

    def say(self, values: dict[str, Any], name: str = "halt") -> bool:
        payload = json.dumps(values).encode()
        return self.commands.answered(name, payload, f"command/{name}", self.act)[1].ok

    def values(self, **changes: Any) -> dict[str, Any]:
        self.numbers += 1
        expires_at = rfc3339(utc_now() + timedelta(seconds=30))
        return {
            "request_id": f"r-{self.numbers}", "client": "hmi", "station": "sheet", "command": "halt", "by": "anna",
            "device": DEVICE, "session": SESSION, "expires_at": expires_at, **changes,
        }  # fmt: skip

    def signed(self, key: str = "command", **changes: Any) -> dict[str, Any]:
        return self.keys.signed(self.values(**changes), key)


def test_a_command_is_carried_out_when_signed_for_here_and_now(keys: Keys) -> None:
    station = Station(keys)
    assert station.say(station.signed())
    for purpose in ("bundle", "configuration", "confirm", "label"):
        with pytest.raises(SignatureError, match="not trusted for command"):
            station.say(station.signed(purpose))
    late, far = (rfc3339(utc_now() + timedelta(seconds=s)) for s in (-1, 7200))
    for wrong, why in (
        (station.values(), "not signed"),
        (station.signed(expires_at=late), "expires_at is"),
        (station.signed(expires_at=far), "expires_at is"),
        (station.signed(expires_at="0001-01-01T00:00:00+14:00"), "expires_at is"),
        (station.signed(expires_at="9999-12-31T23:59:59-14:00"), "expires_at is"),
        (station.signed(session="s-0"), "for session s-0"),
        (station.signed(device="plant/line/other"), "for plant/line/other"),
        (station.signed(command="start"), "came as halt"),
        ({**station.signed(), "station": "press"}, "does not fit"),
    ):
        with pytest.raises(InspectorError, match=why):
            station.say(wrong)
    for field in ("device", "session", "command", "expires_at"):
        values = station.values()
        del values[field]
        with pytest.raises(SignatureError, match=f"without {field}"):
            station.say(keys.signed(values, "command"))
    assert len(station.done) == 1


def test_a_refused_command_shows_the_line_that_opens_it(keys: Keys) -> None:
    station = Station(keys, ("halt",))
    old_style = {"request_id": "1", "client": "hmi", "station": "sheet"}
    assert station.say(old_style)
    assert station.say(old_style), "open commands come as often as they come"
    assert len(station.done) == 2
    with pytest.raises(SignatureError) as caught:
        station.say(old_style, "start")
    assert "remote: {open_commands: [halt, start]}" in caught.value.hint
    line = caught.value.hint.split("remote: ")[1]
    assert device(
        keys.folder, json.loads(line.replace("{open_commands: [halt, start]}", '{"open_commands": ["halt", "start"]}'))
    )
    with pytest.raises(InspectorError, match="for session"):
        station.say({**old_style, "session": "s-0"})


def test_a_command_that_comes_again_is_answered_and_not_carried_out_again(keys: Keys) -> None:
    station = Station(keys)
    good, bad = station.signed(), station.signed(product="glass")
    assert [station.say(good), station.say(bad), station.say(good), station.say(bad)] == [True, False, True, False]
    again = station.signed(request_id=good["request_id"], expires_at=rfc3339(utc_now() + timedelta(seconds=99)))
    assert station.say(again), "signed anew, it is still the same request"
    assert not station.say(station.signed(request_id=good["request_id"], product="paper"))
    assert len(station.done) == 2


def test_what_was_forgotten_of_a_flood_of_commands_is_void(keys: Keys) -> None:
    station = Station(keys)
    now = utc_now()
    times = [rfc3339(now + timedelta(seconds=60, milliseconds=n)) for n in range(REMEMBERED + 3)]
    said = [station.signed(expires_at=at) for at in times]
    assert all(station.say(values) for values in said)
    assert len(station.commands._done) == REMEMBERED
    for values in said[:3]:
        with pytest.raises(InspectorError, match="may have been carried out before"):
            station.say(values)
    assert station.say(said[3])
    assert len(station.done) == REMEMBERED + 3


def line(version: int) -> dict[str, Any]:
    return {
        "schema": "ei.line.v1", "version": version,
        "stations": {"s": {"product": "p", "products": {"p": "r"}, "cameras": {"top": {"uri": "synthetic://"}}}},
        "recipes": {"r": {"cameras": {"top": {"rois": {"all": {"bundle": "b"}}}}}},
    }  # fmt: skip


class Remote:
    """A configuration that takes signed orders."""

    def __init__(self, keys: Keys, folder: Path) -> None:
        self.keys = keys
        self.it = Configuration(folder / "configuration.json", lambda: parse_line(line(3), "x"), keys.authority)

    def want(self, version: int, *, key: str | None = "configuration", again: bool = False) -> str:
        values = {**ORDER, "line": line(version), "confirm_s": 60}
        order = self.keys.signed(values, key) if key is not None else values
        self.it.take("desired", json.dumps(order).encode(), again=again)
        if self.it.candidate is not None:
            self.it.prepared(self.it.candidate, None)
        return self.outcome

    def confirmation(self, version: int, **more: Any) -> bytes:
        values = {**ORDER, "version": version, "action": "confirm", "subject": "configuration", **more}
        return json.dumps(self.keys.signed(values, "confirm")).encode()

    def confirm(self, payload: bytes) -> str:
        self.it.trials.tick(set(), connected=True)
        self.it.take("confirm", payload)
        return self.outcome

    @property
    def trial(self) -> str:
        facts = self.it.report().trial
        assert facts is not None
        return facts.id

    @property
    def outcome(self) -> str:
        return self.it.trials.last.outcome if self.it.trials.last is not None else ""


def test_a_confirmation_holds_for_its_trial_alone(keys: Keys, tmp_path: Path) -> None:
    here = tmp_path / "state"
    remote = Remote(keys, here)
    assert remote.want(4) == "trial"
    recorded = remote.confirmation(4, trial=remote.trial)
    assert remote.confirm(remote.confirmation(4)) == "refused"
    assert remote.confirm(remote.confirmation(4, trial="0" * 16)) == "refused"
    remote = Remote(keys, here)  # the state folder may have been put back meanwhile: it is another trial
    assert remote.confirm(recorded) == "refused"
    assert "name the trial" in (remote.it.trials.last.reason if remote.it.trials.last else "")
    assert remote.confirm(remote.confirmation(4, trial=remote.trial)) == "committed"


def test_orders_of_before_stay_void_when_the_state_folder_is_put_back(keys: Keys, tmp_path: Path) -> None:
    here = tmp_path / "state"
    remote = Remote(keys, here)
    remote.it.hear(7)
    assert remote.want(5) == "stale"
    assert remote.want(7) == "stale"
    assert Remote(keys, here).want(6) == "stale", "what was heard is kept"
    remote = Remote(keys, here)
    for forged in (2**53, 7 + 10**9 + 1, 3, 0):
        remote.it.hear(forged)
    assert remote.it.seen == 7
    assert remote.want(8) == "trial"


def test_an_order_of_before_signatures_is_not_told_again_and_again(keys: Keys, tmp_path: Path) -> None:
    remote = Remote(keys, tmp_path / "state")
    assert remote.want(4) == "trial"
    assert remote.confirm(remote.confirmation(4, trial=remote.trial)) == "committed"
    remote = Remote(keys, tmp_path / "state")
    assert remote.want(4, key=None, again=True) == "committed", "the broker had kept what was in force already"
    assert remote.want(4, key=None) == "refused"
    assert remote.want(5, key=None, again=True) == "refused"


def test_a_flood_of_refused_orders_writes_neither_disk_nor_log(
    keys: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    remote = Remote(keys, tmp_path / "state")
    with caplog.at_level(logging.INFO, "edge_inspector"):
        for n in range(500):
            remote.want(n + 4, key=None)
            remote.it.take("confirm", b"{")
    assert len(caplog.records) < 30
    assert not (tmp_path / "state").exists()
    assert remote.outcome == "rejected"
