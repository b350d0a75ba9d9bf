"""The replicating SQLite VFS: a doorbell and a gate around the default VFS."""
