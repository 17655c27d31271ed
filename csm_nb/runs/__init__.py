"""Runs of the notebooks: parameters, folders, the chain of stages, pages."""
