"""The demo's models and texts."""

import pytest
import torch

from thinwire import ThinwireError
from thinwire.cli import text as demo_text
from thinwire.cli.demo_models import loss_of, transformer


def test_a_transformer_is_causal_and_learns(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question\n" * 300)
    text = demo_text.read(tmp_path / "text.txt")
    model = transformer(len(text.vocabulary), width=16, length=32)
    windows = text.batch(0, 0, 4, 32)
    changed = windows.clone()
    changed[:, 20] = (changed[:, 20] + 1) % len(text.vocabulary)
    with torch.no_grad():
        before, after = model(windows[:, :-1]), model(changed[:, :-1])
    assert torch.equal(before[:, :20], after[:, :20])
    assert (before[:, 20:] != after[:, 20:]).any(2).all()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for step in range(30):
        optimizer.zero_grad()
        loss = loss_of(model, text.batch(step, 0, 4, 32))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert text.held_out_batch(2, 32).shape == (2, 33)


def test_what_can_not_be_read_or_shared(tmp_path):
    with pytest.raises(ThinwireError, match="no text can be read"):
        demo_text.read(tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ThinwireError, match="9 characters"):
        demo_text.read(tmp_path / "short.txt")
    with pytest.raises(ThinwireError, match="width is 30"):
        transformer(10, width=30)
