"""Makes the installation beside this: run with the code of the release that it is of, before `sources:` was in device.yaml.

`cd CHECKOUT_OF_THAT_RELEASE; python make.py FOLDER`. A remote line is in force, a release of a bundle was rolled out, and results
that no broker has had wait in the outbox.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

from edge_inspector import pictures
from tests.line import DaemonProcess, Mosquitto, collected, listening, subscribing, until
from tests.test_remote import confirmed, outcome, want
from tests.tiny import picture, tiny_bundle

PICTURES = (130, 140, 150, 250)


def document(version: int) -> dict[str, object]:
    """A station whose folder, and one whose pipeline, no device.yaml of that release lists."""
    recipe = {"cameras": {"top": {"rois": {"all": {"bundle": "tiny"}}}}}
    press = {"product": "tiny", "products": {"tiny": "whole"}, "cameras": {"top": {"uri": "dir://pictures?loop=1&fps=3"}}}
    belt = {
        "trigger": "software", "product": "tiny", "products": {"tiny": "whole"},
        "cameras": {"top": {"uri": "gst:videotestsrc is-live=true ! video/x-raw,width=32,height=32,framerate=10/1"}},
    }  # fmt: skip
    return {
        "schema": "ei.line.v1",
        "version": version,
        "stations": {"press": press, "belt": belt},
        "recipes": {"whole": recipe},
    }


def make(folder: Path, port: int) -> None:
    """What lies in the folder of a device."""
    (folder / "pictures").mkdir(parents=True)
    for number, level in enumerate(PICTURES):
        pictures.write(folder / "pictures" / f"{number}.png", picture(level))
    made = tiny_bundle(folder.parent / "made").folder
    shutil.copytree(made, folder / "bundles" / "tiny")
    shutil.copytree(made.parent / "trust", folder / "trust")
    (folder / "device.yaml").write_text(
        "schema: ei.device.v1\nidentity: {site: plant, line: line, device: edge}\n"
        f"broker: {{host: 127.0.0.1, port: {port}, keepalive_s: 5}}\nstorage: {{results_mb: 4, evidence_mb: 0}}\n"
    )
    (folder / "line.yaml").write_text(json.dumps(document(1)))


def main() -> None:
    """See above."""
    with tempfile.TemporaryDirectory() as scratch:
        broker, folder = Mosquitto(Path(scratch) / "mosquitto").start(), Path(scratch) / "device"
        make(folder, broker.port)
        release = tiny_bundle(folder.parent / "made", place="release-2", release=2).folder
        with DaemonProcess(folder) as daemon, listening(broker.port) as listener, subscribing(broker.port) as subscriber:
            until(lambda: any(r["ready"] for r in listener.of("ready", "press")), 60, "ready")
            want(listener, document(2))
            outcome(listener, "trial", 60)
            confirmed(listener, 2)
            order = {"by": "anna", "bundle": "tiny", "release": 2, "source": str(release), "shadow_parts": 0}
            listener.say(order, "bundle", "tiny", "desired", retain=True)
            until(
                lambda: (listener.of("bundle", "tiny", "reported")[-1].get("trial") or {}).get("version") == 2, 60, "release 2"
            )
            for _ in range(8):
                listener.say({"by": "ben", "version": 2, "action": "confirm"}, "bundle", "tiny", "confirm")
                time.sleep(1)
            collected(subscriber, 10)
            broker.kill()
            time.sleep(3)
            assert daemon.stop() == 0
        with closing(sqlite3.connect(folder / "state" / "outbox.db", isolation_level=None)) as database:
            database.execute("VACUUM")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for path in (folder / "log", folder / "state" / "lock", folder / "state" / "ballast"):  # a megabyte of nothing
            path.unlink()
        shutil.copytree(folder, sys.argv[1], dirs_exist_ok=True)


if __name__ == "__main__":
    main()
