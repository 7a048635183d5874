"""Whether a station would judge a part now, and why not: the one answer that ready, heartbeat, verdicts and health give.

What must never be: a part judged, or a station told ready, while people, its networks or the device stand against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from edge_inspector.cameras import Camera
from edge_inspector.config import StationConfig
from edge_inspector.messages import Cause, Ready
from edge_inspector.selftest import SelfTest
from edge_inspector.setting import Setting


class Readiness:
    """Of one station. Read by any thread."""

    def __init__(
        self, name: str, config: StationConfig, setting: Setting, cameras: Mapping[str, Camera], self_test: SelfTest,
        promise: Callable[[], str], finds: Callable[[], float | None],
    ) -> None:  # fmt: skip
        """It starts `preoperational`: nothing is judged before the networks are open. `promise`: why that does not hold;
        `finds`: what its thresholds find.
        """
        self.name, self.config, self.setting = name, config, setting
        self.is_building = False
        """Whether engines are built, which takes minutes."""
        self._cameras, self._self_test, self._orders = cameras, self_test, setting.orders
        self._state, self._why = "preoperational", "starting"
        self._busy = False
        self._promise, self._finds = promise, finds
        self._told: tuple[str, str] | None = None

    @property
    def state(self) -> str:
        """How far its networks are: preoperational, error, or what they are ready for."""
        return self._state

    @property
    def why(self) -> str:
        """Why its networks do not judge; empty where they do."""
        return self._why

    @property
    def product(self) -> str | None:
        """Of parts whose trigger names none: what was selected, else the configuration's."""
        return self._orders.of(self.name).product or self.config.product

    @property
    def hindrance(self) -> str:
        """Why a part that comes now would not be judged; empty: it would be."""
        return self.standstill or self._camera_hindrance()

    @property
    def standstill(self) -> str:
        """Why no part is judged, whatever its cameras give."""
        return self._own_standstill() or self.setting.hindrance()

    def _own_standstill(self) -> str:
        standing = self._orders.of(self.name)
        if standing.lost:
            return f"{standing.lost}; it is not known what was ordered: select a product, then start"
        if standing.halted:
            return "halted by command"
        return self._why or self._lost_product() or self._self_test.hindrance

    def _lost_product(self) -> str:
        """A station never goes over to another product by itself."""
        product = self._orders.of(self.name).product
        if product is None or product in self.config.products:
            return ""
        return f"product {product} was selected, and the configuration has no such product here: select another one"

    def _camera_hindrance(self) -> str:
        for name, camera in self._cameras.items():
            if camera.hindrance:
                return f"camera {name}: {camera.hindrance}"
        return ""

    def become(self, state: str, why: str = "") -> None:
        """Another state of its networks; `why` they do not judge."""
        self._state, self._why = state, why

    def ready(self, *, busy: bool | None = None) -> Ready:
        """What is told of it. `busy`: a part is being inspected, from now on or no more."""
        self._busy = self._busy if busy is None else busy
        why, standing, product = self.hindrance, self._orders.of(self.name), self.product
        promise = self._promise()
        self._told = why, promise
        return Ready.model_validate({
            "schema": "ei.ready.v1", "station": self.name, "ready": not why and not self._busy, "busy": self._busy,
            "state": self._state_told(), "reason": why, "product": product, "product_ordered": standing.product is not None,
            "recipe": self.config.products.get(product) if product else None, "session": self.setting.session,
            "tested_at": self._self_test.at, "promise": promise, "finds": self._finds(),
        })  # fmt: skip

    @property
    def is_told(self) -> bool:
        """Whether the answer is still the one that was told last."""
        return (self.hindrance, self._promise()) == self._told

    def _state_told(self) -> str:
        if self._orders.of(self.name).halted:
            return "halted"
        if self._busy:
            return "single_execution"
        is_stopped = self._state != "preoperational" and (self._lost_product() or self._self_test.hindrance)
        return "error" if is_stopped else self._state

    def causes(self) -> list[Cause]:
        """What keeps it from judging, for health; cameras tell for themselves."""
        why = self.standstill
        if not why or (self._state == "preoperational" and not self.is_building):
            return []
        standing = self._orders.of(self.name)
        if standing.halted and not standing.lost:
            return [Cause(code="halted", severity="check_function", thing=self.name, text=why)]
        passes_by_itself = self.is_building or not self._own_standstill()
        severity = "check_function" if passes_by_itself else "failure"
        return [Cause.model_validate({"code": "not_ready", "severity": severity, "thing": self.name, "text": why})]
