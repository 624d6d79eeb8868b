"""What `camphive inspect` prints is true."""

import re

from hf_camphive.cli import main as cli
from hf_camphive.core.measures import format_count
from hf_camphive.hub.loading import load_base
from hf_camphive.network.footprint import count_macs


def test_inspect_tells_the_truth(capsys):
    assert cli.main(["inspect", "--model", "digits_resnet"]) == 0
    told = capsys.readouterr().out
    net = load_base("digits_resnet").net
    macs, parameters = count_macs(net, (3, 16, 16)), sum(p.numel() for p in net.parameters())
    assert macs == 10_203_776
    assert f"{format_count(macs)} MACs per image, {format_count(parameters)} parameters" in told
    rows = {line.split()[0]: line.split() for line in told.splitlines() if "%" in line}
    for name in ("layer1.0.conv1", "layer3.2.conv1"):
        weight = net.get_parameter(f"{name}.weight")
        assert rows[name][1] == str(len(weight))
        both = weight.numel() + net.get_parameter(f"{name[:-1]}2.weight").numel() + 2 * len(weight)
        assert rows[name][3] == f"{both / parameters:.1%}"
        area = {"1": 256, "3": 16}[name[5]]
        first = weight.numel() + net.get_parameter(f"{name[:-1]}2.weight").numel()
        assert rows[name][2] == f"{area * first / macs:.1%}"
    assert "frozen: output of the network" in told
    bars = {name: row[4].count("█") for name, row in rows.items() if len(row) > 4}
    assert bars["layer3.2.conv1"] == 16 and bars["layer1.0.conv1"] == 16 * int(rows["layer1.0.conv1"][1]) // 64
    assert re.search("dropped whole: layer1.0, layer1.1, layer1.2", told)
