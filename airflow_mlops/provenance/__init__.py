"""Where a model comes from and whether it is still that: signatures, and pickles kept apart."""
