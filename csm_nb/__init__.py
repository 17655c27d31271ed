"""A workbook that teaches Sesame CSM-1B a new language: everything its notebooks call."""
