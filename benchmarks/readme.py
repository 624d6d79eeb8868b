"""Redraw the README's picture and rewrite its tables that are made of kept results. Runs in seconds, measures nothing.

    python benchmarks/readme.py

Reads docs/results/latency.json (the picture, docs/results/front.png and front_dark.png), docs/results/demo.json (what the
demo prints) and docs/results/zoo.json (supported networks). The tables stand between HTML comments in README.md.
"""

import hashlib
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import zoo
from matplotlib.axes import Axes

from hf_camphive.hub.report import PruneReport

ROOT = Path(__file__).parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "docs" / "results"
ENGINE, BATCH = "torch folded", "32"
CURVES = {  # what a line shows: the rows of docs/results/latency.json that it joins
    "milliseconds": [f"latency {share}" for share in (0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3)],
    "macs": [f"macs {fewer}x" for fewer in (1.5, 2.1, 2.6, 4.2)],
    "torch-pruning": [f"torch-pruning {fewer}x recalibrated" for fewer in (1.5, 2.1, 2.6, 4.2)],
}
LOWEST = 76  # % at the foot of the picture
THEMES = {  # file: colours that can be told apart with any colour vision, on the two backgrounds of GitHub
    "front.png": {"ink": "#1f2328", "soft": "#59636e", "grid": "#d8dee4"}
    | {"milliseconds": "#0072b2", "macs": "#3f8fc4", "torch-pruning": "#b4510a"},
    "front_dark.png": {"ink": "#f0f6fc", "soft": "#9198a1", "grid": "#30363d"}
    | {"milliseconds": "#58b4f5", "macs": "#4a8dc2", "torch-pruning": "#e8894a"},
}
KINDS = {  # kind of network: (families as the table names them, what the names of its networks begin with)
    "ResNets": (
        "ResNet, ResNeXt, SE, ECA, SK, GC, Res2Net, ResNeSt, NFNet",
        "resnet resnext seresnet ecaresnet gcresnet res2n resnest skresnet legacy_seresnet nf_ eca_nfnet",
    ),
    "Mobile networks": (
        "MobileNet V1 to V4, EfficientNet, EfficientNetV2, MnasNet, MixNet, GhostNet, LCNet, FBNet, ReXNet",
        "mobilenet mnasnet semnasnet spnasnet hardcorenas tinynet efficientnet tf_efficientnet mixnet ghostnet repghostnet"
        " lcnet fbnetc rexnet",
    ),
    "RegNets and re-parametrised networks": (
        "RegNet X, Y and Z, GENet, RepVGG, MobileOne, FastViT, RepViT",
        "regnet gernet repvgg mobileone fastvit repvit",
    ),
    "ConvNeXt and similar": (
        "ConvNeXt V1 and V2, EdgeNeXt, ConvMixer, StarNet, PoolFormer, InceptionNeXt, MambaOut, FocalNet, RDNet",
        "convnext edgenext convmixer starnet poolformer inception_next mambaout convformer focalnet rdnet",
    ),
    "Other convolutional networks": (
        "VGG, Inception, Xception, DenseNet, DLA, DPN, HRNet, CSPNet, DarkNet, TResNet, SelecSLS, VoVNet, HGNet",
        "vgg inception_v inception_resnet xception legacy_xception densenet dla dpn hrnet csp cs3 darknet tresnet selecsls"
        " ese_vovnet vovnet hgnet",
    ),
    "Attention and MLPs": (
        "ViT, Swin, PVT, EfficientViT, MobileViT V2, MLP-Mixer",
        "vit swin pvt efficientvit mobilevit mixer",
    ),
}


def main() -> None:
    """Write the pictures and the README."""
    draw(kept("latency"))
    README.write_text(refreshed(README.read_text(encoding="utf-8")), encoding="utf-8")


