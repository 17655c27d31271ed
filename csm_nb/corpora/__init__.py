"""Any source to rows, rows to clips that can be used, to a split, to codec tokens."""
