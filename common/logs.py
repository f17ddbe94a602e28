"""Log lines: one line of text for people, or one JSON object for programs.

Lines are about steps, parties and counts, never about rows, numbers or keys. The text of an exception is left out.
"""

import json
import logging
from datetime import UTC, datetime

from common.text import shown


class TextLines(logging.Formatter):
    """Formats a record as one line that is safe to show: a message may quote what another party sent."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))  # check: log-lines-are-escaped


class JsonLines(logging.Formatter):
    """Formats time, level, logger and message, and the fields in the caller's `extra={"about": {...}}`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),  # check: logs-hold-no-exception
        }
        return json.dumps(line | getattr(record, "about", {}))  # in ASCII, for terminals that show it
