"""How a device client behaves where the protocol leaves it a choice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How a client behaves; every duration in seconds."""

    # Reconnecting: full jitter between 0 and a ceiling that doubles from the base to the cap.
    backoff_base_s: float = 0.5
    backoff_cap_s: float = 60.0
    # How long Hello may stay unanswered, the time to connect included.
    welcome_timeout_s: float = 20.0
    # How long messages may be out without progress before the stream is given up.
    ack_timeout_s: float = 60.0
    # Another client took over the device: come back after a delay in [d, 2d], or (None) fail with
    # SupersededError. Two clients that both come back at once would throw each other out for ever.
    superseded_delay_s: float | None = 300.0
    # Say Hello with the dictionary's id alone the first time: right for one of many equal devices.
    dictionary_known: bool = False
    # How long leaving `async with` waits for the last acks.
    close_deadline_s: float = 10.0
