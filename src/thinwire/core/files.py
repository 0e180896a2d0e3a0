"""Atomic file writes: a file is replaced whole or not at all, and never through a link in its place."""

import contextlib
import os
import secrets
import stat
import zlib
from collections.abc import Callable, Generator
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, cast

from thinwire.core.errors import ThinwireError

NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
"""Flags that create a new file and fail if the name exists."""


def write(path: str | Path, fill: Callable[[BinaryIO], object]) -> None:
    """Replace a file by a new one, atomically.

    ``fill`` writes into a new file with a random name in the same folder, which is synced to disk and then replaces the
    old file, whose permissions it gets. On any error the new file and new folders are removed and the old file stays.
    A link at ``path`` is replaced, not followed. The folder may be a link, since the caller chose it; it is opened
    once.
    """
    with _folder(path) as (folder, made, mode):
        file = os.open(made, NEW, 0o666 if mode is None else mode, dir_fd=folder)
        try:
            with _Out(file) as out:
                if mode is not None and mode != stat.S_IMODE(os.fstat(file).st_mode):  # the umask removed some bits
                    os.fchmod(file, mode)
                out.fill(fill)
            os.replace(made, Path(path).name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(made, dir_fd=folder)
            raise
        with contextlib.suppress(OSError):  # not every filesystem can sync a folder; the file itself is synced
            os.fsync(folder)


def write_text(path: str | Path, text: str) -> None:
    """Replace a file by one with this text in UTF-8; see ``write``."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise ThinwireError(
            f"can't write {path}: character {error.start} of its text, {text[error.start]!r}, can't be written as "
            "UTF-8; what stood there before is as it was. Take it out of the text, and write it again"
        ) from error
    write(path, lambda file: file.write(data))


def leftovers(path: Path) -> list[Path]:
    """Return the temporary files of processes that were killed while they wrote ``path``."""
    names = os.listdir(path.parent) if path.parent.is_dir() else []
    return [path.parent / name for name in names if name.startswith(_beginning(path))]


def _beginning(path: Path) -> str:
    """Return the prefix of temporary names; a hash, since the name itself plus a suffix could be too long."""
    return f".thinwire-{zlib.crc32(os.fsencode(path.name)):08x}-"


def check_writable(path: str | Path) -> None:
    """Check that ``write`` would succeed, before the content is computed."""
    with _folder(path) as (folder, made, _):
        os.close(os.open(made, NEW, 0o666, dir_fd=folder))
        os.unlink(made, dir_fd=folder)


class _Out:
    """An open file that keeps the first OSError, since a writer may raise another error in its place."""

    def __init__(self, file: int) -> None:
        self._file = os.fdopen(file, "wb")
        self._error: OSError | None = None

    def __enter__(self) -> "_Out":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a failed flush was reported already
            self._file.close()

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._error = self._error or error
            raise

    def flush(self) -> None:
        pass  # ``fill`` flushes at the end

    def fill(self, fill: Callable[[BinaryIO], object]) -> None:
        try:
            fill(cast(BinaryIO, self))
        except Exception as error:
            if self._error is not None and error is not self._error:
                raise self._error from error
            raise
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def _folder(path: str | Path) -> Generator[tuple[int, str, int | None]]:
    """Open the folder of ``path``, created if missing; on an error, created folders are removed.

    Yields the folder, a new name in it, and the permissions of the file to replace.
    """
    try:
        named = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        named = False
    if not named:
        raise ThinwireError(f"can't write {os.fspath(path)!r}: no file can have this name; choose another one")
    path = Path(path)
    made: list[Path] = []
    try:
        missing = takewhile(lambda each: not os.path.exists(each), (path.parent, *path.parent.parents))
        for each in reversed(list(missing)):
            try:
                each.mkdir()
                made.append(each)
            except FileExistsError:  # another process was faster, or it is a broken link
                if not each.is_dir():
                    raise
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            yield folder, _beginning(path) + secrets.token_hex(8), _mode(path, folder)
        finally:
            os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):  # another process has put something there
            for each in reversed(made):
                each.rmdir()
        if not isinstance(error, OSError):
            raise
        raise ThinwireError(
            f"can't write {path}: {error.strerror or error}; what stood there before is as it was, and nothing is "
            "left behind. Make room or choose another place, and write it again"
        ) from error


def _mode(path: Path, folder: int) -> int | None:
    """Return the permissions of the file to replace, None if there is none; refuse a folder, a device or a pipe."""
    try:
        mode = target = os.stat(path.name or ".", dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise ThinwireError(f"can't write {path}: it is a folder; give the name of a file in it")
    with contextlib.suppress(OSError):  # a broken link
        target = os.stat(path.name, dir_fd=folder).st_mode
    if not (stat.S_ISREG(target) or stat.S_ISLNK(target) or stat.S_ISDIR(target)):
        raise ThinwireError(
            f"can't write {path}: it is a device or a pipe, which is not replaced; give the name of a file"
        )
    return mode & 0o777 if stat.S_ISREG(mode) else None
