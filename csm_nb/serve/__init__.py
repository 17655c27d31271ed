"""A server that speaks every language that it has an adapter for, from one base, many requests side by side."""
