"""The engine's CPU backend: kernels of the project's own, compiled on first use."""
