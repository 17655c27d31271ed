"""What is measured of a voice: F0, its turns, voice quality, stød; words built to have them; where they are in recordings."""
