"""What an object store really does: checks against the live store, and a verdict."""
