"""Who runs operations and picks up the pieces."""
