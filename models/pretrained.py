"""Where a part of a pretrained pipeline lies: a local folder, or a repository on the hub."""

from pathlib import Path


def find_part(name: str, kind: str, folder: str, *, hub_folder: str | None = None) -> tuple[str, str | None]:
    """(folder or repository, subfolder) of `name`, as diffusers' from_pretrained takes them.

    Args:
        name: a local folder, the part's own or a pipeline's; or a name on the hub, owner/name[/subfolder].
        kind: what an error calls the part.
        folder: the part's subfolder in a local pipeline.
        hub_folder: its subfolder on the hub where `name` has none.

    Raises ValueError where `name` is neither.
    """
    path = Path(name)
    if path.is_dir():
        return str(path if (path / "config.json").exists() else path / folder), None
    if path.is_absolute() or name.startswith(".") or "/" not in name:
        raise ValueError(f"no {kind} at {name}: want a local folder, or owner/name on the hub")
    owner, repository, *rest = name.split("/")
    return f"{owner}/{repository}", "/".join(rest) or hub_folder
