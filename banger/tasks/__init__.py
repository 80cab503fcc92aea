"""In which order things are done, and how they are undone."""
