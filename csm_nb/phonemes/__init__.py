"""Phonemes: text to IPA, and espeak-ng, which does most of it."""
