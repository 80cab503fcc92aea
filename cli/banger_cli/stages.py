"""The events of an operation as lines: one per step as it ends, a ticking one for what runs now."""

from __future__ import annotations

import time
from typing import Any

from banger import layout
from banger_cli.screen import GREEN, RED, YELLOW, Screen

Json = dict[str, Any]


class Stages:
    """Draw the events of one operation, and of those it waits for, on a screen."""

    def __init__(self, op: str, screen: Screen):
        self.turned_back = False
        """The operation is undone, or will be as soon as a step has noticed that it was cancelled."""
        self.needless = False
        """What was asked for was so already."""
        self._op = op
        self._screen = screen
        self._titles: dict[str, list[str]] = {}
        self._running: dict[str, tuple[str, int]] = {}
        self._message = ""
        self._draw = {
            "op.requested": self._requested,
            "op.parked": self._parked,
            "op.waiting": self._parked,
            "op.cancel-requested": self._cancel_requested,
            "op.reopened": self._reopened,
            "op.claimed": self._claimed,
            "step.started": self._started,
            "step.progress": self._progress,
            "step.done": self._done,
            "step.failed": self._failed,
            "op.undoing": self._undoing,
            "undo.started": self._undo_started,
            "undo.done": self._undo_done,
            "undo.failed": self._failed,
            "op.ended": self._ended,
        }

    def feed(self, event: Json) -> None:
        """Draw what one event changes; a type that is not known is nothing to see."""
        draw = self._draw.get(event["type"])
        if draw is not None:
            draw(event, event["data"])
            self.tick()

    def tick(self) -> None:
        """Draw the running step with its time so far."""
        if not self._running:
            return
        op, (title, since_us) = list(self._running.items())[-1]
        # The daemon's boot clock is ours: the same host.
        spent_s = max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - since_us / 1e6)
        message = f"  {self._message}" if self._message else ""
        self._screen.status(self._stage(op, "·", title, f"{spent_s:.1f}s") + message)

    def close(self) -> None:
        """Take the live line away."""
        self._screen.clear()

    def _requested(self, event: Json, data: Json) -> None:
        self._titles[event["op"]] = data.get("titles") or data["steps"]
        if event["op"] != self._op:
            subject = next((str(value) for value in data["args"].values() if isinstance(value, str)), "")
            self._screen.line(f"  › {data['kind']} {subject}".rstrip())

    def _parked(self, event: Json, data: Json) -> None:
        self._run(event, data["reason"])
        if not self._screen.live:
            self._screen.line(f"{self._indent(event['op'])}… {data['reason']}")

    def _cancel_requested(self, event: Json, _: Json) -> None:
        self.turned_back = self.turned_back or event["op"] == self._op

    def _reopened(self, event: Json, data: Json) -> None:
        if event["op"] == self._op:
            self.turned_back = data.get("back", False)

    def _claimed(self, event: Json, _: Json) -> None:
        self._running.pop(event["op"], None)

    def _started(self, event: Json, data: Json) -> None:
        self._run(event, data.get("title") or data["name"])

    def _progress(self, event: Json, data: Json) -> None:
        self._message = data["message"]
        if not self._screen.live:
            self._screen.line(f"{self._indent(event['op'])}  {data['message']}")

    def _done(self, event: Json, data: Json) -> None:
        self.needless = self.needless or (event["op"] == self._op and data.get("last", False))
        self._end(event, "✓", self._title(event), data["seconds"], GREEN)

    def _failed(self, event: Json, data: Json) -> None:
        again = data.get("retry_in_s")
        fate = "" if again is None else f" (again in {layout.seconds(again)})"
        words = data["error"]["message"].splitlines()[0]
        self._running.pop(event["op"], None)
        self._screen.line(f"{self._indent(event['op'])}✗ {self._title(event)}: {words}{fate}", RED)

    def _undoing(self, event: Json, data: Json) -> None:
        words = data["error"]["message"].splitlines()[0]
        self.turned_back = self.turned_back or event["op"] == self._op
        self._running.pop(event["op"], None)
        self._screen.line(f"{self._indent(event['op'])}↩ undoing: {words}", YELLOW)

    def _undo_started(self, event: Json, _: Json) -> None:
        self._run(event, f"undo {self._title(event)}")

    def _undo_done(self, event: Json, data: Json) -> None:
        self._end(event, "↩", self._title(event), data["seconds"], YELLOW)

    def _ended(self, event: Json, _: Json) -> None:
        self._running.pop(event["op"], None)

    def _run(self, event: Json, title: str) -> None:
        self._running.pop(event["op"], None)  # so that it becomes the last, the one that is shown
        self._running[event["op"]] = (title, event["boot_us"])
        self._message = ""

    def _end(self, event: Json, mark: str, title: str, spent_s: float, colour: str) -> None:
        self._running.pop(event["op"], None)
        self._message = ""
        self._screen.line(self._stage(event["op"], mark, title, layout.seconds(spent_s)), colour)

    def _title(self, event: Json) -> str:
        titles = self._titles.get(event["op"], [])
        step = event["data"]["step"]
        return titles[step] if step < len(titles) else str(event["data"]["name"])

    def _stage(self, op: str, mark: str, title: str, spent: str) -> str:
        return f"{self._indent(op)}{mark} {title:<16}{spent:>6}"

    def _indent(self, op: str) -> str:
        return "  " if op == self._op else "    "
