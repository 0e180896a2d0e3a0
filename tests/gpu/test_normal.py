"""On the device normal numbers have the bits that plain PyTorch makes on the CPU."""

import pytest
import torch

from tests.gpu.training import DEVICE
from thinwire.kernels.normal import ReferenceNormals


def test_bits():
    pytest.importorskip("triton", reason="the CUDA kernels need triton")
    from thinwire.kernels.cuda_normal import CudaNormals

    for n, start, number in ((1, 0, 0), (4099, 8, 1), (100_000, 2**40, 16)):
        wanted = torch.empty(n)
        ReferenceNormals().fill(wanted, 2**63 - 1, number, number + 1, start)
        for maker in (CudaNormals(), ReferenceNormals()):
            out = torch.empty(n, device=DEVICE)
            maker.fill(out, 2**63 - 1, number, number + 1, start)
            assert torch.equal(out.cpu(), wanted), (maker.name, n)
