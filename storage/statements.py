"""SQL statements by name, from the files in `storage/sql/`.

A statement begins with a line `-- name: the_name`; comment lines after it say why it exists. It ends where the next
one begins.
"""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import LiteralString, cast

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


@cache
def statements(file: str) -> Mapping[str, LiteralString]:
    """The statements of one file, such as `statements("ingest.sql")["lock_streams"]`.

    Raises:
        ValueError: a name occurs twice.
    """
    _, *parts = _NAME.split(resources.files("storage").joinpath("sql", file).read_text("utf-8"))
    names, texts = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{file}: a statement name occurs twice")
    # The text comes from a file of this package: as trustworthy as the code beside it.
    return MappingProxyType({n: cast("LiteralString", t.strip()) for n, t in zip(names, texts, strict=True)})
