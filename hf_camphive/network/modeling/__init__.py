"""Load pruned networks in transformers and timm, and define networks for small images.

`modeling_camphive.py` loads pruned networks, `resizing.py` changes widths, `layers.py` and `cifar.py` define layers and
networks. All four are copied into every saved folder as remote code, so they import only torch, timm, transformers and each
other. Start with `resize` in `resizing.py`.
"""
