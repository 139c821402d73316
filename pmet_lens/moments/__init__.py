"""Second moments of the keys of ordinary text, which closed-form edits leave alone:
`second_moments.py` first (one pass over text), `moment.py` (its result per site, with its error),
`moment_files.py` (files; a pass that can be resumed), `published.py` (files of ROME and MEMIT)."""
