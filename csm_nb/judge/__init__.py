"""What is heard in a clip: language ID, recognisers, error rates, intervals. It speaks nothing."""
