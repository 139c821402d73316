"""What the notebook panel is made of: `session.py` is all it does without a button, `effects.py`
what an edit changes, `frame.py` the step that runs and its page."""
