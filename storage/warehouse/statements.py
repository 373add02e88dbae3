"""The warehouse's SQL by name, from the files in `storage/warehouse/sql/`, in the form of `storage.statements`."""

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import LiteralString

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)


@cache
def statements(file: str) -> Mapping[str, LiteralString]:
    """The statements of one file, without their comments, such as `statements("catalog.sql")["lock_states"]`.

    Raises:
        ValueError: a name occurs twice.
    """
    _, *parts = _NAME.split(resources.files("storage.warehouse").joinpath("sql", file).read_text("utf-8"))
    names, texts = parts[::2], parts[1::2]
    if len(set(names)) != len(names):
        raise ValueError(f"{file}: a statement name occurs twice")
    # Comments stay behind: drivers look for parameters and quotes in them too.
    return MappingProxyType(
        # The text comes from a file of this package: as trustworthy as the code beside it.
        {n: _COMMENT.sub("", t).strip() for n, t in zip(names, texts, strict=True)}
    )
