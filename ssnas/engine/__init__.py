"""Mixed operations, fast: what `Cell.forward` defines, computed side by side (see README.md)."""
