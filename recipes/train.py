r"""Train a network and follow its tangent kernel.

At log-spaced steps this logs the alignment of the kernel with the labels (sketched, with its standard error, on
training and test examples), the effective rank and participation ratio of the kernel (exact, on a few training
examples), and the complexity of the path that the weights have followed. Training examples count with the labels that
the network is trained on, including redrawn ones; test labels are clean. training/loop.py holds the training loop.

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4 \
        --regularizer complexity --weight 0.016
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py \
        --config recipes/configs/paper/cifar10-vgg19.yaml --data_path FOLDER
    torchrun --nproc_per_node 2 recipes/train.py --cpu                        # two CPU processes
    WANDB_MODE=offline accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --with_tracking

Each run creates a new folder with config.json, examples.safetensors (the examples, their labels, and which ones are
difficult), metrics.jsonl (without clock times, so the same flags give the same bytes) and figure.png. A run with
--checkpointing_steps can be killed at any time and continues exactly from its newest checkpoint:

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --resume_from_checkpoint runs/FOLDER
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200 \
        --output_dir runs/mine --resume_from_checkpoint latest                # starts, or continues if started before

On SIGTERM the run finishes its step, writes a checkpoint and exits with status 143. The signal must reach this
process: torchrun forwards it, accelerate launch does not (send it to the launcher's child).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # python -m does not look here

from training import flags, loop, messages
from training.config import Config


@messages.in_words()
def main() -> None:
    """Run from the command line."""
    config, resume = flags.parse(Config, __doc__)
    loop.train(config, resume)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads outlive the process group, and a thread that still drops its last work during interpreter
        # shutdown aborts the process. Everything is written by now, so skip the shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
