"""Mimi: codes, round trips and streams, by transformers or moshi, with one face."""
