"""`camphive evaluate`: accuracy and cost of a model, pruned or not."""

from collections.abc import Sequence

from hf_camphive.cli.arguments import parse
from hf_camphive.cli.inputs import DataArguments, ModelArguments, load_data, load_model
from hf_camphive.cli.output import short_name
from hf_camphive.core.config import CampHiVeConfig
from hf_camphive.core.errors import ConfigError


def evaluate(arguments: Sequence[str]) -> None:
    """Print the accuracy and the cost of a model.

    Raises:
        ConfigError: The dataset has another number of classes than the network.
        ModelError: The network cannot be found or read.
        DataError: The dataset cannot be found or used.
    """
    model, data = parse(evaluate, arguments, ModelArguments, DataArguments)

    from hf_camphive.core.runtime import Workers, environment, make_accelerator
    from hf_camphive.hub.report import Stage, stages_table
    from hf_camphive.network.footprint import footprint, measure_latency
    from hf_camphive.network.timm_interface import input_size
    from hf_camphive.training.evaluation import evaluate_accuracy

    config = CampHiVeConfig()
    base = load_model(model)
    accelerator = make_accelerator(config)
    loaders = load_data(model, data, base.net, config)
    net = base.net.to(accelerator.device)
    if net.num_classes != len(loaders.info.label_names):
        raise ConfigError(
            f"the network has {net.num_classes} classes, the dataset {len(loaders.info.label_names)}; give a dataset "
            "that the network was trained for"
        )
    loader, split = loaders.evaluation
    accuracy = evaluate_accuracy(net, loader, accelerator, split)
    size = input_size(net)
    latency = Workers(accelerator).on_main(lambda: measure_latency({"model": net}, size))["model"]
    if accelerator.is_main_process:
        stage = Stage(short_name(model.model), footprint(net, size, latency), accuracy)
        print(stages_table([stage], environment(accelerator.device, accelerator.num_processes)))
