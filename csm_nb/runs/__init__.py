"""The stages: parameters, run folders, headless runs, pages."""
