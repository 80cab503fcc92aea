"""Who may ask, what they may ask, and how they are answered."""
