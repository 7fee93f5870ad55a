"""Read the test images, once, and write every figure of the fine-tuned network on them."""

from ssnas.pipeline.evaluate import evaluate
from stages.cli import main

if __name__ == "__main__":
    main(("rows", "baselines"), evaluate)
