"""What the cells of 01 to 03 and 05 call: each a step of teaching a model a language, in the order of the notebooks."""
