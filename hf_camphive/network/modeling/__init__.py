"""Load pruned networks in transformers and timm, and define networks for small images.

`modeling_camphive.py` and `cifar.py` are copied into every saved folder as remote code, so they import only torch, timm,
transformers and each other. Start with `resize` in `modeling_camphive.py`.
"""
