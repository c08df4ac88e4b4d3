from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class HeldInterrupt:
    """Lets Ctrl-C wait while an optimizer moves weights: within it, some have moved and others not.

    A second one does not wait. In other threads than the first, where Python handles no signals, nothing is held.

    Example:
        >>> held = HeldInterrupt()
        >>> held.hold()
        >>> signal.raise_signal(signal.SIGINT)
        >>> try:
        ...     held.let_go()
        ... except KeyboardInterrupt:
        ...     print("now")
        now
    """

    def __init__(self) -> None:
        self._before: Any = None
        self._pending = False

    def hold(self) -> None:
        """From here on it waits."""
        if self._before is not None or threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGINT)
        if callable(before):
            self._before, self._pending = before, False
            signal.signal(signal.SIGINT, self._note)

    def let_go(self, *, forget: bool = False) -> None:
        """Do what would have been done, if there was one.

        Args:
            forget: something else has ended the step: it is not done.
        """
        if self._before is None:
            return
        before, self._before = self._before, None
        signal.signal(signal.SIGINT, before)
        if self._pending and not forget:
            before(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pending:
            self._before(number, frame)
        self._pending = True
