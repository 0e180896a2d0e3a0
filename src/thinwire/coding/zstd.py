"""zstd as the last stage of a frame: ``pip install 'thinwire[zstd]'``."""

from typing import Any

from thinwire.core.errors import ThinwireError

LEVEL = 3


class BadContent(ThinwireError):
    """These bytes are not what they were said to be."""


def compress(data: bytes) -> bytes:
    """One zstd frame that says how long its content is.

    Raises:
        ThinwireError: the package is not there.
    """
    return _package().ZstdCompressor(level=LEVEL).compress(data)


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """The content of one zstd frame, which must be ``size`` bytes; no more are ever allocated.

    Raises:
        BadContent: it is not such a frame.
        ThinwireError: the package is not there.
    """
    zstandard = _package()
    try:
        declared = zstandard.frame_content_size(data)  # decompress() allocates this much
        if declared != size:
            raise BadContent(f"{size} bytes of content were declared, and {declared} in the zstd frame (-1: unknown)")
        return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise BadContent(str(error)) from error


def _package() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ThinwireError("this frame needs the package zstandard: pip install 'thinwire[zstd]'") from error
    return zstandard
