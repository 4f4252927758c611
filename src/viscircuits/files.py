"""Writing files so that a crash never leaves half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Write = Callable[[Any], Any]


def write_atomically(path: Path, content: str | bytes | Callable[[Write], None]) -> Path:
    """Write to a temporary file beside `path`, then rename it over `path`. Returns `path`.

    `content` may be a function that is given how to write bytes, for what need not be in memory at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            if callable(content):
                content(file.write)
            else:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
