"""What curvature costs, beside PyHessian, curvlinops and Torch-Pruning: a table, docs/results/curvature.json and a plot.

    python benchmarks/curvature.py --data FOLDER --threads 1

FOLDER is that of compare.py; without it images and weights are random, which the results say. All contestants of a
section run in one process on the same network, batch, threads and memory format, in turns; a ratio is the median over
rounds of ratios within a round. A section that stands in the results is not run again, unless with --again.
Peers: pip install "hf_camphive[benchmarks]".
"""

import argparse
import copy
import json
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from cases import SEED, Case, load_case
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from measuring import Figure, Seconds, markdown, peak_bytes, race, ratio, seconds_of, spread, straightness
from peers import (
    curvlinops_products,
    pyhessian_eigenpair,
    pyhessian_product,
    pyhessian_steps,
    torch_pruning_scores,
)
from torch import Tensor, distributed

from hf_camphive import CampHiVeConfig
from hf_camphive.core.runtime import Workers, environment, keep_freed_memory
from hf_camphive.curvature.eigensolvers import SolverOptions, lanczos, power_iteration
from hf_camphive.curvature.operators import Curvature
from hf_camphive.hub.plots import BLUE, DPI, GREY, INK, ORANGE
from hf_camphive.network.analysis import NetworkAnalysis
from hf_camphive.pruning.scoring.criteria import SCORERS, ScoringContext
from hf_camphive.training.data.calibration import Calibration

RESULTS = Path(__file__).parent.parent / "docs" / "results"
BATCHES = {"cifar_resnet56": 128, "resnet18": 16, "mobilenetv2_100": 16}  # images
TOLERANCE = 1e-2  # residual of an eigenpair
MOST_STEPS = 300
MATRICES = ("hessian", "gauss-newton")
TITLES = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton"}


@dataclass(frozen=True)
class Options:
    """What a run was asked for."""

    data: Path | None
    device: str
    rounds: int
    images: int
    quick: bool


