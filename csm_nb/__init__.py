"""A workbook that teaches Sesame CSM-1B a new language: everything its notebooks call."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a CPU kernel that nothing here uses
