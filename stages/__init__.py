"""One small script per DVC stage, over the `ssnas` core."""
