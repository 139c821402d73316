"""The notebook panel: `session.py` is all it does without a button, `explorer.py` the panel."""
