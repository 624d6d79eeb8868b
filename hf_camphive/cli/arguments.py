"""How options are declared and parsed: dataclasses of a command, the config's fields, and presets."""

import copy
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, Literal

from hf_camphive.core.config import FROM_TEXT, CampHiVeConfig, choices, without_texts
from hf_camphive.core.errors import ConfigError
from hf_camphive.core.methods import PRESETS

TEXT_EXAMPLES = {"keep": "Such as 'layer4.*,conv1'.", "layer_max_ratio": "Such as 'layer1.*=0.3,conv1=0'."}


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Declare an option as a dataclass field, with its line in `--help`."""
    return field(default=default, metadata={"help": help, **metadata})


def parse(command: Callable[..., Any], arguments: Sequence[str], *kinds: Any) -> tuple[Any, ...]:
    """Parse a command's arguments into one instance of each dataclass of options.

    `--help` shows the command's name and the first paragraph of its docstring. A `--preset` among the arguments sets the
    defaults of others.

    Raises:
        SystemExit: For `--help`, and where an option is unknown or its value cannot be read, as argparse does.
    """
    from transformers import HfArgumentParser

    parser = HfArgumentParser(
        kinds,
        prog=f"camphive {command.__name__}",
        usage=f"camphive {command.__name__} [options]",
        description=(command.__doc__ or "").partition("\n\n")[0],
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

    Choices are read when this is called, so that methods registered from outside the package are among them. `defaults`
    replace the config's. `config_from` makes a config of the parsed options.
    """
    options: list[tuple[str, Any, Any]] = []
    for f in (f for f in fields(CampHiVeConfig) if f.name not in without):
        if f.name in FROM_TEXT:
            options.append((f.name, str, option("", f"{f.metadata['help']} {TEXT_EXAMPLES[f.name]}")))
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
    """Return a dataclass with the option `preset`, whose choices are read when this is called."""
    sources = "; ".join(f"{name}: {row.source}" for name, row in PRESETS.items() if row.source)
    text = f"Recipe that sets several of the options below; those given beside it override it ({sources})."
    return make_dataclass("PresetOptions", [("preset", Literal[tuple(PRESETS)], option("default", text))])


def split_list(text: str) -> list[str]:
    """Return the items of a comma-separated text."""
    return [part.strip() for part in text.split(",") if part.strip()]


def split_numbers(name: str, text: str, kind: type) -> list[Any]:
    """Return the numbers of a comma-separated text, the value of the option `name`.

    Raises:
        ConfigError: An item is not a number of this kind.
    """
    try:
        return [kind(part) for part in split_list(text)]
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise ConfigError(f"--{name} is {text!r}; give {what} separated by commas") from error


def _preset(arguments: Sequence[str]) -> dict[str, Any]:
    """Return the settings of `--preset`; none where it is absent or misspelled, which the whole parser reports."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?", default="default")
    name = parser.parse_known_args(list(arguments))[0].preset
    return dict(PRESETS[name].settings) if name in PRESETS else {}


class _Help(ArgumentDefaultsHelpFormatter):
    """Show --one-spelling of an option that may be written --one_spelling as well."""

    def _format_action_invocation(self, action: Action) -> str:
        shown = copy.copy(action)
        shown.option_strings = list(dict.fromkeys(s.replace("_", "-") for s in action.option_strings))
        return super()._format_action_invocation(shown)
