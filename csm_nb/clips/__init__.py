"""Which clips of a corpus are used, and why others are not: their faults, their ends and level, what is heard in them."""
