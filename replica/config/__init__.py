"""Settings: where they come from, what they say, and what they mean."""
