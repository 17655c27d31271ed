"""Text: sentences to say, numbers in words, and what two texts are compared by."""
