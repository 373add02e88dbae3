"""The guard against a client that does not read what a stream sends it.

What was sent cannot be taken back: it stays in memory until the client reads it, or until the connection ends. So a
stream sends one message at a time, and ends when its client leaves one unread for too long.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gateway.status import Reason, Refusal


class ReaderWatch:
    """Watches the writes of one stream. `gave_up` is called with the refusal, from the event loop, as soon as a message
    was left unread for `patience_s` seconds; its write is still under way then.
    """

    def __init__(self, patience_s: float, gave_up: Callable[[Refusal], None]) -> None:
        self._patience_s = patience_s
        self._gave_up = gave_up
        self._refusal: Refusal | None = None

    @property
    def is_stuck(self) -> bool:
        """Whether a message was left unread for too long: nothing more should be sent."""
        return self._refusal is not None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """The block writes one message; it ends when the transport has taken it, as fast as the client reads.

        The write is never cut off: a status that is sent while a write is under way can get lost, and the client would
        wait for it for ever. It ends when the client reads on, or with the connection.

        Raises:
            Refusal: SLOW_READER, after the block, when it took too long.
        """
        giving_up = asyncio.get_running_loop().call_later(self._patience_s, self._give_up)
        try:
            yield
        finally:
            giving_up.cancel()
        if self._refusal is not None:
            raise self._refusal

    def _give_up(self) -> None:
        text = f"a message was left unread for {self._patience_s:g} s; the rest was not sent"
        self._refusal = Refusal(Reason.SLOW_READER, text)
        self._gave_up(self._refusal)
