"""The parts that search, pre-training and fine-tuning share.

- `images`: the images of a training, on its device;
- `objectives`: the losses to minimise, Barlow Twins among them, and the inputs they draw;
- `batches`: each step's inputs;
- `optimizer`: the optimiser of the weights ω;
- `trainer`: the resumable loop of epochs and steps;
- `checkpoint`: the loop's state in a file;
- `monitor`: figures that a search shows and does not use.
"""
