"""Laws that every compressor and every memory must keep, to be run on your own in your own tests.

Example::

    from thinwire.testing import check_compressor, check_memory

    def test_mine():
        check_compressor(MyCompressor(0.1))
        check_memory(MyMemory())
"""

from thinwire.testing.laws import check_compressor, check_memory

__all__ = ["check_compressor", "check_memory"]
