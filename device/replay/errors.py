"""What can be wrong with a file or with what was said about it."""

from device.errors import DeviceError


class ReplayError(DeviceError):
    """The file and the arguments do not fit together; the message says what to change. Nothing was sent."""


class StalledError(DeviceError):
    """No message was acked for so long that the replay gives up; what is unacked may or may not be stored."""

    def __init__(self, seconds: float, *, ever_acked: bool) -> None:
        super().__init__(f"nothing was acked for {seconds:g} s")
        self.ever_acked = ever_acked


class RowError(Exception):
    """One row, or one cell of it, cannot be read. `reason` is counted, `text` is for a person."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text
