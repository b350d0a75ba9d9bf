"""The engine: capture, spool, upload and restore.  Import its modules, not this package."""
