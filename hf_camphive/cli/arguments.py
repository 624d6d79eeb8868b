"""What the command line's options are, and how they are read: dataclasses beside `CampHiVeConfig`, and presets."""

import copy
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal

from hf_camphive.core.config import FROM_TEXT, CampHiVeConfig, choices, without_texts
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.methods import PRESETS

BUNDLED_MODEL = "digits_wide_resnet"
DEMO: dict[str, Any] = {"target_latency": 0.45, "latency_batch_size": 32}
"""Settings of `camphive prune` where no option says what to prune, on what, or how."""
TEXT_EXAMPLES = {"keep": "Such as 'layer4.*,conv1'.", "layer_max_ratio": "Such as 'layer1.*=0.3,conv1=0'."}


def _option(default: Any, help: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class ModelArguments:
    """Which network."""

    model: str = _option(
        BUNDLED_MODEL,
        "Hub id (timm/resnet18.a1_in1k, with @revision if you like), a folder, a network name with --checkpoint, or "
        "digits_wide_resnet or digits_resnet, which are bundled.",
        aliases=["--model_name_or_path", "--model-name-or-path"],
    )
    checkpoint: str | None = _option(None, "Safetensors file with the weights of a timm network that --model names.")


@dataclass
class DataArguments:
    """Which images."""

    dataset: str | None = _option(
        None,
        "Hub id, a folder (parquet, class folders, save_to_disk), or digits, which is bundled. By default digits for "
        "digits_* networks, cifar10 for cifar_* networks, else imagenet-1k.",
        aliases=["--dataset_name", "--dataset-name"],
    )
    dataset_config_name: str | None = _option(None, "Configuration of the dataset, where it has several.")
    image_column_name: str | None = _option(None, "Image column; found by type if not given.")
    label_column_name: str | None = _option(None, "Label column; found by type if not given.")
    streaming: bool = _option(False, "Read the dataset as a stream instead of downloading it.")
    max_train_samples: int | None = _option(None, "Use at most so many training images.")
    max_eval_samples: int | None = _option(None, "Use at most so many validation and test images.")
    dataloader_num_workers: int | None = _option(None, "Loading processes of each loader.")


@dataclass
class RunArguments:
    """What to do with the result."""

    output_dir: str | None = _option(None, "Folder of the pruned model; outputs/<model>-camphive by default.")
    overwrite: bool = _option(
        False,
        "Replace a pruned model in the output folder; without --resume, discard what a run that was cut off kept.",
    )
    dry_run: bool = _option(False, "Only plan: print the plan and write prune_plan.json into the output folder.")
    resume: bool = _option(
        False, "Go on with a run that was killed or ended in an error, from its last finished cycle or epoch."
    )
    push_to_hub: bool = _option(False, "Upload the result (log in with `hf auth login` first).")
    hub_model_id: str | None = _option(None, "Where to upload to: user/name.")
    hub_private_repo: bool = _option(False, "Make the repo private if it is created.")


@dataclass
class ExpandArguments:
    """What to widen, and how far."""

    factor: float = _option(2.0, "Channels of a widened group, relative to what it has.")
    groups: str | None = _option(
        None,
        "Channel groups to widen, by name and split by commas (see camphive inspect); all that can be by default.",
    )
    from_report: str | None = _option(
        None, "Folder of a pruned model: widen the bottlenecks that its report names.", aliases=["--from"]
    )
    spread: float = _option(
        0.2, "How much the shares of a channel's copies differ, so that training can tell them apart."
    )
    seed: int = _option(0, "Seed of what is copied and of the shares.")
    output_dir: str | None = _option(None, "Folder of the widened model; outputs/<model>-wide by default.")
    overwrite: bool = _option(False, "Replace a model that stands in the output folder.")


@dataclass
class CompareArguments:
    """Which runs; several values are separated by commas, and every combination is run."""

    methods: str = _option(
        "merge-aware,fisher,magnitude", "Criteria to compare, as --criterion of `camphive prune` has them."
    )
    merge: str = _option("reconstruct", "Merge rules.")
    ratios: str = _option("1.5,2.1,2.6,4.2", "How many times fewer MACs.")
    seeds: int = _option(3, "So many runs of each, with other calibration images and random numbers.")
    cycles: str = _option("1", "Numbers of cycles.")
    calibration_size: str = _option("1024", "Numbers of calibration images.")
    output_dir: str | None = _option(
        None,
        "Folder of results.json, .csv, .md and .png; outputs/<model>-comparison by default. Runs that stand there "
        "already are not repeated, so the same command goes on with what was interrupted.",
    )


def parse(command: Callable[..., Any], arguments: Sequence[str], *kinds: type) -> tuple[Any, ...]:
    """The options of a command, one dataclass a kind; the command's name and docstring are what `--help` shows."""
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        kinds,
        prog=f"camphive {command.__name__}",
        usage=f"camphive {command.__name__} [options]",
        description=command.__doc__,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.set_defaults(**_preset(arguments))
    *parsed, unknown = parser.parse_args_into_dataclasses(
        list(arguments), return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return tuple(parsed)


def config_options(without: Sequence[str] = (), **defaults: Any) -> type:
    """Return a dataclass with the config's fields as options, except those in `without`.

    Choices are those of this moment, so that methods registered from outside the package are among them. `defaults`
    replace the config's. `config_from` makes a config of the parsed options.
    """
    options = []
    for f in (f for f in fields(CampHiVeConfig) if f.name not in without):
        if f.name in FROM_TEXT:
            options.append((f.name, str, _option("", f"{f.metadata['help']} {TEXT_EXAMPLES[f.name]}")))
        else:
            kind = Literal[names] if (names := choices(f.name)) else f.type
            options.append((f.name, kind, field(default=defaults.get(f.name, f.default), metadata=f.metadata)))
    return make_dataclass("ConfigOptions", options)


def config_from(options: Any, **settings: Any) -> CampHiVeConfig:
    """Return the config that parsed `config_options` describe, with further settings.

    Raises:
        ConfigError: A value cannot work.
    """
    return CampHiVeConfig(**without_texts(vars(options)), **settings)


def preset_options() -> type:
    """Return a dataclass with the option `preset`, whose choices are those of this moment."""
    sources = "; ".join(f"{name}: {row.source}" for name, row in PRESETS.items() if row.source)
    text = f"Recipe: sets several of the options below, which override it where given beside it ({sources})."
    return make_dataclass("PresetOptions", [("preset", Literal[tuple(PRESETS)], _option("default", text))])


def listed(text: str) -> list[str]:
    """The parts of a text that commas separate."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(option: str, text: str, kind: type) -> list[Any]:
    """The numbers that an option lists; raises `ConfigError` on what is none."""
    try:
        return [kind(part) for part in listed(text)]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"--{option} is {text!r}; give {what} separated by commas") from error


def _preset(arguments: Sequence[str]) -> dict[str, Any]:
    """Defaults that `--preset` sets; none where it is absent, or misspelled (which the parser itself will say)."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?", default="default")
    name = parser.parse_known_args(list(arguments))[0].preset
    return dict(PRESETS[name].settings) if name in PRESETS else {}


class _Help(ArgumentDefaultsHelpFormatter):
    """Shows --one-spelling of an option that may be written --one_spelling as well."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = list(dict.fromkeys(s.replace("_", "-") for s in action.option_strings))
        return super()._format_action_invocation(shown)
