"""Log lines for programs: one JSON object a line.

A line is about steps, parties and counts, never about rows, numbers or keys. What an exception says stays out of it.
"""

import json
import logging
from datetime import UTC, datetime


class JsonLines(logging.Formatter):
    """time, level, logger, message, and what the caller gave as `extra={"about": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),  # check: logs-hold-no-exception
        }
        return json.dumps(line | getattr(record, "about", {}), ensure_ascii=False)
