"""Bytes of the WAL and of LTX files: no I/O, no clock, no thread."""
