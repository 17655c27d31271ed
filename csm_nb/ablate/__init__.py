"""What one change at a time is worth."""
