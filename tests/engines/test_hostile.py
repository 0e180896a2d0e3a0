"""A rank that sends whatever it likes: the others get an error or a wrong gradient, and live."""

import pytest
import torch
import torch.distributed as dist

import thinwire
from tests.engines.models import batch, build, loss_of
from thinwire import ThinwireError
from thinwire.exchange import pipeline

METHODS = {
    "cast": lambda: thinwire.cast("float16"),
    "topk": lambda: thinwire.topk(0.1),
    "dgc": lambda: thinwire.dgc(0.1),
    "two phases": lambda: thinwire.topk(0.1, route="two_phase"),
    "powersgd": lambda: thinwire.powersgd(2),
    "qsgd": lambda: thinwire.qsgd(4),
    "signsgd": lambda: thinwire.signsgd(),
    "sidco": lambda: thinwire.methods.sidco(0.1),
    "scalecom": lambda: thinwire.scalecom(0.1),
    "decoupled": lambda: thinwire.methods.decoupled_momentum(),
}
PATTERNS = {
    "ones": lambda message: message.view(torch.uint8).fill_(255),
    "random": lambda message: message.view(torch.uint8).random_(0, 256, generator=torch.Generator().manual_seed(3)),
    "highest bits": lambda message: message.view(torch.uint8)[message.nbytes // 2 :].fill_(128),
}


def _hostile(rank, patterns):
    found = {}
    send = pipeline.send
    for name, method in METHODS.items():
        for pattern, overwrite in ((one, PATTERNS[one]) for one in patterns):
            group = dist.new_group([0, 1])
            model, optimizer = build()
            canary = torch.full((4096,), 7, dtype=torch.uint8)
            wire = thinwire.attach(
                model, method(), optimizer=optimizer, process_group=group, timeout=6.0, kernels="reference"
            )

            def lying(*args, send=send, overwrite=overwrite, **kwargs):
                outbox = send(*args, **kwargs)
                for message in outbox.messages:
                    overwrite(message.view(-1))
                return outbox

            with pytest.MonkeyPatch.context() as patch:
                if rank:
                    patch.setattr(pipeline, "send", lying)
                try:
                    loss_of(model, batch(rank, 0)).backward()
                    optimizer.step()
                    found[name, pattern] = "a step"
                except ThinwireError as error:
                    found[name, pattern] = str(error).split(";")[0][:60]
            assert (canary == 7).all()
            assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
            wire.abandon()
            dist.destroy_process_group(group)  # before the barrier, since who has no error may wait in it
            del wire, group
            dist.barrier()
    return found


@pytest.mark.parametrize("pattern", PATTERNS)
def test_hostile_messages_are_an_error_or_a_wrong_gradient_and_no_crash(world2, pattern):
    honest, _ = world2.run(_hostile, [pattern], timeout=240.0)
    assert len(honest) == len(METHODS)
    if pattern == "highest bits":
        assert any(what != "a step" for what in honest.values()), "indices out of range are an error"
    assert all("step 0: the" in what for what in honest.values() if what != "a step"), honest
