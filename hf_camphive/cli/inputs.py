"""The network and the images that a command's options name."""

from dataclasses import dataclass
from typing import Any

from hf_camphive.cli.arguments import option
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError

BUNDLED_MODEL, BUNDLED_DATASET = "digits_wide_resnet", "digits"


@dataclass
class ModelArguments:
    """Which network."""

    model: str = option(
        BUNDLED_MODEL,
        "Hub id (timm/resnet18.a1_in1k, with @revision if you like), a folder, a network name with --checkpoint, or "
        "digits_wide_resnet or digits_resnet, which are bundled.",
        aliases=["--model_name_or_path", "--model-name-or-path"],
    )
    checkpoint: str | None = option(None, "Safetensors file with the weights of a timm network that --model names.")


@dataclass
class DataArguments:
    """Which images."""

    dataset: str | None = option(
        None,
        "Hub id, a folder (parquet, class folders, save_to_disk), or digits, which is bundled. By default digits for "
        "digits_* networks, cifar10 for cifar_* networks, else imagenet-1k.",
        aliases=["--dataset_name", "--dataset-name"],
    )
    dataset_config_name: str | None = option(None, "Configuration of the dataset, where it has several.")
    image_column_name: str | None = option(None, "Image column; found by type if not given.")
    label_column_name: str | None = option(None, "Label column; found by type if not given.")
    streaming: bool = option(False, "Read the dataset as a stream instead of downloading it.")
    max_train_samples: int | None = option(None, "Use at most this many training images.")
    max_eval_samples: int | None = option(None, "Use at most this many validation and test images each.")
    dataloader_num_workers: int | None = option(None, "Loading processes of each loader.")


def load_model(model: ModelArguments) -> Any:
    """Load the network as a `BaseModel`.

    Raises:
        ModelError: It cannot be found, read or pruned.
    """
    from hf_camphive.hub.loading import load_base

    return load_base(model.model, model.checkpoint)


def load_data(model: ModelArguments, data: DataArguments, net: Any, config: CampHiVeConfig) -> Any:
    """Open the dataset as `Loaders` that suit the network `net`.

    Raises:
        DataError: It cannot be found or used.
    """
    from hf_camphive.training.data.loaders import DataOptions, load_loaders

    options = DataOptions(
        config_name=data.dataset_config_name,
        image_column=data.image_column_name,
        label_column=data.label_column_name,
        streaming=data.streaming,
        workers=data.dataloader_num_workers,
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
    )
    return load_loaders(dataset_name(model, data), net, config, options)


def dataset_name(model: ModelArguments, data: DataArguments) -> str:
    """Return the dataset that was named, or the usual one for the network."""
    if data.dataset:
        return data.dataset
    if model.model.startswith("digits_"):
        return BUNDLED_DATASET
    return "cifar10" if model.model.startswith("cifar_") else "imagenet-1k"


def check_stream(data: DataArguments, config: Any) -> None:
    """Check that training on a stream has an end; `config` has the field `num_train_epochs`.

    Raises:
        ConfigError: It has none.
    """
    if data.streaming and config.num_train_epochs and not data.max_train_samples:
        raise ConfigError("--streaming: an epoch of a stream has no end; add --max-train-samples, or --epochs 0")
