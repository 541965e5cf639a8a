"""An adapter's directory: adapter_config.json and adapter_model.safetensors, read and written so that nothing is lost.

Reading trusts nothing: sizes are bounded before memory is taken, the header is checked against the file, links that
leave the directory are refused. Writing goes to temporary files that are renamed when they are whole and on disk.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FOLLOW_LINKS = "pass follow_symlinks=True"  # the command puts its option in the place of this
_PICKLE = "adapter_model.bin"
_LARGEST_CONFIG = 4 << 20  # bytes; PEFT's are about a thousand
_LARGEST_HEADER = 32 << 20  # bytes; a tensor takes about 150
_MOST_DIMENSIONS = 16
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class AdapterError(ValueError):
    """An adapter that cannot be read, written, or loaded into this model; the message lists everything found.

    ``file``: the name of the file, or the directory, that cannot be read; "" where something else is wrong.
    """

    file = ""


class AdapterExistsError(AdapterError, FileExistsError):
    """There is an adapter in the directory already, and ``overwrite`` was not asked for."""


@dataclass(frozen=True)
class StoredTensor:
    """What the header says about one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFiles:
    """What a directory holds: the config as parsed JSON, the header and the metadata of the weights."""

    directory: Path
    config: dict[str, Any]
    stored: dict[str, StoredTensor]
    metadata: dict[str, str]

    def tensors(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors of the file, on the CPU.

        Raises:
            AdapterError: the file changed since its header was read, or is broken.
        """
        safetensors, keys = _safetensors(), list(keys)
        path = self.directory / WEIGHTS_FILE
        if not keys:
            return {}
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in keys}
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            with _blaming(WEIGHTS_FILE):
                raise AdapterError(f"{path} cannot be read: {error}") from None


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError:
        raise ModuleNotFoundError("adapter files need safetensors: pip install safetensors") from None
    return safetensors


def adapter_folder(directory: str | os.PathLike[str], subfolder: str | None) -> Path:
    """``directory``, or ``subfolder`` below it, where PEFT puts adapters that have a name.

    Raises:
        AdapterError: ``subfolder`` would leave the directory.
    """
    if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
        raise TypeError(f"the directory of an adapter must be a path, got {directory!r}")
    folder = Path(directory)
    if subfolder is None:
        return folder
    if not isinstance(subfolder, str):
        raise TypeError(f"subfolder must be a string, got {type(subfolder).__name__}")
    parts = subfolder.replace("\\", "/").split("/")
    if any(part in ("", ".", "..") or "\0" in part or ":" in part for part in parts):
        raise AdapterError(f"subfolder {subfolder!r} must be the name of a folder inside {folder}")
    below = folder.joinpath(*parts)
    if not below.resolve().is_relative_to(folder.resolve()):
        raise AdapterError(f"subfolder {subfolder!r} is a link that leaves {folder}")
    return below


def read_adapter(folder: Path, follow_symlinks: bool = False) -> AdapterFiles:
    """Read config and header, checking both; the tensors' values are not read yet.

    Raises:
        AdapterError: a file is missing, too large, cut short, not what its name says, or a link out of ``folder``.
    """
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    with _blaming(str(folder)):
        _check_folder(folder)
    with _blaming(CONFIG_FILE):
        config = _read_config(config_path, follow_symlinks)
    with _blaming(WEIGHTS_FILE), _open(weights_path, follow_symlinks) as (file, size):
        stored, metadata = _read_header(file, size, weights_path)
    return AdapterFiles(folder, config, stored, metadata)


@contextlib.contextmanager
def _blaming(file: str) -> Iterator[None]:
    """Have every AdapterError from inside say that it is of this file."""
    try:
        yield
    except AdapterError as error:
        error.file = file
        raise


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"there is no directory {folder}" + (": it is a file" if folder.exists() else ""))
    if not os.path.lexists(folder / WEIGHTS_FILE) and (folder / _PICKLE).exists():
        raise AdapterError(
            f"{folder} holds {_PICKLE}, a pickle, which can run code when it is read: convert it once, where you trust "
            "it, with safetensors.torch.save_file(torch.load('adapter_model.bin', weights_only=True), "
            f"'{WEIGHTS_FILE}', {{'format': 'pt'}})"
        )


@contextlib.contextmanager
def _open(path: Path, follow_symlinks: bool) -> Iterator[tuple[Any, int]]:
    """The file and its size; refuses links out of the directory and what is no regular file."""
    if not os.path.lexists(path):
        raise AdapterError(f"{path.parent} has no {path.name}: is it the directory of an adapter?")
    if path.is_symlink() and not follow_symlinks and not _link_stays(path):
        raise AdapterError(f"{path} is a link that leaves its directory: {FOLLOW_LINKS} if it leads where you want")
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise AdapterError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            yield file, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def _link_stays(path: Path) -> bool:
    """Whether a link stays in its directory, or leads where the hub's cache keeps its files: ../../blobs."""
    target, folder = path.resolve(), path.parent.resolve()
    if target.is_relative_to(folder):
        return True
    snapshots = next((parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), None)
    return snapshots is not None and target.is_relative_to(snapshots.parent.parent / "blobs")


def _read_config(path: Path, follow_symlinks: bool) -> dict[str, Any]:
    with _open(path, follow_symlinks) as (file, size):
        if size > _LARGEST_CONFIG:
            raise AdapterError(f"{path} has {size:,} bytes, more than the {_LARGEST_CONFIG:,} a config may have")
        config = _parse(file.read(_LARGEST_CONFIG), path)
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, not a JSON object: it is no adapter's config")
    return config


def _parse(data: bytes, path: Path) -> Any:
    """JSON without what the standard does not know (NaN) and without keys that appear twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"{key!r} appears twice")
        return content

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is not valid JSON: {error}") from None


def _read_header(file: Any, size: int, path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The safetensors header: 8 bytes of length, JSON, then the tensors, back to back and to the end of the file."""
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise AdapterError(f"{path} is cut short or no safetensors file: {size:,} bytes, header of {length:,}")
    if length > _LARGEST_HEADER:
        raise AdapterError(f"{path} has a header of {length:,} bytes, more than the {_LARGEST_HEADER:,} allowed")
    header = _parse(file.read(length), path)
    if not isinstance(header, dict):
        raise AdapterError(f"{path} has a header that is a {type(header).__name__}, not an object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError(f"{path} has metadata that is not a table of strings")
    spans, stored = [], {}
    for key, entry in header.items():
        stored[key], span = _read_entry(key, entry, path)
        spans.append((*span, key))
    end = 0
    for start, stop, key in sorted(spans):
        if start != end:
            raise AdapterError(f"{path}: tensor {key!r} starts at byte {start} where {end} was due: overlap or gap")
        end = stop
    if end != size - 8 - length:
        raise AdapterError(f"{path} holds {size - 8 - length:,} bytes of tensors, its header says {end:,}: cut short?")
    return stored, metadata


def _read_entry(key: str, entry: Any, path: Path) -> tuple[StoredTensor, tuple[int, int]]:
    def whole(numbers: Any, most: int) -> bool:
        return (
            isinstance(numbers, list)
            and len(numbers) <= most
            and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        )

    if not isinstance(entry, dict):
        raise AdapterError(f"{path}: {key!r} is a {type(entry).__name__} in the header, not a tensor")
    shape, offsets = entry.get("shape", ()), entry.get("data_offsets", ())
    if not whole(shape, _MOST_DIMENSIONS) or not whole(offsets, 2) or len(offsets) != 2:
        raise AdapterError(f"{path}: tensor {key!r} has no valid shape and offsets in the header")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry.get("dtype"), str) else None
    if dtype is None:
        raise AdapterError(f"{path}: tensor {key!r} is of dtype {entry.get('dtype')!r}; known are {', '.join(_DTYPES)}")
    start, stop = offsets
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise AdapterError(f"{path}: tensor {key!r} of shape {shape} does not take {stop - start} bytes")
    return StoredTensor(dtype, tuple(shape)), (start, stop)


def write_adapter(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], metadata: dict[str, str], overwrite: bool
) -> None:
    """Write both files, each to a temporary file beside it that is renamed once it is on disk.

    Raises:
        AdapterExistsError: one of the two is there already and ``overwrite`` is False.
        AdapterError: ``folder`` is a file.
    """
    save = _safetensors().torch.save
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder} is a file: an adapter needs a directory")
    there = [name for name in (CONFIG_FILE, WEIGHTS_FILE, _PICKLE) if os.path.lexists(folder / name)]
    if there and not overwrite:
        raise AdapterExistsError(
            f"{folder} has {' and '.join(there)} already, which stays as it is: choose another directory, or pass "
            "overwrite=True"
        )
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False).encode()
    # Copies, because safetensors refuses tensors that share memory.
    whole = {key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as cleanup:
        parts = [
            (_temporary(folder / name, data, cleanup), folder / name)
            for name, data in ((WEIGHTS_FILE, save(whole, metadata)), (CONFIG_FILE, text))
        ]
        for temporary, path in parts:
            os.replace(temporary, path)
    _sync_folder(folder)


def _temporary(path: Path, data: bytes, cleanup: contextlib.ExitStack) -> Path:
    """``data`` in a new file beside ``path``, on disk; removed by ``cleanup`` where it was not renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # 0o666 leaves the permissions to the user's umask, as open() does.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    cleanup.callback(temporary.unlink, missing_ok=True)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _sync_folder(folder: Path) -> None:
    """Have the renames on disk too; not every system can open a directory."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
