"""What is in a guest, and how it is reached."""
