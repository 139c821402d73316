"""The panel of `pl.explore`: `explorer.py` opens models, and a file per tab."""
