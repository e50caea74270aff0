"""What a node takes for the time: a clock that is set wrong, runs fast or slow, and may jump.

Cores only ever see their own node's clock, as processes only see their machine's. Devices and links
go by the world's time: a wrong clock makes nothing faster.
"""

from __future__ import annotations

#: NTP slews a clock by at most 500 ppm; a broken quartz does worse.
MAX_DRIFT = 0.05


class Clock:
    """Local time is `ahead_s` at the beginning and runs `1 + drift` as fast as the world's."""

    def __init__(self, ahead_s: float = 0.0, drift: float = 0.0) -> None:
        assert abs(drift) <= MAX_DRIFT, f"a clock that drifts by {drift} is no clock"
        self._rate = 1.0 + drift
        # Local time is _local_s + _rate * (world's - _since_s).
        self._local_s = ahead_s
        self._since_s = 0.0

    def local_s(self, world_s: float) -> float:
        return self._local_s + self._rate * (world_s - self._since_s)

    def world_s(self, local_s: float) -> float:
        """When it will show `local_s`, if nothing is done to it."""
        return self._since_s + (local_s - self._local_s) / self._rate

    def jump(self, by_s: float, world_s: float) -> None:
        """At `world_s` it is put forward (a machine that was suspended) or, where `by_s` is
        negative, back, which a monotonic clock should not allow."""
        self._local_s = self.local_s(world_s) + by_s
        self._since_s = world_s

    def drifts(self, drift: float, world_s: float) -> None:
        """From `world_s` on it runs `1 + drift` as fast as the world's."""
        assert abs(drift) <= MAX_DRIFT, f"a clock that drifts by {drift} is no clock"
        self.jump(0.0, world_s)
        self._rate = 1.0 + drift
