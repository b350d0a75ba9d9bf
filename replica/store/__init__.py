"""Object stores: bytes under names.  Nothing here knows what a page is."""
