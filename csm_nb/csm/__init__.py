"""The speech model: loaded, adapters put on it, switched and saved; attention of packed rows."""
