"""Images, videos and sound: nothing trains on them yet, and a row without them would be another row."""

from __future__ import annotations

from typing import Any

from stages.data.faults import RowError, what_is
from stages.data.types import Row

MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_NOTHING: tuple[Any, ...] = (None, "", [])


def refuse_media(row: Row, where: str) -> None:
    """Raises RowError for a column of images, videos or sound that holds some."""
    for column in MEDIA_COLUMNS:
        if not any(row.get(column) is empty or row.get(column) == empty for empty in _NOTHING):
            raise RowError(
                where,
                column,
                "images, videos and sound are not supported; the text alone would be another row",
                what_is(row[column]),
                "leave the column out with keep_columns if the text alone is meant, or rename it with columns",
            )
