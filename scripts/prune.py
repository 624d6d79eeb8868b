#!/usr/bin/env python
"""The main job: `accelerate launch scripts/prune.py --model timm/resnet18.a1_in1k` (`--help` lists all options)."""

import sys

from hf_camphive.cli.main import prune_main

if __name__ == "__main__":
    sys.exit(prune_main())