def kept(name: str) -> dict:
    """Results of a benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


# The tables


def refreshed(text: str) -> str:
    """The README's text, with every block between comments made anew.

    Raises:
        ValueError: A block's comments are missing, or stand there twice.
    """
    for name, block in blocks().items():
        begin, end = f"<!-- begin {name}: written by benchmarks/readme.py -->\n", f"<!-- end {name} -->"
        if (text.count(begin), text.count(end)) != (1, 1):
            raise ValueError(f"README.md must hold {begin.strip()} and {end} once each")
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{block}\n\n{end}{after}"
    return text


def blocks() -> dict[str, str]:
    """What stands between the comments."""
    report = PruneReport.from_json((RESULTS / "demo.json").read_text(encoding="utf-8"))
    return {"demo": f"```text\n{report.table().strip()}\n```", "zoo": supported(kept("zoo"))}


def supported(rows: dict[str, dict]) -> str:
    """How many networks of each kind lose half of their MACs, and which are only partly cut."""
    tools = list(zoo.TOOLS)
    passed = {tool: {name for name, row in rows.items() if zoo.passed(row[tool])} for tool in tools}
    lines = [
        f"Of {len(rows)} networks of timm, {len(passed[tools[0]])} lose at least half of their MACs when half of their channels"
        f" go; {len(passed[tools[1]])} do with torch-pruning 1.6.1.",
        "",
        "| kind | families | networks | MACs halved | by torch-pruning | partly frozen (MACs removed) |",
        "|---|---|---|---|---|---|",
    ]
    for kind, (families, _) in KINDS.items():
        members = [name for name in rows if kind_of(name) == kind]
        counts = [len(members), *(len(passed[tool].intersection(members)) for tool in tools)]
        partly = [
            f"`{name}` ({1 - row['macs_left'] / row['macs']:.0%})"
            for name in members
            if (row := rows[name]["camphive"]).get("frozen")
        ]
        lines.append(f"| {kind} | {families} | {' | '.join(map(str, counts))} | {', '.join(partly)} |")
    return "\n".join(lines)


def kind_of(name: str) -> str:
    """The one kind that a network of the zoo belongs to.

    Raises:
        ValueError: None fits, or several do.
    """
    kinds = [kind for kind, (_, beginnings) in KINDS.items() if name.startswith(tuple(beginnings.split()))]
    if len(kinds) != 1:
        raise ValueError(f"{name} is of {len(kinds)} kinds of KINDS in benchmarks/readme.py ({kinds}); it needs one")
    return kinds[0]


# The picture


def points(rows: dict[str, dict]) -> dict[str, list[tuple[float, float]]]:
    """(milliseconds, top-1 in %) of the dense network and along each curve."""
    return {
        curve: [(rows[name]["ms"][ENGINE][BATCH]["median"], 100 * rows[name]["test_top1"]) for name in names]
        for curve, names in {"dense": ["dense"], **CURVES}.items()
    }


def fingerprint(rows: dict[str, dict]) -> str:
    """What a picture's metadata says of the points that it shows."""
    return hashlib.sha256(json.dumps(points(rows)).encode()).hexdigest()


def draw(rows: dict[str, dict]) -> None:
    """Accuracy over milliseconds, once for each theme."""
    found = points(rows)
    for file, colours in THEMES.items():
        figure, axes = plt.subplots(figsize=(8, 4.3), layout="constrained")
        ((dense_ms, dense_top1),) = found["dense"]
        frame(axes, dense_ms, colours)
        for curve, width in {"torch-pruning": 1.8, "macs": 1.8, "milliseconds": 3.2}.items():
            axes.plot(*zip(*found[curve]), marker="o", markersize=2.5 * width, linewidth=width, color=colours[curve])
        axes.plot(dense_ms, dense_top1, marker="D", markersize=9, color=colours["ink"], clip_on=False)
        label(axes, found, colours)
        figure.savefig(RESULTS / file, dpi=200, transparent=True, metadata={"Description": fingerprint(rows)})
        plt.close(figure)


def frame(axes: Axes, dense_ms: float, colours: dict[str, str]) -> None:
    """Axes: milliseconds below, how many times faster than the dense network above."""
    axes.set(xlim=(11, 48), ylim=(LOWEST, 95), yticks=range(80, 96, 5))
    axes.set_xlabel("milliseconds for 32 images, measured", fontsize=11, color=colours["soft"])
    axes.set_ylabel("top-1 on 10,000 test images, %", fontsize=11, color=colours["soft"])
    above = axes.secondary_xaxis("top", functions=(lambda ms: ms, lambda ms: ms))
    speeds = {1: "1x", 1.25: "1.25x", 1.5: "1.5x", 2: "2x faster", 3: "3x faster"}
    above.set_xticks([dense_ms / times for times in speeds], speeds.values())
    axes.tick_params(length=0, labelsize=11, labelcolor=colours["soft"])
    above.tick_params(length=5, labelsize=11, color=colours["soft"], labelcolor=colours["soft"])
    for spine in (*axes.spines.values(), *above.spines.values()):
        spine.set_visible(False)
    axes.grid(axis="y", color=colours["grid"], linewidth=1)
    axes.set_axisbelow(True)


def label(axes: Axes, found: dict[str, list[tuple[float, float]]], colours: dict[str, str]) -> None:
    """Say beside each line what it is, and where torch-pruning's leads to below the picture."""
    ((dense_ms, dense_top1),) = found["dense"]
    (x, y), (macs_x, macs_y), (peer_x, peer_y) = found["milliseconds"][4], found["macs"][3], found["torch-pruning"][0]
    then_ms, then_top1 = found["torch-pruning"][1]
    below = {"ha": "left", "va": "top", "fontsize": 11.5}
    axes.text(
        dense_ms, dense_top1 - 0.9, f"dense\n{dense_top1:.1f} %", color=colours["ink"], **below | {"ha": "center"}
    )
    half_x, half_y = found["milliseconds"][3]
    axes.text(half_x + 0.3, half_y - 0.6, f"{half_y:.1f} %", color=colours["milliseconds"], **below)
    ours = "hf_camphive, planned\nfor milliseconds"
    axes.text(
        x - 1, y + 2.6, ours, color=colours["milliseconds"], weight="bold", **below | {"ha": "right", "va": "bottom"}
    )
    axes.text(macs_x + 0.4, macs_y - 0.6, "hf_camphive, planned\nfor MACs", color=colours["macs"], **below)
    peer = f"torch-pruning by\nmagnitude: {peer_y:.0f} %,\nthen {then_top1:.0f} % at {then_ms:.0f} ms"
    axes.text(peer_x + 0.4, peer_y - 1.7, peer, color=colours["torch-pruning"], **below)


if __name__ == "__main__":
    main()
