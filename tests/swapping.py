"""A process that puts a foreign network in the place of a bundle's own and back, for ever: python swapping.py FILE."""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path


def main() -> None:
    network = Path(sys.argv[1])
    made = network.parent.parent
    good, foreign = (made / "good").read_bytes(), (made / "foreign").read_bytes()
    assert len(good) == len(foreign)
    (made / "swapping").touch()
    while True:
        for data in (foreign, good):
            if random.random() < 0.5:
                (made / "next").write_bytes(data)
                os.replace(made / "next", network)
            else:
                with network.open("r+b") as file:
                    file.write(data)
            time.sleep(random.uniform(0, 0.004))


if __name__ == "__main__":
    main()
