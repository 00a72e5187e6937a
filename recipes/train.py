r"""What happens to the tangent kernel of a network while it is trained?

Trains a network and follows, at log-spaced steps, the alignment of its tangent kernel with the labels (streamed sketch,
with standard error, on training and test examples), the kernel's effective rank and participation ratio (exact, on a
few training examples), and the complexity of the path that the weights take. Training examples count with the labels
that the network is trained on, redrawn ones included; test labels are clean.

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --label_noise 0.4 \
        --regularizer complexity --weight 0.016
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py \
        --config recipes/configs/paper/cifar10-vgg19.yaml --data_path FOLDER
    torchrun --nproc_per_node 2 recipes/train.py --cpu                        # two CPU processes
    WANDB_MODE=offline accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --with_tracking

Each run makes a new folder with config.json, examples.safetensors (which examples, labels, and which are difficult),
metrics.jsonl (no clock times: the same flags give the same bytes) and figure.png. With --checkpointing_steps it can be
killed at any time and goes on exactly where the newest checkpoint is:

    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --resume_from_checkpoint runs/FOLDER
    accelerate launch --config_file recipes/configs/single.yaml recipes/train.py --checkpointing_steps 200 \
        --output_dir runs/mine --resume_from_checkpoint latest                # begins, or goes on, when started again

On SIGTERM it finishes the step, writes a checkpoint and leaves with exit status 143. The signal must reach this
process: torchrun passes it on, accelerate launch does not (send it to the launcher's child).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # where python -m does not look

from training import flags, loop, messages
from training.config import Config


def main() -> None:
    """Run from the command line."""
    with messages.in_words():
        config, resume = flags.parse(Config, __doc__)
        loop.train(config, resume)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Gloo's threads outlive the process group, and one that still drops its last work while the interpreter exits
        # aborts the process. All is written and ended by now: leave without the interpreter's farewell.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
