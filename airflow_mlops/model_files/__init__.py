"""The files of a model, looked at without loading any: what each of them is, and one digest of all."""
