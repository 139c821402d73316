"""Second moments of the keys of ordinary text, which closed-form edits leave alone:
`second_moments.py` first; files that resume, and the published ones."""
