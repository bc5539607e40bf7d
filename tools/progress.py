"""One line per long phase: a bar with an estimate on a terminal, a line now and then in a log.

Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

bar_width = 24
seconds_between_lines = 20.0  # where the output is a file or a pipe


def clock(seconds: float) -> str:
    """Minutes and seconds, as 1:05."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{rest:02d}"


class Phase:
    """A named phase: `update` as often as you like, `finish` once."""

    def __init__(self, title: str):
        self.title = title
        self.began = time.monotonic()
        self.shown = self.began
        self.fraction = 0.0
        self.note = ""
        self.terminal = sys.stdout.isatty()
        if self.terminal:
            self.draw()
        else:
            print(f"{title} ...", flush=True)

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def remaining(self) -> str:
        if self.fraction <= 0.02 or self.elapsed() < 2:
            return ""
        return ", " + clock(self.elapsed() * (1 / self.fraction - 1)) + " left"

    def line(self) -> str:
        full = int(bar_width * self.fraction)
        bar = "#" * full + "." * (bar_width - full)
        times = clock(self.elapsed()) + self.remaining()
        return f"{self.title:<22} [{bar}] {self.fraction:4.0%}  {times}  {self.note}"

    def draw(self) -> None:
        columns = shutil.get_terminal_size().columns
        print("\r\x1b[2K" + self.line()[: columns - 1], end="", flush=True)

    def update(self, fraction: float | None = None, note: str | None = None) -> None:
        if fraction is not None:
            self.fraction = min(max(fraction, self.fraction), 1.0)
        if note is not None:
            self.note = note
        now = time.monotonic()
        if self.terminal:
            self.draw()
        elif now - self.shown >= seconds_between_lines:
            self.shown = now
            print("  " + self.line(), flush=True)

    def clear(self) -> None:
        """Makes room for a message that must stay on the screen."""
        if self.terminal:
            print("\r\x1b[2K", end="", flush=True)

    def finish(self, note: str = "") -> None:
        self.clear()
        print(f"{self.title:<22} {clock(self.elapsed())}  {note}".rstrip(), flush=True)


def follow(command: list[str], on_line: Callable[[str], None], on_tick: Callable[[], None]) -> int:
    """Runs a command, hands over each line it prints, and ticks five times a second meanwhile."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True,
    )  # fmt: skip
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    try:
        while True:
            try:
                line = lines.get(timeout=0.2)
            except queue.Empty:
                on_tick()
                continue
            if line is None:
                return process.wait()
            on_line(line)
    except BaseException:
        stop(process)
        raise


def stop(process: subprocess.Popen) -> None:
    """Ends a command and its children, politely first, and waits until it is gone."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
