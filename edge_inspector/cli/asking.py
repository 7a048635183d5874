"""Verbs for one part and one command: trigger, command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from edge_inspector.cli.remote import Address, BrokerOption, ByOption, DeviceOption, KeyOption
from edge_inspector.cli.shown import COLOURS, ConfigOption, JsonOption, err, out, print_json
from edge_inspector.messages import Command, Topics, TriggerRequest, VerdictMessage
from edge_inspector.remote.asking import Asking, fresh_id
from edge_inspector.results import Verdict
from edge_inspector.schema import validate

StationArgument = Annotated[str, typer.Argument(help="as in line.yaml")]
ProductOption = Annotated[str | None, typer.Option("--product", help="one of the station's products")]
WaitOption = Annotated[float, typer.Option("--wait-s", min=0.1, help="for the answer")]
_CODES = {Verdict.PASS: 0, Verdict.FAIL: 1, Verdict.UNDECIDED: 2}


def trigger(
    station: StationArgument,
    id_: Annotated[str | None, typer.Option("--id", help="of the trigger; one that came before is answered again")] = None,
    part_id: Annotated[str | None, typer.Option("--part-id", help="of the part, for its record")] = None,
    product: ProductOption = None, wait_s: WaitOption = 10.0,
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Have one part inspected and tell its verdict. Exit code 0: pass, 1: fail, 2: undecided, or none."""
    values = {"trigger_id": id_ or fresh_id(), "part_id": part_id, "product": product}
    request = validate(TriggerRequest, values, "trigger")
    with Address(config, device, broker).connected(fresh_id(), _subscriptions) as reached:
        verdict = Asking(*reached).trigger(station, request, wait_s)
    if verdict is None:
        err.print(f"no verdict within {wait_s:g} s: not ok; the result, if there is one: edge-inspector watch --start all")
        raise typer.Exit(2)
    print_json(verdict.model_dump(mode="json", by_alias=True)) if as_json else _show(verdict)
    raise typer.Exit(_CODES[verdict.verdict])


def command(
    name: Annotated[str, typer.Argument(help="halt, start, select-product or self-test")],
    station: StationArgument,
    product: ProductOption = None, wait_s: WaitOption = 10.0,
    config: ConfigOption = Path("device.yaml"), device: DeviceOption = None, broker: BrokerOption = None,
    key: KeyOption = None, by: ByOption = None, as_json: JsonOption = False,
) -> None:  # fmt: skip
    """Give a station one command, signed. Exit code 0: carried out, 1: refused, 2: not answered."""
    address, client = Address(config, device, broker, key, by), fresh_id()
    values = {"request_id": fresh_id(), "client": client, "station": station, "product": product, "command": name,
              "by": address.name}  # fmt: skip
    asked, signer = validate(Command, values, "command"), address.signer
    with address.connected(client, lambda topics: Asking.subscriptions(topics, client)) as reached:
        reply = Asking(*reached).command(asked, signer, wait_s)
    if as_json:
        print_json(reply.model_dump(mode="json", by_alias=True))
    elif reply.error is None:
        out.print(escape(f"{station}: {name} {product or ''}".rstrip()))
    else:
        err.print(escape(f"refused: {reply.error.message}"), style="red")
        err.print(escape(f"  hint: {reply.error.hint}") if reply.error.hint else "")
    raise typer.Exit(0 if reply.ok else 1)


def _subscriptions(topics: Topics) -> tuple[str, ...]:
    return Asking.subscriptions(topics, fresh_id())


def _show(verdict: VerdictMessage) -> None:
    colour, words = COLOURS[verdict.verdict], verdict.reason.value.replace("_", " ")
    again = ", judged before" if verdict.repeated else ""
    out.print(f"[{colour}]{verdict.verdict.value}[/]  {escape(verdict.trigger_id)}  {escape(words)}{again}")
    if verdict.detail is not None:
        err.print(escape(verdict.detail))
