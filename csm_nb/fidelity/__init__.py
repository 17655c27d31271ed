"""Stage 00: can the codec carry the language at all?"""
