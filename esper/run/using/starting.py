"""Writes a starting template into a new folder."""

import keyword
from pathlib import Path

from esper.leyline.errors import ConfigError
from esper.run.using import templates


def write_project(folder: Path, task: str) -> list[str]:
    """Writes a package of the folder's name: model, data, task, settings, a Slurm line, a test.

    Args:
        folder: a new folder.
        task: ``classification``, ``regression`` or ``segmentation``.

    Returns:
        Lines that say what may be typed next.

    Raises:
        ConfigError: the folder is there already or its name is no name of a package; there is no such template.
    """
    name = folder.name
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"esper init {name}: a package cannot be called so; use letters, digits and _")
    if task not in templates.MODEL:
        raise ConfigError(f"--task {task}: no template for it; there are {', '.join(sorted(templates.MODEL))}")
    if folder.exists():
        raise ConfigError(f"{folder}: it is there already; name a new folder")
    files = {
        f"{name}/__init__.py": "",
        f"{name}/model.py": templates.MODEL[task],
        f"{name}/data.py": templates.DATA[task],
        f"{name}/task.py": templates.TASK[task],
        "settings.txt": templates.SETTINGS.replace("SITES", templates.SITES),
        "train.sh": templates.TRAIN,
        "slurm.sh": templates.SLURM,
        f"test_{name}.py": templates.TEST,
    }
    for path, text in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("NAME", name))
        if target.suffix == ".sh":
            target.chmod(0o755)
    return [
        f"esper: {len(files)} files in {folder}",
        f"  cd {folder} && ./train.sh       trains on synthetic data",
        f"  cd {folder} && pytest           a few steps of everything",
        f"  {name}/data.py, task.py and model.py are where your own go",
    ]
