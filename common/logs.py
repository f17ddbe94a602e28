"""Log lines for programs to read: one JSON object on each line.

Lines are about steps, parties and counts, never about rows, numbers or keys. The text of an exception is left out.
"""

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """Formats time, level, logger and message, and the fields in the caller's `extra={"about": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),  # check: logs-hold-no-exception
        }
        return json.dumps(line | getattr(record, "about", {}), ensure_ascii=False)
