"""Loading networks to prune (`load_base`) and pruned models (`from_pretrained`), from the Hub or a folder.

Writes nothing but the Hub's cache. Weights are read from safetensors only, never from a pickle.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import ModelCard, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HTTPError,  # of httpx or its successor, whichever this version uses
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_camphive.core.errors import ModelError, PlanError, did_you_mean
from hf_camphive.core.plan import PLAN_FILE, PrunePlan, plans_from_json
from hf_camphive.hub.saving import first_line
from hf_camphive.network.graph.program import named_tensors
from hf_camphive.network.modeling import modeling_camphive
from hf_camphive.network.modeling.cifar import checkpoint_filter
from hf_camphive.network.modeling.modeling_camphive import MODEL_TYPE, CampHiVeForImageClassification, check_config
from hf_camphive.network.timm_interface import timm_interface

BUNDLED = ("digits_wide_resnet", "digits_resnet")
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
_FILES = [CONFIG_FILE, WEIGHTS_FILE, PLAN_FILE, "README.md"]
_PICKLES = (".bin", ".pth", ".pt", ".th", ".tar", ".ckpt", ".pkl")
# Errors that timm raises where a config's arguments or weights do not fit the architecture.
_UNFIT = (RuntimeError, TypeError, ValueError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class BaseModel:
    """A network to prune, and its origin.

    `timm.create_model(architecture, **model_args)` builds the dense network (`model_args` never holds num_classes). For
    a network that was pruned before, that is the network before any pruning, and `plans` are those applied since.
    """

    net: nn.Module
    architecture: str
    model_args: dict[str, Any]
    model_id: str
    revision: str | None
    license: str | None
    label_names: tuple[str, ...] | None
    plans: tuple[PrunePlan, ...] = ()
    pretrained: bool = True


def load_base(model_id: str, checkpoint: str | None = None) -> BaseModel:
    """Load a network for pruning, on the CPU, in fp32 and evaluation mode.

    `model_id` is a Hub id ("timm/resnet18.a1_in1k", perhaps with "@revision"), a folder in timm's layout or one that
    this package saved, the name of a bundled network (`BUNDLED`), the name of a timm network with published weights, or, with
    `checkpoint` (a safetensors file), of any timm network.

    Raises:
        ModelError: The network cannot be found, downloaded, read, or built by timm.
    """
    for prefix in ("hf-hub:", "hf_hub:", "local-dir:"):
        model_id = model_id.removeprefix(prefix)
    if not model_id:
        raise ModelError(
            f"no model is named; give a Hub id such as {_EXAMPLE}, a folder, or {BUNDLED[0]!r}, which is bundled"
        )
    if checkpoint is not None:
        return _from_checkpoint(model_id, Path(checkpoint))
    if model_id in BUNDLED:
        with resources.as_file(resources.files("hf_camphive") / "assets" / model_id) as folder:
            return _from_folder(folder, model_id, None)
    if Path(model_id).is_dir():
        return _from_folder(Path(model_id), model_id, None)
    if Path(model_id).is_file():
        raise ModelError(
            f"{model_id!r} is a file; give its folder, or the network's name with --checkpoint {model_id}"
        )
    if re.match(r"[./~\\]|[A-Za-z]:\\", model_id):
        raise ModelError(f"there is no folder {model_id!r}; check the path, or give a Hub id such as {_EXAMPLE}")
    repo, _, revision = model_id.partition("@")
    if "/" not in repo:
        repo = _published(repo)
    return _from_hub(repo, revision or None)


def as_base(model: BaseModel | nn.Module | str) -> BaseModel:
    """Return a timm network, or whatever `load_base` accepts, as a `BaseModel`.

    Raises:
        ModelError: The network is not one of timm's, or `load_base` fails.
    """
    if isinstance(model, BaseModel):
        return model
    if isinstance(model, str):
        return load_base(model)
    model = getattr(model, "timm_model", model)  # transformers' wrapper of timm networks
    if isinstance(model, PreTrainedModel):
        raise ModelError(
            f"{type(model).__name__} is one of transformers' own models, which are built from one width for all layers and "
            "could not be read back with others; give the same network from timm"
        )
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(model, nn.Module) or not config or not config.get("architecture"):
        raise ModelError(
            f"cannot prune a {type(model).__name__}; give a network of timm.create_model, a Hub id or a folder"
        )
    return BaseModel(
        net=model,
        architecture=config["architecture"],
        model_args={},
        model_id=config.get("hf_hub_id") or config["architecture"],
        revision=None,
        license=config.get("license"),
        label_names=tuple(config["label_names"]) if config.get("label_names") else None,
    )


def weights_fingerprint(net: nn.Module) -> str:
    """Return a short SHA-256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named_tensors(net).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def replace_head(base: BaseModel, label_names: Sequence[str], seed: int) -> BaseModel:
    """Return a copy of `base` with a new classifier for these labels, drawn from `seed`."""
    net = copy.deepcopy(base.net)
    # timm draws the new weights itself, from the global generator, which is seeded here and restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        timm_interface(net).reset_classifier(len(label_names))
    names = tuple(label_names)
    _set_pretrained_config(
        net, {**timm_interface(net).pretrained_cfg, "num_classes": len(names), "label_names": names}
    )
    return replace(base, net=net.eval(), label_names=names)


