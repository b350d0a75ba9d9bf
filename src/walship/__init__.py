"""walship: replicates SQLite to object storage from inside the application."""

from __future__ import annotations

__version__ = "0.1.0"
