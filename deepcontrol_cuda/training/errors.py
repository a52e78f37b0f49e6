"""What a user can mend."""

from __future__ import annotations


class TrainingError(Exception):
    """Settings, data or files are not what they must be; the message says what is wanted and what helps."""
