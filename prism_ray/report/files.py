"""Writing a document whole or not at all."""

import os
import uuid
from pathlib import Path

from prism_ray.storage import storage_errors


def write_document(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8; a reader sees the old document or the new one.

    Raises:
        StorageError, InputError: no space left, or not permitted; one line with the way out.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
