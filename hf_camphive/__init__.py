"""Make image classifiers from the Hugging Face Hub smaller for real.

    import hf_camphive
    model = hf_camphive.from_pretrained("user/resnet18-camphive")

Names are loaded on first use, so that importing the package alone stays quick; transformers' and timm's own readers know
pruned models as soon as it is imported.
"""

from importlib import import_module
from typing import Any

from hf_camphive.network.modeling import modeling_camphive  # noqa: F401  (registers the readers)

__version__ = "0.1.0"

_HOMES = {
    "CampHiVeConfig": "hf_camphive.core.config",
    "CampHiVePruner": "hf_camphive.runs.pruner",
    "CampHiVeError": "hf_camphive.core.errors",
    "CampHiVeForImageClassification": "hf_camphive.network.modeling.modeling_camphive",
    "DataOptions": "hf_camphive.training.data.loaders",
    "PrunePlan": "hf_camphive.core.plan",
    "expand": "hf_camphive.network.surgery.widening",
    "fold": "hf_camphive.network.surgery.folding",
    "from_pretrained": "hf_camphive.hub.loading",
    "load_base": "hf_camphive.hub.loading",
    "load_loaders": "hf_camphive.training.data.loaders",
    "register_criterion": "hf_camphive.pruning.scoring.criteria",
    "register_merge_rule": "hf_camphive.pruning.merging.rules",
    "register_operation": "hf_camphive.network.graph.handlers",
}
__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