def _set_pretrained_config(net: nn.Module, config: dict[str, Any]) -> None:
    timm_interface(net).pretrained_cfg = timm_interface(net).default_cfg = config


_EXAMPLE = "timm/resnet18.a1_in1k"


def _from_hub(repo: str, revision: str | None) -> BaseModel:
    at = f"{repo}@{revision}" if revision else repo
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_FILES))
    except GatedRepoError as error:
        raise ModelError(f"{repo!r} is gated; accept its terms on the Hub and log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"there is no model {repo!r} on the Hub, or it is private; {_close(repo)}") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"model {repo!r} has no revision {revision!r}; see its commits on the Hub") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {at!r} is neither in the cache nor can it be downloaded ({_short(error)}); check the id and the "
            f"network (HF_HUB_OFFLINE allows cached models only), or give a folder; {_close(repo)}"
        ) from error
    if not (folder / WEIGHTS_FILE).exists() and (pickles := _pickles_on_hub(repo, revision)):
        raise _pickled(repo, pickles[0])
    # A snapshot's folder is named after its commit.
    return _from_folder(folder, repo, folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision)


def _from_folder(folder: Path, model_id: str, revision: str | None) -> BaseModel:
    config = _read_config(folder, model_id)
    pruned = config.get("model_type") == modeling_camphive.MODEL_TYPE
    _check_weights(folder, model_id)
    try:
        net = timm.create_model(f"local-dir:{folder}", pretrained=True)
    except _UNFIT as error:
        raise ModelError(
            f"the weights of {model_id!r} do not fit its config.json ({_short(error)}); get both files from the same "
            "place again, or update timm"
        ) from error
    source = timm_interface(net).pretrained_cfg
    if source.get("num_classes") != timm_interface(net).num_classes:
        raise ModelError(
            f"config.json of {model_id!r} does not say num_classes, without which its classifier would be left "
            "untrained; add it, as timm's save_for_hf does"
        )
    args = {name: value for name, value in (config.get("model_args") or {}).items() if name != "num_classes"}
    architecture = args.pop("base") if pruned else config["architecture"]
    for name in ("widths", "shortcuts", "attributes") if pruned else ():
        args.pop(name, None)
    labels = _label_names(net, config)
    # Paths of this machine must not be saved with the model.
    kept = {key: value for key, value in source.items() if key not in ("file", "source", "url")}
    _set_pretrained_config(net, kept | {"label_names": labels})
    return BaseModel(
        net=net.eval(),
        architecture=architecture,
        model_args=args,
        model_id=model_id,
        revision=revision,
        license=_license(folder, model_id, architecture, source),
        label_names=labels,
        plans=_read_plans(folder, model_id) if pruned else (),
    )


def _from_checkpoint(name: str, file: Path) -> BaseModel:
    if not timm.is_model(name):
        raise ModelError(f"--checkpoint needs the name of a timm network, and {name!r} is none; {_close(name)}")
    if file.suffix in _PICKLES:
        raise _pickled(str(file), file.name)
    if not file.is_file():
        raise ModelError(f"there is no checkpoint {str(file)!r}; give a safetensors file")
    _check_safetensors(file, str(file))
    state = load_file(file)
    net = timm.create_model(name, device="meta")
    state = checkpoint_filter(state, net) if isinstance(net, modeling_camphive.CifarResNet) else state
    head = timm_interface(net).pretrained_cfg.get("classifier")
    classes = state.get(f"{head}.weight", timm_interface(net).get_classifier().get_parameter("weight")).shape[0]
    overlay = {"file": str(file), "num_classes": classes}
    try:
        net = timm.create_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=overlay)
    except _UNFIT as error:
        raise ModelError(
            f"checkpoint {str(file)!r} does not fit {name!r} ({_short(error)}); name the network that it comes from"
        ) from error
    source = timm_interface(net).pretrained_cfg
    _set_pretrained_config(net, {key: value for key, value in source.items() if key not in _SOURCES})
    # The license that timm lists for its own weights of that architecture does not apply to a user's checkpoint.
    return BaseModel(net.eval(), name, {}, name, None, None, _label_names(net, {}))


