"""Recommenders that read no rationale: the references every row of the table is held against.

`family` says what each of them offers and chooses parameters; one file per family of methods;
`store` keeps what was fitted in the run directory.
"""