def main() -> None:
    """Run the sections that are not there yet, keeping each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of datasets and weights; random ones where it lacks them")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections to run")
    parser.add_argument("--again", action="store_true", help="run sections that stand in the results again")
    parser.add_argument("--threads", type=int, default=1, help="threads of every contestant (1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds after the warm-up (7)")
    parser.add_argument("--images", type=int, default=256, help="images of the section `scores` (256)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, random data, results in a temporary folder")
    parser.add_argument("--results", type=Path, help="folder for the table, JSON and plot (docs/results)")
    given = parser.parse_args()
    logging.getLogger("hf_camphive").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # products are float32 throughout, see `product` for what TF32 would do
    options = Options(
        None if given.quick else given.data,
        given.device,
        1 if given.quick else given.rounds,
        given.images,
        given.quick,
    )
    folder = given.results or (Path(tempfile.mkdtemp(prefix="curvature-")) if given.quick else RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("curvature.json" if given.device == "cpu" else "curvature_cuda.json")
    sections = json.loads(path.read_text()) if path.exists() else {}
    for name in given.only:
        if given.again or name not in sections:
            print(f"{name} ...", flush=True)
            found = SECTIONS[name](options)
            figures = [figure.to_dict() for figure in found.pop("figures")]
            sections[name] = {"figures": figures, **found, "environment": environment(given.device)}
            path.write_text(json.dumps(sections, indent=1) + "\n")
            print(markdown({name: sections[name]}), flush=True)
    draw(sections, path.with_suffix(".png"))
    path.with_suffix(".md").write_text(markdown(sections))
    print(markdown(sections), f"\n{path}", sep="")


def product(options: Options) -> dict:
    """One product against one gradient, and against the peers' products of the same matrix with the same vector."""
    figures, seconds, notes = [], {}, set()
    for case in cases(options):
        notes.add(f"{case.network}: {case.source}")
        vector = case.direction(case.weight_curvature())
        peers = curvlinops_products(case.net, case.images, case.labels)
        theirs = {
            "PyHessian Hessian": partial(pyhessian_product(case.net, case.images, case.labels), vector),
            **{f"curvlinops {TITLES[matrix]}": partial(peers[matrix], vector) for matrix in MATRICES},
        }
        ours = {f"weight {TITLES[matrix]}": partial(case.weight_curvature(matrix), vector) for matrix in MATRICES}
        for peer, run in theirs.items():
            figures.append(exactly(case, f"{peer}, difference from ours", run(), ours[f"weight {peer.split()[1]}"]()))
        case.net.zero_grad()
        for matrix in MATRICES:
            u = case.direction(case.gate_curvature())
            ours[f"gate {TITLES[matrix]}"] = partial(case.gate_curvature(matrix), u)
            exact = case.gate_curvature(matrix, torch.float64)(u.double())
            for label, run in precisions(ours[f"gate {TITLES[matrix]}"], options.device).items():
                figures.append(exactly(case, f"gate {TITLES[matrix]}, {label} error against fp64", run(), exact))
                if label == "TF32":
                    ours[f"gate {TITLES[matrix]}, TF32"] = run
        times = race({"gradient": case.gradient, **ours, **theirs}, options.rounds, options.device)
        seconds[case.subject] = times
        figures += [spread(case.subject, "gradient, seconds", times["gradient"])]
        for name in ours:
            most = {"target": 1.9 if "Hessian" in name else 1.3, "at_most": True} if options.device == "cpu" else {}
            figures.append(ratio(case.subject, times, name, "gradient", **most))
        for space in ("gate", "weight"):
            figures.append(ratio(case.subject, times, "PyHessian Hessian", f"{space} Hessian", target=1.6))
            for title in TITLES.values():
                figures.append(ratio(case.subject, times, f"curvlinops {title}", f"{space} {title}", target=1.0))
    notes |= {
        "the gradient is that of the module as it is, in eval mode, in all weights",
        "products of PyHessian include its first gradient, as in its mode for data loaders; ours and curvlinops' do too",
        "a product in gate space is one with its own, smaller matrix, lift^T H lift",
    }
    return {"figures": figures, "seconds": seconds, "notes": sorted(notes)}


def precisions(run: Callable[[], Tensor], device: str) -> dict[str, Callable[[], Tensor]]:
    """The product in float32, and on a GPU with TF32 convolutions too."""

    def tf32() -> Tensor:
        with torch.backends.cudnn.flags(allow_tf32=True):
            return run()

    return {"float32": run} | ({"TF32": tf32} if device == "cuda" else {})


def exactly(case: Case, name: str, found: Tensor, expected: Tensor) -> Figure:
    """Relative difference of two vectors."""
    error = float((found.double() - expected.double()).norm() / expected.double().norm())
    return Figure(case.subject, name, error, error, error)


