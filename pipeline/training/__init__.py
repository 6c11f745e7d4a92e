"""Training of ARMs and of what they are compared with."""