_SOURCES = ("file", "source", "url", "hf_hub_id", "hf_hub_filename", "license", "tag", "origin_url")


def _published(name: str) -> str:
    """Return the Hub id of a timm network's published weights.

    Raises:
        ModelError: There are none.
    """
    try:
        config = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a known architecture with an unknown tag
        config = None
    if config is None:
        raise ModelError(
            f"{name!r} is neither a folder, nor a Hub id (owner/name), nor a timm network; {_close(name)}"
        )
    if not config.hf_hub_id:
        raise ModelError(
            f"{name!r} is an architecture without published weights, and random weights are not worth pruning; pass "
            "--checkpoint with a safetensors file"
        )
    return config.hf_hub_id


def _read_config(folder: Path, model_id: str) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{model_id!r} holds no config.json; give one saved by timm or hf_camphive") from error
    except ValueError as error:
        raise ModelError(f"config.json of {model_id!r} is damaged ({_short(error)}); get the file again") from error
    if not isinstance(config, dict):
        raise ModelError(f"config.json of {model_id!r} holds no settings; give a model saved by timm or hf_camphive")
    architecture = config.get("architecture")
    if architecture is None:
        kind = config.get("model_type") or ", ".join(config.get("architectures") or ["unknown"])
        raise ModelError(
            f"{model_id!r} is a model of type {kind!r}, not a timm image classifier; many networks are on the Hub as "
            f"timm models too, for instance {_EXAMPLE}"
        )
    try:
        modeling_camphive.check_config(config)
    except ValueError as error:
        raise ModelError(f"{model_id!r} is refused: {error}") from error
    pruned = config.get("model_type") == modeling_camphive.MODEL_TYPE
    args = config.get("model_args") or {}
    name = args.get("base") if pruned else architecture
    if not isinstance(name, str) or not timm.is_model(name):
        raise ModelError(
            f"{model_id!r} has the architecture {name!r}, which timm {timm.__version__} does not know; update timm, "
            f"or give another model; {_close(str(name))}"
        )
    return config


def _read_plans(folder: Path, model_id: str) -> tuple[PrunePlan, ...]:
    file = folder / PLAN_FILE
    try:
        return plans_from_json(file.read_bytes())
    except (OSError, PlanError) as error:
        raise ModelError(f"{PLAN_FILE} of {model_id!r} is missing or damaged ({error}); get the file again") from error


def _check_weights(folder: Path, model_id: str) -> None:
    file = folder / WEIGHTS_FILE
    if not file.exists():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise _pickled(model_id, pickles[0])
        raise ModelError(f"{model_id!r} holds no {WEIGHTS_FILE}; give a folder saved by timm or hf_camphive")
    _check_safetensors(file, model_id)


def _check_safetensors(file: Path, source: str) -> None:
    try:
        with safe_open(file, "pt") as tensors:  # reads the header and checks the file's length
            tensors.keys()
    except (SafetensorError, OSError, ValueError) as error:
        with file.open("rb") as stream:
            is_pointer = stream.read(23) == b"version https://git-lfs"
        if is_pointer:
            raise ModelError(f"the weights of {source!r} are a Git LFS pointer; run `git lfs pull` there") from error
        raise ModelError(
            f"the weights of {source!r} are damaged, perhaps by an interrupted download ({_short(error)}); delete "
            f"{file.name} and get it again (`hf download --force-download` for the Hub's cache)"
        ) from error


def _pickles_on_hub(repo: str, revision: str | None) -> list[str]:
    with suppress(OSError, ValueError):  # offline, only the cached files are known
        return sorted(name for name in list_repo_files(repo, revision=revision) if name.endswith(_PICKLES))
    return []


