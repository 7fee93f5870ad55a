"""What search and fine-tuning share: objectives, optimiser, the resumable loop, checkpoints."""
