"""The machine: device, precision, seeds, processes, CUDA graphs."""