def eigenpair(options: Options) -> dict:
    """Top eigenpair to the same residual: ours in weight space and gate space, PyHessian's power iteration."""
    (case,) = cases(options, "cifar_resnet56")
    most = 3 if options.quick else MOST_STEPS
    weight, gate = case.weight_curvature(), replace(case.gate_curvature(), held=True)
    steps, reached = pyhessian_steps(case.net, case.images, case.labels, TOLERANCE, most, SEED)
    solvers = {
        "PyHessian": pyhessian_eigenpair(case.net, case.images, case.labels, steps, SEED),
        "weight Lanczos": partial(_solve, lanczos, weight, most, options.device),
        "weight power iteration": partial(_solve, power_iteration, weight, most, options.device),
        "gate Lanczos": partial(_solve, lanczos, gate, most, options.device),
        "gate power iteration": partial(_solve, power_iteration, gate, most, options.device),
    }
    found, times = {}, {name: [] for name in solvers}
    for turn in range(1 if options.quick else min(options.rounds, 3) + 1):
        for name, solve in solvers.items():
            if name == "PyHessian" or turn == 0 or "power" not in name:  # the slowest of ours once
                times[name].append(
                    seconds_of(lambda name=name, solve=solve: found.update({name: solve()}), options.device)
                )
    value, vector = found.pop("PyHessian")
    image = weight(vector)
    rayleigh = float(vector @ image / (vector @ vector))
    residual = float((image - rayleigh * vector).norm() / vector.norm() / abs(rayleigh))
    exact = {"at_most": True, "target": TOLERANCE}
    figures = [Figure(case.subject, "PyHessian, residual of its vector by our product", *[residual] * 3, **exact)]
    figures += [
        Figure(case.subject, f"{name}, residual", *[float(pair.residuals[0])] * 3, **exact)
        for name, pair in found.items()
    ]
    apart = abs(rayleigh - float(found["weight Lanczos"].values[0])) / abs(rayleigh)
    figures.append(Figure(case.subject, "top eigenvalue, PyHessian against weight Lanczos", *[apart] * 3, 0.01, True))
    for name in found:
        few = {key: values[: len(times[name])] for key, values in times.items()}
        figures.append(ratio(case.subject, few, "PyHessian", name, target=3.0))
    products = {name: pair.products for name, pair in found.items()}
    notes = [
        f"products: PyHessian {steps}{'' if reached else ' (tolerance not reached: its time is a lower bound)'}, "
        + ", ".join(f"{name} {count}" for name, count in products.items()),
        "gate space: graphs are held between products, as PyHessian's are in its mode for one batch",
        "PyHessian: least maxIter whose vector has the residual, found beforehand and not timed; its mode for one batch, "
        "which differentiates once and not once a product; a set of several batches would need its slower mode",
        f"top eigenvalue: PyHessian {value:.5g}, "
        + ", ".join(f"{name} {float(pair.values[0]):.5g}" for name, pair in found.items())
        + "; gate space has its own matrix, and this is what the scores use",
        "no warm-up round of its own: the first of several rounds is kept, the rest repeat it",
    ]
    return {"figures": figures, "seconds": {case.subject: times}, "notes": notes}


def _solve(solver: Callable, matrix: Curvature, most: int, device: str):
    generator = torch.Generator().manual_seed(SEED)
    matrix = replace(matrix)  # holds nothing yet
    return solver(matrix, matrix.size, 1, SolverOptions(most, TOLERANCE, generator, device=device))


