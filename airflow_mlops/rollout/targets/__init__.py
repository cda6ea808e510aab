"""Where traffic is split: one module per system."""
