"""How a guest reaches the world and the host reaches a guest."""
