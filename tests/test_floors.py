"""The house rules that a reader counts on: imports go down only, and each kind of side effect has its few files."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "hf_camphive"
FLOORS = {
    0: ["__init__", "errors", "allocator", "memory", "modes", "config", "plan", "cifar", "modeling_camphive"],
    1: ["norms", "graph", "ridge", "limits", "planning", "depth", "budgets", "calibration"],
    2: [
        *("labels", "handlers", "tracing", "branches", "implants", "surgery", "expansion"),
        *(
            "spectrum",
            "traces",
            "gates",
            "curvature",
            "evidence",
            "second_order",
            "weight_pruning",
            "merge_loss",
            "criteria",
        ),
        *("reconstruction", "merging"),
        *("folding", "operations", "footprint", "report", "timing", "latency", "results", "plots", "card", "metrics"),
    ],
    3: [
        *("splits", "sources", "data", "models", "launch", "precision", "evaluation"),
        *("optimization", "polish", "checkpoints", "training", "hub"),
    ],
    4: ["resume", "steps", "pruner", "comparison"],
    5: ["arguments", "cli"],
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}
# Within a floor, the order in which modules may build on each other: a module imports only from those before it.
WITHIN = {module: i for modules in FLOORS.values() for i, module in enumerate(modules)}
PRINTS = {"cli"}
WRITES = {"config", "hub", "resume", "cli", "comparison", "checkpoints", "timing"}  # and caches of timings
DRAWS = {"plots"}  # figures into a folder that it is given
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.glob("*.py"))}


def own_imports(tree: ast.AST) -> set[str]:
    """Modules of the package that a module imports, also within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                assert node.level == 1, "the package is flat"
                found |= {node.module} if node.module else {alias.name for alias in node.names}
            elif node.module.split(".")[0] == "hf_camphive":
                found.add(node.module.partition(".")[2] or "__init__")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "hf_camphive"}
    return found


def calls(tree: ast.AST) -> set[str]:
    """Dotted names of everything that a module calls, as far as they are spelled out: "torch.load", ".write_text"."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            parts, function = [], node.func
            while isinstance(function, ast.Attribute):
                parts.insert(0, function.attr)
                function = function.value
            parts.insert(0, function.id if isinstance(function, ast.Name) else "")
            found |= {".".join(parts), f".{parts[-1]}" if len(parts) > 1 else parts[-1]}
    return found


def test_every_module_has_a_floor():
    assert MODULES.keys() == FLOOR.keys()


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    for other in own_imports(MODULES[module]):
        assert (FLOOR[other], WITHIN[other]) < (FLOOR[module], WITHIN[module]) or (module, other) == (
            "__init__",
            "modeling_camphive",
        ), f"{module} (floor {FLOOR[module]}) imports {other} (floor {FLOOR[other]})"


def test_what_is_shipped_as_remote_code_needs_nothing_else():
    assert own_imports(MODULES["cifar"]) == set()
    assert own_imports(MODULES["modeling_camphive"]) == {"cifar"}


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    assert module in PRINTS or not calls(MODULES[module]) & {"print", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("module", MODULES)
def test_few_files_write(module):
    writing = calls(MODULES[module]) & {
        *(".write_text", ".write_bytes", ".mkdir", ".rename", ".unlink", ".rmdir", ".rmtree", ".save_file"),
        *("open", "os.rename", "os.replace", "shutil.rmtree", "shutil.copy", "shutil.copytree", "torch.save"),
        *(".savefig", ".save_state", ".save_pretrained", ".touch"),
    }
    if module in DRAWS:
        assert writing <= {".savefig"}
    elif module in ("modeling_camphive", "pruner"):
        assert writing <= {".save_pretrained"}  # transformers' own, which the one extends, and the other's by `hub`
    else:
        assert module in WRITES or not writing, writing


@pytest.mark.parametrize("module", MODULES)
def test_nothing_is_unpickled(module):
    imported = {
        alias.name.split(".")[0]
        for node in ast.walk(MODULES[module])
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert not imported & {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
    loads = {"torch.load", "pickle.load", "pickle.loads", "np.load", "torch.hub.load", "Unpickler"}
    assert not calls(MODULES[module]) & (loads | {"eval", "exec"})


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module):
    assert ast.get_docstring(MODULES[module])


def test_no_drawer_for_odds_and_ends():
    assert not MODULES.keys() & {"utils", "util", "helpers", "common", "misc"}


def test_the_rules_bite():
    tree = ast.parse(
        "from .cli import main\nfrom . import hub\nimport hf_camphive.cli.main\nprint(torch.load(p).x.mkdir())"
    )
    assert own_imports(tree) == {"cli", "hub", "hf_camphive.cli.main"}
    assert {"print", "torch.load", ".mkdir"} <= calls(tree)