def scores(options: Options) -> dict:
    """All channel scores of a network: `hive` against Torch-Pruning's Hessian importance on the same images."""
    case = load("resnet18", options.images, options)
    few = case.first(max(2, len(case.images) // 8))
    batch = 2 if options.quick else 16

    def torch_pruning(some: Case, batch: int) -> Callable[[], object]:
        return torch_pruning_scores(copy.deepcopy(case.net), some.images, some.labels, batch)

    contests = {
        case: {
            "Torch-Pruning, image by image": torch_pruning(case, 1),
            "hive": partial(hive, case),
            "hive, one pass": partial(hive, case, curvature_passes=1),
        },
        few: {
            "Torch-Pruning, image by image": torch_pruning(few, 1),
            "Torch-Pruning as documented": torch_pruning(few, batch),
            "hive": partial(hive, few),
        },
    }
    figures, seconds = [], {}
    for some, contestants in contests.items():
        times = seconds[some.subject] = race(contestants, min(options.rounds, 3), options.device)
        figures += [spread(some.subject, f"{name}, seconds", values) for name, values in times.items()]
        ours = [name for name in times if name.startswith("hive")]
        peers = [name for name in times if name not in ours]
        figures += [ratio(some.subject, times, peer, name, target=3.0) for peer in peers for name in ours]
    once_only = {
        "Torch-Pruning, image by image": [seconds_of(torch_pruning(few, 1), options.device)],
        "hive of the Hessian": [seconds_of(partial(hive, few, curvature="hessian"), options.device)],
    }
    seconds[f"{few.subject}, once"] = once_only
    figures.append(ratio(few.subject, once_only, "Torch-Pruning, image by image", "hive of the Hessian", target=3.0))
    exact, once, twice = (torch.cat(list(hive(few, curvature_passes=passes).values())) for passes in (99, 1, 2))
    for name, found in (("one pass", once), ("two passes", twice)):
        value = float(torch.corrcoef(torch.stack([_ranks(exact), _ranks(found)]))[0, 1])
        figures.append(Figure(few.subject, f"hive, {name}: rank correlation with 99 passes", *[value] * 3))
    notes = [
        f"{case.network}: {case.source}",
        "hive: k=8 and the configuration's defaults for all else (Gauss-Newton, two backward passes); a time is that of the scores, "
        "tracing and Torch-Pruning's graph of dependencies not counted",
        "Torch-Pruning 1.6.1: its sum over images is mended, since as released it keeps the last image alone. As documented, it goes "
        f"back through a batch of {batch} for each image of it; image by image, each goes forward and back alone, its fastest way",
        "hive of the Hessian takes products, at a cost in proportion to the images; an eighth of them, timed once, shows the ratio",
        "one pass forward and one back through the inputs alone are the least that any gradient costs: `hive, one pass` stands for it",
    ]
    return {"figures": figures, "seconds": seconds, "notes": notes}


def _ranks(values: Tensor) -> Tensor:
    return values.argsort().argsort().double()


def hive(case: Case, **options) -> dict[str, Tensor]:
    """Scores of all channels, from batches as the pruner makes them."""
    rows = [{"pixel_values": case.images, "labels": case.labels}]
    calibration = Calibration.collect(rows, case.images.device)
    config = CampHiVeConfig(criterion="hive", curvature_images=len(case.images), **options)
    analysis = NetworkAnalysis(case.trace, case.state, frozenset(name for name, _ in case.net.named_parameters()))
    return SCORERS["hive"](ScoringContext(analysis, calibration, config))


def block(options: Options) -> dict:
    """Eight vectors at once against eight products."""
    figures, seconds = [], {}
    for case in cases(options, "cifar_resnet56", "resnet18"):
        some = case.first(64)
        contestants = {}
        for matrix in MATRICES:
            curvature = some.gate_curvature(matrix)
            vectors = some.direction(curvature, 8)
            contestants[f"product, gate {TITLES[matrix]}"] = partial(curvature, vectors[:, 0])
            contestants[f"8 at once, gate {TITLES[matrix]}"] = partial(curvature, vectors)
        times = seconds[some.subject] = race(contestants, min(options.rounds, 5), options.device)
        for title in TITLES.values():
            one, together = times[f"product, gate {title}"], times[f"8 at once, gate {title}"]
            values = [8 * a / b for a, b in zip(one, together)]
            figures.append(spread(some.subject, f"8 products / 8 at once, gate {title}", values, target=1.5))
    return {"figures": figures, "seconds": seconds, "notes": []}


def memory(options: Options) -> dict:
    """Most memory of a product over a training step's, each in a process of its own."""
    figures, bytes_ = [], {}
    names = list(MEMORY)[:: 2 if options.quick else 1]
    for case in cases(options):
        found = bytes_[case.subject] = {
            name: peak_bytes(remembered, case, name, device=options.device) for name in names
        }
        step = found["training step"]
        for name in names[1:]:
            ours = {"target": 2.0, "at_most": True} if name.split()[0] in ("gate", "weight") else {}
            value = found[name] / step
            figures.append(Figure(case.subject, f"{name} / training step", value, value, value, **ours))
    note = (
        "CPU: high-water mark of resident memory over what stood before; GPU: allocated memory. Forward in train mode, "
        "backward, plain SGD is the training step"
    )
    return {"figures": figures, "bytes": bytes_, "notes": [note]}


def remembered(case: Case, name: str) -> Callable[[int | None], object]:
    """A contestant of `memory` on the first so many images."""
    return lambda count: MEMORY[name](case.first(count))


def training_step(case: Case) -> None:
    """Forward in train mode, backward, plain SGD; the gradients go, as before a next step."""
    optimizer = torch.optim.SGD(case.net.parameters(), lr=1e-6)
    F.cross_entropy(case.net.train()(case.images), case.labels).backward()
    optimizer.step()
    optimizer.zero_grad()


def _one_product(case: Case, space: str, matrix: str, vectors: int = 1) -> Tensor:
    curvature = case.gate_curvature(matrix) if space == "gate" else case.weight_curvature(matrix)
    return curvature(case.direction(curvature, vectors))


def _peer_product(case: Case, peer: str) -> Tensor:
    make = {
        "PyHessian": pyhessian_product,
        "curvlinops": lambda *arguments: curvlinops_products(*arguments)["hessian"],
    }[peer]
    return make(case.net, case.images, case.labels)(case.direction(case.weight_curvature()))


MEMORY: dict[str, Callable[[Case], object]] = {
    "training step": training_step,
    "gradient": Case.gradient,
    **{
        f"{space} {TITLES[matrix]}": partial(_one_product, space=space, matrix=matrix)
        for space in ("gate", "weight")
        for matrix in MATRICES
    },
    "gate Hessian, 8 vectors": partial(_one_product, space="gate", matrix="hessian", vectors=8),
    "PyHessian Hessian": partial(_peer_product, peer="PyHessian"),
    "curvlinops Hessian": partial(_peer_product, peer="curvlinops"),
}


def processes(options: Options) -> dict:
    """Products of two processes with one thread each over those of one, all in the same run."""
    if options.device != "cpu":
        return {"figures": [], "seconds": {}, "notes": ["measured on the CPU only"]}
    (case,) = cases(options, "cifar_resnet56")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_share, (case, options.rounds, folder), nprocs=2)
        times = json.loads(Path(folder, "seconds.json").read_text())
    figure = ratio(case.subject, times, "one process", "two processes", target=1.7)
    note = "gate Hessian; one thread a process, images split in halves, one reduce (gloo) a product; both results agree to 1e-6"
    return {"figures": [figure], "seconds": {case.subject: times}, "notes": [note]}


def _share(rank: int, case: Case, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    class Both(Workers):
        """Both processes, without an `Accelerator`."""

        def sum(self, tensor: Tensor) -> Tensor:
            distributed.all_reduce(tensor)
            return tensor

    alone = case.gate_curvature()
    images, labels = (half[rank::2].contiguous() for half in (case.images, case.labels))
    mine = replace(case, images=images.contiguous(memory_format=torch.channels_last), labels=labels)
    shared = replace(mine.gate_curvature(), total=len(case.images), workers=Both())
    vector = case.direction(alone)
    torch.testing.assert_close(shared(vector), alone(vector), rtol=1e-5, atol=1e-6 * float(alone(vector).abs().max()))
    times: Seconds = {"one process": [], "two processes": []}
    for _ in range(rounds):
        distributed.barrier()
        if rank == 0:
            times["one process"].append(seconds_of(partial(alone, vector)))
        distributed.barrier()
        times["two processes"].append(seconds_of(partial(shared, vector)))
    if rank == 0:
        Path(folder, "seconds.json").write_text(json.dumps(times))
    distributed.destroy_process_group()


def growth(options: Options) -> dict:
    """Time of gate Hessian products by images, parameters and vectors, and how straight the lines are."""
    (case,) = cases(options, "cifar_resnet56")
    most = len(case.images)
    others = [
        load(f"cifar_resnet{depth}", most // 4, options)
        for depth in (20, 32, 44, 56, 110)[: 2 if options.quick else 5]
    ]
    curvature = case.first(most // 4).gate_curvature()
    vectors = case.direction(curvature, 16)
    axes = {
        "images": [(n, _product_of(case.first(n))) for n in (most // 4, most // 2, 3 * most // 4, most)],
        "parameters": [
            (sum(weight.numel() for weight in other.net.parameters()), _product_of(other)) for other in others
        ],
        "vectors": [(k, partial(curvature, vectors[:, :k])) for k in (1, 2, 4, 8, 16)],
    }
    contestants = {f"{axis} {x}": run for axis, points in axes.items() for x, run in points}
    times = race(contestants, min(options.rounds, 5), options.device)
    figures, lines = [], {}
    for axis, points in axes.items():
        x = [x for x, _ in points]
        seconds = [median(times[f"{axis} {value}"]) for value in x]
        slope, intercept, r2 = straightness(x, seconds)
        lines[axis] = {"x": x, "seconds": seconds, "slope": slope, "intercept": intercept, "r2": r2}
        subject = f"cifar_resnet20 to {others[-1].network[12:]}" if axis == "parameters" else case.network
        straight = {} if axis == "parameters" else {"target": 0.98}
        figures.append(Figure(subject, f"time by {axis}, R\u00b2 of a line", r2, r2, r2, **straight))
    notes = [f"{other.network}: {other.source}" for other in others]
    return {"figures": figures, "seconds": {"all": times}, "lines": lines, "notes": notes}


def _product_of(case: Case) -> Callable[[], Tensor]:
    curvature = case.gate_curvature()
    return partial(curvature, case.direction(curvature))


SECTIONS: dict[str, Callable[[Options], dict]] = {
    "product": product,
    "eigenpair": eigenpair,
    "scores": scores,
    "block": block,
    "memory": memory,
    "processes": processes,
    "growth": growth,
}


def load(network: str, count: int, options: Options) -> Case:
    """A network and images for it; a small one where the run is to be quick."""
    if options.quick:
        small = network if network.startswith("cifar") and network != "cifar_resnet56" else "cifar_resnet20"
        return load_case(small, min(count, 4), None, options.device)
    return load_case(network, count, options.data, options.device)


def cases(options: Options, *networks: str) -> list[Case]:
    """The networks that products are measured on, or those named."""
    networks = networks or tuple(BATCHES)
    return [load(name, BATCHES[name], options) for name in (networks[:1] if options.quick else networks)]


def draw(sections: dict[str, dict], path: Path) -> None:
    """Costs of products in gradients, and how time grows."""
    picture = Picture(figsize=(8, 6), layout="constrained", facecolor="white")
    costs, *rest = picture.subplots(2, 2).flat
    if "product" in sections:
        draw_costs(costs, sections["product"]["seconds"])
    for axes, (name, line) in zip(rest, sections.get("growth", {}).get("lines", {}).items()):
        axes.plot(line["x"], line["seconds"], "o", color=BLUE)
        ends = [0, max(line["x"])]
        axes.plot(ends, [line["slope"] * x + line["intercept"] for x in ends], color=GREY, linewidth=1)
        axes.set(xlabel=name, ylabel="seconds a product" if name != "vectors" else "seconds a block")
        axes.set_title(f"R\u00b2 = {line['r2']:.3f}", fontsize=9.5, color=INK)
        axes.set_ylim(bottom=0)
    for axes in (costs, *rest):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
    picture.savefig(path, dpi=DPI, metadata={"Software": None})


def draw_costs(axes: Axes, seconds: dict[str, Seconds]) -> None:
    """Median cost of each product in gradients, a bar for each network."""
    names = [name for name in next(iter(seconds.values())) if name != "gradient"]
    height = 0.8 / len(seconds)
    for i, (colour, (subject, times)) in enumerate(zip((BLUE, ORANGE, GREY), seconds.items())):
        values = [ratio(subject, times, name, "gradient").median for name in names]
        axes.barh(
            [row + i * height for row in range(len(names))], values, height, color=colour, label=subject.split(",")[0]
        )
    axes.set_yticks([row + height * (len(seconds) - 1) / 2 for row in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("cost of a product, in gradients")
    axes.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.78))


if __name__ == "__main__":
    main()
