"""The machine: its device and precision, several processes as one, steps as CUDA graphs."""
