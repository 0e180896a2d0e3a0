"""The zstd stage of a frame; needs ``pip install 'thinwire[zstd]'``."""

from typing import Any

from thinwire.core.errors import ThinwireError


class BadContent(ThinwireError):
    """Error: the bytes are not the declared zstd frame."""


def compress(data: bytes) -> bytes:
    """Compress to one zstd frame that declares the length of its content."""
    return _package().ZstdCompressor(level=3).compress(data)


def decompress(data: bytes | memoryview, size: int) -> bytes:
    """Return the content of one zstd frame, which must be ``size`` bytes; it never allocates more."""
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
