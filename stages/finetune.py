"""Train the derived network, from the searched weights, on the long-tailed labels."""

from ssnas.pipeline.finetune import finetune
from stages.cli import main

if __name__ == "__main__":
    main(("rows", "baselines"), finetune)
