"""Who may import whom (docs in the house plan): an AST walk over every file, lazy imports counted."""

import ast
from pathlib import Path

import pytest

from model.config import CHECKOUT

FILES = sorted([*CHECKOUT.glob("model/**/*.py"), *CHECKOUT.glob("pages/**/*.py"), CHECKOUT / "app.py"])
PAGES_MAY = {
    "model.storyteller",
    "model.find",
    "model.prompt",
    "model.config",
    "model.errors",
    "model.library",
    "model.jobs.admission",
    "model.jobs.manager",
    "model.jobs.record",
    "model.intake",
    "model.jobs.plan",
    "model.own_models",
    "model.evaluation",
    "model.hub.pull",
    "model.hub.publish",
}
# For each part of the house, which of the others it must never import.
FORBIDDEN = {
    "model/engine": ("model.training", "model.evaluation", "model.hub", "model.storyteller", "model.find", "model.cli"),
    "model/training": ("model.engine", "model.hub", "model.storyteller", "model.find", "model.cli"),
    "model/evaluation": ("model.engine", "model.training", "model.storyteller", "model.find", "model.cli"),
    "model/hub": ("model.engine", "model.training", "model.storyteller", "model.find", "model.cli"),
    **dict.fromkeys(
        ("model/decoder.py", "model/sampling.py", "model/tokenizer.py", "model/checkpoint.py", "model/config.py"),
        ("model.engine", "model.training", "model.evaluation", "model.hub", "model.storyteller", "model.find",
         "model.cli"),
    ),
    "model/find.py": ("model.engine", "model.training", "model.evaluation", "model.storyteller", "model.cli"),
    "model/prompt.py": ("model.",),
    "model/storyteller.py": ("model.training", "model.evaluation", "model.cli"),
    **dict.fromkeys(
        tuple(f"model/jobs/{name}.py" for name in ("manager", "admission", "launcher", "record", "state", "process")),
        ("model.training", "model.engine", "model.storyteller", "model.find", "model.hub", "model.cli",
         "model.jobs.worker", "model.jobs.task"),
    ),
    "model/jobs/worker.py": ("model.jobs.manager", "model.engine", "model.storyteller", "model.find", "model.hub",
                             "model.cli"),
    "model/intake": ("model.engine", "model.evaluation", "model.storyteller", "model.jobs", "model.cli"),
}  # fmt: skip
WITHOUT_TORCH = (
    "model/config.py",
    *(f"model/jobs/{name}.py" for name in ("manager", "admission", "launcher", "record", "state", "process", "worker")),
    "model/errors.py",
    "model/tokenizer.py",
    "model/engine/request.py",
    "model/engine/scheduler.py",
    "model/engine/engine.py",
    "model/engine/cpu_kernels.py",
    "model/engine/cpu_backend.py",
    "model/hub/export.py",
    "model/hub/pull.py",
    *(f"model/evaluation/{name}.py" for name in ("cloze", "stories", "following", "overlap", "realism", "suite")),
    "model/text.py",
    "model/drafts.py",
    "model/prompt.py",
    "model/worlds/world.py",
    "model/training/data.py",
    "model/training/ideas.py",
    "model/training/contamination.py",
    *(f"model/intake{part}.py" for part in ("", "_text", "_formats", "_rows", "_check")),
)


def imports(path: Path) -> set[str]:
    """Every module a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def ids(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_follow_the_plan(path):
    name, found = ids(path), imports(path)
    assert "model" not in found, "write `from model.x import Y`"
    if name.startswith("model/"):
        assert not {module for module in found if module.split(".")[0] in ("streamlit", "pages", "app")}
    else:
        ours = {module for module in found if module.startswith("model")}
        assert ours <= PAGES_MAY
        assert not {module.split(".")[0] for module in found} & {"torch", "numpy", "safetensors", "sentencepiece"}
    for part, never in FORBIDDEN.items():
        if name.startswith(part):
            assert not {module for module in found if module.startswith(never)}
    if name in WITHOUT_TORCH:
        assert not {module for module in found if module.split(".")[0] in ("torch", "transformers")}


def test_training_needs_neither_streamlit_nor_platformdirs():
    """Training also runs on machines that have torch and little else."""
    seen, queue = set(), ["model.training.loop"]
    while queue:
        module = queue.pop()
        path = CHECKOUT / (module.replace(".", "/") + ".py")
        if module in seen or not path.is_file():
            continue
        seen.add(module)
        top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in top_level:
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not {name.split(".")[0] for name in names} & {"streamlit", "platformdirs", "click"}, module
            queue += [name for name in names if name.startswith("model.")]
    assert {"model.config", "model.decoder", "model.training.data"} <= seen
