"""The house: imports go along one chain of rooms, and only named places print, write, draw or talk to the Hub."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hf_camphive"
ROOMS = {  # each room, and the rooms that it may import
    "core": (),
    "network": ("core",),
    "training": ("core", "network"),
    "curvature": ("core", "network"),
    "pruning": ("core", "network", "training", "curvature"),
    "hub": ("core", "network", "training", "curvature"),
    "runs": ("core", "network", "training", "curvature", "pruning", "hub"),
    "cli": ("core", "network", "training", "curvature", "pruning", "hub", "runs"),
}
MOST_ENTRIES = 7  # of a folder of the package, its __init__ apart
REMOTE_CODE = {  # shipped inside saved folders: these files import one another and nothing else of the package
    "hf_camphive.network.modeling.cifar": set(),
    "hf_camphive.network.modeling.layers": set(),
    "hf_camphive.network.modeling.resizing": {"hf_camphive.network.modeling.layers"},
    "hf_camphive.network.modeling.modeling_camphive": {  # transformers ships what this one imports itself
        *("hf_camphive.network.modeling.cifar", "hf_camphive.network.modeling.layers"),
        "hf_camphive.network.modeling.resizing",
    },
}
PRINTS = ("hf_camphive.cli",)
WRITES = (
    *("hf_camphive.cli", "hf_camphive.core.config", "hf_camphive.hub.saving", "hf_camphive.runs.progress"),
    *("hf_camphive.runs.comparison", "hf_camphive.training.checkpoints"),
    "hf_camphive.pruning.planning.latency.timing",  # caches of timings
)
DRAWS = ("hf_camphive.hub.plots", "hf_camphive.runs.comparison_plot")  # figures into a folder that they are given
TALKS_TO_HUB = ("hf_camphive.hub", "hf_camphive.training.data.datasets")
FILE_CALLS = {
    *(".write_text", ".write_bytes", ".mkdir", ".rename", ".unlink", ".rmdir", ".rmtree", ".save_file"),
    *("open", "os.rename", "os.replace", "shutil.rmtree", "shutil.copy", "shutil.copytree", "torch.save"),
    *(".savefig", ".save_state", ".save_pretrained", ".touch"),
}
HUB_CALLS = {
    *("snapshot_download", "hf_hub_download", "list_repo_files", "HfApi", "upload_folder", ".create_repo"),
    *(".upload_folder", "datasets.load_dataset"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself and the entry point of `python -m`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else None


def own_imports(module: str, tree: ast.AST) -> set[str]:
    """Modules of the package that a module imports, also within functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *filter(None, [node.module])])
            if base.split(".")[0] == "hf_camphive":
                names = {f"{base}.{alias.name}" for alias in node.names}
                found |= {name for name in names if name in MODULES} or {base}
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


def within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def may_import(module: str, other: str) -> bool:
    room, target = room_of(module), room_of(other)
    if room is None or other == "hf_camphive":  # the package itself exports names from all rooms
        return room is None
    return target == room or target in ROOMS[room]


def a_circle(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, the first one repeated at the end; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(imports.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(imports) if (found := visit(module, []))), [])


def test_every_module_has_a_room():
    assert {room_of(module) for module in MODULES} - {None} == ROOMS.keys()
    assert {path.name for path in PACKAGE.iterdir() if path.is_file()} == {"__init__.py", "__main__.py", "py.typed"}


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_along_the_chain(module):
    for other in own_imports(module, MODULES[module]):
        assert may_import(module, other), f"{module} imports {other}"


def test_no_imports_in_a_circle():
    assert not a_circle({module: own_imports(module, tree) for module, tree in MODULES.items()})


@pytest.mark.parametrize("folder", sorted({path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}), ids=str)
def test_a_folder_holds_few_things(folder):
    entries = {path.name for path in folder.iterdir()} - {"__init__.py", "__pycache__"}
    assert len(entries) <= MOST_ENTRIES, sorted(entries)


@pytest.mark.parametrize("module", REMOTE_CODE)
def test_what_is_shipped_as_remote_code_needs_nothing_else(module):
    assert own_imports(module, MODULES[module]) == REMOTE_CODE[module]


@pytest.mark.parametrize("module", MODULES)
def test_only_the_command_line_prints(module):
    assert within(module, PRINTS) or not calls(MODULES[module]) & {"print", "sys.stdout.write", "sys.stderr.write"}


@pytest.mark.parametrize("module", MODULES)
def test_few_files_write(module):
    writing = calls(MODULES[module]) & FILE_CALLS
    if within(module, DRAWS):
        assert writing <= {".savefig"}
    elif module in (*REMOTE_CODE, "hf_camphive.runs.pruner"):
        assert writing <= {".save_pretrained"}  # transformers' own, which the one extends, and the other's by `hub`
    else:
        assert within(module, WRITES) or not writing, writing


@pytest.mark.parametrize("module", MODULES)
def test_only_the_hub_room_and_datasets_talk_to_the_hub(module):
    assert within(module, TALKS_TO_HUB) or not calls(MODULES[module]) & HUB_CALLS


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
    text = ast.get_docstring(MODULES[module])
    assert text and "To be described" not in text


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda path: path.name)
def test_no_test_module_imports_another(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name for name in names if name.split(".")[-1].startswith("test_")}


def test_no_drawer_for_odds_and_ends():
    assert not {module.split(".")[-1] for module in MODULES} & {"utils", "util", "helpers", "misc"}


def test_the_rules_bite():
    tree = ast.parse("from hf_camphive.cli.main import main\nimport hf_camphive.runs\nprint(torch.load(p).x.mkdir())")
    assert own_imports("hf_camphive.core.plan", tree) == {"hf_camphive.cli.main", "hf_camphive.runs"}
    assert {"print", "torch.load", ".mkdir"} <= calls(tree)
    relative = ast.parse("from .cifar import CifarResNet")
    assert own_imports("hf_camphive.network.modeling.modeling_camphive", relative) == {
        "hf_camphive.network.modeling.cifar"
    }
    assert not may_import("hf_camphive.hub.card", "hf_camphive.pruning.polish")
    assert not may_import("hf_camphive.training.data.loaders", "hf_camphive.curvature.gates")
    assert may_import("hf_camphive.runs.cycle", "hf_camphive.pruning.polish")
    assert a_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert not a_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})
