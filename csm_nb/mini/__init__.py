"""The recipe that made the miniature models under models/."""
