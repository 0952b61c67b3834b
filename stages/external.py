"""Things outside the recipe that a configuration names: data files, Hub repositories, user code."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from artifacts.digest import sha256_bytes, sha256_file
from artifacts.errors import PosttrainError, RequestError
from stages.names import nearest

HUB = "hub:"
_CHUNK_BYTES = 1 << 20


def resolve_reference(kind: str, text: str, base: Path) -> str:
    """The reference with a relative path made absolute. Raises RequestError when it leads nowhere."""
    if kind == "code":
        return _resolve_code(text, base)
    if text.startswith(HUB) or "://" in text:
        return text
    path = Path(text).expanduser()
    path = path if path.is_absolute() else base / path
    if not any(_local_files(path)):
        raise RequestError(f"no such file or folder: {text!r} (looked for {path}); give an existing one")
    return str(path)


def _resolve_code(text: str, base: Path) -> str:
    if ":" not in text:
        return text
    source, name = text.rsplit(":", 1)
    if source.endswith(".py"):
        path = Path(source).expanduser()
        path = path if path.is_absolute() else base / path
        if not path.is_file():
            raise RequestError(f"no such Python file: {source!r} (looked for {path})")
        _require_function(path, name)
        return f"{path.resolve()}:{name}"
    if _module_file(source) is None:
        raise RequestError(f"no module named {source!r}; write file.py:name or an importable package.module:name")
    return text


def _require_function(path: Path, name: str) -> None:
    """Checked on the syntax tree, so that planning runs no code of the user."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise RequestError(f"{path}:{error.lineno}: not valid Python: {error.msg}") from error
    defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    if name not in defined:
        raise RequestError(
            f"{path} defines no function {name!r}{nearest(name, defined)}; it has: {', '.join(defined) or 'none'}"
        )


def load_code(reference: str) -> Callable[..., Any]:
    """The function that `file.py:name` or `package.module:name` names."""
    source, name = reference.rsplit(":", 1)
    if source.endswith(".py"):
        path = Path(source).resolve()
        spec = importlib.util.spec_from_file_location(f"posttrain_user_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # so that the file can import its neighbours
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    else:
        module = importlib.import_module(source)
    found = getattr(module, name, None)
    if not callable(found):
        raise RequestError(f"{source} has no function {name!r}{nearest(name, vars(module))}")
    return found  # type: ignore[no-any-return]


def code_identity(reference: str) -> Any:
    """The source of the named function's file and of the neighbours it imports; a built-in name stays a name."""
    if ":" not in reference:
        return reference
    source, name = reference.rsplit(":", 1)
    path = Path(source) if source.endswith(".py") else _module_file(source)
    if path is None:
        raise RequestError(f"no module named {source!r}")
    digest = hashlib.sha256()
    for file in _with_neighbours(path):
        digest.update(f"{file.name}:{sha256_file(file)}\n".encode())
    return {"function": name, "sha256": digest.hexdigest()}


def _module_file(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _with_neighbours(path: Path) -> list[Path]:
    """The file and the modules beside it that it imports, directly or not, in the order of their names."""
    found: dict[str, Path] = {}
    pending = [path]
    while pending:
        file = pending.pop()
        if file.name in found or not file.is_file():
            continue
        found[file.name] = file
        pending.extend(file.parent / f"{name}.py" for name in _imported_names(file))
    return [found[name] for name in sorted(found)]


def _imported_names(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def data_identity(reference: str) -> dict[str, str]:
    """The content of a file, folder or glob: SHA-256 of its files' names and digests; never a path or a time."""
    if reference.startswith(HUB):
        return {"hub": reference[len(HUB) :], "revision": hub_revision(reference[len(HUB) :], "dataset")}
    if "://" in reference:
        return _remote_identity(reference)
    path = Path(reference)
    if path.is_file():
        return {"sha256": sha256_file(path), "suffix": "".join(path.suffixes[-2:])}
    return {"sha256": folder_digest(path)}


def folder_digest(path: Path) -> str:
    """SHA-256 over the relative names and digests of a folder's (or glob's) files."""
    root = path if path.is_dir() else path.parent
    lines = [f"{file.relative_to(root).as_posix()}:{sha256_file(file)}" for file in _local_files(path)]
    if not lines:
        raise RequestError(f"no files at {path}")
    return sha256_bytes("\n".join(lines).encode())


def _local_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
    elif any(sign in path.name for sign in "*?["):
        yield from sorted(path.parent.glob(path.name))


def _remote_identity(url: str) -> dict[str, str]:
    import fsspec

    try:
        files = fsspec.open_files(url, "rb")
        lines = []
        for file in sorted(files, key=lambda entry: str(entry.path)):
            digest = hashlib.sha256()
            with file as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
            lines.append(f"{Path(file.path).name}:{digest.hexdigest()}")
    except Exception as error:
        raise RequestError(f"cannot read {url}: {type(error).__name__}: {error}") from error
    if not lines:
        raise RequestError(f"no files at {url}")
    return {"sha256": sha256_bytes("\n".join(lines).encode()), "suffix": "".join(Path(url).suffixes[-2:])}


def hub_revision(name: str, kind: str) -> str:
    """The commit of a Hub repository (`kind`: model or dataset) that its name means now."""
    from huggingface_hub import HfApi, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, RepositoryNotFoundError

    try:
        api = HfApi()
        info = api.model_info(name) if kind == "model" else api.dataset_info(name)
        return str(info.sha)
    except RepositoryNotFoundError as error:
        raise RequestError(f"no {kind} {name!r} on the Hub (a private one needs HF_TOKEN)") from error
    except (HfHubHTTPError, OSError, PosttrainError) as error:
        try:
            for repository in scan_cache_dir().repos:
                if repository.repo_id == name and repository.repo_type == kind:
                    return max(repository.revisions, key=lambda revision: revision.last_modified).commit_hash
        except CacheNotFound:
            pass
        raise RequestError(
            f"the Hub does not answer for {kind} {name!r} and it is not in the local cache "
            f"({type(error).__name__}); check the network or give a folder"
        ) from error
