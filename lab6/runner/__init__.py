"""The parts of run_notebooks.py, which says what they do together."""
