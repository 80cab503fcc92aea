"""Images in registries: what a name means, and its layers, fetched and checked."""