def _pickled(source: str, name: str) -> ModelError:
    return ModelError(
        f"{source!r} keeps its weights in the pickle {name}, which can run any code when it is opened, and is "
        "therefore refused; give a safetensors version (https://huggingface.co/spaces/safetensors/convert makes one)"
    )


def _label_names(net: nn.Module, config: dict[str, Any]) -> tuple[str, ...] | None:
    names = config.get("label_names") or timm_interface(net).pretrained_cfg.get("label_names")
    if (
        names
        and len(names) == timm_interface(net).num_classes
        and not all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names)
    ):
        return tuple(str(name) for name in names)
    if subset := infer_imagenet_subset(net):  # by the number of classes, as transformers does
        info = ImageNetInfo(subset)
        return tuple(info.label_name_to_description(name) for name in info.label_names())
    return None


def _license(folder: Path, model_id: str, architecture: str, source: dict[str, Any]) -> str | None:
    if source.get("license"):
        return source["license"]
    card = folder / "README.md"
    if card.exists():
        with suppress(OSError, ValueError):  # a card without readable metadata names no license
            if isinstance(name := ModelCard.load(card, ignore_metadata_errors=True).data.license, str):
                return name
    if model_id.startswith("timm/"):  # only timm's own weights have the license that timm lists
        tag = f"{architecture}.{source['tag']}" if source.get("tag") else architecture
        listed = timm.models.get_pretrained_cfg(tag)
        return listed.license if listed is not None else None
    return None


def _close(name: str) -> str:
    owner, _, bare = name.rpartition("/")
    known = {f"{owner}/{n}" if owner == "timm" else n for n in [*timm.list_models(), *timm.list_pretrained()]}
    name = f"{owner}/{bare}" if owner == "timm" else bare
    return did_you_mean(name, sorted(known), otherwise=f"an id looks like {_EXAMPLE}", most=3)


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + "..."


def from_pretrained(
    path_or_id: str | Path, revision: str | None = None, **kwargs: Any
) -> CampHiVeForImageClassification:
    """Load a pruned model from a folder or the Hub, without running code from there.

    Weights come from safetensors only. `kwargs` are passed to transformers' `from_pretrained` (dtype, device_map, token, ...).

    Raises:
        ModelError: There is no whole model saved by this package, or its config.json asks for other files.
    """  # noqa: DOC501 (OSError is caught, and _damaged returns a ModelError)
    source = str(path_or_id)
    where = {"revision": revision} if revision else {}
    try:
        values, _ = PreTrainedConfig.get_config_dict(source, **where, **kwargs)
        if not values:
            raise OSError("there is none")
    except (OSError, ValueError, HTTPError) as error:
        raise ModelError(
            f"cannot read config.json of {source} ({first_line(error)}); give a folder that hf_camphive saved, or "
            "the Hub id of one"
        ) from error
    if values.get("model_type") != MODEL_TYPE:
        kind = values.get("model_type") or values.get("architecture") or "unknown"
        raise ModelError(
            f"{source} is a model of type {kind!r} that was not saved by hf_camphive; load it with "
            "transformers.AutoModelForImageClassification or timm.create_model"
        )
    try:
        check_config(values)
    except ValueError as error:
        raise ModelError(f"{source} is refused: {error}") from error
    resized = kwargs.pop("ignore_mismatched_sizes", False)
    how = {**kwargs, **where, "output_loading_info": True, "ignore_mismatched_sizes": True, "use_safetensors": True}
    try:
        loaded: Any = CampHiVeForImageClassification.from_pretrained(source, **how)
        model, found = loaded  # a pair, by output_loading_info
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError, HTTPError) as error:
        raise _damaged(source, first_line(error)) from error
    if found["missing_keys"]:
        raise _damaged(source, f"model.safetensors lacks {_listed(found['missing_keys'])}")
    if found["unexpected_keys"]:
        raise _damaged(source, f"the network has no place for {_listed(found['unexpected_keys'])}")
    if found["mismatched_keys"] and not resized:
        raise _damaged(
            source, f"other shapes than config.json says: {_listed(k[0] for k in found['mismatched_keys'])}"
        )
    return model


def _damaged(source: str, fault: str) -> ModelError:
    return ModelError(
        f"{source} is damaged: its weights do not fit the network that its config.json describes ({fault}); download "
        "or copy it again, or save it again from the run that made it"
    )


def _listed(keys: Iterable[str]) -> str:
    names = sorted(key.removeprefix("timm_model.") for key in keys)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
