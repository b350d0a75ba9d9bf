"""Replication from beside an application that does not open its database through the VFS."""
