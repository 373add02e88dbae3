"""What arguments of several commands may be: each is the `type` of an argument, and refuses as argparse expects."""

import argparse

from runtime.config import duration


def seconds(text: str) -> float:
    """A duration such as 10m, in seconds.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        return duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {duration.allowed}") from None


def label(text: str) -> tuple[str, str]:
    """A label, KEY=VALUE.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value
